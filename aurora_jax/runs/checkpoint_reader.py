"""Checkpoints as they lie in a run's folder, read without being the run: which there are, what they hold, parts of them.

What they consist of stands in checkpoint.py, which writes them. Only what reads arrays or their shapes needs Orbax.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.runs import format as state_format
from aurora_jax.runs import orbax_errors

Path = str | os.PathLike


def steps(folder: Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, ascending; [] where there is no such folder. Needs no Orbax.

  Orbax writes into a folder of another name and renames it when all is written, so a bare number means complete.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    return []
  return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir())


def newest(folder: Path) -> int | None:
  """The newest complete checkpoint's step, or None."""
  return max(steps(folder), default=None)


def chosen(folder: Path, step: int | None) -> int:
  """The step asked for, or the newest; UserError if it is not there."""
  found = steps(folder)
  if not found:
    raise UserError(f"no checkpoint in {folder}")
  if step is not None and step not in found:
    raise UserError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, found))}")
  return found[-1] if step is None else step


def size_bytes(folder: Path, step: int) -> int:
  """Bytes on disk of a checkpoint."""
  return sum(path.stat().st_size for path in (pathlib.Path(folder) / str(step)).rglob("*") if path.is_file())


def only_parts(folder: Path, step: int | None = None) -> list[str] | None:
  """Names of the parts that a checkpoint of `write_parts` has; None for one with the full state. Needs no Orbax."""
  return _stored_config_item(folder, step).get("parts")


def read(folder: Path, wanted: Any, step: int | None = None, *, whole: bool = False) -> tuple[int, Any]:
  """Reads leaves of a checkpoint's state by name, without being the run that writes there.

  Args:
    folder: path of `checkpoints/`.
    wanted: a tree of shapes and dtypes, and shardings where it matters: the whole state, or nested dicts with some of its
      parts, such as {"networks": {"generator": {"ema": ...}}}. Everything else stays on the disk. Shardings need not be
      those under which the checkpoint was written.
    step: which checkpoint; None takes the newest.
    whole: refuse a checkpoint that has more than `wanted`.

  Returns:
    (step, the tree with its arrays).

  Raises:
    UserError: no such checkpoint, one of another architecture (what differs is named), or one that cannot be read.
  """
  import orbax.checkpoint as ocp

  step = chosen(folder, step)
  path = pathlib.Path(os.path.abspath(folder)) / str(step)
  orbax_errors.quieten()
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
  """A leaf as a checkpoint describes it: typed PRNG keys by their data. Orbax makes keys of these again."""
  if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return leaf
  data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def read_parts(folder: Path, prefixes: Sequence[str], step: int | None = None) -> tuple[int, dict[str, Any]]:
  """Reads parts of a checkpoint's state onto the default device; their shapes are those in its metadata.

  Args:
    folder: path of `checkpoints/`.
    prefixes: of the leaves' names, such as "networks/generator/ema".
    step: which checkpoint; None takes the newest.

  Returns:
    (step, {prefix: nested dicts of arrays}; a prefix that the checkpoint does not have is left out).

  Raises:
    UserError: no such checkpoint, or one that cannot be read.
  """
  wanted: dict[str, Any] = {}
  for name, leaf in shapes(folder, step).items():
    if any(name.startswith(f"{prefix}/") for prefix in prefixes):
      *groups, last = name.split("/")
      target = wanted
      for group in groups:
        target = target.setdefault(group, {})
      target[last] = leaf
  step, tree = read(folder, wanted, step)
  found = {}
  for prefix in prefixes:
    part = tree
    for name in prefix.split("/"):
      part = part.get(name, {})
    if part:
      found[prefix] = part
  return step, found


def _flatten(tree):
  """({name: leaf} in order, the structure)."""
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  return {leaf_name(keys): leaf for keys, leaf in leaves}, structure


def stored_config(folder: Path, step: int | None = None) -> dict[str, Any] | None:
  """The configuration under which a checkpoint was written, nested dicts; None where the checkpoint has none."""
  return _stored_config_item(folder, step).get("experiment")


def stored_progress(folder: Path, step: int | None = None) -> dict[str, Any]:
  """The small JSON object beside a checkpoint's state; {} where there is none. Needs no Orbax."""
  return _stored_item(folder, step, "progress")


def _stored_config_item(folder, step):
  """What `_config_item` made; {} where there is none."""
  return _stored_item(folder, step, "config")


def _stored_item(folder, step, name):
  """A JSON item of a checkpoint; {} where there is none."""
  step = newest(folder) if step is None else step
  for path in (pathlib.Path(folder) / str(step) / name).glob("*"):
    if path.is_file() and path.name == "metadata":
      return json.loads(path.read_text(encoding="utf-8"))
  return {}


def describe(folder: Path, step: int | None = None) -> dict[str, tuple[int, int, int]]:
  """What a checkpoint's state consists of, without reading it: {part: (arrays, values, bytes)}.

  Raises:
    UserError: no such checkpoint, or one that cannot be read.
  """
  parts = {}
  for name, leaf in _stored_leaves(pathlib.Path(os.path.abspath(folder)) / str(chosen(folder, step))).items():
    part = state_format.part(name)
    leaves, values, size = parts.get(part, (0, 0, 0))
    count = int(np.prod(leaf.shape))
    parts[part] = leaves + 1, values + count, size + count * np.dtype(leaf.dtype).itemsize
  return parts


def _stored_leaves(path):
  """{name in the newest format: shape and dtype} of a checkpoint's state."""
  orbax_errors.quieten()
  try:
    stored = stored_tree(path)
  except Exception as error:
    raise orbax_errors.unreadable(path, error) from error
  version = state_format.of_tree(stored)
  return {
    state_format.name(leaf_name(keys), version): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(stored)[0]
  }


def shapes(folder: Path, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
  """{name: shape and dtype} of the leaves of a checkpoint's state, from its metadata."""
  path = pathlib.Path(os.path.abspath(folder)) / str(chosen(folder, step))
  return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _stored_leaves(path).items()}


def stored_tree(path: pathlib.Path) -> dict[str, Any]:
  """What a checkpoint says of its leaves: nested dicts and lists of objects with shape and dtype."""
  import orbax.checkpoint as ocp
  from etils import epath

  metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path / "state"))
  return metadata.tree


def leaf_name(keys: tuple) -> str:
  """A leaf's path as "generator/mapping/0/kernel", the same for dicts, lists, tuples and dataclasses."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def misfit(folder: Path, step: int, wanted: Any) -> str | None:
  """How some parts of a checkpoint differ from those wanted, in names and shapes: words, None if they do not.

  Args:
    folder: path of `checkpoints/`.
    step: of the checkpoint.
    wanted: as of `read`.

  Raises:
    UserError: the checkpoint cannot be read.
  """
  return _differences(pathlib.Path(os.path.abspath(folder)) / str(step), wanted, whole=False)


def _differences(path, wanted, whole):
  """In words, None where there are none."""
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
  """Gives every leaf a sharding: its own, else the default device."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here),
    abstract_state,
  )
