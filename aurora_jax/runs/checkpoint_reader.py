"""Checkpoints as they lie in a run's folder, read without being the run: which there are, what they hold, parts of them.

What they consist of stands in checkpoint.py, which writes them. Only what reads arrays or their shapes needs Orbax.
"""

import json
import os
import pathlib

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.runs import orbax_errors


def steps(folder):
  """Steps of the complete checkpoints in a folder, ascending; [] where there is no such folder. Needs no Orbax.

  Orbax writes into a folder of another name and renames it when all is written, so a bare number means complete.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    return []
  return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir())


def newest(folder):
  """The newest complete checkpoint's step, or None."""
  return max(steps(folder), default=None)


def chosen(folder, step):
  """The step asked for, or the newest; UserError if it is not there."""
  found = steps(folder)
  if not found:
    raise UserError(f"no checkpoint in {folder}")
  if step is not None and step not in found:
    raise UserError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, found))}")
  return found[-1] if step is None else step


def size_bytes(folder, step):
  """Bytes on disk of a checkpoint."""
  return sum(path.stat().st_size for path in (pathlib.Path(folder) / str(step)).rglob("*") if path.is_file())


def only_parts(folder, step=None):
  """Names of the parts that a checkpoint of `write_parts` has; None for one with the full state. Needs no Orbax."""
  return _stored_config_item(folder, step).get("parts")


def read(folder, abstract_parts, step=None):
  """Reads some parts of a checkpoint's state without being the run that writes there. For sampling and evaluation.

  Args:
    folder: path of `checkpoints/`.
    abstract_parts: {name of a field of the state: its shapes and dtypes, and shardings where it matters}; the fields that
      are not named (optimisers, say) are left on the disk.
    step: which one; None takes the newest.

  Returns:
    (step, {part: its tree}).

  Raises:
    UserError: as of `Checkpoints.restore`; the checkpoint may have more parts, or others of another architecture.
  """
  import orbax.checkpoint as ocp

  step = chosen(folder, step)
  path = pathlib.Path(os.path.abspath(folder)) / str(step)
  orbax_errors.quieten()
  wanted = with_shardings(dict(abstract_parts))
  check_same_leaves(path, wanted, tuple(wanted))
  try:
    stored = stored_tree(path)
    item = {name: wanted.get(name, jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)) for name, tree in stored.items()}
    how = jax.tree.map(
      lambda leaf: ocp.RestoreArgs() if leaf is ocp.PLACEHOLDER else ocp.ArrayRestoreArgs(sharding=leaf.sharding), item
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      restored = checkpointer.restore(path / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=how))
  except Exception as error:
    raise orbax_errors.unreadable(path, error) from error
  return step, {part: restored[part] for part in wanted}


def stored_config(folder, step=None):
  """The configuration under which a checkpoint was written, nested dicts; None where the checkpoint has none."""
  return _stored_config_item(folder, step).get("experiment")


def stored_progress(folder, step=None):
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


def describe(folder, step=None):
  """What a checkpoint's state consists of, without reading it.

  Returns:
    {top-level part of the state: (arrays, values, bytes)}.

  Raises:
    UserError: no such checkpoint, or one that cannot be read.
  """
  path = pathlib.Path(os.path.abspath(folder)) / str(chosen(folder, step))
  orbax_errors.quieten()
  try:
    tree = stored_tree(path)
  except Exception as error:
    raise orbax_errors.unreadable(path, error) from error
  parts = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    leaves, values, size = parts.get(leaf_name(keys[:1]), (0, 0, 0))
    count = int(np.prod(leaf.shape))
    parts[leaf_name(keys[:1])] = leaves + 1, values + count, size + count * np.dtype(leaf.dtype).itemsize
  return parts


def stored_tree(path):
  """What a checkpoint says of its leaves: nested dicts and lists of objects with shape and dtype."""
  import orbax.checkpoint as ocp
  from etils import epath

  metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path / "state"))
  return metadata.tree


def leaf_name(keys):
  """A leaf's path as "generator/mapping/0/kernel", the same for dicts, lists, tuples and dataclasses."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def _named_shapes(tree):
  return {
    leaf_name(keys): tuple(leaf.shape)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  }


def misfit(folder, step, wanted):
  """How some parts of a checkpoint differ from those wanted, in names and shapes: words, None if they do not.

  Args:
    folder: path of `checkpoints/`.
    step: of the checkpoint.
    wanted: {part: its tree of `jax.ShapeDtypeStruct`}.

  Raises:
    UserError: the checkpoint cannot be read.
  """
  orbax_errors.quieten()
  return _differences(pathlib.Path(os.path.abspath(folder)) / str(step), wanted, tuple(wanted))


def check_same_leaves(path, abstract_state, parts=None):
  """Says in one line how a checkpoint's leaves differ from those wanted; Orbax would print all of them."""
  differences = _differences(path, abstract_state, parts)
  if differences:
    raise UserError(f"checkpoint {path} is of another architecture: {differences}")


def _differences(path, abstract_state, parts=None):
  """In words, None where there are none; of all parts of the stored state, or of these only."""
  try:
    stored = {
      name: shape
      for name, shape in _named_shapes(stored_tree(path)).items()
      if parts is None or name.split("/")[0] in parts
    }
  except Exception as error:
    raise orbax_errors.unreadable(path, error) from error
  wanted = _named_shapes(abstract_state)
  keys = {leaf_name(k) for k, leaf in jax.tree_util.tree_flatten_with_path(abstract_state)[0]} - wanted.keys()
  problems = [f"it has no {name}" for name in wanted if name not in stored]
  problems += [f"it has {name} besides" for name in stored if name not in wanted and name not in keys]
  problems += [
    f"its {name} has shape {stored[name]}, wanted {wanted[name]}"
    for name in wanted
    if name in stored and stored[name] != wanted[name]
  ]
  more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
  return "; ".join(problems[:3]) + more if problems else None


def with_shardings(abstract_state):
  """Gives every leaf a sharding: its own, else the default device."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here),
    abstract_state,
  )
