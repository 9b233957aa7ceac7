"""TFRecord files (TensorFlow's framing) with an index beside each, so that any record is one read away.

A record in the file: its length (uint64), a masked CRC-32C of the length (uint32), the bytes, a masked CRC-32C of the
bytes (uint32), all little-endian. The index `NAME.index` beside `NAME.tfrecord` is a bare array of little-endian
uint64 pairs, one per record: where its frame begins in the file, and how many bytes its payload has.
"""

import hashlib
import os
import pathlib
import struct

import google_crc32c
import numpy as np

from aurora_jax.errors import UserError

HEADER_BYTES = 12
FOOTER_BYTES = 4
FRAME_BYTES = HEADER_BYTES + FOOTER_BYTES
_MASK_DELTA = 0xA282EAD8


class RecordError(Exception):
  """A record that cannot be read. The message names file and record."""


def masked_crc(data):
  """TensorFlow's masked CRC-32C of bytes: rotated right by 15 bits, plus a constant, modulo 2**32."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def frame(payload):
  """The bytes that hold `payload` in a TFRecord file."""
  length = struct.pack("<Q", len(payload))
  return b"".join(
      (length, struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))))


def shard_name(name, split, shard, shards):
  """File name of a shard, `NAME-SPLIT-00003-of-00128.tfrecord`."""
  return f"{name}-{split}-{shard:05d}-of-{shards:05d}.tfrecord"


def index_path(path):
  """Path of the index of the shard at `path`."""
  return pathlib.Path(path).with_suffix(".index")


class ShardWriter:
  """Writes one shard and, when closed, its index. A context manager.

  Attributes:
    path: of the shard.
    index: list of (where the record's frame begins, payload's length), in bytes.
    size: bytes written.
  """

  def __init__(self, path):
    self.path = pathlib.Path(path)
    self.index = []
    self.size = 0
    self._hash = hashlib.sha256()
    self._file = open(self.path, "wb")

  @property
  def sha256(self):
    """Of all that has been written, as hexadecimal digits."""
    return self._hash.hexdigest()

  def write(self, payload):
    """Appends one record (bytes)."""
    framed = frame(payload)
    self._file.write(framed)
    self._hash.update(framed)
    self.index.append((self.size, len(payload)))
    self.size += len(framed)

  def close(self):
    self._file.close()
    index_path(self.path).write_bytes(np.array(self.index, "<u8").tobytes())

  def __enter__(self):
    return self

  def __exit__(self, kind, value, traceback):
    self.close()


def read_record(file, offset, length, name=None, number=None):
  """Reads one record and checks it.

  Args:
    file: a path, or a descriptor open for reading (positions are not used, so threads may share it).
    offset: where the record's frame begins, in bytes.
    length: of the payload, in bytes.
    name: the file's name for messages, where `file` is a descriptor.
    number: the record's number for messages.

  Returns:
    The payload, bytes.

  Raises:
    RecordError: the file ends early, a length differs from the index, or a checksum is wrong.
  """
  if not isinstance(file, int):
    try:
      descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
      raise RecordError(f"{file}: {error.strerror}") from None
    try:
      return read_record(descriptor, offset, length, name or file, number)
    finally:
      os.close(descriptor)
  where = f"{name}: record at byte {offset}" if number is None else f"{name}: record {number} at byte {offset}"
  data = os.pread(file, length + FRAME_BYTES, offset)
  if len(data) < length + FRAME_BYTES:
    raise RecordError(f"{where} is cut off: {len(data)} of {length + FRAME_BYTES} bytes")
  stored_length, length_crc = struct.unpack_from("<QI", data)
  if length_crc != masked_crc(data[:8]) or stored_length != length:
    raise RecordError(f"{where} has a broken header (length {stored_length}, the index says {length})")
  payload = data[HEADER_BYTES:-FOOTER_BYTES]
  if struct.unpack("<I", data[-FOOTER_BYTES:])[0] != masked_crc(payload):
    raise RecordError(f"{where} has a wrong checksum")
  return payload


def scan(path):
  """Reads the headers of a shard.

  Args:
    path: of the shard.

  Returns:
    uint64 [records, 2]: where each record's frame begins and its payload's length, in bytes.

  Raises:
    RecordError: a header is broken, or the file ends within a record.
  """
  entries = []
  size = os.path.getsize(path)
  position = 0
  with open(path, "rb") as file:
    while position < size:
      file.seek(position)
      header = file.read(HEADER_BYTES)
      where = f"{path}: record {len(entries)} at byte {position}"
      if len(header) < HEADER_BYTES:
        raise RecordError(f"{where} is cut off within its header")
      length, crc = struct.unpack("<QI", header)
      if crc != masked_crc(header[:8]):
        raise RecordError(f"{where} has a broken header")
      if position + length + FRAME_BYTES > size:
        raise RecordError(f"{where} is cut off: {size - position} of {length + FRAME_BYTES} bytes")
      entries.append((position, length))
      position += length + FRAME_BYTES
  return np.array(entries, np.uint64).reshape(-1, 2)


def load_index(path):
  """The index of a shard: from the file beside it, else made by a scan and written there if possible.

  Args:
    path: of the shard.

  Returns:
    int64 [records, 2]: where each record's frame begins and its payload's length, in bytes.

  Raises:
    UserError: the shard is missing or does not end where the index says that it does, the index is broken, or (where
      there is none) the scan fails.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
  except OSError:
    raise UserError(f"shard {path} is missing") from None
  try:
    data = index_path(path).read_bytes()
  except FileNotFoundError:
    return _rebuild_index(path)
  broken = f"index {index_path(path)} is broken (delete it to have it made anew)"
  if len(data) % 16:
    raise UserError(f"{broken}: {len(data)} bytes are not whole pairs")
  index = np.frombuffer(data, "<u8").astype(np.int64).reshape(-1, 2)
  ends = index.sum(axis=1) + FRAME_BYTES
  if not np.array_equal(index[:, 0], np.concatenate([[0], ends])[:-1].astype(np.int64)):
    raise UserError(f"{broken}: its records do not follow each other")
  expected = int(ends[-1]) if len(ends) else 0
  if size != expected:
    raise UserError(f"shard {path} has {size} bytes, its index says {expected}: it is truncated or was changed")
  return index


def _rebuild_index(path):
  try:
    index = scan(path)
  except RecordError as error:
    raise UserError(str(error)) from None
  partial = index_path(path).with_suffix(f".index.{os.getpid()}")
  try:
    partial.write_bytes(index.astype("<u8").tobytes())
    os.replace(partial, index_path(path))
  except OSError:  # A read-only folder: the scan is repeated at the next start.
    pass
  return index.astype(np.int64)
