"""Finds the files of a source."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from aurora_jax.data.sources.base import PART_ITEMS, shown
from aurora_jax.errors import UserError

_T = TypeVar("_T")


def find_files(path: str | os.PathLike, suffixes: Sequence[str], kind: str) -> list[str]:
  """Files by suffix.

  Args:
    path: a file, or a folder that is searched with its subfolders. Hidden files and folders are skipped.
    suffixes: in lower case.
    kind: what the files are called in an error.

  Returns:
    Paths, in a fixed order.

  Raises:
    UserError: there is none.
  """
  path = str(os.fspath(path))
  if os.path.isfile(path):
    return [path]
  if not os.path.isdir(path):
    raise UserError(f"{kind} source {shown(path)} does not exist")
  found = []
  for folder, folders, names in os.walk(path):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    found += [
      os.path.join(folder, name)
      for name in sorted(names)
      if name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
    ]
  if not found:
    raise UserError(f"{kind} source {shown(path)} has no file {' or '.join(f'*{suffix}' for suffix in suffixes)}")
  return found


def slices(rows: Iterable[_T], count: int = PART_ITEMS) -> Iterator[tuple[_T, ...]]:
  """Groups rows, `count` at a time, without holding more of them."""
  rows = iter(rows)
  while group := tuple(itertools.islice(rows, count)):
    yield group
