"""Reads checkpoints from outside a run: which ones exist, what they contain, whole states or parts of them.

checkpoint_manager.py writes them and describes their items. checkpoint_folder.py has what needs neither JAX nor Orbax.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.runs import format as state_format
from aurora_jax.runs import orbax_errors, stored_arrays
from aurora_jax.runs.checkpoint_folder import (
  Path,
  chosen,
  newest,
  only_parts,
  reachable,
  size_bytes,
  steps,
  stored_config,
  stored_progress,
)

__all__ = [
  "chosen",
  "describe",
  "leaf_name",
  "misfit",
  "newest",
  "only_parts",
  "read",
  "read_parts",
  "shapes",
  "size_bytes",
  "steps",
  "stored_config",
  "stored_progress",
  "stored_tree",
  "with_shardings",
]


def read(folder: Path, wanted: Any, step: int | None = None, *, whole: bool = False) -> tuple[int, Any]:
  """Reads leaves of a checkpoint's state by name.

  Args:
    folder: path of `checkpoints/`.
    wanted: a tree of `jax.ShapeDtypeStruct`: the whole state, or nested dicts with some of its parts, such as
      {"networks": {"generator": {"ema": ...}}}. Other leaves are not read. Leaves without a sharding go to the default
      device. The shardings may differ from those under which the checkpoint was written.
    step: the checkpoint's step; None takes the newest.
    whole: refuse a checkpoint that has more leaves than `wanted`.

  Returns:
    (step, the tree with arrays).

  Raises:
    UserError: the checkpoint does not exist, has another architecture (the message names the differences), or cannot be
      read.
  """
  import orbax.checkpoint as ocp

  step = chosen(folder, step)
  path = reachable(folder, step)
  orbax_errors.silence_log()
  wanted = jax.tree.map(_as_stored, with_shardings(wanted))
  differences = _differences(path, wanted, whole)
  if differences:
    raise UserError(f"checkpoint {path} is of another architecture: {differences}")
  names, structure = _flatten(wanted)
  try:
    stored = stored_tree(path)
    version = state_format.of_tree(stored)
    placed = jax.tree_util.tree_map_with_path(
      lambda keys, _: names.get(state_format.name(leaf_name(keys), version), ocp.PLACEHOLDER), stored
    )
    how = jax.tree.map(
      lambda leaf: ocp.RestoreArgs() if leaf is ocp.PLACEHOLDER else ocp.ArrayRestoreArgs(sharding=leaf.sharding),
      placed,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      restored = checkpointer.restore(path / "state", args=ocp.args.PyTreeRestore(item=placed, restore_args=how))
    found = {
      state_format.name(leaf_name(keys), version): leaf
      for keys, leaf in jax.tree_util.tree_flatten_with_path(restored)[0]
    }
  except Exception as error:
    raise orbax_errors.unreadable(path, error) from error
  return step, structure.unflatten([found[name] for name in names])


def _as_stored(leaf):
  """A leaf as a checkpoint describes it: a typed PRNG key as its data, which Orbax turns back into a key."""
  if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return leaf
  data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def read_parts(folder: Path, prefixes: Sequence[str], step: int | None = None) -> tuple[int, dict[str, Any]]:
  """Reads parts of a checkpoint's state onto the default device, in the shapes that its metadata gives.

  Args:
    folder: path of `checkpoints/`.
    prefixes: of the leaves' names, such as "networks/generator/ema".
    step: the checkpoint's step; None takes the newest.

  Returns:
    (step, {prefix: nested dicts of arrays}). A prefix that the checkpoint lacks is left out.

  Raises:
    UserError: the checkpoint does not exist or cannot be read.
  """
  step = chosen(folder, step)
  device = jax.local_devices()[0]
  path = reachable(folder, step)
  leaves = stored_arrays.read(path, prefixes, lambda array: jax.device_put(array, device))
  if leaves is None:
    wanted = {n: leaf for n, leaf in shapes(folder, step).items() if any(n.startswith(f"{p}/") for p in prefixes)}
    _, tree = read(folder, _nested(wanted), step)
  else:
    tree = _nested(leaves)
  found = {}
  for prefix in prefixes:
    part = tree
    for name in prefix.split("/"):
      part = part.get(name, {})
    if part:
      found[prefix] = part
  return step, found


def _nested(leaves):
  """{"a/b": leaf} as nested dicts."""
  tree: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *groups, last = name.split("/")
    target = tree
    for group in groups:
      target = target.setdefault(group, {})
    target[last] = leaf
  return tree


def _flatten(tree):
  """({name: leaf} in order, the structure)."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  return {leaf_name(keys): leaf for keys, leaf in leaves}, structure


def describe(folder: Path, step: int | None = None) -> dict[str, tuple[int, int, int]]:
  """The parts of a checkpoint's state, from its metadata: {part: (number of arrays, number of values, bytes)}.

  Raises:
    UserError: the checkpoint does not exist or cannot be read.
  """
  parts = {}
  for name, leaf in _stored_leaves(reachable(folder, chosen(folder, step))).items():
    part = state_format.part(name)
    leaves, values, size = parts.get(part, (0, 0, 0))
    count = int(np.prod(leaf.shape))
    parts[part] = leaves + 1, values + count, size + count * np.dtype(leaf.dtype).itemsize
  return parts


def _stored_leaves(path):
  """{name in the newest format: metadata with shape and dtype} of a checkpoint's leaves."""
  orbax_errors.silence_log()
  try:
    stored = stored_tree(path)
  except Exception as error:
    raise orbax_errors.unreadable(path, error) from error
  version = state_format.of_tree(stored)
  return {
    state_format.name(leaf_name(keys), version): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(stored)[0]
  }


def shapes(folder: Path, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
  """{name: shape and dtype} of a checkpoint's leaves, from its metadata."""
  path = reachable(folder, chosen(folder, step))
  return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _stored_leaves(path).items()}


def stored_tree(path: pathlib.Path) -> dict[str, Any]:
  """A checkpoint's metadata: nested dicts and lists of objects with `shape` and `dtype`."""
  import orbax.checkpoint as ocp
  from etils import epath

  metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path / "state"))
  return metadata.tree


def leaf_name(keys: tuple) -> str:
  """A key path as "generator/mapping/0/kernel", the same for dicts, lists, tuples and dataclasses."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def misfit(folder: Path, step: int, wanted: Any) -> str | None:
  """Describes how parts of a checkpoint differ from `wanted` in names and shapes.

  Args:
    folder: path of `checkpoints/`.
    step: the checkpoint's step.
    wanted: as of `read`.

  Returns:
    A description, or None if nothing differs.

  Raises:
    UserError: the checkpoint cannot be read.
  """
  return _differences(reachable(folder, step), wanted, whole=False)


def _differences(path, wanted, whole):
  """A description of the first differences, or None."""
  stored = {name: tuple(leaf.shape) for name, leaf in _stored_leaves(path).items()}
  asked = {name: tuple(leaf.shape) for name, leaf in _flatten(wanted)[0].items()}
  problems = [f"it has no {name}" for name in asked if name not in stored]
  if whole:
    problems += [f"it has {name} besides" for name in stored if name not in asked]
  problems += [
    f"its {name} has shape {stored[name]}, wanted {asked[name]}"
    for name in asked
    if name in stored and stored[name] != asked[name]
  ]
  more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
  return "; ".join(problems[:3]) + more if problems else None


def with_shardings(abstract_state: Any) -> Any:
  """A tree of `jax.ShapeDtypeStruct` in which leaves without a sharding get the default device's."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here),
    abstract_state,
  )
