"""One SHA-256 of a whole training state: two runs with the same fingerprint agree in every bit."""

import hashlib
import os

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_folder, checkpoint_reader, orbax_errors
from aurora_jax.runs import format as state_format

# Leaves are read and hashed in groups of about this size, to save memory.
_GROUP_BYTES = 1 << 28


def of_checkpoint(folder: str | os.PathLike, step: int | None = None) -> tuple[int, str]:
  """SHA-256 over a checkpoint's whole state: names, dtypes, shapes and bytes of all leaves, in order of name.

  It does not depend on the mesh on which the state was written.

  Args:
    folder: path of `checkpoints/`.
    step: the checkpoint's step; None takes the newest.

  Returns:
    (step, hexadecimal digits).

  Raises:
    UserError: the checkpoint does not exist or cannot be read.
  """
  import orbax.checkpoint as ocp

  step = checkpoint_reader.chosen(folder, step)
  path = checkpoint_folder.reachable(folder, step)
  digest = hashlib.sha256()
  orbax_errors.silence_log()
  try:
    tree = checkpoint_reader.stored_tree(path)
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    version = state_format.of_tree(tree)
    names = [state_format.name(checkpoint_reader.leaf_name(keys), version) for keys, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      for group in _groups(sorted(range(len(names)), key=names.__getitem__), leaves):
        chosen = set(group)
        item = structure.unflatten([leaf if i in chosen else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)])
        how = structure.unflatten([ocp.RestoreArgs(restore_type=np.ndarray) for _ in leaves])
        values = structure.flatten_up_to(
          checkpointer.restore(path / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=how))
        )
        for i in group:
          value = np.asarray(values[i])
          digest.update(f"{names[i]} {value.dtype} {value.shape}\n".encode())
          digest.update(np.ascontiguousarray(value).view(np.uint8).tobytes() if value.ndim else value.tobytes())
  except UserError:
    raise
  except Exception as error:
    raise orbax_errors.unreadable(path, error) from error
  return step, digest.hexdigest()


def _groups(order, leaves):
  """Splits a list of leaf numbers into groups of about _GROUP_BYTES."""
  group, size = [], 0
  for i in order:
    bytes_here = int(np.prod(leaves[i].shape)) * np.dtype(leaves[i].dtype).itemsize
    if group and size + bytes_here > _GROUP_BYTES:
      yield group
      group, size = [], 0
    group.append(i)
    size += bytes_here
  if group:
    yield group
