"""Checkpoints: the full training state by Orbax, saved in the background, restored onto our own shardings.

A checkpoint at step s means that s steps were done. The next batch is that of step s, so the step alone gives the
position in the data. A checkpoint is one folder `checkpoints/S` with three items:

    state      the training state, a pytree of arrays
    config     {"experiment": the configuration, "fingerprint": its SHA-256}
    progress   small JSON object: seconds trained, metrics of the window that is not yet logged

A converted checkpoint (`write_parts`) holds some parts of the state only, such as the generator without its optimizer.
It can be sampled from, and a new run can start from it, but it cannot be resumed.

checkpoint_reader.py reads checkpoints from outside a run. Only these two modules, orbax_errors.py and fingerprint.py
use Orbax (v0: its v1 is still moving, see the 0.12 changelog).
"""

import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np

from aurora_jax import storage
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_reader, cleanup, orbax_errors, retention, workdir
from aurora_jax.runs import format as state_format

_SECONDS_BETWEEN_FOLDER_CHECKS = 1.0
_SECONDS_BETWEEN_POLLS = 0.02


class SaveError(UserError):
  """A checkpoint could not be written. The message is one line with the step, the folder and the reason."""


class Checkpoints:
  """Writes and reads the checkpoints of one run. A context manager: its exit waits for the last save.

  Every process of a run makes one and makes the same calls. Orbax has each process write its own shards.
  """

  def __init__(self, folder: str | os.PathLike, policy: retention.Policy = retention.Policy()):
    """Opens the folder, which is made if missing, and removes what interrupted saves left there.

    Args:
      folder: path of `checkpoints/`, or its gs:// URL.
      policy: which checkpoints stay on disk.

    Raises:
      UserError: the folder cannot be used.
    """
    import orbax.checkpoint as ocp

    self._remote = storage.is_url(folder)
    if self._remote:
      storage.prepare_orbax()
    self.folder = storage.path(folder) if self._remote else pathlib.Path(os.path.abspath(folder))
    self._ocp = ocp
    self._complete: int | None = None  # the newest checkpoint, as far as it has been seen
    self._saving: int | None = None  # the step of a save that is not known to be complete
    self._failures: list[BaseException] = []  # of background writes in this process
    self._remover = cleanup.Nothing() if self._remote else cleanup.Remover(self.folder)
    self._next_folder_check = 0.0
    orbax_errors.silence_log()
    try:
      if not self._remote:
        os.makedirs(self.folder, exist_ok=True)
      self._remover.finish()
      self._manager = ocp.CheckpointManager(
        self.folder,
        item_handlers={
          "state": orbax_errors.note_failures(ocp.StandardCheckpointHandler(), self._failures),
          "config": orbax_errors.note_failures(ocp.JsonCheckpointHandler(), self._failures),
          "progress": orbax_errors.note_failures(ocp.JsonCheckpointHandler(), self._failures),
        },
        options=ocp.CheckpointManagerOptions(
          preservation_policy=policy,
          todelete_subdir=None if self._remote else cleanup.FOLDER,
          create=False,
          cleanup_tmp_directories=True,
          enable_async_checkpointing=True,
        ),
      )
    except OSError as error:
      raise UserError(f"checkpoint folder {folder} cannot be used: {error.strerror or error}") from error
    if self._remote:
      self.newest()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if error is None:
      self.wait()
      self._manager.close()
      self._remover.finish()
    elif jax.process_count() == 1 and not isinstance(error, storage.StorageError):
      # With several processes, closing would wait for those that saw no error; without a server, for that server.
      with contextlib.suppress(Exception):  # `error` says more than an error of closing
        self._manager.close()

  def newest(self) -> int | None:
    """The newest complete checkpoint's step, or None."""
    self._complete = checkpoint_reader.newest(self.folder)
    return self._complete

  @property
  def last_seen(self) -> int | None:
    """As `newest`, but without asking a server: it may have been seen some time ago."""
    return self._complete if self._remote else self.newest()

  def save(self, step: int, state: Any, config: Mapping[str, Any], progress: Mapping[str, Any] | None = None) -> None:
    """Starts a save. Returns when the arrays are copied; the files are written in the background.

    Args:
      step: steps done.
      state: the training state, a pytree of arrays.
      config: the configuration, nested dicts of plain values.
      progress: a small JSON object.

    Raises:
      SaveError: this save, or the one before it, failed.
    """
    if step == self._saving:
      return
    self._check_folder(step)  # Orbax would silently make a new one
    self.wait()  # Orbax would wait too, and report a failure of the earlier save as one of this save
    if step in checkpoint_reader.steps(self.folder):
      return
    args = self._ocp.args
    items = args.Composite(
      state=args.StandardSave(state), config=args.JsonSave(_config_item(config)), progress=args.JsonSave(progress or {})
    )
    with self._reporting(step):
      self._manager.save(step, args=items, force=True)
    self._saving = step

  def check(self) -> None:
    """Raises SaveError if a save failed in the background or the folder has vanished. Takes microseconds."""
    with self._reporting(self._saving):
      self._raise_failure()
      self._manager.check_for_errors()
    if time.monotonic() >= self._next_folder_check:  # a network file system may be slow
      self._next_folder_check = time.monotonic() + _SECONDS_BETWEEN_FOLDER_CHECKS
      self._check_folder(self._saving)
      self._remover.start()

  def _check_folder(self, step):
    if not self._remote and not self.folder.is_dir():
      what = "nothing can be saved any more" if step is None else f"checkpoint of step {step} cannot be saved"
      raise SaveError(f"{what}: the folder {self.folder} has vanished")

  def wait(self) -> None:
    """Waits until the last save is complete on disk.

    Raises:
      SaveError: the save failed.
    """
    saving = self._saving
    with self._reporting(saving):
      next_question = time.monotonic() + storage.attempt_seconds() if self._remote else float("inf")
      while self._manager.is_saving_in_progress():
        self._raise_failure()
        time.sleep(_SECONDS_BETWEEN_POLLS)
        if time.monotonic() > next_question:  # Orbax repeats requests for longer than our deadline
          storage.exists(storage.join(self.folder, "0"))
          next_question = time.monotonic() + storage.attempt_seconds()
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    if saving is not None and jax.process_index() == 0 and saving not in checkpoint_reader.steps(self.folder):
      raise SaveError(f"checkpoint of step {saving} is missing from {self.folder} after it was saved")
    self._complete = self._complete if saving is None else saving
    self._saving = None

  def _raise_failure(self):
    if self._failures:
      raise self._failures.pop()

  @contextlib.contextmanager
  def _reporting(self, step: int | None) -> Generator[None, None, None]:
    """Turns an exception of Orbax into a `SaveError` of one line."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:
      self._saving = None
      last = self.last_seen
      remaining = "no other is there" if last is None else f"the last complete one is of step {last}"
      raise SaveError(
        f"checkpoint of step {step} could not be saved in {self.folder}: {orbax_errors.reason(error)} ({remaining})"
      ) from error

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads a checkpoint.

    Args:
      abstract_state: the state's tree of `jax.ShapeDtypeStruct`. Leaves without a sharding go to the default device.
        The shardings may differ from those under which the checkpoint was written.
      step: the checkpoint's step; None takes the newest.

    Returns:
      (state, progress).

    Raises:
      UserError: the checkpoint does not exist, has another architecture (the message names the differences), or cannot
        be read.
    """
    self.wait()
    step, state = checkpoint_reader.read(self.folder, abstract_state, step, whole=True)
    return state, checkpoint_reader.stored_progress(self.folder, step)


