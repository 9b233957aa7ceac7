"""Weights in safetensors files, in shards with an index where they are large; written and read one array at a time."""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop import tensor_files, weight_files
from aurora_jax.interop.hub.twin_map import Entry

NAME = "model.safetensors"
SHARD_BYTES = 5_000_000_000
_DTYPES = {"float32": "F32", "int32": "I32", "int64": "I64"}


def write(
  folder: pathlib.Path,
  entries: Sequence[Entry],
  arrays: Iterable[tuple[str, np.ndarray]],
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with `model.safetensors.index.json`.

  Args:
    folder: an existing folder.
    entries: names, shapes and dtypes of all arrays.
    arrays: (name, array) in the order of `entries`; they need not be in memory together.
    shard_bytes: the most that a file holds, unless a single array is larger.

  Raises:
    ValueError: the arrays are not those of `entries`.
  """
  shards: list[list[Entry]] = [[]]
  for entry in entries:
    if shards[-1] and sum(map(_size, shards[-1])) + _size(entry) > shard_bytes:
      shards.append([])
    shards[-1].append(entry)
  names = [NAME]
  if len(shards) > 1:
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    index = {
      "metadata": {"total_size": sum(map(_size, entries))},
      "weight_map": {entry.name: name for name, shard in zip(names, shards) for entry in shard},
    }
    (folder / f"{NAME}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
  source = iter(arrays)
  for name, shard in zip(names, shards):
    _write_file(folder / name, shard, source)
  if (more := next(source, None)) is not None:
    raise ValueError(f"{more[0]} is not announced")


def _size(entry):
  return int(np.prod(entry.shape, dtype=np.int64)) * np.dtype(entry.dtype).itemsize


def _write_file(path, entries, source):
  offset, header = 0, {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say "pt"
  for entry in entries:
    end = offset + _size(entry)
    dtype = _DTYPES[np.dtype(entry.dtype).name]
    header[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
    offset = end
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as stream:
    stream.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
      name, array = next(source, ("nothing", None))
      if name != entry.name or array.shape != entry.shape:
        raise ValueError(f"{entry.name} {entry.shape} is announced, {name} {np.shape(array)} came")
      stream.write(np.asarray(array, np.dtype(entry.dtype).newbyteorder("<"), order="C").tobytes())


def read(folder: pathlib.Path) -> Mapping[str, Any]:
  """Arrays by name (`interop.stored_array.StoredArray`); they stay on the disk until they are read.

  Raises:
    UserError: no weights, a missing shard, or weights in a format that may hold code.
  """
  weights: dict[str, Any] = {}
  for path in weight_files.find(folder):
    if path.suffix != ".safetensors":
      raise UserError(f"{folder} has its weights in {path.name}; only safetensors files are read here")
    weights |= {name: value for name, value in tensor_files.read(path).items() if tensor_files.is_array(value)}
  return weights
