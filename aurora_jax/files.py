"""Files and folders that appear whole or not at all: written beside, then renamed.

Errors are `UserError`s, one line that names the place.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile

from aurora_jax.errors import UserError


@contextlib.contextmanager
def whole_file(path):
  """Yields a path beside `path`, which is renamed to it when the block ends well and removed otherwise.

  Args:
    path: where the file shall stand; its folder is made if missing, a file that stands there is replaced.

  Raises:
    UserError: it cannot be written.
  """
  path = pathlib.Path(path)
  beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield beside
    os.replace(beside, path)
  except OSError as error:
    raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
  finally:
    with contextlib.suppress(OSError):
      beside.unlink()


def write_text(path, text):
  """Writes a text file, whole. Raises UserError if that is not possible."""
  with whole_file(path) as beside:
    beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path, check=lambda: None, words=""):
  """Yields a folder beside `path` that takes its place when the block ends well and is removed otherwise.

  Args:
    path: where the folder shall stand, or a link to there. What stands there is replaced; it comes back if that fails.
    check: called right before; raises if something has come up there that must stay.
    words: what to call the folder in an error, e.g. "out ".

  Raises:
    UserError: it cannot be written.
  """
  target, partial = pathlib.Path(path).resolve(), None
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    yield partial
    os.chmod(partial, 0o777 & ~_umask())  # mkdtemp's folders are for the owner only
    check()
    _replace_folder(partial, target)
  except OSError as error:
    raise UserError(f"{words}{path} cannot be written: {error.strerror or error}") from error
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)


def _replace_folder(new, target):
  if not target.exists():
    os.rename(new, target)
    return
  retired = new.with_suffix(".retired")
  os.rename(target, retired)
  try:
    os.rename(new, target)
  except BaseException:
    os.rename(retired, target)
    raise
  shutil.rmtree(retired, ignore_errors=True)


def _umask():
  mask = os.umask(0)
  os.umask(mask)
  return mask


def check_folder(folder, name=None):
  """Makes sure, before minutes of work, that files can be written to a folder; leaves nothing behind.

  Args:
    folder: it may be missing, then the one in which it would be made counts.
    name: what to call it in the error; None takes its path.

  Raises:
    UserError: a file is in the way, or it cannot be written to.
  """
  name, existing = name or folder, pathlib.Path(folder).absolute()
  try:
    while not existing.exists() and existing != existing.parent:
      existing = existing.parent
    if not existing.is_dir():
      raise UserError(f"{name} cannot be written: {existing} is not a folder")
    with tempfile.TemporaryFile(dir=existing):  # asks the file system itself: the superuser passes any check of bits
      pass
  except OSError as error:
    raise UserError(f"{name} cannot be written: {error.strerror or error}") from error
