"""Checkpoints of a run at a URL, as a single process writes them: to a local folder, then copied in the background.

The object `commit_success.txt` is written last and makes a checkpoint complete, as Orbax does it at gs://. What several
processes write that way would be scattered over their disks; see `checkpoint_manager.of_run`.
"""

import os
import pathlib
import threading
from types import TracebackType
from typing import Any

from aurora_jax import files, local_copies, storage
from aurora_jax.runs import checkpoint_folder, checkpoint_manager, checkpoint_reader, retention


class StagedCheckpoints(checkpoint_manager.Checkpoints):
  """`Checkpoints` of a run at a URL, by way of a local folder. Copies are made in the background.

  Attributes:
    url: of `checkpoints/`.
  """

  def __init__(self, url: str, folder: str | os.PathLike, policy: retention.Policy = retention.Policy()):
    """Opens the folder and removes what interrupted copies left at the URL.

    Args:
      url: of `checkpoints/`.
      folder: the local folder; it need not exist.
      policy: which checkpoints stay at the URL. The local folder gets the newest one.

    Raises:
      UserError: the folder cannot be used.
    """
    self.url, self._policy = url, policy
    self._copying: threading.Thread | None = None
    self._copy_error: Exception | None = None
    self._at_url: int | None = None
    local_copies.show_as(folder, url)
    complete = self._steps()
    for name in storage.list_folder(url)[1]:
      if name.isdigit() and int(name) not in complete:
        storage.delete_folder(storage.join(url, name))
    if self._at_url is not None:
      self._fetch(pathlib.Path(folder), str(self._at_url))
    self._copied: int | None = self._at_url  # the newest step for which a copy was begun
    super().__init__(folder, retention.Policy(newest=1))

  def _fetch(self, folder, name):
    """Copies a checkpoint into the local folder, under its name when it is complete."""
    url, partial = storage.join(self.url, name), folder / f".{name}.partial"
    files = storage.find(url)
    files.pop(checkpoint_folder.COMMIT)
    storage.download_all(url, partial, files)
    os.replace(partial, folder / name)

  def _steps(self):
    steps = checkpoint_folder.steps(self.url)
    self._at_url = max(steps, default=None)
    return steps

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    super().__exit__(kind, error, trace)
    if self._copying is not None and error is not None and not isinstance(error, storage.StorageError):
      self._copying.join()

  def newest(self) -> int | None:
    self._steps()
    return self._at_url

  @property
  def last_seen(self) -> int | None:
    return self._at_url

  def check(self) -> None:
    super().check()
    self._raise_copy_error()
    if self._saving is not None and not self._manager.is_saving_in_progress():
      super().wait()
    if self._saving is None:
      self._begin_copy()

  def wait(self) -> None:
    super().wait()
    self._begin_copy()
    if self._copying is not None:
      self._copying.join()
      self._copying = None
    self._raise_copy_error()

  def _raise_copy_error(self):
    if self._copy_error is not None:
      error, self._copy_error = self._copy_error, None
      raise error

  def _begin_copy(self):
    """Starts to copy the newest local checkpoint, unless that has begun or another copy is under way."""
    step = self._complete
    if step is None or step == self._copied or (self._copying is not None and self._copying.is_alive()):
      return
    self._copied = step
    self._copying = threading.Thread(target=self._copy, args=(step,), name="copy checkpoint", daemon=True)
    self._copying.start()

  def _copy(self, step):
    try:
      local, url = self.folder / str(step), storage.join(self.url, str(step))
      names = {name for name, _ in files.files_below(local)}
      storage.upload_all(local, url, sorted(names - {checkpoint_folder.COMMIT}))
      if not names or names != {name for name, _ in files.files_below(local)}:
        raise storage.StorageError(f"checkpoint {url} could not be copied: files of {local} have vanished")
      storage.write(storage.join(url, checkpoint_folder.COMMIT), b"Checkpoint commit was successful")
      steps = self._steps()
      reasons = self._policy.reasons(steps)
      for old in steps:
        if not reasons[old]:
          storage.delete_folder(storage.join(self.url, str(old)), first=[checkpoint_folder.COMMIT])
    except Exception as error:
      self._copy_error = error

  def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    if step is None or step in checkpoint_folder.steps(self.folder):
      return super().restore(abstract_state, step)
    self.wait()
    step, state = checkpoint_reader.read(self.url, abstract_state, step, whole=True)
    return state, checkpoint_reader.stored_progress(self.url, step)
