"""The numerical guard: a step that would write NaN or infinity is left out, and a run that stays there stops.

Inside the compiled step (`Guard`): a loss or a gradient of the discriminator that is not finite leaves both networks, their
optimisers and averages as they were; one of the generator leaves the generator so, after the discriminator's update. On
the host (`Skips`): which network, which loss, which module, in one line; after too many in a row, or where nothing guards
the step, training stops with its last good checkpoint intact (`NonFinite`).

A step's metrics carry one sum of squares per parameter array (`Squares`): the norms that are logged per module, and,
where one is not finite, the name of the array.
"""

import functools
import re
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

SKIPPED = "guard/skipped"  # 1 in the metrics of a step whose update was left out; summed over a window
SKIPPED_R1 = "guard/skipped_r1"  # the same for the lazy regularisation, which is an update of its own
BAD_PICTURES = {"guard/bad_real": "the batch's pictures", "guard/bad_generated": "the generator's pictures"}
_INTERNAL = (SKIPPED_R1, *BAD_PICTURES, "grad_norm/r1/*")  # for the diagnosis only
NETWORKS = {"g": "generator", "d": "discriminator", "r1": "R1 of the discriminator"}


class NonFinite(Exception):
  """A number that must be finite is not.

  Attributes:
    step: number of the step (the first one is 0) that gave it, or that the state stands before.
    name: of the metric or of the state's entry.
    value: "nan", "inf", "-inf".
  """

  def __init__(self, step, name, value, words=None):
    super().__init__(words or f"{name} is {value} at step {step}")
    self.step, self.name, self.value = step, name, value


# ---- inside the compiled step ------------------------------------------------------------------------------------


@flax.struct.dataclass
class Squares:
  """Sums of squares of the arrays of a tree.

  Attributes:
    values: [arrays] float32; beyond 3e38, which is a norm of 2e19, it is infinite.
    names: of the arrays, "synthesis/r8_block0_conv/conv0/weight"; they travel in the tree's structure.
  """

  values: jax.Array
  names: tuple[str, ...] = flax.struct.field(pytree_node=False)


def squares(tree):
  """`Squares` of a tree of arrays: one pass over it, which the norm of the whole takes too."""
  paths, leaves = zip(*jax.tree_util.tree_flatten_with_path(tree)[0])
  return Squares(
    jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves]),
    tuple("/".join(str(getattr(key, "key", key)) for key in path) for path in paths),
  )


class Guard:
  """What a step asks; every method is a pure function of traced values."""

  def norms(self, name, tree):
    """Metrics: the norm of a tree under `name` ("grad_norm/g"), and its `Squares` under `name`/*."""
    parts = squares(tree)
    return {name: jnp.sqrt(jnp.sum(parts.values)), f"{name}/*": parts}

  def pictures(self, real, generated):
    """Metrics that tell a NaN that came in from one that was made: `BAD_PICTURES`, 1 where not all pixels are finite."""
    return {
      name: 1.0 - jnp.isfinite(images).all().astype(jnp.float32)
      for name, images in zip(BAD_PICTURES, (real, generated))
    }

  def healthy(self, metrics):
    """Whether all losses and norms of gradients among the metrics are finite: a bool scalar, the same on all devices."""
    watched = [
      value
      for name, value in metrics.items()
      if name.startswith(("loss/", "grad_norm/")) and not isinstance(value, Squares)
    ]
    return jnp.isfinite(jnp.stack([jnp.asarray(value, jnp.float32) for value in watched])).all()

  def keeper(self, ok):
    """(new array, old array) -> the new one where all is well, else the old one, bit by bit."""
    return functools.partial(jnp.where, ok)

  def verdict(self, name, ok):
    """The metric that says so: `SKIPPED` or `SKIPPED_R1`."""
    return {name: 1.0 - ok.astype(jnp.float32)}


class NoGuard:
  """The twin of `Guard` that lets everything pass and measures the whole gradient only: what a guard costs beside it."""

  def norms(self, name, tree):
    return {name: optax.global_norm(tree)}

  def pictures(self, real, generated):
    return {}

  def healthy(self, metrics):
    return True

  def keeper(self, ok):
    return lambda new, old: new

  def verdict(self, name, ok):
    return {}


