"""The folder of a run: the paths of its files, and a lock against two processes that train in it.

config.json       the experiment, as `config_files.to_json` writes it
references.json   identities of the data set and the weights that it names (runs/references.py)
checkpoints/      one folder per saved step (runs/checkpoint_manager.py)
metrics.jsonl     one JSON object per line (runs/metrics.py)
skipped_records.jsonl   the records that could not be read, if there were any (runs/skipped_records.py)
samples/          step-00001000.png
tensorboard/      event files
profile/          profiler traces of --profile-steps
report.html       written when training ends

A run may be at a gs:// or s3:// URL. `RunFolder` is then a local copy of it without checkpoints (runs/remote_run.py).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Generator
from typing import Any

from aurora_jax import config_files, files, storage, text
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError

try:
  import fcntl
except ImportError:  # not Unix: there is no lock
  fcntl = None

URL_FILE = ".url"  # in the local copy of a run at a URL


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """Paths of the files of a run. Constructing one creates nothing on disk."""

  path: pathlib.Path

  def __post_init__(self):
    object.__setattr__(self, "path", pathlib.Path(self.path))

  @property
  def config(self) -> pathlib.Path:
    return self.path / "config.json"

  @property
  def references(self) -> pathlib.Path:
    return self.path / "references.json"

  @property
  def url(self) -> str | None:
    """Where the run is, if this is a local copy of it."""
    try:
      return (self.path / URL_FILE).read_text(encoding="utf-8")
    except OSError:
      return None

  @property
  def checkpoints(self) -> pathlib.Path:
    """The folder of the checkpoints: for a run at a URL an `etils.epath.Path` of that URL."""
    url = self.url
    return self.path / "checkpoints" if url is None else storage.path(storage.join(url, "checkpoints"))

  @property
  def metrics(self) -> pathlib.Path:
    return self.path / "metrics.jsonl"

  @property
  def skipped_records(self) -> pathlib.Path:
    return self.path / "skipped_records.jsonl"

  @property
  def samples(self) -> pathlib.Path:
    return self.path / "samples"

  @property
  def tensorboard(self) -> pathlib.Path:
    return self.path / "tensorboard"

  @property
  def profile(self) -> pathlib.Path:
    return self.path / "profile"

  @property
  def report(self) -> pathlib.Path:
    return self.path / "report.html"

  def sample_image(self, step: int) -> pathlib.Path:
    """Path of the sample sheet of a step."""
    return self.samples / f"step-{step:08d}.png"

  def experiment(self) -> Experiment:
    """Reads `config.json`.

    Raises:
      UserError: there is no such run, or its config.json cannot be read.
    """
    if not self.path.is_dir():
      raise UserError(f"run folder not found: {self.path}")
    if not self.config.is_file():
      raise UserError(f"{self.path} is no run: it has no config.json")
    return config_files.from_stored(read_json(self.config))


def check_writable(path: str | os.PathLike) -> None:
  """Checks that a run can be written to `path`. Leaves nothing behind.

  Raises:
    UserError: `path` is a file, or it (or the folder in which it would be made) cannot be written to.
  """
  if storage.is_url(path):
    storage.check_writable(str(path), f"workdir {path}")
    return
  if "://" in str(path):
    raise UserError(f"workdir {path}: a run needs a folder, or a URL that begins with gs:// or s3://")
  if not text.is_utf8(path):
    raise UserError(f"workdir {path}: checkpoints cannot be stored under a name whose bytes are not UTF-8")
  files.check_folder(path, f"workdir {path}")


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Generator[None, None, None]:
  """Makes the folder and locks it against other training processes. The lock ends with the process, even after a kill.

  Raises:
    UserError: the folder cannot be made, or another process trains in it.
  """
  try:
    os.makedirs(path, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
  except OSError as error:
    raise UserError(f"workdir {path} cannot be written to: {error.strerror or error}") from error
  try:
    if not _lock(descriptor, attempts=5):
      raise UserError(f"workdir {path}: another process is training in it")
    yield
  finally:
    os.close(descriptor)


def refuse_locked(path: str | os.PathLike) -> None:
  """Raises UserError if another process trains in the folder now. Makes nothing."""
  if not os.path.isdir(path):
    return
  descriptor = os.open(path, os.O_RDONLY)
  try:
    if not _lock(descriptor, attempts=5):
      raise UserError(f"workdir {path}: another process is training in it")
  finally:
    os.close(descriptor)


def is_locked(path: str | os.PathLike) -> bool:
  """Whether a process trains in the folder now; for the copy of a run at a URL, whether one does so there."""
  url = RunFolder(pathlib.Path(path)).url
  if url is not None:
    from aurora_jax.runs import remote_run

    return remote_run.is_leased(url)
  descriptor = os.open(path, os.O_RDONLY)
  try:
    return not _lock(descriptor)
  finally:
    os.close(descriptor)  # releases the lock


def _lock(descriptor, attempts=1):
  """Takes the lock if it is free. Several attempts, because `is_locked` of another process may hold it briefly."""
  if fcntl is None:
    return True
  for attempt in range(attempts):
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      if attempt + 1 < attempts:
        time.sleep(0.05)
    except OSError:  # a file system without locks
      return True
  return False


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; UserError if the file does not hold one."""
  try:
    values = json.loads(text.read_text(path))
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
  if not isinstance(values, dict):
    raise UserError(f"{path} holds no JSON object")
  return values
