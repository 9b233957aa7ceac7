"""The folder of a run: its files, who may write into it, and which configuration it belongs to.

config.json       the experiment, as `config_files.to_json` writes it
checkpoints/      one folder per saved step (runs/checkpoint_manager.py)
metrics.jsonl     one JSON object per line (runs/metrics.py)
skipped_records.jsonl   the records that could not be read, if there were any (runs/skipped_records.py)
samples/          step-00001000.png
tensorboard/      event files
profile/          traces of --profile-steps
report.html       written by the command when training ends
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

from aurora_jax import config_files, files
from aurora_jax.errors import UserError

try:
  import fcntl
except ImportError:  # not a Unix: no lock there
  fcntl = None


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """Where the files of a run are. Nothing is created by making one of these."""

  path: pathlib.Path

  def __post_init__(self):
    object.__setattr__(self, "path", pathlib.Path(self.path))

  @property
  def config(self):
    return self.path / "config.json"

  @property
  def checkpoints(self):
    return self.path / "checkpoints"

  @property
  def metrics(self):
    return self.path / "metrics.jsonl"

  @property
  def skipped_records(self):
    return self.path / "skipped_records.jsonl"

  @property
  def samples(self):
    return self.path / "samples"

  @property
  def tensorboard(self):
    return self.path / "tensorboard"

  @property
  def profile(self):
    return self.path / "profile"

  @property
  def report(self):
    return self.path / "report.html"

  def sample_image(self, step):
    """Path of the sample grid of a step."""
    return self.samples / f"step-{step:08d}.png"

  def experiment(self):
    """Reads `config.json`.

    Returns:
      An `Experiment`.

    Raises:
      UserError: no such run, or a config.json that cannot be read.
    """
    if not self.path.is_dir():
      raise UserError(f"run folder not found: {self.path}")
    if not self.config.is_file():
      raise UserError(f"{self.path} is no run: it has no config.json")
    return config_files.from_stored(read_json(self.config))


def check_writable(path):
  """Makes sure that a run can be written to `path`, and leaves nothing behind.

  Raises:
    UserError: `path` is a file or a URL, or it (or the folder in which it would be made) cannot be written to.
  """
  if "://" in str(path):
    raise UserError(f"workdir {path}: a run needs a local or mounted folder, not a URL")
  files.check_folder(path, f"workdir {path}")


@contextlib.contextmanager
def held(path):
  """Makes the folder and keeps other processes from training in it. The hold ends with the process, however it ends.

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


def is_held(path):
  """Whether a process trains in the folder now."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    return not _lock(descriptor)
  finally:
    os.close(descriptor)  # and with it the lock


def _lock(descriptor, attempts=1):
  """Takes the lock if nobody has it. `is_held` of another process may have it for a moment: hence the attempts."""
  for attempt in range(attempts if fcntl is not None else 0):
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      if attempt + 1 < attempts:
        time.sleep(0.05)
    except OSError:  # a file system without locks
      return True
  return fcntl is None


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; UserError if the file holds none."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
  if not isinstance(values, dict):
    raise UserError(f"{path} holds no configuration")
  return values
