"""Removes checkpoints that are no longer kept, in the background, so that a kill leaves no half of one in sight.

Orbax moves such a checkpoint into FOLDER in one step; what is in there counts for nothing and is removed file by file.
"""

import shutil
import threading

import jax

FOLDER = ".removed"


class Remover:
  """Of one run; the first process does the work."""

  def __init__(self, checkpoints):
    """Args: checkpoints: path of `checkpoints/`."""
    self._folder = checkpoints / FOLDER
    self._thread = None

  def start(self):
    """Begins to remove what is there, unless it is at it. Returns at once."""
    if jax.process_index() or self._thread is not None and self._thread.is_alive():
      return
    moved = list(self._folder.glob("*"))  # not the folder: Orbax may be about to use it
    if moved:
      self._thread = threading.Thread(target=lambda: [shutil.rmtree(path, True) for path in moved], name="remove")
      self._thread.start()

  def finish(self):
    """Removes all, while nothing is being saved; returns when it is gone."""
    if self._thread is not None:
      self._thread.join()
    if jax.process_index() == 0:
      shutil.rmtree(self._folder, ignore_errors=True)
