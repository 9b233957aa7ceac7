"""Data sets at gs:// and s3:// URLs: read through a local folder, written from one.

The local folder has the manifest, the index files and the caption indices. In place of each shard it has an empty file
of the same size (which takes no space), and a file `.url` says where the shards are. Records are read from there by
ranges. The folder is in the user's cache folder, one for each content of a manifest.
"""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Generator
from typing import BinaryIO

from aurora_jax import local_copies, storage
from aurora_jax.errors import UserError

_URL_FILE = ".url"
_MANIFEST = "manifest.json"
_SMALL = (".index", ".captions")  # of record_index.py and caption_index.py, which load NumPy
_BUFFER_BYTES = 1 << 22
_GROUP = 64  # files between two reports of progress


def local(path: str | os.PathLike) -> pathlib.Path:
  """The local folder of a data set: that of a URL is made or brought up to date.

  Raises:
    UserError: there is no manifest at the URL, or it cannot be read.
  """
  return _mirror(str(path).rstrip("/"), os.getpid()) if storage.is_url(path) else pathlib.Path(path)


@functools.lru_cache(maxsize=64)
def _mirror(url, process):
  del process
  storage.check_url(url)
  try:
    manifest = storage.read(storage.join(url, _MANIFEST))
  except storage.MissingError as error:
    raise UserError(f"data set {url} has no {_MANIFEST}: it was not made by build-data, or not completely") from error
  folder = local_copies.cache_folder("data", url) / hashlib.sha256(manifest).hexdigest()[:20]
  local_copies.show_as(folder, url)
  found = storage.find(url)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _URL_FILE).write_text(url, encoding="utf-8")
    wanted = {}
    for name, size in found.items():
      if "/" in name or name == _MANIFEST:
        continue
      place = folder / name
      if place.suffix in _SMALL:
        if not place.is_file() or place.stat().st_size != size:
          wanted[name] = size
      elif place.suffix == ".tfrecord":
        with open(place, "ab") as file:
          file.truncate(size)
    for place in folder.glob("*.tfrecord"):
      if place.name not in found:
        place.unlink(missing_ok=True)
    storage.download_all(url, folder, wanted)
    partial = folder / f".{_MANIFEST}.{os.getpid()}.partial"
    partial.write_bytes(manifest)
    os.replace(partial, folder / _MANIFEST)
  except OSError as error:
    raise UserError(f"{folder} (for the index of {url}) cannot be written: {error.strerror or error}") from error
  return folder


@functools.lru_cache(maxsize=256)
def _url_of_folder(folder):
  try:
    return (pathlib.Path(folder) / _URL_FILE).read_text(encoding="utf-8")
  except OSError:
    return None


def url_of(path: str | os.PathLike) -> str | None:
  """Where a file of a data set really is: the URL of a shard that is read from a bucket, else None."""
  folder, name = os.path.split(os.fspath(path))
  if not name.endswith(".tfrecord"):
    return None
  url = _url_of_folder(folder)
  return None if url is None else storage.join(url, name)


def open_file(path: str | os.PathLike) -> int | storage.RangeReader:
  """Opens a file of a data set for reads at offsets: a descriptor, or a reader of a shard in a bucket.

  Raises:
    OSError: it cannot be opened.
  """
  url = url_of(path)
  return os.open(path, os.O_RDONLY) if url is None else storage.RangeReader(url)


def close_file(file: int | storage.RangeReader) -> None:
  """Closes what `open_file` returned."""
  if isinstance(file, int):
    os.close(file)


@contextlib.contextmanager
def stream(path: str | os.PathLike) -> Generator[BinaryIO, None, None]:
  """Opens a file of a data set for reading from its beginning. Raises OSError."""
  url = url_of(path)
  if url is None:
    with open(path, "rb") as file:
      yield file
  else:
    yield io.BufferedReader(_Stream(storage.RangeReader(url)), _BUFFER_BYTES)


class _Stream(io.RawIOBase):
  """An object as a file."""

  def __init__(self, reader: storage.RangeReader):
    self._reader, self._position = reader, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._reader.size}[whence]
    self._position = base + offset
    return self._position

  def readinto(self, buffer) -> int:
    count = max(0, min(len(buffer), self._reader.size - self._position))
    data = self._reader.pread(count, self._position)
    buffer[: len(data)] = data
    self._position += len(data)
    return len(data)


def check_out(url: str, overwrite: bool) -> None:
  """Checks that a data set can be written to a URL.

  Args:
    url: of the folder.
    overwrite: whether a data set there may be replaced.

  Raises:
    UserError: it cannot be written, or something is there.
  """
  storage.check_writable(url, f"out {url}")
  names, folders = storage.list_folder(url)
  if _MANIFEST in names:
    if not overwrite:
      raise UserError(f"out {url} holds a data set (--overwrite replaces it)")
  elif any(not name.endswith((".tfrecord", ".index", ".captions", ".json")) for name in names) or folders:
    raise UserError(f"out {url} holds other objects: choose another folder")


def upload(
  folder: str | os.PathLike, url: str, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
  """Writes a complete local data set to a URL. The manifest goes first and comes last, so there is never half of one.

  Args:
    folder: the local data set.
    url: of the folder. Objects of an earlier data set are deleted.
    on_progress: called with (files copied, files in all).
  """
  names = sorted(path.name for path in pathlib.Path(folder).iterdir() if path.is_file())
  url = url.rstrip("/")
  before = storage.find(url)
  storage.delete([storage.join(url, _MANIFEST)] if _MANIFEST in before else [])
  storage.delete(storage.join(url, name) for name in before if name not in names and name != _MANIFEST)
  rest = [name for name in names if name != _MANIFEST]
  for i in range(0, len(rest), _GROUP):
    on_progress(i, len(names))
    storage.upload_all(folder, url, rest[i : i + _GROUP])
  storage.upload_all(folder, url, [_MANIFEST])
