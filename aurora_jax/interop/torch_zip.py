"""Reads PyTorch's zip files (`torch.save` since 1.6), without PyTorch and without running code in them.

Such a file is a zip of a pickle, `NAME/data.pkl`, and one uncompressed entry `NAME/data/KEY` per storage of tensors.
The unpickler can rebuild tensors and refuses every other global, so no code of the file is imported or called. Tensors
are read on demand.

No package on PyPI does this safely: tinygrad's reader silently replaces unknown classes by dummies, the others call
`pickle.load`.
"""

import collections
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop import numpy_pickle
from aurora_jax.interop.stored_array import StoredArray

# `torch.NAMEStorage`, and the dtype objects that newer files name instead.
_DTYPES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
  "float64": np.float64,
  "double": np.float64,
  "float32": np.float32,
  "float": np.float32,
  "float16": np.float16,
  "half": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
  "int64": np.int64,
  "long": np.int64,
  "int32": np.int32,
  "int": np.int32,
  "int16": np.int16,
  "short": np.int16,
  "int8": np.int8,
  "uint8": np.uint8,
  "uint16": np.uint16,
  "uint32": np.uint32,
  "uint64": np.uint64,
  "bool": np.bool_,
}
# No program that writes checkpoints puts these into a file, so a file with them is an attack.
_DANGEROUS = frozenset(
  "_pickle builtins code commands ctypes functools importlib io multiprocessing nt operator os pickle posix pty runpy "
  "shutil signal socket subprocess sys threading webbrowser __builtin__".split()
)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., bytes of the name, bytes of the extra field


class Forbidden(UserError):
  """The pickle names a global that does not rebuild a tensor. `name` is that global, such as "os.system"."""

  def __init__(self, path: str | os.PathLike, name: str):
    message = f"{path} holds code or objects besides tensors ({name}); it was not loaded, nothing in it was run"
    if name.split(".")[0] not in _DANGEROUS:  # a class of the program that wrote it, such as argparse.Namespace
      message += (
        "; if you trust it, make a file of its weights alone where that class is at hand: c = torch.load("
        f"'{pathlib.Path(path).name}', weights_only=False); torch.save({{k: c[k] for k in KEYS}}, 'weights.pth'), KEYS "
        "being those of the weights, such as generator_smooth"
      )
    super().__init__(message)
    self.name = name


def read(path: str | os.PathLike) -> Any:
  """Reads the object in a file; tensors become `StoredArray`.

  Args:
    path: a zip file written by `torch.save`.

  Returns:
    Nested dicts, lists, plain values and numpy arrays.

  Raises:
    Forbidden: the pickle names a global that does not rebuild a tensor or a numpy value.
    UserError: no such file, or it is truncated or corrupt.
  """
  path = pathlib.Path(path)
  try:
    with zipfile.ZipFile(path) as archive:
      entries = {info.filename: info for info in archive.infolist()}
      pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
      if len(pickles) != 1:
        raise UserError(f"{path} is a zip file, but none of PyTorch: it has no data.pkl")
      root = pickles[0].removesuffix("data.pkl")
      order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
      if order != b"little":
        raise UserError(
          f"{path} was written in byte order {order.decode(errors='replace')}; only little-endian files can be read"
        )
      storages = {
        name.removeprefix(f"{root}data/"): (_data_offset(path, info), info.file_size)
        for name, info in entries.items()
        if name.startswith(f"{root}data/") and info.compress_type == zipfile.ZIP_STORED
      }
      with archive.open(pickles[0]) as stream:
        return Unpickler(stream, path, storages).load()
  except UserError:
    raise
  except zipfile.BadZipFile as error:
    raise UserError(f"{path} is cut off or damaged: {error}") from error
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
  except Exception as error:  # a corrupt pickle can raise any exception
    raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def refuse_code(path: str | os.PathLike) -> None:
  """Raises `Forbidden` if a bare pickle (not in a zip) names a forbidden global. Other errors are ignored."""
  with open(path, "rb") as stream:
    try:
      while True:  # PyTorch's files before 1.6 are several pickles in a row
        Scanner(stream, path, {}).load()
    except Forbidden:
      raise
    except Exception:
      return  # not a pickle, or its end


class _Token(int):
  """Stands for a type, a storage or a tensor within the pickle: an index into a list of the unpickler.

  A pickle can set attributes of every object that it holds. This one has none.
  """

  __slots__ = ()


