"""Reads arrays of a checkpoint by TensorStore alone.

Importing Orbax and asking it for a checkpoint's metadata takes longer than reading a small generator. This reader knows
one layout, the one that runs write: zarr arrays in an OCDBT store, described by `state/_METADATA`. For anything else,
  and
for a checkpoint that is damaged, it returns None, and Orbax does the work or says what is wrong.
"""

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from aurora_jax import storage
from aurora_jax.runs import format as state_format

_ARRAYS = ("jax.Array", "np.ndarray")
_EMPTY = ("None", "Dict", "List")  # nodes without a value
_GROUP_BYTES = 1 << 28  # of arrays that are read at once


def read(path: pathlib.Path, prefixes: Sequence[str], place: Callable[[np.ndarray], Any]) -> dict[str, Any] | None:
  """Reads the leaves whose names begin with one of some prefixes.

  Args:
    path: the checkpoint's folder.
    prefixes: names of nodes, such as "networks/generator/ema".
    place: called with each array, to put it where it belongs; the array itself is then let go.

  Returns:
    {name of the leaf in the newest format: result of `place`}, or None: this reader cannot do it.
  """
  try:
    names = _names(path / "state", prefixes)
    return None if names is None else dict(_read(path / "state", names, place))
  except Exception:  # whatever a damaged file leads to; Orbax reads it again and its error is reported
    return None


def _names(state, prefixes):
  """{leaf's name in the newest format: its name in the store}, or None for a layout that is not known here."""
  metadata = json.loads((state / "_METADATA").read_bytes())
  if not metadata["use_ocdbt"] or metadata["use_zarr3"] or not (state / "manifest.ocdbt").is_file():
    return None
  entries = [
    ([str(key["key"]) for key in entry["key_metadata"]], entry["value_metadata"])
    for entry in metadata["tree_metadata"].values()
  ]
  version = state_format.of_tree({keys[0]: None for keys, _ in entries})
  names = {}
  for keys, value in entries:
    name = state_format.name("/".join(keys), version)
    if not any(name.startswith(f"{prefix}/") for prefix in prefixes) or value["value_type"] in _EMPTY:
      continue
    if value["value_type"] not in _ARRAYS or value["skip_deserialize"]:
      return None
    names[name] = ".".join(keys)
  return names


def _read(state, names, place) -> Iterator[tuple[str, Any]]:
  import tensorstore as ts

  context = ts.Context()
  opening = {
    name: ts.open(
      {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": _base(state), "path": f"{stored}/"},
      },
      open=True,
      read=True,
      context=context,
    )
    for name, stored in names.items()
  }
  group, size = {}, 0
  for name, future in opening.items():
    store = future.result()
    group[name] = store.read()
    size += int(np.prod(store.shape)) * store.dtype.numpy_dtype.itemsize
    if size > _GROUP_BYTES:
      yield from _placed(group, place)
      group, size = {}, 0
  yield from _placed(group, place)


def _base(state):
  """TensorStore's name of a folder."""
  url = str(state)
  if not storage.is_url(url):
    return {"driver": "file", "path": f"{url}/"}
  bucket, _, path = url.removeprefix("gs://").partition("/")
  return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def _placed(group, place):
  for name in list(group):
    yield name, place(group.pop(name).result())
