"""Config fields that have other names in earlier versions. Runs of these versions resume, and errors name the new
field.

A stored configuration without `system` is older than the second system: it is Aurora's.
"""

from collections.abc import Mapping
from typing import Any

_BOTH = ("optimizer.generator", "optimizer.discriminator")
_VALUES = {"data.visit": {"pictures": "image", "captions": "caption"}}

# Old dotted name -> new dotted names, all of which take the value.
RENAMED: dict[str, tuple[str, ...]] = {
  "optimizer.generator_lr": ("optimizer.generator.learning_rate",),
  "optimizer.discriminator_lr": ("optimizer.discriminator.learning_rate",),
  "optimizer.muon_momentum": tuple(f"{network}.momentum" for network in _BOTH),
  "optimizer.muon_iterations": tuple(f"{network}.iterations" for network in _BOTH),
  "optimizer.attention_weight_decay": tuple(f"{network}.weight_decay" for network in _BOTH),
  **{
    f"optimizer.{name}": tuple(f"{network}.{name}" for network in _BOTH)
    for name in ("method", "bias_lr_factor", "beta2", "eps", "final_lr_fraction", "warmup_steps")
  },
  "optimizer.ema_half_life_images": ("ema.half_life_images",),
  "optimizer.ema_ramp_up": ("ema.ramp_up",),
  "optimizer.w_average_decay": ("generator.w_average_decay",),
  "data.visit": ("data.epoch_unit",),
  "data.tolerate_damage": ("data.tolerate_corruption",),
  "mesh.exchange_capacity": ("mesh.capacity_factor",),
  **{f"watch.{name}": (f"health.{name}",) for name in ("logit_gap", "diversity", "expert_entropy")},
}


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
  """A stored configuration of any version (nested dicts) with the present names. Unknown fields stay as they are."""
  values = _copy(values)
  values.setdefault("system", "aurora")
  for old, names in RENAMED.items():
    group, _, field = old.rpartition(".")
    if field not in values.get(group, {}):
      continue
    value = values[group].pop(field)
    value = _VALUES.get(old, {}).get(value, value) if isinstance(value, str) else value
    for name in names:
      *path, last = name.split(".")
      target = values
      for part in path:
        target = target.setdefault(part, {})
      target.setdefault(last, value)
  if values.get("watch") == {}:
    del values["watch"]
  return values


def _copy(values: Any) -> Any:
  return {name: _copy(value) for name, value in values.items()} if isinstance(values, Mapping) else values


def new_name(old: str) -> str | None:
  """The present name of a field, or None if it never had another name. `old`: the dotted old name, or its last part."""
  for name, names in RENAMED.items():
    if old == name or ("." not in old and name.rpartition(".")[2] == old):
      return " and ".join(names)
  return "the group 'health'" if old == "watch" else None
