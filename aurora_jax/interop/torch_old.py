"""Reads files of PyTorch before 1.6, without PyTorch and without running code in them.

Such a file is a series of pickles: a magic number, a version, properties of the machine, the object, the keys of its
storages. The storages follow in the order of the keys. Each is the number of its elements (int64) and the elements.
"""

import os
import struct
from typing import Any

from aurora_jax.errors import UserError
from aurora_jax.interop import torch_zip

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT = struct.Struct("<q")


def read(path: str | os.PathLike) -> Any:
  """Reads the object in a file; tensors become `StoredArray`.

  Args:
    path: a file written by `torch.save` before 1.6, or with `_use_new_zipfile_serialization=False`.

  Returns:
    Nested dicts, lists and plain values.

  Raises:
    torch_zip.Forbidden: the pickle names a global that does not rebuild a tensor.
    UserError: a file of another kind, truncated or corrupt.
  """
  try:
    with open(path, "rb") as stream:
      return _read(path, stream)
  except UserError:
    raise
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
  except Exception as error:  # a corrupt pickle can raise any exception
    raise UserError(f"{path} is cut off or damaged: {type(error).__name__}: {error}") from error


def _read(path, stream):
  try:
    magic = torch_zip.Unpickler(stream, path, {}).load()
  except torch_zip.Forbidden:
    raise
  except Exception:
    magic = None
  if magic != _MAGIC:
    raise UserError(f"{path} is no file of PyTorch's: neither a zip file nor of the format before 1.6")
  version, machine = (torch_zip.Unpickler(stream, path, {}).load() for _ in range(2))
  if version != _VERSION or machine["little_endian"] is not True:
    raise UserError(
      f"{path} is of version {version}, {machine}; only little-endian files of version {_VERSION} can be read"
    )
  begin, sizes = stream.tell(), _Sizes(stream, path)
  sizes.load()
  keys = torch_zip.Unpickler(stream, path, {}).load()
  places, position, end = {}, stream.tell(), os.fstat(stream.fileno()).st_size
  for key in keys:
    count, size = sizes.found[key]
    stream.seek(position)
    if _COUNT.unpack(stream.read(_COUNT.size)) != (count,):
      raise ValueError(f"the storage {key} has another size than {count}")
    places[key] = position + _COUNT.size, size
    position += _COUNT.size + size
  if position > end:
    raise ValueError(f"{position:,} bytes are wanted, {end:,} are there")
  stream.seek(begin)
  return torch_zip.Unpickler(stream, path, places).load()


class _Sizes(torch_zip.Scanner):
  """Collects the storages that a pickle names. `found`: {key: (elements, bytes)}."""

  def __init__(self, stream, path):
    super().__init__(stream, path, {})
    self.found = {}

  def persistent_load(self, pid):
    _, key, count, dtype = self.storage(pid)
    self.found[key] = count, count * dtype.itemsize