def of(train):
  """The guard of a `config.Train`."""
  return Guard() if train.guard else NoGuard()


# ---- on the host -------------------------------------------------------------------------------------------------


def module_of(name):
  """The module that an array belongs to, for a person to find: "synthesis/r8_block0_conv/conv0/weight" is of
  "r8_block0_conv"."""
  return next(part for part in name.split("/") if part != "synthesis")


def group_of(name):
  """Its group in the logs, the same for all blocks of a resolution: "r8_conv", "r8_attention", "r8_heads", "mapping"."""
  module = re.sub(r"_?block\d*", "", module_of(name))
  module = re.sub(r"^(r\d+)$", r"\1_conv", module)  # a block of the discriminator
  module = re.sub(r"(?<=[a-z])_?\d+$", "", module)  # mapping_0, r8_attention1
  return re.sub(r"_(un)?conditional$", "_heads", module).replace("_from_rgb", "_rgb")


@functools.lru_cache(maxsize=16)
def _groups(names):
  """(groups in order of name, [arrays] index of each array's group): asked at every step, the same each time."""
  groups = sorted({group_of(name) for name in names})
  return groups, np.array([groups.index(group_of(name)) for name in names])


def by_module(metrics):
  """What of a step's metrics is logged, each `Squares` as norms per group of modules: {"grad_norm/g/r8_conv": float}."""
  plain = {}
  for key, value in metrics.items():
    if key in _INTERNAL:
      continue
    if isinstance(value, Squares):
      sums = np.asarray(value.values, np.float64)
      groups, index = _groups(value.names)
      plain[key.removesuffix("/*")] = np.sqrt(sums.sum())
      plain |= {f"{key[:-1]}{group}": norm for group, norm in zip(groups, np.sqrt(np.bincount(index, sums)))}
    else:
      plain[key] = value
  return plain


class Skip(NamedTuple):
  """Why a step's update was left out.

  Attributes:
    step: its number; the first one is 0.
    losses: {name: "nan", "inf" or "-inf"}.
    modules: {network: {module: (arrays whose gradient is not finite, arrays)}}, networks as in `NETWORKS`.
    pictures: which pictures were not finite, in words.
  """

  step: int
  losses: dict
  modules: dict
  pictures: tuple

  @property
  def networks(self):
    """Which of `NETWORKS` gave it."""
    named = {_network_of_loss(name) for name in self.losses} | set(self.modules)
    return tuple(name for name in NETWORKS if name in named)

  @property
  def words(self):
    """One line, such as "discriminator: loss/d_matching is nan, gradient not finite in r8_block0 (5 of 5 arrays)"."""
    parts = [f"{name} are not finite" for name in self.pictures]
    for network in self.networks:
      said = [f"{name} is {value}" for name, value in self.losses.items() if _network_of_loss(name) == network]
      modules = self.modules.get(network, {})
      if modules:
        named = [f"{name} ({bad} of {arrays} arrays)" for name, (bad, arrays) in modules.items()]
        more = f" and {len(named) - 4} more modules" if len(named) > 4 else ""
        said.append("gradient not finite in " + ", ".join(named[:4]) + more)
      parts.append(f"{NETWORKS[network]}: " + ", ".join(said))
    return "; ".join(parts)

  def to_json(self):
    """For metrics.jsonl."""
    return {
      "networks": [NETWORKS[name] for name in self.networks],
      "losses": self.losses,
      "modules": {
        NETWORKS[network]: {name: list(pair) for name, pair in modules.items()}
        for network, modules in self.modules.items()
      },
      "pictures": list(self.pictures),
    }


def _network_of_loss(name):
  return "r1" if name == "loss/r1" else "d" if name.startswith("loss/d_") else "g"


