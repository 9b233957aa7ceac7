"""Compares a run's stored configuration with the one it is resumed with, and refuses changes that are not allowed."""

import dataclasses
import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

from aurora_jax import config_files, config_migration, text
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_folder
from aurora_jax.runs.workdir import RunFolder, read_json

# What may change when a run is resumed: its length, what it writes and when, and its mesh. A learning rate that decays
# follows the total_steps of the current start.
FREE_FIELDS = frozenset(
  {
    "train.total_steps",
    "train.max_seconds",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "data.workers",
    "data.max_skipped",
    "data.tolerate_corruption",
    "mesh.data",
    "mesh.expert",
    "mesh.fsdp",
    "mesh.fsdp_over",
    "mesh.exchange",
    "train.init_from",  # only a new run reads it
    "mesh.capacity_factor",
    "train.max_skipped_in_a_row",
    "health.logit_gap",
    "health.diversity",
    "health.expert_entropy",
  }
)
_NOTHING = "(nothing)"


def config_changes(stored: Mapping[str, Any], experiment: Experiment) -> dict[str, tuple[Any, Any]]:
  """Differences between a stored configuration and the current one.

  A field that the stored configuration lacks, because it is older than the field, has the field's default.

  Args:
    stored: a run's config.json of this or an earlier version, nested dicts.
    experiment: the current configuration.

  Returns:
    {dotted field: (stored value, current value)}, JSON values.
  """
  default = type(experiment)()
  plain = lambda values: json.loads(config_files.to_json(values))
  now = _flatten(plain(experiment), default)
  before = _flatten(plain(default), default) | _flatten(config_migration.migrate(stored), default)
  return {
    name: (before.get(name, _NOTHING), now.get(name, _NOTHING))
    for name in sorted(before.keys() | now.keys())
    if before.get(name, _NOTHING) != now.get(name, _NOTHING)
  }


def refuse_changes(
  folder: RunFolder, experiment: Experiment, allowed: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
  """Refuses to resume a run with a configuration that computes something else.

  Args:
    folder: a folder without a checkpoint accepts any configuration.
    experiment: the current configuration.
    allowed: names of fields ("loss.clip_weight") or groups ("loss") that may differ in addition to FREE_FIELDS.

  Returns:
    The accepted changes, as of `config_changes`.

  Raises:
    UserError: other fields differ (the message names all, old -> new), a name in `allowed` does not exist, config.json
      cannot be read, or the newest checkpoint is a converted one, which cannot be resumed.
  """
  has_run = checkpoint_folder.newest(folder.checkpoints) is not None and folder.config.is_file()
  stored = config_migration.migrate(read_json(folder.config)) if has_run else {}
  default = type(experiment)()
  # The stored configuration may have fields that no longer exist.
  fields = _flatten(json.loads(config_files.to_json(experiment)), default) | _flatten(stored, default)
  for name in allowed:
    if name not in fields and not any(field.startswith(f"{name}.") for field in fields):
      known = {".".join(parts[: i + 1]) for parts in (field.split(".") for field in fields) for i in range(len(parts))}
      close = difflib.get_close_matches(name, sorted(known), n=1)
      raise UserError(
        f"--allow-config-change {name}: the config has no such field or group"
        + (f"; did you mean {close[0]}?" if close else "")
      )
  if not has_run:
    return {}
  parts = checkpoint_folder.only_parts(folder.checkpoints)
  if parts is not None:
    raise UserError(
      f"{folder.path} is a converted checkpoint ({', '.join(parts)}, no optimizer), not a run that could "
      f"continue: train with another --workdir and --config.train.init_from={text.shell_quoted(folder.path)}"
    )
  changes = config_changes(stored, experiment)
  refused = [name for name in changes if not is_allowed(name, allowed)]
  if refused:
    description = "; ".join(f"{name} {_show(changes[name][0])} -> {_show(changes[name][1])}" for name in refused)
    flags = " ".join(f"--allow-config-change {name}" for name in refused)
    raise UserError(
      f"the config differs from that of the run in {folder.path}: {description} (go on all the same with "
      f"{flags}, or start another --workdir)"
    )
  return changes


def is_allowed(name: str, allowed: Collection[str]) -> bool:
  """Whether a field may differ: it is in FREE_FIELDS, or it or its group is in `allowed`."""
  return name in FREE_FIELDS or any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


def _flatten(values, example, prefix=""):
  """Nested dicts as {dotted field: value}. A field whose value is a mapping (of resolutions) stays one value."""
  flat = {}
  for name, value in values.items():
    inner = getattr(example, name, None)
    if dataclasses.is_dataclass(inner) and isinstance(value, dict):
      flat |= _flatten(value, inner, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def _show(value):
  return value if value is _NOTHING else json.dumps(value)
