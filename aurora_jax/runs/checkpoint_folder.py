"""The folders of checkpoints: which ones exist, how large they are, their JSON items. Imports neither JAX nor Orbax.

A folder may be at a gs:// or s3:// URL, as a string or an `etils.epath.Path`.
"""

import atexit
import functools
import json
import os
import pathlib
import tempfile
from typing import Any

from aurora_jax import files, local_copies, storage, text
from aurora_jax.errors import UserError

Path = str | os.PathLike
COMMIT = "commit_success.txt"  # the last object of a checkpoint, as Orbax writes it where there is no rename


def steps(folder: Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, ascending; [] if there is no such folder.

  Orbax writes into a folder of another name and renames it at the end, so a name that is a number means complete. In a
  bucket it writes the object COMMIT at the end.
  """
  if storage.is_url(folder):
    numbers = [name for name in storage.list_folder(str(folder))[1] if name.isdigit()]
    return sorted(int(name) for name in numbers if storage.exists(storage.join(folder, name, COMMIT)))
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    return []
  return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir())


def newest(folder: Path) -> int | None:
  """The newest complete checkpoint's step, or None."""
  return max(steps(folder), default=None)


def chosen(folder: Path, step: int | None) -> int:
  """`step`, or the newest checkpoint's step for None; UserError if there is no such checkpoint."""
  found = steps(folder)
  if not found:
    raise UserError(f"no checkpoint in {folder}")
  if step is not None and step not in found:
    raise UserError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, found))}")
  if not storage.is_url(folder) and not text.is_utf8(folder):
    raise UserError(f"{folder}: checkpoints cannot be read under a name whose bytes are not UTF-8 (rename the folder)")
  return found[-1] if step is None else step


def size_bytes(folder: Path, step: int) -> int:
  """Size of a checkpoint on disk, in bytes."""
  if storage.is_url(folder):
    return sum(storage.find(storage.join(folder, str(step))).values())
  return sum(status.st_size for _, status in files.files_below(pathlib.Path(folder) / str(step)))


def only_parts(folder: Path, step: int | None = None) -> list[str] | None:
  """Names of the parts in a checkpoint of `write_parts`; None for a checkpoint with the full state."""
  return _stored_config_item(folder, step).get("parts")


def stored_config(folder: Path, step: int | None = None) -> dict[str, Any] | None:
  """The configuration under which a checkpoint was written, as nested dicts; None if the checkpoint has none."""
  return _stored_config_item(folder, step).get("experiment")


def stored_progress(folder: Path, step: int | None = None) -> dict[str, Any]:
  """A checkpoint's item `progress`, a small JSON object; {} if there is none."""
  return _stored_item(folder, step, "progress")


def _stored_config_item(folder, step):
  """A checkpoint's item `config`; {} if there is none."""
  return _stored_item(folder, step, "config")


def _stored_item(folder, step, name):
  """A JSON item of a checkpoint; {} if there is none."""
  step = newest(folder) if step is None else step
  if storage.is_url(folder):
    try:
      return json.loads(storage.read(storage.join(folder, str(step), name, "metadata")))
    except storage.MissingError:
      return {}
  try:
    return json.loads((pathlib.Path(folder) / str(step) / name / "metadata").read_text(encoding="utf-8"))
  except (FileNotFoundError, NotADirectoryError):
    return {}


def reachable(folder: Path, step: int) -> pathlib.Path:
  """The folder of one checkpoint, as Orbax can read it.

  Orbax reads gs:// itself, each process only what it needs. Of s3:// a copy is made, for as long as the process lives.

  Args:
    folder: path of `checkpoints/`.
    step: of a checkpoint in it.
  """
  if not storage.is_url(folder):
    return pathlib.Path(os.path.abspath(folder)) / str(step)
  if str(folder).startswith("gs://"):
    storage.prepare_orbax()
    return storage.path(storage.join(folder, str(step)))
  return _copied(storage.join(folder, str(step)))


@functools.lru_cache(maxsize=1)
def _copied(url):
  place = _temporary_folder() / url.rsplit("/", 1)[-1]
  local_copies.show_as(place, url)
  storage.download_all(url, place, storage.find(url))
  return place


def _temporary_folder():
  folder = tempfile.TemporaryDirectory(prefix="aurora_jax-")
  atexit.register(folder.cleanup)
  return pathlib.Path(folder.name)
