"""The numerical guard: skips updates that would write NaN or infinity, and stops a run that does not recover.

Inside the compiled step (`Guard`), an update whose loss or gradient is not finite leaves its network as it was, with
its optimizer, average and other collections. So does every update that depends on it. On the host, `Skips` names the
network, the loss and the module at fault in one line. After too many skips in a row, or without a guard, training stops
with its last good checkpoint intact (`NonFinite`).

The metrics of a guarded update hold one sum of squares per parameter array (`Squares`). They give the norms that are
logged per group of modules and, where one is not finite, the module at fault.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from aurora_jax.config import Train
from aurora_jax.parallel.mesh import Label
from aurora_jax.runs import metrics as metrics_lib
from aurora_jax.systems.metric_names import BAD_IMAGES, DISCRIMINATOR, JUDGED_LOSSES

SKIPPED = "guard/skipped"  # 1 for a step with a skipped update; summed over a window
_VERDICT = "guard/skipped/"  # with the update's short name


class NonFinite(Exception):
  """A number that must be finite is not.

  Attributes:
    step: number of the step (the first one is 0) with this number, or that the state would enter.
    name: name of the metric or of the state's entry.
    value: "nan", "inf", "-inf".
  """

  def __init__(self, step: int, name: str, value: str, message: str | None = None):
    super().__init__(message or f"{name} is {value} at step {step}")
    self.step, self.name, self.value = step, name, value


# ---- inside the compiled step ------------------------------------------------------------------------------------


@struct.dataclass
class Squares:
  """Sums of squares of the arrays of a tree.

  Attributes:
    values: [arrays] float32; infinite beyond 3e38, a norm of 2e19.
    modules: module of each array, from its label.
    groups: group of each array, from its label.
  """

  values: jax.Array
  modules: tuple[str, ...] = struct.field(pytree_node=False)
  groups: tuple[str, ...] = struct.field(pytree_node=False)


def squares(tree: Any, label: Label) -> Squares:
  """`Squares` of a tree of arrays, in one pass over it."""
  paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0])
  labels = [label(path) for path in paths]
  return Squares(
    jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves]),
    tuple(entry.module for entry in labels),
    tuple(entry.group for entry in labels),
  )


class Guard:
  """Guards the updates of a compiled step. Every method is a pure function of traced values."""

  def norms(self, name: str, tree: Any, label: Label) -> dict[str, Any]:
    """Metrics: the norm of a tree under `name` ("grad_norm/g"), and its `Squares` under `name`/*."""
    parts = squares(tree, label)
    return {name: jnp.sqrt(jnp.sum(parts.values)), f"{name}/*": parts}

  def all_finite(self, metrics: Mapping[str, Any]) -> jax.Array:
    """Whether all losses and gradient norms among the metrics are finite: a bool scalar, the same on all devices."""
    values = [
      value
      for name, value in metrics.items()
      if name.startswith(("loss/", "grad_norm/")) and not isinstance(value, Squares)
    ]
    return jnp.isfinite(jnp.stack([jnp.asarray(value, jnp.float32) for value in values])).all()

  def keeper(self, ok: jax.Array | bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A function of (new array, old array) that returns the new one if `ok`, else the old one, equal to the bit."""
    return functools.partial(jnp.where, ok)

  def verdict(self, log_name: str, ok: jax.Array | bool) -> dict[str, Any]:
    """The metric that says whether an update was skipped."""
    return {f"{_VERDICT}{log_name}": 1.0 - jnp.asarray(ok).astype(jnp.float32)}


class NoGuard:
  """Applies all updates, and measures only the norm of the whole gradient. It has the methods of `Guard`."""

  def norms(self, name: str, tree: Any, label: Label) -> dict[str, Any]:
    del label
    return {name: optax.global_norm(tree)} if name.startswith("grad_norm") else {}

  def all_finite(self, metrics: Mapping[str, Any]) -> bool:
    return True

  def keeper(self, ok: jax.Array | bool) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda new, old: new

  def verdict(self, log_name: str, ok: jax.Array | bool) -> dict[str, Any]:
    return {}


def of(train: Train) -> Guard | NoGuard:
  """The guard that a configuration asks for."""
  return Guard() if train.guard else NoGuard()


# ---- on the host -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _index(groups):
  """(sorted distinct groups, [arrays] index of each array's group). Cached: every log line needs the same."""
  distinct = sorted(set(groups))
  return distinct, np.array([distinct.index(group) for group in groups])


def by_group(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """The metrics of a phase that are logged. A `Squares` becomes norms per group, {"grad_norm/g/r8_conv": float}."""
  plain = {}
  for key, value in metrics.items():
    if isinstance(value, Squares):
      sums = np.asarray(value.values, np.float64)
      groups, index = _index(value.groups)
      plain[key.removesuffix("/*")] = np.sqrt(sums.sum())
      plain |= {f"{key[:-1]}{group}": norm for group, norm in zip(groups, np.sqrt(np.bincount(index, sums)))}
    elif not key.startswith(_VERDICT) and key not in BAD_IMAGES:
      plain[key] = value
  return plain


class Skip(NamedTuple):
  """Why an update was skipped.

  Attributes:
    step: its number; the first one is 0.
    losses: {name: "nan", "inf" or "-inf"}.
    modules: {short name of an update: {module: (arrays whose gradient is not finite, arrays)}}.
    images: which images were not finite, such as "the batch's images".
    names: {short name: name for messages} of all updates.
  """

  step: int
  losses: dict[str, str]
  modules: dict[str, dict[str, tuple[int, int]]]
  images: tuple[str, ...]
  names: Mapping[str, str]

  @property
  def updates(self) -> tuple[str, ...]:
    """Short names of the updates at fault."""
    named = {_update_of(name, self.names) for name in self.losses} | set(self.modules)
    return tuple(name for name in self.names if name in named)

  @property
  def message(self) -> str:
    """One line, such as "discriminator: loss/d_matching is nan, gradient not finite in r8_block0 (5 of 5 arrays)"."""
    parts = [f"{name} are not finite" for name in self.images]
    for update in self.updates:
      said = [f"{name} is {value}" for name, value in self.losses.items() if _update_of(name, self.names) == update]
      modules = self.modules.get(update, {})
      if modules:
        named = [f"{name} ({bad} of {arrays} arrays)" for name, (bad, arrays) in modules.items()]
        more = f" and {len(named) - 4} more modules" if len(named) > 4 else ""
        said.append("gradient not finite in " + ", ".join(named[:4]) + more)
      parts.append(f"{self.names[update]}: " + ", ".join(said))
    return "; ".join(parts)

  def to_json(self) -> dict[str, Any]:
    """Values of its line in metrics.jsonl."""
    return {
      "networks": [self.names[name] for name in self.updates],
      "losses": self.losses,
      "modules": {
        self.names[update]: {name: list(pair) for name, pair in modules.items()}
        for update, modules in self.modules.items()
      },
      "images": list(self.images),
    }


def _update_of(loss, names):
  """The update whose loss it is: "loss/d_matching" is of "d", "loss/r1" of "r1", anything else of the first one."""
  short = loss.removeprefix("loss/")
  return next((name for name in names if short == name or short.startswith(f"{name}_")), next(iter(names)))


def _diagnose(step, metrics, names):
  """A `Skip` from the host metrics of a phase that skipped an update."""
  losses = {
    name: str(_number(value))
    for name, value in sorted(metrics.items())
    if name.startswith("loss/") and not np.isfinite(_number(value))
  }
  modules = {}
  for update in names:
    parts = metrics.get(f"grad_norm/{update}/*")
    if parts is not None and not np.isfinite(parts.values).all():
      counts = {}
      for name, finite in zip(parts.modules, np.isfinite(parts.values)):
        bad, arrays = counts.get(name, (0, 0))
        counts[name] = bad + (not finite), arrays + 1
      modules[update] = {name: pair for name, pair in counts.items() if pair[0]}
  if DISCRIMINATOR in modules and not _number(metrics.get("guard/bad_generated", 0.0)):
    # Other networks are judged by the updated discriminator: what is wrong with their judged losses is a consequence.
    for name in list(losses):
      update = _update_of(name, names)
      if update != DISCRIMINATOR and name.removeprefix(f"loss/{update}_") in JUDGED_LOSSES:
        del losses[name]
    for update in list(modules):
      if update != DISCRIMINATOR and not any(_update_of(name, names) == update for name in losses):
        del modules[update]
  images = tuple(description for name, description in BAD_IMAGES.items() if _number(metrics.get(name, 0.0)))
  return Skip(step, losses, modules, images, names)


class Skips:
  """Looks at each step's metrics and counts the skipped steps in a row."""

  def __init__(self, most_in_a_row: int, names: Mapping[str, str], stored: Mapping[str, int] | None = None):
    """Starts, or continues.

    Args:
      most_in_a_row: this many skipped steps in a row stop the run.
      names: {short name of an update: name for messages}. Losses without a short name belong to the first update.
      stored: what `to_json` returned before a restart, or None.
    """
    self._most, self._names = most_in_a_row, names
    self.in_a_row = (stored or {}).get("in_a_row", 0)

  def look(
    self, step: int, phases: Mapping[str, Mapping[str, Any]], detail: bool
  ) -> tuple[dict[str, Any], Skip | None]:
    """Checks one step.

    Args:
      step: its number.
      phases: {phase: its metrics}, on the devices. Scalars are fetched; arrays only for `detail` or a diagnosis.
      detail: whether to return arrays too (norms per group of modules, expert loads).

    Returns:
      (host metrics that may enter an average, `Skip` or None).

    Raises:
      NonFinite: a metric is not finite and no guard protected the state from it.
    """
    is_scalar = lambda value: not isinstance(value, Squares) and np.ndim(value) == 0
    scalars = metrics_lib.to_host(
      {phase: {k: v for k, v in metrics.items() if is_scalar(v)} for phase, metrics in phases.items()}
    )
    skip, plain = None, {}
    for phase, metrics in phases.items():
      verdicts = [_number(value) for name, value in scalars[phase].items() if name.startswith(_VERDICT)]
      bad = any(verdicts)
      if verdicts:  # logged where nothing was skipped too
        plain.setdefault(SKIPPED, 0.0)
      host = metrics_lib.to_host(dict(metrics)) if detail or bad else scalars[phase]
      if not bad:
        plain |= by_group(host)
      else:  # the other metrics of this phase may be finite and wrong
        skip = skip or _diagnose(step, host, self._names)
    if skip is None:
      self.in_a_row = 0
    else:
      self.in_a_row += 1
      plain[SKIPPED] = 1.0
    check_metrics(step, plain)
    return plain, skip

  def refuse(self, skip: Skip) -> None:
    """Raises `NonFinite` if the number of steps skipped in a row has reached the limit. `skip`: the last of them."""
    if self.in_a_row >= self._most:
      name, value = next(iter(skip.losses.items()), ("gradient", "not finite"))
      raise NonFinite(
        skip.step,
        name,
        value,
        f"{self.in_a_row} steps in a row were skipped up to step {skip.step} (train.max_skipped_in_a_row={self._most})",
      )

  def to_json(self) -> dict[str, int]:
    """Plain values for a checkpoint."""
    return {"in_a_row": self.in_a_row}


def _number(value):
  return float(np.asarray(value))


def check_metrics(step: int, metrics: Mapping[str, Any]) -> None:
  """Raises `NonFinite` at the first metric (in order of name) that is not finite. Args: host values of one step."""
  if (
    not metrics or np.isfinite(np.concatenate([np.ravel(value) for value in metrics.values()], dtype=np.float64)).all()
  ):
    return
  for name in sorted(metrics):
    value = np.asarray(metrics[name], np.float64)
    if not np.isfinite(value).all():
      raise NonFinite(step, name, str(float(value[~np.isfinite(value)].ravel()[0] if value.ndim else value)))


def check_state(step: int, state: Any) -> None:
  """Raises `NonFinite` at the first entry of a state that holds NaN or infinity. Such a state must not be saved.

  A step with finite losses can write one; only the next step's losses would show it.
  """
  entries = [
    (path, leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  if all(leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu" for _, leaf in entries):
    # On the CPU numpy reads the arrays without a copy, and nothing must be compiled.
    finite = [all(np.isfinite(shard.data).all() for shard in leaf.addressable_shards) for _, leaf in entries]
  else:
    finite = np.asarray(_all_finite([leaf for _, leaf in entries]))
  for (path, _), good in zip(entries, finite):
    if not good:
      raise NonFinite(step, f"state{jax.tree_util.keystr(path)}", "not finite")


@jax.jit
def _all_finite(leaves):
  """[leaves] bool, in one program."""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])
