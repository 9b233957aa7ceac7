"""Folders in the user's cache: of compiled programs, and of local copies of remote files."""

import os
import pathlib
import stat


def folder(name: str) -> pathlib.Path | None:
  """A folder in the user's cache folder, made if it is missing.

  It is `aurora_jax/NAME` in XDG_CACHE_HOME, or in `.cache` of the home folder. If there is no home folder, or it is
  read-only or another user's, it is in the temporary folder, where nobody else can write to it.

  Args:
    name: of it, such as "jax"; with slashes for one in another.

  Returns:
    Its path, or None where there is no safe place. What is cached is trusted: nobody else may write it.
  """
  home = os.path.expanduser("~")
  shared = os.environ.get("XDG_CACHE_HOME", "")
  places = [shared] if os.path.isabs(shared) else [os.path.join(home, ".cache")] if _is_home(home) else []
  for place in places:
    path = pathlib.Path(place, "aurora_jax", name)
    if _is_usable(path):
      return path
  import tempfile

  private = pathlib.Path(tempfile.gettempdir(), f"aurora_jax-{os.geteuid() if hasattr(os, 'geteuid') else 'cache'}")
  if _is_usable(private, private=True) and _is_usable(private / name):
    return private / name
  return None


def _is_home(path: str) -> bool:
  """Whether a home folder is there: without HOME and an entry in passwd, "~" stays as it is."""
  return os.path.isabs(path) and os.path.isdir(path)


def _is_usable(path: pathlib.Path, private: bool = False) -> bool:
  """Whether a folder is there, or can be made, belongs to this user and can be written to.

  `private`: its parent belongs to all, so that it must be a folder that nobody else can write to, and no link.
  """
  try:
    path.mkdir(mode=0o700 if private else 0o777, parents=not private, exist_ok=True)
    found = os.lstat(path) if private else os.stat(path)
  except OSError:
    return False
  if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
    return False
  if private and (not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022):
    return False
  return os.access(path, os.W_OK | os.X_OK)
