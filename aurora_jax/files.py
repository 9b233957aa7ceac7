"""Atomic writes: files and folders are written under a temporary name and then renamed.

The umask decides who may read them, even where a library makes files for their owner alone (safetensors does). Errors
are `UserError`s of one line with the path.
"""

import contextlib
import glob
import os
import pathlib
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator

from aurora_jax import text
from aurora_jax.errors import UserError

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary path in the same folder. It is renamed to `path` if the block succeeds, else removed.

  Args:
    path: the final path. A missing folder is created, an existing file is replaced.

  Raises:
    UserError: it cannot be written.
  """
  path = pathlib.Path(path)
  tmp_path = path.with_name(f".{_short(path.name)}.{os.getpid()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield tmp_path
    _open_to_others(tmp_path, _umask())
    os.replace(tmp_path, path)
  except OSError as error:
    raise UserError(f"{_shown(path)} cannot be written: {error.strerror or error}") from error
  finally:
    with contextlib.suppress(OSError):
      tmp_path.unlink()


def write_text(path: str | os.PathLike, content: str) -> None:
  """Writes a UTF-8 text file atomically. Raises UserError if it cannot be written."""
  with atomic_file(path) as tmp_path:
    tmp_path.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(
  path: str | os.PathLike, check: Callable[[], None] = lambda: None, label: str = ""
) -> Iterator[pathlib.Path]:
  """Yields a temporary folder next to `path`. It is renamed to `path` if the block succeeds, else removed.

  A process that is killed leaves its temporary folder. The next one with the same path removes it.

  Args:
    path: the final path, or a link to it. An existing folder is replaced, and restored if that fails.
    check: called just before the rename; raises if something has appeared there that must stay.
    label: prefix of the path in an error, e.g. "out ".

  Raises:
    UserError: it cannot be written.
  """
  target, partial, lock = pathlib.Path(path).resolve(), None, None
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    ours = False
    while not ours:
      partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{_short(target.name)}.", suffix=".partial", dir=target.parent))
      ours, lock = _lock(partial)
    yield partial
    _open_to_others(partial, _umask())
    check()
    _replace_folder(partial, target)
  except OSError as error:
    raise UserError(f"{label}{_shown(path)} cannot be written: {error.strerror or error}") from error
  finally:
    if partial is not None:
      shutil.rmtree(partial, ignore_errors=True)
    if lock is not None:
      os.close(lock)


def _lock(folder):
  """(whether a temporary folder is ours, a file descriptor that locks it as long as the process lives, or None)."""
  descriptor = None
  try:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Another process may take a folder without a lock for a leftover, just after it was made.
    ours = os.fstat(descriptor).st_nlink > 0
  except (BlockingIOError, FileNotFoundError):
    ours = False
  except (OSError, AttributeError):  # no locks here: nobody takes the folder for a leftover
    ours = True
  if not ours and descriptor is not None:
    os.close(descriptor)
  return ours, descriptor if ours else None


def _remove_leftovers(target):
  """Removes temporary folders of dead processes, and what they replaced if the replacement is in its place."""
  name = re.compile(rf"\.{re.escape(_short(target.name))}\.[a-z0-9_]{{8}}\.(partial|retired)")
  for path in target.parent.glob(f".{glob.escape(_short(target.name))}.*"):
    match = name.fullmatch(path.name)
    if match is None or path.is_symlink() or not path.is_dir():
      continue
    with contextlib.suppress(OSError, AttributeError):
      descriptor = os.open(path, os.O_RDONLY)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if match[1] == "partial" or target.exists():
          shutil.rmtree(path, ignore_errors=True)
      finally:
        os.close(descriptor)


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
  """The start of a name. A whole name may have the greatest length that is allowed, and a suffix is added."""
  return os.fsdecode(os.fsencode(name)[:100])


def _open_to_others(path, umask):
  """Gives files and folders the permissions that the umask grants; some were made for their owner alone."""
  with contextlib.suppress(
    OSError
  ):  # some mounts have no permissions; a file that was not written is reported by the rename
    os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | (0o777 if path.is_dir() else 0o666) & ~umask)
  if path.is_dir():
    for entry in path.iterdir():
      if not entry.is_symlink():
        _open_to_others(entry, umask)


def _umask():
  """The umask, read without setting it: files that other threads create meanwhile would be open to everybody."""
  try:
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return int(re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE)[1], 8)
  except (OSError, TypeError):  # not Linux
    mask = os.umask(0)
    os.umask(mask)
    return mask


def files_below(folder: str | os.PathLike, skip: Collection[str] = ()) -> Iterator[tuple[str, os.stat_result]]:
  """Yields (name relative to the folder, status) of every file below it, in no order.

  Other threads and processes may change the folder meanwhile: what vanishes is passed over. (`Path.rglob` raises
  FileNotFoundError for a folder that vanishes.)

  Args:
    folder: need not exist.
    skip: names in the folder itself that are passed over with all that is in them.
  """
  for place, folders, names in os.walk(folder):
    if skip and place == os.fspath(folder):
      folders[:] = [name for name in folders if name not in skip]
      names = [name for name in names if name not in skip]
    for name in names:
      path = os.path.join(place, name)
      with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode):
          yield pathlib.Path(os.path.relpath(path, folder)).as_posix(), status


def check_folder(folder: str | os.PathLike, name: str | None = None) -> None:
  """Checks, before long work begins, that files can be written to a folder. Leaves nothing behind.

  Args:
    folder: if it is missing, its nearest existing parent is checked.
    name: of the folder in an error; None: its path.

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
