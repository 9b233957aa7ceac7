"""The index of a shard: checked, read in parts, or found as far as possible for a corrupt shard."""

import errno
import os
import pathlib

import numpy as np

from aurora_jax import storage
from aurora_jax.data import remote_shards, tfrecords
from aurora_jax.errors import UserError


def of_shard(
  shard: pathlib.Path, examples: int, tolerate_corruption: bool, hold: bool
) -> tuple[np.ndarray | None, str | None]:
  """Checks the index of a shard, or makes it.

  Args:
    shard: path of the shard.
    examples: number of records according to the manifest.
    tolerate_corruption: find what can be found of a corrupt shard.
    hold: return the index also if it can be read from its file later.

  Returns:
    (int64 [examples, 2] as of `salvage_index`, or None: it is to be read by `read_rows`; a problem or None).

  Raises:
    UserError: as `Dataset.open`.
  """
  count = None
  try:
    count, index = (None if hold else check_index(shard)), None
    if count is None:
      index = tfrecords.load_index(shard)
      count = len(index)
      if not hold and tfrecords.index_path(shard).exists():  # it has been written
        index = None
    if count == examples:
      return index, None
  except UserError:
    if not tolerate_corruption:
      raise
  if not tolerate_corruption:
    raise UserError(f"shard {shard} holds {count} examples, the manifest says {examples}")
  return salvage_index(shard, examples)


def check_index(path: str | os.PathLike) -> int | None:
  """Checks the index file of a shard as `tfrecords.load_index` does, in constant memory.

  Args:
    path: path of the shard.

  Returns:
    The number of records, or None if there is no index file.

  Raises:
    UserError: as `tfrecords.load_index`.
  """
  path = pathlib.Path(path)
  size, count, end = tfrecords.shard_size(path), 0, 0
  try:
    for rows in tfrecords.index_rows(path):
      count, end = count + len(rows), int(rows[-1].sum()) + tfrecords.FRAME_BYTES
  except FileNotFoundError:
    return None
  tfrecords.check_size(path, size, end)
  return count


def read_rows(file: str | os.PathLike | int | storage.RangeReader, first: int, count: int) -> np.ndarray:
  """Reads rows of an index file, without the others.

  Args:
    file: path of the index file, or the file opened for reading.
    first: number of the first record.
    count: number of records.

  Returns:
    int64 [count, 2] as of `tfrecords.load_index`.

  Raises:
    OSError: the file cannot be read, or it ends before.
  """
  if isinstance(file, (str, os.PathLike)):
    opened = remote_shards.open_file(file)
    try:
      return read_rows(opened, first, count)
    finally:
      remote_shards.close_file(opened)
  data, there = tfrecords.read_bytes(file, first * tfrecords.ROW_BYTES, count * tfrecords.ROW_BYTES)
  if there < count * tfrecords.ROW_BYTES:
    raise OSError(errno.EIO, "has become shorter")
  return np.frombuffer(data, "<i8").reshape(-1, 2)


def salvage_index(path: str | os.PathLike, records: int) -> tuple[np.ndarray, str | None]:
  """The index of a shard that may be corrupt, as far as it can be found.

  There is a row for every record. No index file of a corrupt shard is written.

  Args:
    path: path of the shard.
    records: number of records according to the manifest.

  Returns:
    (index, problem). index: int64 [records, 2] as of `tfrecords.load_index`; -1 if the place of a record is unknown.
    problem: a message, or None if nothing is wrong.

  Raises:
    UserError: the shard holds more records than the manifest says.
  """
  problem = None
  try:
    index = tfrecords.load_index(path)
  except UserError as error:
    problem = str(error)
    try:
      index = tfrecords.stored_index(pathlib.Path(path))
    except UserError:
      index = None
    if index is None or len(index) != records:
      index, _ = tfrecords.scan_to_error(path)
  if len(index) > records:
    raise UserError(f"shard {path} holds {len(index)} examples, the manifest says {records}")
  if len(index) < records:
    problem = problem or f"shard {path} holds {len(index)} examples, the manifest says {records}"
    index = np.concatenate([index, np.full((records - len(index), 2), -1)])
  return index, problem
