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
import difflib
import json
import os
import pathlib
import time

from aurora_jax import config, config_files, files
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_reader

try:
  import fcntl
except ImportError:  # not a Unix: no lock there
  fcntl = None

# What may change from one start of a run to the next: how long it goes on and what is written when. A learning rate
# that decays is planned to the total_steps of the start at hand. A run moves between meshes.
FREE_FIELDS = frozenset(
  {
    "train.total_steps",
    "train.max_seconds",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "data.workers",
    "data.max_skipped",
    "data.tolerate_damage",
    "mesh.data",
    "mesh.expert",
    "mesh.fsdp",
    "mesh.fsdp_over",
    "mesh.exchange",
    "train.init_from",  # a run that goes on has left its beginning behind
    "mesh.exchange_capacity",
    "train.max_skipped_in_a_row",
    "watch.logit_gap",
    "watch.diversity",
    "watch.expert_entropy",
  }
)
_NOTHING = "(nothing)"


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

  def sample_picture(self, step):
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
    return config_files.from_mapping(_read_json(self.config))


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


def config_changes(stored, experiment):
  """What differs between a stored configuration and the one at hand.

  A field that the stored one lacks (it was written before the field existed) counts as having its default.

  Args:
    stored: nested dict, from a run's config.json.
    experiment: `Experiment`.

  Returns:
    {dotted field: (stored value, value now)}, JSON values.
  """
  now = _flatten(json.loads(config_files.to_json(experiment)))
  before = _flatten(json.loads(config_files.to_json(config.Experiment()))) | _flatten(stored)
  return {
    name: (before.get(name, _NOTHING), now.get(name, _NOTHING))
    for name in sorted(before.keys() | now.keys())
    if before.get(name, _NOTHING) != now.get(name, _NOTHING)
  }


def refuse_changes(folder, experiment, allowed=()):
  """Refuses to go on with a run under a configuration that computes something else.

  Args:
    folder: `RunFolder`; without a checkpoint in it anything goes.
    experiment: `Experiment`.
    allowed: names of fields ("loss.clip_weight") or groups ("loss") that may differ besides FREE_FIELDS.

  Returns:
    The changes that are let through, as of `config_changes`.

  Raises:
    UserError: other fields differ (all are named, old -> new), a name in `allowed` does not exist, config.json cannot
      be read, or the newest checkpoint is a converted one, with which no run can go on.
  """
  kept = checkpoint_reader.newest(folder.checkpoints) is not None and folder.config.is_file()
  stored = _read_json(folder.config) if kept else {}
  fields = _flatten(json.loads(config_files.to_json(experiment))) | _flatten(stored)  # a field may be gone by now
  for name in allowed:
    if name not in fields and not any(field.startswith(f"{name}.") for field in fields):
      known = {".".join(parts[: i + 1]) for parts in (field.split(".") for field in fields) for i in range(len(parts))}
      close = difflib.get_close_matches(name, sorted(known), n=1)
      raise UserError(
        f"--allow-config-change {name}: the config has no such field or group"
        + (f"; did you mean {close[0]}?" if close else "")
      )
  if not kept:
    return {}  # nothing was kept: whatever stands there begins anew
  parts = checkpoint_reader.only_parts(folder.checkpoints)
  if parts is not None:
    raise UserError(
      f"{folder.path} is a converted checkpoint ({', '.join(parts)}, no optimiser), not a run that could "
      f"go on: train with another --workdir and --config.train.init_from={folder.path}"
    )
  changes = config_changes(stored, experiment)
  refused = [name for name in changes if not is_allowed(name, allowed)]
  if refused:
    words = "; ".join(f"{name} {_show(changes[name][0])} -> {_show(changes[name][1])}" for name in refused)
    flags = " ".join(f"--allow-config-change {name}" for name in refused)
    raise UserError(
      f"the config differs from that of the run in {folder.path}: {words} (go on all the same with "
      f"{flags}, or start another --workdir)"
    )
  return changes


def is_allowed(name, allowed):
  """Whether a field may differ from the stored one: always (FREE_FIELDS), or because it or its group was named."""
  return name in FREE_FIELDS or any(name == entry or name.startswith(f"{entry}.") for entry in allowed)


def _read_json(path):
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
  if not isinstance(values, dict):
    raise UserError(f"{path} holds no configuration")
  return values


def _flatten(values, example=config.Experiment(), prefix=""):
  """Nested dicts as {dotted field: value}. A field that is itself a mapping (of resolutions) stays one value."""
  flat = {}
  for name, value in values.items():
    inner = getattr(example, name, None)
    if dataclasses.is_dataclass(inner) and isinstance(value, dict):
      flat |= _flatten(value, inner, f"{prefix}{name}.")
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def _show(value):
  return value if value is _NOTHING else json.dumps(value)