def diagnose(step, metrics):
  """A `Skip` from the metrics of a step, or None if nothing was left out. Args: host values, with their `Squares`."""
  if not any(_number(metrics.get(name, 0.0)) for name in (SKIPPED, SKIPPED_R1)):
    return None
  losses = {
    name: str(_number(value))
    for name, value in sorted(metrics.items())
    if name.startswith("loss/") and not np.isfinite(_number(value))
  }
  modules: dict[str, Any] = {}
  for network in NETWORKS:
    parts = metrics.get(f"grad_norm/{network}/*")
    if parts is not None and not np.isfinite(parts.values).all():
      counts = {}
      for name, finite in zip(parts.names, np.isfinite(parts.values)):
        bad, arrays = counts.get(module_of(name), (0, 0))
        counts[module_of(name)] = bad + (not finite), arrays + 1
      modules[network] = {name: pair for name, pair in counts.items() if pair[0]}
  if "d" in modules and not _number(metrics.get("guard/bad_generated", 0.0)):
    # The generator is judged by the updated discriminator: of what is wrong with it, this is a consequence.
    for name in ("loss/g_adversarial", "loss/g_matching"):
      losses.pop(name, None)
    if not any(_network_of_loss(name) == "g" for name in losses):
      modules.pop("g", None)
  pictures = tuple(words for name, words in BAD_PICTURES.items() if _number(metrics.get(name, 0.0)))
  return Skip(step, losses, modules, pictures)


class Skips:
  """Looks at each step's metrics and counts how many in a row were left out."""

  def __init__(self, most_in_a_row, stored=None):
    """Args: most_in_a_row: that many stop the run; stored: what `to_json` gave before a restart, or None."""
    self._most = most_in_a_row
    self.in_a_row = (stored or {}).get("in_a_row", 0)

  def look(self, step, metrics):
    """Judges one step.

    Args:
      step: its number.
      metrics: host values.

    Returns:
      (metrics that may enter an average, `Skip` or None).

    Raises:
      NonFinite: something is not finite that no guard kept from the state.
    """
    skip = diagnose(step, metrics)
    whole = _number(metrics.get(SKIPPED, 0.0))
    metrics = by_module(metrics)
    if skip is None:
      self.in_a_row = 0
    else:
      self.in_a_row += 1
      # What else a skipped step measured may be finite and as wrong.
      metrics = {} if whole else {name: value for name, value in metrics.items() if "r1" not in name}
      metrics[SKIPPED] = 1.0
    check_metrics(step, metrics)
    return metrics, skip

  def refuse(self, skip):
    """Raises `NonFinite` once as many steps in a row as the limit were left out, the last of them for `skip`."""
    if self.in_a_row >= self._most:
      name, value = next(iter(skip.losses.items()), ("gradient", "not finite"))
      raise NonFinite(
        skip.step,
        name,
        value,
        f"{self.in_a_row} steps in a row were skipped up to step {skip.step} (train.max_skipped_in_a_row={self._most})",
      )

  def to_json(self):
    """What a checkpoint keeps."""
    return {"in_a_row": self.in_a_row}


def _number(value):
  return float(np.asarray(value))


def check_metrics(step, metrics):
  """Raises `NonFinite` at the first metric (in order of name) that is not finite. Args: host values of one step."""
  if np.isfinite(np.concatenate([np.ravel(value) for value in metrics.values()], dtype=np.float64)).all():
    return
  for name in sorted(metrics):
    value = np.asarray(metrics[name], np.float64)
    if not np.isfinite(value).all():
      raise NonFinite(step, name, str(float(value[~np.isfinite(value)].ravel()[0] if value.ndim else value)))


def check_state(step, state):
  """Raises `NonFinite` at the first entry of a state that holds a NaN or an infinity: such a state is not to be saved.

  A step with finite losses may still have written one, which the next step's losses would show.
  """
  entries = [
    (path, leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  if all(leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu" for _, leaf in entries):
    # On the CPU the arrays are seen without a copy, and nothing needs to be compiled.
    finite = [all(np.isfinite(shard.data).all() for shard in leaf.addressable_shards) for _, leaf in entries]
  else:
    finite = jax.device_get([_all_finite(leaf) for _, leaf in entries])
  for (path, _), good in zip(entries, finite):
    if not good:
      raise NonFinite(step, f"state{jax.tree_util.keystr(path)}", "not finite")


@jax.jit
def _all_finite(leaf):
  return jnp.isfinite(leaf).all()
