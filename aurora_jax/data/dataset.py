"""A data set on disk: a folder with sharded tfrecords, an index file per shard and `manifest.json`.

Opening a data set checks sizes and counts. A missing, truncated or grown shard or a broken index is an error. With
`tolerate_corruption` the data set opens nevertheless. It then has as many records as its manifest says, so that every
record keeps its number. Corruption that is found when a record is read concerns that record alone: `RecordError`.
Training replaces such a record by another one (data/loader.py); an evaluation stops.
"""

import bisect
import contextlib
import itertools
import os
import pathlib
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from aurora_jax import storage
from aurora_jax.data import caption_index, decode, images, record_index, remote_shards, schema, tfrecords
from aurora_jax.data.manifest import MANIFEST as MANIFEST
from aurora_jax.data.manifest import check_local as check_local
from aurora_jax.data.manifest import read_manifest
from aurora_jax.errors import UserError

# With more shards than this, files are opened for each read: a process may hold about 1,000 open files, and a shard has
# two, records and index.
_KEPT_OPEN = 256
# The indices of larger splits are not held in memory (16 bytes a record), but read where they are needed.
_HELD_RECORDS = 2**16
_CAPTION_RUN = 64  # records that are read at once to make a caption index


class Dataset:
  """Random access to one split of a data set folder.

  It is safe to share between threads and can be pickled: files are opened on first use.

  Attributes:
    path: the folder.
    split: name of the split.
    manifest: content of the folder's `manifest.json`.
    name: name of the data set.
    resolution: side of the stored images, which are square, in pixels.
    decoding: how training reduces JPEGs unless told otherwise: `decode.SHRINK` if the manifest says so, else
      `decode.FULL`.
    problems: descriptions of the corruption that `tolerate_corruption` let through.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    split: str,
    manifest: dict[str, Any],
    shards: Sequence[pathlib.Path],
    counts: Sequence[int],
    indices: Mapping[int, np.ndarray] = types.MappingProxyType({}),
    problems: Sequence[str] = (),
  ):
    """Use `Dataset.open`.

    Args:
      path: the folder.
      split: name of the split.
      manifest: content of `manifest.json`.
      shards: paths of the shards.
      counts: number of records of each shard.
      indices: {number of a shard: int64 [records, 2]} (see `tfrecords.load_index`) of shards; -1 if the place of a
        record is unknown. The rows of all other shards are read from their index files when they are needed, so the
        memory taken does not grow with the number of records.
      problems: descriptions of the corruption found.
    """
    self.path = pathlib.Path(path)
    self.split = split
    self.manifest = manifest
    self.name = manifest["name"]
    self.resolution = manifest["resolution"]
    self.decoding = decode.SHRINK if manifest.get("decode") == decode.SHRINK else decode.FULL
    self.problems = list(problems)
    self._shards = shards
    self._indices = dict(indices)
    self._ends = list(itertools.accumulate(counts))  # number of the first record after each shard
    self._captions = None
    self._reset()

  def _reset(self):
    self._descriptors = {}
    self._lock = threading.Lock()

  @classmethod
  def open(cls, path: str | os.PathLike, split: str = "train", tolerate_corruption: bool = False) -> "Dataset":
    """Opens a split.

    Args:
      path: a folder written by `build-data`, or its gs:// or s3:// URL.
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
    path = remote_shards.local(path)
    if split not in manifest["splits"]:
      raise UserError(f"data set {path} has no split {split!r} (it has {', '.join(manifest['splits'])})")
    shards, counts, indices, problems = [], [], {}, []
    entries = manifest["splits"][split]["shards"]
    hold = sum(entry["examples"] for entry in entries) <= _HELD_RECORDS
    for entry in entries:
      shard, examples = path / entry["file"], entry["examples"]
      index, problem = record_index.of_shard(shard, examples, tolerate_corruption, hold)
      problems += [problem] if problem else []
      if index is not None:
        indices[len(shards)] = index
      shards.append(shard)
      counts.append(examples)
    if not sum(counts):
      raise UserError(f"split {split!r} of data set {path} is empty")
    return cls(path, split, manifest, shards, counts, indices, problems)

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, number: int) -> schema.Example:
    """Reads the example at `number`. Raises `tfrecords.RecordError`, which names file and record, if it is corrupt."""
    return self.parse(number, self.read(number))

  def parse(self, number: int, record: bytes) -> schema.Example:
    """Decodes the bytes of record `number`. Raises `tfrecords.RecordError` if they are no complete example."""
    try:
      return schema.decode(record)
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
      remote_shards.close_file(descriptor)

  def read(self, number: int) -> bytes:
    """Reads the bytes of record `number` and checks them. Raises `tfrecords.RecordError` if they are corrupt."""
    shard, record = self._locate(number)
    (offset, length) = self._rows(shard, record, 1)[0].tolist()
    if offset < 0:
      raise tfrecords.RecordError(f"{self._shards[shard]}: record {record}", "is lost: nothing says where it begins")
    return tfrecords.read_record(self._file(shard), offset, length, self._shards[shard], record)

  def read_run(self, first: int, count: int) -> list[bytes | tfrecords.RecordError]:
    """Reads records `first` to `first + count`, with one read per shard.

    Returns:
      For each record its bytes, or the error that `read` would raise.
    """
    found = []
    while count:
      shard, record = self._locate(first)
      some = min(count, self._ends[shard] - first)
      found += self._read_run(first, some, shard, record)
      first, count = first + some, count - some
    return found

  def _read_run(self, first, count, shard, record):
    with contextlib.suppress(tfrecords.RecordError):  # of the file; each record gets its own error
      rows = self._rows(shard, record, count)
      if (rows[:, 0] >= 0).all():
        return tfrecords.read_records(self._file(shard), rows, self._shards[shard], record)
    found: list[bytes | tfrecords.RecordError] = []
    for number in range(first, first + count):
      try:
        found.append(self.read(number))
      except tfrecords.RecordError as error:
        found.append(error)
    return found

  def image(self, number: int, record: bytes | None = None) -> tuple[Image.Image, schema.Example]:
    """Reads an example and decodes its image.

    Args:
      number: number of the example.
      record: the bytes of the record, if they have been read.

    Returns:
      (PIL image of mode RGB, the example).

    Raises:
      tfrecords.RecordError: the record cannot be read, its image cannot be decoded, or the image has another size than
        the record says.
    """
    example = self[number] if record is None else self.parse(number, record)
    size = (example.width, example.height) if example.width and example.height else None
    try:
      return images.open_image(example.image, size=size), example
    except images.ImageError as error:
      raise tfrecords.RecordError(f"{self.where(number)}:", str(error), example.key) from None

  def pixels(
    self, number: int, side: int, decoding: str = decode.FULL, record: bytes | None = None
  ) -> tuple[np.ndarray, schema.Example]:
    """Reads an example and decodes its image to a square.

    Args:
      number: number of the example.
      side: side of the result, in pixels.
      decoding: how a JPEG is reduced (decode.py): `FULL`, `SHRINK`, or `AUTO`, as the manifest says.
      record: the bytes of the record, if they have been read.

    Returns:
      (uint8 [side, side, 3], the example).

    Raises:
      tfrecords.RecordError: as `image`.
    """
    example = self[number] if record is None else self.parse(number, record)
    size = (example.width, example.height) if example.width and example.height else None
    shrink = (self.decoding if decoding == decode.AUTO else decoding) == decode.SHRINK
    try:
      return decode.square_pixels(example.image, side, size, shrink), example
    except images.ImageError as error:
      raise tfrecords.RecordError(f"{self.where(number)}:", str(error), example.key) from None

  def where(self, number: int) -> str:
    """Names the file and record of example `number`, for messages."""
    shard, record = self._locate(number)
    return f"{self._shards[shard]}: record {record}"

  def place(self, number: int) -> tuple[str, int, int]:
    """The place of example `number`: (file name of the shard, number of the record in it, its first byte or -1)."""
    shard, record = self._locate(number)
    try:
      offset = int(self._rows(shard, record, 1)[0, 0])
    except tfrecords.RecordError:
      offset = -1
    return self._shards[shard].name, record, offset

  def captions(self) -> list[tuple[str, ...]]:
    """All captions of the split: per example a tuple, the primary caption first. They are read once.

    Raises:
      UserError: a record cannot be read.
    """
    if self._captions is None:
      found: list[tuple[str, ...]] = [()] * len(self)
      for number, captions in self.readable_captions():
        found[number] = captions
      if () in found:
        number = found.index(())
        try:
          found[number] = self[number].captions
        except tfrecords.RecordError as error:
          raise UserError(str(error)) from None
      self._captions = found
    return self._captions

  def readable(self) -> Iterator[tuple[int, schema.Example]]:
    """Yields (number, example) of the examples that can be read, in order. Images are not decoded."""
    for number in range(len(self)):
      with contextlib.suppress(tfrecords.RecordError):  # reported when training reads it
        yield number, self[number]

  def readable_captions(self) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields (number, captions) of the examples that can be read, in order.

    The captions come from the caption index of each shard. Without one, the shard is read, and its caption index is
    written if all its records can be read and the folder can be written. Later corruption of a record is not noticed
    here.
    """
    for shard in range(len(self._shards)):
      for number, captions in enumerate(self._shard_captions(shard), self._start(shard)):
        if captions:
          yield number, captions

  def first_captions(self, count: int) -> list[str]:
    """The first `count` distinct primary captions of the readable examples, or all if there are fewer."""
    captions = {}
    for _, (primary, *_) in self.readable_captions() if count else ():
      captions[primary] = None
      if len(captions) == count:
        break
    return list(captions)

  def _shard_captions(self, shard):
    """The captions of each record of a shard, () of one that cannot be read."""
    start = self._start(shard)
    count = self._ends[shard] - start
    captions = caption_index.read(self._shards[shard], count)
    if captions is None:
      captions = caption_index.make(self._shards[shard], self._parsed_captions(start, count))
    return captions

  def _parsed_captions(self, start, count):
    """Reads some records and yields their captions."""
    for first in range(start, start + count, _CAPTION_RUN):
      for number, record in enumerate(self.read_run(first, min(_CAPTION_RUN, start + count - first)), first):
        try:
          yield () if isinstance(record, tfrecords.RecordError) else self.parse(number, record).captions
        except tfrecords.RecordError:  # reported when training reads it
          yield ()

  def _start(self, shard: int) -> int:
    """Number of the first record of a shard."""
    return self._ends[shard - 1] if shard else 0

  def _locate(self, number: int) -> tuple[int, int]:
    size = self._ends[-1]
    if not -size <= number < size:
      raise IndexError(f"example {number} of {size}")
    number = number % size
    shard = bisect.bisect_right(self._ends, number)
    return shard, number - self._start(shard)

  def _rows(self, shard: int, first: int, count: int) -> np.ndarray:
    """Rows of the index of a shard. Raises `tfrecords.RecordError` if they cannot be read."""
    if shard in self._indices:
      return self._indices[shard][first : first + count]
    path = tfrecords.index_path(self._shards[shard])
    where = f"{self._shards[shard]}: record {first}"
    try:
      rows = record_index.read_rows(self._descriptor(path) if self._keeps_open else path, first, count)
    except OSError as error:
      raise tfrecords.unreadable(error, f"{where}: its index") from None
    if (rows < 0).any():
      raise tfrecords.RecordError(where, "is lost: its index is broken")
    return rows

  def _file(self, shard: int) -> pathlib.Path | int | storage.RangeReader:
    """What `tfrecords` reads the records of a shard from."""
    path = self._shards[shard]
    try:
      return self._descriptor(path) if self._keeps_open else path
    except OSError as error:
      raise tfrecords.unreadable(error, f"{path}:") from None

  @property
  def _keeps_open(self) -> bool:
    return len(self._shards) <= _KEPT_OPEN

  def _descriptor(self, path: pathlib.Path) -> int | storage.RangeReader:
    with self._lock:
      if path not in self._descriptors:
        self._descriptors[path] = remote_shards.open_file(path)
      return self._descriptors[path]
