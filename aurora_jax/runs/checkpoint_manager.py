"""Checkpoints: the full training state by Orbax, saved in the background, restored onto our own shardings.

A checkpoint at step s means that s steps were done; the next batch is that of step s, so the data's position needs
nothing else. It is one folder `checkpoints/S` with three items:

    state      the training state, a pytree of arrays
    config     {"experiment": the configuration, "fingerprint": its SHA-256}
    progress   small JSON beside the state: seconds trained, metrics of the window that is not yet logged

A converted checkpoint (`write_parts`) has some parts of the state only: what a generator has, and no optimisers. It can
be sampled from, and a run can begin with it, but not go on.

They are read, without being the run, by checkpoint_reader.py. These two, orbax_errors.py and fingerprint.py are the only
ones that know Orbax (v0: its v1 is still moving, see the 0.12 changelog).
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_reader, cleanup, orbax_errors, retention, save_failures
from aurora_jax.runs import format as state_format

_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_BETWEEN_QUESTIONS = 0.02


class SaveError(UserError):
  """A checkpoint could not be written. The message is one line with the step, the folder and the reason."""


class Checkpoints:
  """Writes and reads the checkpoints of one run. A context manager: leaving it waits for the last save.

  Every process of a run makes one and makes the same calls; Orbax sees to it that each writes its own shards.
  """

  def __init__(self, folder, policy=retention.Policy()):
    """Opens (and makes) the folder; remains of saves that were cut off are removed.

    Args:
      folder: path of `checkpoints/`.
      policy: `kept.Policy`.
    """
    import orbax.checkpoint as ocp

    self.folder = pathlib.Path(os.path.abspath(folder))
    self._ocp = ocp
    self._saving = None  # the step of a save that is not known to be complete
    self._failures = []  # of writing in the background, in this process
    self._remover = cleanup.Remover(self.folder)
    self._next_look = 0.0
    orbax_errors.quieten()
    try:
      os.makedirs(self.folder, exist_ok=True)
      self._remover.finish()
      self._manager = ocp.CheckpointManager(
        self.folder,
        item_handlers={
          "state": save_failures.watched(ocp.StandardCheckpointHandler(), self._failures),
          "config": save_failures.watched(ocp.JsonCheckpointHandler(), self._failures),
          "progress": save_failures.watched(ocp.JsonCheckpointHandler(), self._failures),
        },
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policy,
          todelete_subdir=cleanup.FOLDER,
          create=False,
          cleanup_tmp_directories=True,
          enable_async_checkpointing=True,
        ),
      )
    except OSError as error:
      raise UserError(f"checkpoint folder {folder} cannot be used: {error.strerror or error}") from error

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if error is None:
      self.wait()
      self._manager.close()
      self._remover.finish()
    elif jax.process_count() == 1:  # else the others, who may know of no error, would be waited for
      with contextlib.suppress(Exception):  # what is under way says more than what the clean-up could say
        self._manager.close()

  def newest(self):
    """The newest complete checkpoint's step, or None."""
    return checkpoint_reader.newest(self.folder)

  def save(self, step, state, config, progress=None):
    """Starts to save; returns when the arrays are copied, the files are written in the background.

    Args:
      step: int, how many steps were done.
      state: the training state.
      config: the configuration, nested dicts of plain values.
      progress: a small JSON object.

    Raises:
      SaveError: this save, or the one before it, failed.
    """
    if step == self._saving:
      return
    self._check_folder(step)  # Orbax would silently make a new one
    self.wait()  # Orbax would wait too, and lay the failure of the save before to this one
    if step in checkpoint_reader.steps(self.folder):
      return
    args = self._ocp.args
    items = args.Composite(
      state=args.StandardSave(state), config=args.JsonSave(_config_item(config)), progress=args.JsonSave(progress or {})
    )
    with self._reporting(step):
      self._manager.save(step, args=items, force=True)
    self._saving = step

  def check(self):
    """Raises SaveError if a save failed in the background or the folder has vanished. Costs microseconds."""
    with self._reporting(self._saving):
      self._raise_failure()
      self._manager.check_for_errors()
    if time.monotonic() >= self._next_look:  # the file system may be far away
      self._next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
      self._check_folder(self._saving)
      self._remover.start()

  def _check_folder(self, step):
    if not self.folder.is_dir():
      what = "nothing can be saved any more" if step is None else f"checkpoint of step {step} cannot be saved"
      raise SaveError(f"{what}: the folder {self.folder} has vanished")

  def wait(self):
    """Waits until the last save is complete on disk.

    Raises:
      SaveError: it failed.
    """
    saving = self._saving
    with self._reporting(saving):
      while self._manager.is_saving_in_progress():
        self._raise_failure()
        time.sleep(_SECONDS_BETWEEN_QUESTIONS)
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    if saving is not None and jax.process_index() == 0 and saving not in checkpoint_reader.steps(self.folder):
      raise SaveError(f"checkpoint of step {saving} is missing from {self.folder} after it was saved")
    self._saving = None

  def _raise_failure(self):
    if self._failures:
      raise self._failures.pop()

  @contextlib.contextmanager
  def _reporting(self, step):
    """Turns whatever Orbax raises into one line."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      self._saving = None
      last = self.newest()
      stands = "no other is there" if last is None else f"the last complete one is of step {last}"
      raise SaveError(
        f"checkpoint of step {step} could not be saved in {self.folder}: {orbax_errors.reason(error)} ({stands})"
      ) from error

  def restore(self, abstract_state, step=None):
    """Reads a checkpoint.

    Args:
      abstract_state: the state's tree of `jax.ShapeDtypeStruct`; leaves without a sharding go to the default device.
        Their shardings need not be those under which the checkpoint was written.
      step: which one; None takes the newest.

    Returns:
      (state, progress dict).

    Raises:
      UserError: no such checkpoint, one of another architecture (what differs is named), or one that cannot be read.
    """
    self.wait()
    step, state = checkpoint_reader.read(self.folder, abstract_state, step, whole=True)
    return state, checkpoint_reader.stored_progress(self.folder, step)


def _config_item(config, **more):
  """The item `config` of a checkpoint."""
  text = json.dumps(config, sort_keys=True)
  return {
    "format": state_format.NEWEST,
    "experiment": json.loads(text),
    "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
  } | more


def part_names(parts: Mapping[str, Any]) -> list[str]:
  """The names of parts of a state: "generator/ema" for {"networks": {"generator": {"ema": ...}}}."""
  return sorted(f"{network}/{part}" for network, tree in parts["networks"].items() for part in tree)


def write_parts(
  folder: str | os.PathLike,
  step: int,
  parts: Mapping[str, Any],
  config: Mapping[str, Any],
  progress: Mapping[str, Any] | None = None,
) -> None:
  """Writes a checkpoint of some parts of the state; returns when it is complete. Copies none of the arrays.

  Args:
    folder: path of `checkpoints/`.
    step: int.
    parts: {"networks": {network: {part: its tree of numpy arrays}}}, parts as of `NetworkState`.
    config: as of `Checkpoints.save`.
    progress: a small JSON object.

  Raises:
    SaveError: it could not be written.
  """
  import orbax.checkpoint as ocp
  from orbax.checkpoint import type_handlers

  path = pathlib.Path(os.path.abspath(folder)) / str(step)
  orbax_errors.quieten()
  # Orbax would copy arrays of the host first, for the case that somebody changes them before they are written, and hold
  # compressed copies of all of them, for a few percent of the space: 2.3 times the model in memory, measured.
  registry = type_handlers.create_type_handler_registry(
    (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False))
  )
  handler = ocp.CompositeCheckpointHandler(
    state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False),
    config=ocp.JsonCheckpointHandler(),
    progress=ocp.JsonCheckpointHandler(),
  )
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(
        path,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(parts),
          config=ocp.args.JsonSave(_config_item(config, parts=part_names(parts))),
          progress=ocp.args.JsonSave(progress or {}),
        ),
      )
  except Exception as error:
    raise SaveError(f"checkpoint {path} could not be written: {orbax_errors.reason(error)}") from error


def place(state, abstract_state):
  """Puts a fresh state where a restored one would be, so that both run the same compiled programs.

  A program is compiled anew for arguments that are bound to their device (restored ones are) after it was compiled for
  unbound ones, and is another entry in JAX's compilation cache on disk.
  """
  return jax.tree.map(
    lambda leaf, abstract: jax.device_put(leaf, abstract.sharding),
    state,
    checkpoint_reader.with_shardings(abstract_state),
  )