class Unpickler(pickle.Unpickler):
  """Rebuilds tensors and numpy values, and refuses every other global."""

  def __init__(self, stream: IO[bytes], path: str | os.PathLike, storages: Mapping[str, tuple[int, int]]):
    """Prepares to read a pickle.

    Args:
      stream: the pickle.
      path: the file, for errors and for `StoredArray`.
      storages: {key: (offset in the file, bytes)}.
    """
    super().__init__(stream, encoding="utf-8")
    self._path, self._storages = path, storages
    self._things = []  # by token: a dtype, a storage as (offset, bytes, dtype), or a StoredArray
    # New for every file, because a pickle can set attributes of these.
    self._globals = {
      ("collections", "OrderedDict"): type("OrderedDict", (collections.OrderedDict,), {}),
      ("torch", "Size"): lambda values=(): tuple(values),
      ("torch", "device"): lambda kind, index=None: kind if index is None else f"{kind}:{index}",
      ("torch._utils", "_rebuild_tensor"): lambda *args: self._tensor(*args),
      ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: self._tensor(
        storage, offset, size, stride
      ),
      ("torch._utils", "_rebuild_tensor_v3"): lambda storage, offset, size, stride, _grad, _hooks, dtype, *_: (
        self._tensor(storage, offset, size, stride, dtype)
      ),
      ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
      ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
      **numpy_pickle.safe_globals(),
    }

  def load(self) -> Any:
    return self._resolved(super().load(), {})

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in self._globals:
      return self._globals[module, name]
    if module == "torch" and name in _DTYPES:
      return self._token(np.dtype(_DTYPES[name]))
    if module in ("torch", "torch.storage") and name == "UntypedStorage":
      return self._token(np.dtype(np.uint8))
    raise Forbidden(self._path, f"{module}.{name}")

  def persistent_load(self, pid: Any) -> _Token:
    """A token that stands for a storage."""
    kind, key, count, dtype = self.storage(pid)
    offset, available = self._storages.get(key, (0, None))
    if kind != "storage" or available is None:
      raise ValueError(f"the {kind} {key} is missing or compressed")
    size = count * dtype.itemsize
    if not 0 <= size <= available:
      raise ValueError(f"the storage {key} has {available} bytes, {size} are wanted")
    return self._token((offset, size, dtype))

  def storage(self, pid: Any) -> tuple[str, str, int, np.dtype]:
    """(kind, key, elements, dtype) of the persistent id ("storage", type, key, device, elements).

    Before 1.6 there is a sixth value. It is None unless the storage is a view of another one, as in PyTorch 0.1.
    """
    kind, dtype, key, _, count, *part = pid
    if part not in ([], [None]) or count < 0:
      raise ValueError(f"the {kind} {key} of {count} elements, {part}")
    return kind, key, count, self._thing(dtype, np.dtype)

  def _tensor(self, storage, offset, size, stride, dtype=None):
    begin, available, stored_as = self._thing(storage, tuple)
    dtype = stored_as if dtype is None else self._thing(dtype, np.dtype)
    shape, strides = tuple(map(int, size)), tuple(int(step) * dtype.itemsize for step in stride)
    if min(shape, default=0) < 0 or min(strides, default=0) < 0 or len(shape) != len(strides) or offset < 0:
      raise ValueError(f"a tensor of shape {shape} and strides {strides}")
    array = StoredArray(self._path, begin + offset * dtype.itemsize, shape, dtype, strides)
    if offset * dtype.itemsize + array.span > available:
      raise ValueError(f"a tensor of {array.span} bytes at {offset * dtype.itemsize} in a storage of {available}")
    return self._token(array)

  def _token(self, thing):
    self._things.append(thing)
    return _Token(len(self._things) - 1)

  def _thing(self, token, kind):
    thing = self._things[token] if isinstance(token, _Token) else None
    if not isinstance(thing, kind):
      raise ValueError(f"{token!r} in place of a {kind.__name__}")
    return thing

  def _resolved(self, value, done):
    """The unpickled value with arrays in place of tokens. `done` holds results of shared or cyclic values."""
    if isinstance(value, _Token):
      thing = self._things[value]
      return thing if isinstance(thing, StoredArray) else str(thing)
    if isinstance(value, numpy_pickle.PLACEHOLDERS):
      return value.value
    if not isinstance(value, (dict, list, tuple, set, frozenset)):
      return value
    if id(value) not in done:
      done[id(value)] = None  # a cycle ends here
      if isinstance(value, dict):
        done[id(value)] = {key: self._resolved(entry, done) for key, entry in value.items()}
      else:
        done[id(value)] = [self._resolved(entry, done) for entry in value]
    return done[id(value)]


class Scanner(Unpickler):
  """Checks the globals that a pickle names, without rebuilding tensors."""

  def load(self) -> Any:
    return pickle.Unpickler.load(self)

  def persistent_load(self, pid: Any) -> None:
    return None

  def _tensor(self, *args, **options):
    return None


def _data_offset(path, info):
  """Offset of an entry's bytes. They follow its local header, whose extra field differs from that of the directory."""
  with open(path, "rb") as stream:
    stream.seek(info.header_offset)
    header = stream.read(_LOCAL_HEADER.size)
    signature, name, extra = _LOCAL_HEADER.unpack(header.ljust(_LOCAL_HEADER.size, b"\0"))
    end = stream.seek(0, os.SEEK_END)
  begin = info.header_offset + _LOCAL_HEADER.size + name + extra
  if signature != b"PK\x03\x04" or begin + info.file_size > end:
    raise ValueError(f"the entry {info.filename} lies outside the file")
  return begin
