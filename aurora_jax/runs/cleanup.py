"""Deletes checkpoints that the retention policy dropped, in the background.

Orbax moves a dropped checkpoint into FOLDER with one rename, so a kill never leaves half of a checkpoint under its own
name. What is in FOLDER no longer counts and is deleted file by file.
"""

import pathlib
import shutil
import threading

import jax

FOLDER = ".removed"


class Nothing:
  """Does nothing: in a bucket Orbax deletes checkpoints at once. `Remover` has the same methods."""

  def start(self) -> None:
    """Starts to delete what is in FOLDER, unless a deletion is running. Returns at once."""

  def finish(self) -> None:
    """Deletes FOLDER and returns when it is gone. Must not be called during a save."""


class Remover(Nothing):
  """Deletes the dropped checkpoints of one run. Only the primary process does the work."""

  def __init__(self, checkpoints: pathlib.Path):
    """Takes the path of `checkpoints/`."""
    self._folder = checkpoints / FOLDER
    self._thread: threading.Thread | None = None

  def start(self) -> None:
    """Starts to delete what is in FOLDER, unless a deletion is running. Returns at once."""
    if jax.process_index() or (self._thread is not None and self._thread.is_alive()):
      return
    moved = list(self._folder.glob("*"))  # not FOLDER itself: Orbax may be about to use it
    if moved:
      self._thread = threading.Thread(target=lambda: [shutil.rmtree(path, True) for path in moved], name="remove")
      self._thread.start()

  def finish(self) -> None:
    """Deletes FOLDER and returns when it is gone. Must not be called during a save."""
    if self._thread is not None:
      self._thread.join()
    if jax.process_index() == 0:
      shutil.rmtree(self._folder, ignore_errors=True)
