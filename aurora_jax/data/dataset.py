"""A data set on disk: a folder with sharded tfrecords, an index per shard and `manifest.json`.

Damage. What sizes and counts show when a data set is opened (a missing, truncated or grown shard, a broken index) is an
error: whoever starts something is there to mend it. With `tolerate_damage` the data set opens all the same, and with as
many records as its manifest says: none is dropped, so that every other record keeps its number. Damage that shows when
a record is read, then or days later, concerns that record alone: `RecordError`. What becomes of it is up to the reader:
training takes another record in its place (data/loader.py), evaluation stops.
"""

import json
import os
import pathlib
import threading

import numpy as np

from aurora_jax import text
from aurora_jax.data import images, schema, tfrecords
from aurora_jax.errors import UserError

MANIFEST = "manifest.json"  # UTF-8, whatever the locale
# Files of a split with more shards than this are opened anew for each read: processes may hold about 1,000 open files.
_KEPT_OPEN = 256


class Dataset:
  """Random access to one split of a data set folder.

  Threads may share it, and it may be sent to another process: files are opened on first use.

  Attributes:
    path: the folder.
    split: the split's name.
    manifest: the folder's `manifest.json`, a dict.
    name: the data set's name.
    resolution: side of the stored (square) pictures, in pixels.
    problems: list of str, what `tolerate_damage` let through.
  """

  def __init__(self, path, split, manifest, shards, indices, problems=()):
    """Use `Dataset.open`.

    Args:
      path: the folder.
      split: the split's name.
      manifest: dict.
      shards: list of shard paths.
      indices: list of int64 [records, 2], one per shard; -1 where a record's place is unknown.
      problems: list of str.
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
  def open(cls, path, split="train", tolerate_damage=False):
    """Opens a split.

    Args:
      path: a folder written by `build-data`.
      split: name of a split in its manifest, "train" or "heldout".
      tolerate_damage: open it although shards or indices are missing, cut off or broken; `problems` says which. The
        records concerned raise `RecordError` when they are read.

    Returns:
      A `Dataset`.

    Raises:
      UserError: no such folder, no (or no readable) manifest, no such split, or a shard that is missing or does not
        have the size that its index says.
    """
    manifest = read_manifest(path)
    path = pathlib.Path(path)
    if split not in manifest["splits"]:
      raise UserError(f"data set {path} has no split {split!r} (it has {', '.join(manifest['splits'])})")
    shards, indices, problems = [], [], []
    for entry in manifest["splits"][split]["shards"]:
      shard, examples = path / entry["file"], entry["examples"]
      if tolerate_damage:
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

  def __len__(self):
    return int(self._starts[-1])

  def __getitem__(self, number):
    """The `Example` at `number`; `tfrecords.RecordError` if it cannot be read, naming file and record."""
    try:
      return schema.decode(self.read(number))
    except schema.ExampleError as error:
      raise tfrecords.RecordError(f"{self.where(number)}:", str(error), error.key) from None

  def __repr__(self):
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

  def read(self, number):
    """The bytes of record `number`, checked; `tfrecords.RecordError` if that fails."""
    shard, record = self._locate(number)
    offset, length = self._indices[shard][record].tolist()
    if offset < 0:
      raise tfrecords.RecordError(f"{self._shards[shard]}: record {record}", "is lost: nothing says where it begins")
    file = self._descriptor(shard) if len(self._shards) <= _KEPT_OPEN else self._shards[shard]
    return tfrecords.read_record(file, offset, length, self._shards[shard], record)

  def picture(self, number):
    """Reads an example and decodes its picture.

    Args:
      number: of the example.

    Returns:
      (PIL image of mode RGB, `Example`).

    Raises:
      tfrecords.RecordError: the record cannot be read, or its picture cannot be decoded or has another size than the
        record says.
    """
    example = self[number]
    size = (example.width, example.height) if example.width and example.height else None
    try:
      return images.open_image(example.image, size=size), example
    except images.ImageError as error:
      raise tfrecords.RecordError(f"{self.where(number)}:", str(error), example.key) from None

  def where(self, number):
    """File and record of example `number`, for messages."""
    shard, record = self._locate(number)
    return f"{self._shards[shard]}: record {record}"

  def place(self, number):
    """(shard's file name, number of the record in it, byte at which it begins or -1) of example `number`."""
    shard, record = self._locate(number)
    return self._shards[shard].name, record, int(self._indices[shard][record, 0])

  def captions(self):
    """All captions of the split, in order: a list of tuples, the primary caption first. Read once, then kept.

    Raises:
      UserError: a record cannot be read.
    """
    if self._captions is None:
      try:
        self._captions = [self[number].captions for number in range(len(self))]
      except tfrecords.RecordError as error:
        raise UserError(str(error)) from None
    return self._captions

  def readable(self):
    """Yields (number, `Example`) of the examples that can be read, in order; pictures are not decoded."""
    for number in range(len(self)):
      try:
        example = self[number]
      except tfrecords.RecordError:  # It will be told of when training meets it.
        continue
      yield number, example

  def first_captions(self, count):
    """The first `count` distinct primary captions of the examples that can be read (fewer where there are no more)."""
    captions = {}
    for _, example in self.readable() if count else ():
      captions[example.captions[0]] = None
      if len(captions) == count:
        break
    return list(captions)

  def _locate(self, number):
    if not -len(self) <= number < len(self):
      raise IndexError(f"example {number} of {len(self)}")
    number = number % len(self)
    shard = int(np.searchsorted(self._starts, number, side="right")) - 1
    return shard, number - int(self._starts[shard])

  def _descriptor(self, shard):
    with self._lock:
      if shard not in self._descriptors:
        self._descriptors[shard] = tfrecords.open_shard(self._shards[shard])
      return self._descriptors[shard]


def check_local(path):
  """Raises `UserError` for an address such as gs://bucket/folder, of which pathlib would make a folder named "gs:"."""
  if "://" in str(path):
    raise UserError(f"{path} is an address: data sets are read and written in folders, mount or copy it first")


def read_manifest(path):
  """Reads and checks the manifest of a data set folder.

  Args:
    path: the folder.

  Returns:
    dict, see `build.build`.

  Raises:
    UserError: no folder, no manifest, or one that this version cannot read.
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
