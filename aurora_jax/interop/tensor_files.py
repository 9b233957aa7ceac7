"""Reads and writes files of named arrays, one array at a time: PyTorch's (.pth, .pt, .bin) and safetensors.

No code in a file is run. PyTorch's zip files are read by `torch_zip`, its format before 1.6 by `torch_old`, even if
PyTorch is installed: `torch.load(mmap=True)` would count the mapped file as memory next to the model.
"""

import json
import os
import pathlib
import types
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from aurora_jax.errors import UserError
from aurora_jax.interop import torch_old, torch_zip
from aurora_jax.interop.stored_array import StoredArray

_SAFETENSORS_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "BOOL": np.bool_,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
}
_WRAPPERS = ("module.", "_orig_mod.")
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = TORCH_SUFFIXES + (".safetensors",)


class Content(dict):
  """Content of a file, by name. `notes` are lines for the user about how the names were changed."""

  notes: tuple[str, ...] = ()


def read(path: str | os.PathLike) -> Content:
  """Reads the content of a file of arrays; the arrays themselves are read on demand.

  If the names of all arrays of a mapping begin with the prefix of a wrapper (`module.` of PyTorch's DataParallel,
  `_orig_mod.` of its compiler), the prefix is removed, and the notes say so.

  Args:
    path: .pth, .pt, .bin (PyTorch) or .safetensors.

  Returns:
    `Content`, a mapping, possibly nested, of `StoredArray`s and plain values.

  Raises:
    UserError: no such file, a file of another kind, a truncated file, or one with code in it.
  """
  path = pathlib.Path(path)
  if path.suffix not in SUFFIXES:
    raise UserError(f"{path}: weights are read from {', '.join(SUFFIXES)}")
  _refuse_other_kinds(path)
  if path.suffix == ".safetensors":
    content = _read_safetensors(path)
  else:
    content = torch_zip.read(path) if zipfile.is_zipfile(path) else torch_old.read(path)
  if not isinstance(content, Mapping):
    raise UserError(f"{path} holds a {type(content).__name__}, not weights by name")
  notes = []
  content = Content(_unwrapped(content, "", notes))
  content.notes = tuple(notes)
  return content


def _unwrapped(mapping, name, notes):
  """Removes the prefixes of wrappers from a mapping and from those within it."""
  taken_off = ""
  arrays = [key for key, value in mapping.items() if is_array(value)]
  while prefix := _common_prefix(arrays):
    arrays = [key.removeprefix(prefix) for key in arrays]
    mapping = {key.removeprefix(prefix) if isinstance(key, str) else key: value for key, value in mapping.items()}
    taken_off += prefix
  if taken_off:
    where = f"{name}: " if name else ""
    notes.append(f"{where}all names begin with '{taken_off}', which was taken off")
  return {
    key: _unwrapped(value, f"{name}.{key}" if name else str(key), notes) if isinstance(value, dict) else value
    for key, value in mapping.items()
  }


def _common_prefix(names):
  if not names or not all(isinstance(name, str) for name in names):
    return None
  return next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in names)), None)


def is_array(value: Any) -> bool:
  """Whether a value of `read`'s mapping is an array."""
  return isinstance(value, StoredArray)


def _refuse_other_kinds(path):
  """Raises `UserError` for a file without weights: missing, empty, a web page, a pointer to a file, a cut-off zip."""
  try:
    with open(path, "rb") as stream:
      head = stream.read(64)
  except IsADirectoryError as error:
    raise UserError(f"{path} is a folder, not a file of weights") from error
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
  if not head:
    raise UserError(f"{path} is empty")
  if path.suffix in TORCH_SUFFIXES and not zipfile.is_zipfile(path):
    torch_zip.refuse_code(path)  # the oldest pickles are text
  if head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
    begin = " ".join(head[:40].decode().split())
    raise UserError(
      f"{path} is a text file, not weights (it begins with '{begin}'): was the download a web page, or a "
      "pointer to the file?"
    )
  if path.suffix != ".safetensors" and head.startswith(b"PK") and not zipfile.is_zipfile(path):
    raise UserError(f"{path} is cut off: its {path.stat().st_size:,} bytes begin as a zip file and do not end as one")


def _read_safetensors(path):
  try:
    with safetensors.safe_open(path, framework="np"):
      pass  # it checks that the offsets fill the file
    with open(path, "rb") as stream:
      size = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(size))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise UserError(f"{path} is no safetensors file, or is cut off: {error}") from error
  header.pop("__metadata__", None)
  unknown = sorted({entry["dtype"] for entry in header.values()} - _SAFETENSORS_DTYPES.keys())
  if unknown:
    raise UserError(f"{path} has arrays of type {', '.join(unknown)}, which cannot be read")
  return {
    name: StoredArray(
      path, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
    )
    for name, entry in header.items()
  }


def check_target(path: str | os.PathLike, overwrite: bool = False) -> None:
  """Raises `UserError` if `path` is a folder, or a file that exists without `overwrite`."""
  path = pathlib.Path(path)
  if path.is_dir():
    raise UserError(f"{path} is a folder, not a file")
  if path.exists() and not overwrite:
    raise UserError(f"{path} exists; choose another name or say --overwrite")


def write_safetensors(
  path: str | os.PathLike, shapes: Mapping[str, Sequence[int]], arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
  """Writes float32 arrays one at a time, so that they need not be in memory together.

  Args:
    path: the file; overwritten.
    shapes: {name: shape} of all arrays.
    arrays: (name, array) for every name, in any order.

  Raises:
    ValueError: an array is missing or has another shape.
  """
  offset, header = 0, {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say "pt"
  for name, shape in shapes.items():
    size = 4 * int(np.prod(shape, dtype=np.int64))
    header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
    offset += size
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    left = set(shapes)
    for name, array in arrays:
      array = np.asarray(array, "<f4", order="C")
      if array.shape != tuple(shapes[name]):
        raise ValueError(f"{name} is {array.shape}, announced as {shapes[name]}")
      left.remove(name)
      stream.seek(8 + len(text) + header[name]["data_offsets"][0])
      stream.write(array.data if array.ndim else array.tobytes())
    if left:
      raise ValueError(f"not written: {sorted(left)}")
    stream.truncate(8 + len(text) + offset)


def write_torch(path: str | os.PathLike, state_dicts: Mapping[str, Mapping[str, np.ndarray]]) -> None:
  """Writes {key: {name: float32 array}} with `torch.save`. Names of the same array object share a storage.

  Args:
    path: the file; overwritten.
    state_dicts: {key: {name: float32 array}}.

  Raises:
    UserError: PyTorch is not installed.
  """
  torch = require_torch(path)
  tensors = {}

  def tensor(array):
    if id(array) not in tensors:
      tensors[id(array)] = torch.from_numpy(array)
    return tensors[id(array)]

  torch.save(
    {key: {name: tensor(array) for name, array in arrays.items()} for key, arrays in state_dicts.items()}, path
  )


def require_torch(path: str | os.PathLike) -> types.ModuleType:
  """Imports PyTorch. Raises a `UserError` that names the alternative if it is not installed."""
  try:
    import torch
  except ImportError as error:
    raise UserError(
      f"{path}: writing this format needs PyTorch (pip install torch); a .safetensors file does not"
    ) from error
  return torch
