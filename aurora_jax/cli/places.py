"""What the PATH of a command names: something local, or at a gs:// or s3:// URL."""

import pathlib
from typing import Any

from aurora_jax import storage


def is_checkpoint(path: Any) -> bool:
  """Whether a path is that of one checkpoint in a run."""
  return path.name.isdigit() and path.parent.name == "checkpoints"


def local(name: str) -> Any:
  """The path of a run, a checkpoint, a data set or a CLIP folder.

  Args:
    name: as the user wrote it.

  Returns:
    Its `pathlib.Path`; for a URL that of a local copy, but for that of a checkpoint an `etils.epath.Path`, which
    `runs.checkpoint_reader` reads.

  Raises:
    UserError: there is nothing at the URL, or it cannot be read.
  """
  if not storage.is_url(name):
    return pathlib.Path(name)
  storage.check_url(name)
  if is_checkpoint(storage.path(name)):
    return storage.path(name)
  if storage.exists(storage.join(name, "manifest.json")):
    from aurora_jax.data import remote_shards

    return remote_shards.local(name)
  from aurora_jax.runs import remote_run

  return remote_run.fetched(name, whole=True)
