"""A data set on disk: a folder with sharded tfrecords, an index file per shard and `manifest.json`.

Opening a data set checks sizes and counts. A missing, truncated or grown shard or a broken index is an error. With
`tolerate_corruption` the data set opens nevertheless. It then has as many records as its manifest says, so that every
record keeps its number. Corruption that is found when a record is read concerns that record alone: `RecordError`.
Training replaces such a record by another one (data/loader.py); an evaluation stops.
"""

import json
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from aurora_jax import text
from aurora_jax.data import images, schema, tfrecords
from aurora_jax.errors import UserError

MANIFEST = "manifest.json"  # always UTF-8
# With more shards than this, files are opened for each read: a process may hold about 1,000 open files.
_KEPT_OPEN = 256


class Dataset:
  """Random access to one split of a data set folder.

  It is safe to share between threads and can be pickled: files are opened on first use.

  Attributes:
    path: the folder.
    split: name of the split.
    manifest: content of the folder's `manifest.json`.
    name: name of the data set.
    resolution: side of the stored images, which are square, in pixels.
    problems: descriptions of the corruption that `tolerate_corruption` let through.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    split: str,
    manifest: dict[str, Any],
    shards: Sequence[pathlib.Path],
    indices: Sequence[np.ndarray],
    problems: Sequence[str] = (),
  ):
    """Use `Dataset.open`.

    Args:
      path: the folder.
      split: name of the split.
      manifest: content of `manifest.json`.
      shards: paths of the shards.
      indices: one int64 [records, 2] per shard (see `tfrecords.load_index`); -1 if the place of a record is unknown.
      problems: descriptions of the corruption found.
    """
    self.path = pathlib.Path(path)
    self.split = split
    self.manifest = manifest
    self.name = manifest["name"]
    self.resolution = manifest["resolution"]
    self.problems = list(problems)
    self._shards = shards
    self._indices = indices
    self._starts = np.concatenate([[0], np.cumsum([len(index) for index in indices])]).astype(np.int64)
    self._captions = None
    self._reset()

  def _reset(self):
    self._descriptors = {}
    self._lock = threading.Lock()

  @classmethod
  def open(cls, path: str | os.PathLike, split: str = "train", tolerate_corruption: bool = False) -> "Dataset":
    """Opens a split.

    Args:
      path: a folder written by `build-data`.
      split: name of a split in the manifest, "train" or "heldout".
      tolerate_corruption: open the split even if shards or indices are missing, truncated or broken. `problems` then
        lists them, and reading an affected record raises `RecordError`.

    Returns:
      A `Dataset`.

    Raises:
      UserError: no such folder, no readable manifest, no such split, or a shard that is missing or whose size differs
        from its index.
    """
    manifest = read_manifest(path)
    path = pathlib.Path(path)
    if split not in manifest["splits"]:
      raise UserError(f"data set {path} has no split {split!r} (it has {', '.join(manifest['splits'])})")
    shards, indices, problems = [], [], []
    for entry in manifest["splits"][split]["shards"]:
      shard, examples = path / entry["file"], entry["examples"]
      if tolerate_corruption:
        index, problem = tfrecords.salvage_index(shard, examples)
        problems += [problem] if problem else []
      else:
        index = tfrecords.load_index(shard)
      if len(index) != examples:
        raise UserError(f"shard {shard} holds {len(index)} examples, the manifest says {examples}")
      shards.append(shard)
      indices.append(index)
    if not sum(map(len, indices)):
      raise UserError(f"split {split!r} of data set {path} is empty")
    return cls(path, split, manifest, shards, indices, problems)

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, number: int) -> schema.Example:
    """Reads the example at `number`. Raises `tfrecords.RecordError`, which names file and record, if it is corrupt."""
    try:
      return schema.decode(self.read(number))
    except schema.ExampleError as error:
      raise tfrecords.RecordError(f"{self.where(number)}:", str(error), error.key) from None

  def __repr__(self) -> str:
    return f"Dataset({str(self.path)!r}, split={self.split!r}, examples={len(self)})"

  def __getstate__(self):
    state = self.__dict__.copy()
    del state["_descriptors"], state["_lock"]
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._reset()

  def __del__(self):
    for descriptor in self.__dict__.get("_descriptors", {}).values():
      os.close(descriptor)

  def read(self, number: int) -> bytes:
    """Reads the bytes of record `number` and checks them. Raises `tfrecords.RecordError` if they are corrupt."""
    shard, record = self._locate(number)
    offset, length = self._indices[shard][record].tolist()
    if offset < 0:
      raise tfrecords.RecordError(f"{self._shards[shard]}: record {record}", "is lost: nothing says where it begins")
    file = self._descriptor(shard) if len(self._shards) <= _KEPT_OPEN else self._shards[shard]
    return tfrecords.read_record(file, offset, length, self._shards[shard], record)

  def image(self, number: int) -> tuple[Image.Image, schema.Example]:
    """Reads an example and decodes its image.

    Args:
      number: number of the example.

    Returns:
      (PIL image of mode RGB, the example).

    Raises:
      tfrecords.RecordError: the record cannot be read, its image cannot be decoded, or the image has another size than
        the record says.
    """
    example = self[number]
    size = (example.width, example.height) if example.width and example.height else None
    try:
      return images.open_image(example.image, size=size), example
    except images.ImageError as error:
      raise tfrecords.RecordError(f"{self.where(number)}:", str(error), example.key) from None

  def where(self, number: int) -> str:
    """Names the file and record of example `number`, for messages."""
    shard, record = self._locate(number)
    return f"{self._shards[shard]}: record {record}"

  def place(self, number: int) -> tuple[str, int, int]:
    """The place of example `number`: (file name of the shard, number of the record in it, its first byte or -1)."""
    shard, record = self._locate(number)
    return self._shards[shard].name, record, int(self._indices[shard][record, 0])

  def captions(self) -> list[tuple[str, ...]]:
    """All captions of the split: per example a tuple, the primary caption first. They are read once.

    Raises:
      UserError: a record cannot be read.
    """
    if self._captions is None:
      try:
        self._captions = [self[number].captions for number in range(len(self))]
      except tfrecords.RecordError as error:
        raise UserError(str(error)) from None
    return self._captions

  def readable(self) -> Iterator[tuple[int, schema.Example]]:
    """Yields (number, example) of the examples that can be read, in order. Images are not decoded."""
    for number in range(len(self)):
      try:
        example = self[number]
      except tfrecords.RecordError:  # reported when training reads it
        continue
      yield number, example

  def first_captions(self, count: int) -> list[str]:
    """The first `count` distinct primary captions of the readable examples, or all if there are fewer."""
    captions = {}
    for _, example in self.readable() if count else ():
      captions[example.captions[0]] = None
      if len(captions) == count:
        break
    return list(captions)

  def _locate(self, number: int) -> tuple[int, int]:
    if not -len(self) <= number < len(self):
      raise IndexError(f"example {number} of {len(self)}")
    number = number % len(self)
    shard = int(np.searchsorted(self._starts, number, side="right")) - 1
    return shard, number - int(self._starts[shard])

  def _descriptor(self, shard: int) -> int:
    with self._lock:
      if shard not in self._descriptors:
        self._descriptors[shard] = tfrecords.open_shard(self._shards[shard])
      return self._descriptors[shard]


def check_local(path: str | os.PathLike) -> None:
  """Raises `UserError` for a URL such as gs://bucket/folder: pathlib would read it as a local folder named "gs:"."""
  if "://" in str(path):
    raise UserError(f"{path} is an address: data sets are read and written in folders, mount or copy it first")


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
  """Reads and checks the manifest of a data set folder.

  Args:
    path: the folder.

  Returns:
    The manifest (see `build.build`).

  Raises:
    UserError: no such folder, no manifest, or a manifest that this version cannot read.
  """
  check_local(path)
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"data set {path} {'is not a folder' if path.exists() else 'does not exist'}")
  try:
    manifest = json.loads(text.decode((path / MANIFEST).read_bytes()))
  except FileNotFoundError:
    shards = next(path.glob("*.tfrecord*"), None)
    found = f", and {text.printable(shards.name, 100)} alone does not say what is whole" if shards else ""
    raise UserError(f"data set {path} has no {MANIFEST}: it was not made by build-data{found}") from None
  except text.TextError as error:
    raise UserError(f"data set {path}: {MANIFEST} cannot be read: it {error}") from None
  except RecursionError:
    raise UserError(f"data set {path}: {MANIFEST} cannot be read: it is nested too deeply") from None
  except (OSError, ValueError) as error:
    raise UserError(f"data set {path}: {MANIFEST} cannot be read: {error}") from None
  version = manifest.get("schema_version") if isinstance(manifest, dict) else None
  if version != schema.SCHEMA_VERSION:
    raise UserError(f"data set {path} has schema version {version}, this program reads {schema.SCHEMA_VERSION}")
  missing = [name for name in ("name", "resolution", "splits") if name not in manifest]
  if missing:
    raise UserError(f"data set {path}: {MANIFEST} lacks {', '.join(missing)}")
  if not isinstance(manifest["resolution"], int) or manifest["resolution"] < 1:
    raise UserError(
      f"data set {path}: {MANIFEST} is damaged: its resolution is {text.printable(repr(manifest['resolution']), 40)}"
    )
  try:
    for split in manifest["splits"].values():
      for shard in split["shards"]:
        if not (isinstance(shard["file"], str) and isinstance(shard["examples"], int) and shard["examples"] >= 0):
          raise ValueError(shard)
  except (AttributeError, KeyError, TypeError, ValueError):
    raise UserError(f"data set {path}: {MANIFEST} is damaged: it does not list the shards of each split") from None
  return manifest
