"""Files and folders that appear whole or not at all: written beside, then renamed.

What is written may be read by whom the umask lets, whatever the library that wrote it thinks (safetensors makes files for
the owner alone). Errors are `UserError`s, one line that names the place.
"""

import contextlib
import os
import pathlib
import re
import shutil
import stat
import tempfile

from aurora_jax import text
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
  beside = path.with_name(f".{_short(path.name)}.{os.getpid()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield beside
    _open_to_others(beside, _umask())
    os.replace(beside, path)
  except OSError as error:
    raise UserError(f"{_shown(path)} cannot be written: {error.strerror or error}") from error
  finally:
    with contextlib.suppress(OSError):
      beside.unlink()


def write_text(path, content):
  """Writes a text file in UTF-8, whole. Raises UserError if that is not possible."""
  with whole_file(path) as beside:
    beside.write_text(content, encoding="utf-8")


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
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{_short(target.name)}.", suffix=".partial", dir=target.parent))
    yield partial
    _open_to_others(partial, _umask())
    check()
    _replace_folder(partial, target)
  except OSError as error:
    raise UserError(f"{words}{_shown(path)} cannot be written: {error.strerror or error}") from error
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


def _shown(path):
  return text.printable(text.path_text(path))


def _short(name):
  """A name's beginning: the whole one may be as long as names can be, and something is put around it."""
  return os.fsdecode(os.fsencode(name)[:100])


def _open_to_others(path, umask):
  """Gives files and folders that were made for the owner alone the permissions that the umask grants."""
  with contextlib.suppress(OSError):  # some mounts know no permissions; and what was not written is missed later on
    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | (0o777 if path.is_dir() else 0o666) & ~umask)
  if path.is_dir():
    for entry in path.iterdir():
      if not entry.is_symlink():
        _open_to_others(entry, umask)


def _umask():
  """The process's umask; asked for without a change of it, during which other threads would make files for everybody."""
  try:
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return int(re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE)[1], 8)
  except (OSError, TypeError):  # not Linux
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
  name, existing = name or _shown(folder), pathlib.Path(folder).absolute()
  try:
    while not existing.exists() and existing != existing.parent:
      existing = existing.parent
    if not existing.is_dir():
      raise UserError(f"{name} cannot be written: {_shown(existing)} is not a folder")
    with tempfile.TemporaryFile(dir=existing):  # asks the file system itself: the superuser passes any check of bits
      pass
  except OSError as error:
    raise UserError(f"{name} cannot be written: {error.strerror or error}") from error
