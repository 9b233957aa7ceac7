"""Finds config files: in the current folder, then among those that are installed with the package."""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Iterator

PACKAGE = "configs"  # the name that config files import each other by


def shipped_folder() -> pathlib.Path:
  """The folder of the project's own config files: `configs/` of a checkout, `aurora_jax/configs/` of an
  installation.
  """
  package = pathlib.Path(__file__).parent
  installed = package / PACKAGE
  return installed if installed.is_dir() else package.parent / PACKAGE


def names() -> list[str]:
  """The names of the project's own config files, without `.py`, sorted."""
  return sorted(path.stem for path in shipped_folder().glob("[!_]*.py"))


def find(argument: str) -> str | None:
  """The path of a config file, or None where there is no such file.

  Args:
    argument: a path, or one of `NAME`, `NAME.py`, `configs/NAME` and `configs/NAME.py`. The latter four are looked up
      in `configs/` of the current folder, then among the files that are installed with the package.
  """
  if os.path.isfile(argument):
    return argument
  folder, name = os.path.split(argument)
  if folder not in ("", PACKAGE) or not name:
    return None
  name = name.removesuffix(".py") + ".py"
  for candidate in (os.path.join(PACKAGE, name), str(shipped_folder() / name)):
    if os.path.isfile(candidate):
      return candidate
  return None


def hint(argument: str) -> str:
  """The end of a message that `argument` was not found: the most similar name, or "" where none is similar."""
  close = difflib.get_close_matches(pathlib.PurePath(argument).stem, names(), n=1)
  return f"; did you mean {PACKAGE}/{close[0]}.py?" if close else ""


@contextlib.contextmanager
def importable(path: str) -> Iterator[None]:
  """While it lasts, `from configs import NAME` works in a config file, wherever the file and the current folder are.

  NAME is looked up next to the config file if its folder is called `configs`, in `configs/` of the current folder, and
  among the files that are installed with the package. What was imported as `configs` before is back afterwards.

  Args:
    path: the config file that is about to run.
  """
  own_folder = os.path.dirname(os.path.abspath(path))
  folders = [own_folder] if os.path.basename(own_folder) == PACKAGE else []
  folders += [os.path.abspath(PACKAGE), str(shipped_folder())]
  spec = importlib.machinery.ModuleSpec(PACKAGE, None, is_package=True)
  spec.submodule_search_locations = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
  before = _take_out()
  sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
  try:
    yield
  finally:
    _take_out()
    sys.modules.update(before)


def _take_out() -> dict[str, types.ModuleType]:
  """Removes `configs` and its modules from `sys.modules`; returns them."""
  imported = [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]
  return {name: sys.modules.pop(name) for name in imported}