def of_run(folder: workdir.RunFolder, policy: retention.Policy) -> Checkpoints:
  """The checkpoints of a run, local or at a URL.

  Of a run at a URL a single process writes them by way of a local folder (staged_checkpoints.py), with a tenth of the
  requests that Orbax makes for small files. Several processes write to gs:// directly, by Orbax.

  Raises:
    UserError: the folder cannot be used; or it is at s3:// and there are several processes.
  """
  if not storage.is_url(folder.checkpoints):
    return Checkpoints(folder.checkpoints, policy)
  if jax.process_count() == 1:
    from aurora_jax.runs import staged_checkpoints

    return staged_checkpoints.StagedCheckpoints(str(folder.checkpoints), folder.path / "checkpoints", policy)
  if not str(folder.checkpoints).startswith("gs://"):
    raise UserError(
      f"{folder.checkpoints}: {jax.process_count()} processes cannot write checkpoints there. Orbax writes to gs:// or "
      "to a folder that all processes share (such as a mounted bucket)"
    )
  return Checkpoints(folder.checkpoints, policy)


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
  """Writes a checkpoint of some parts of the state. Returns when it is complete. Copies no array.

  Args:
    folder: path of `checkpoints/`.
    step: steps done.
    parts: {"networks": {network: {part: its tree of numpy arrays}}}, parts as of `NetworkState`.
    config: as of `Checkpoints.save`.
    progress: a small JSON object.

  Raises:
    SaveError: it could not be written.
  """
  import orbax.checkpoint as ocp
  from orbax.checkpoint import type_handlers

  path = pathlib.Path(os.path.abspath(folder)) / str(step)
  orbax_errors.silence_log()
  # By default Orbax copies host arrays, in case they change before they are written, and holds compressed copies of all
  # of them, which saves a few percent of the disk. That took 2.3 times the model's memory when measured.
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


def place(state: Any, abstract_state: Any) -> Any:
  """Commits a new state to the devices and shardings of a restored one, so that both run the same compiled programs.

  JAX compiles a program once for uncommitted arguments and again for committed ones, which restored arrays are. Each is
  an entry of its own in the compilation cache on disk.

  Args:
    state: a pytree of arrays.
    abstract_state: as of `Checkpoints.restore`.
  """
  return jax.tree.map(
    lambda leaf, abstract: jax.device_put(leaf, abstract.sharding),
    state,
    checkpoint_reader.with_shardings(abstract_state),
  )
