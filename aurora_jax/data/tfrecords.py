"""TFRecord files (TensorFlow's framing) with an index beside each, so that any record is one read away.

A record in the file: its length (uint64), a masked CRC-32C of the length (uint32), the bytes, a masked CRC-32C of the
bytes (uint32), all little-endian. The index `NAME.index` beside `NAME.tfrecord` is a bare array of little-endian
uint64 pairs, one per record: where its frame begins in the file, and how many bytes its payload has.

A record is read at the place that its index gives and both checksums are checked, always. So damage to one record says
nothing about the next one, and nothing passes whose bytes are not those that were written.
"""

import errno
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


# What the process lacks, not the file: such an error must not pass for a damaged record.
_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Memory for a larger record is asked for only where the file is that long: a damaged index may name any length.
_LARGE = 2**26


class RecordError(Exception):
  """A record that cannot be read. The message names the file and, unless all of that is gone, the record.

  Attributes:
    where: file and record, the beginning of the message.
    reason: the rest of it, such as "has a wrong checksum".
    key: the example's key, "" where that much cannot be read.
  """

  def __init__(self, where, reason, key=""):
    super().__init__(where, reason, key)  # all of them, so that it can travel between processes
    self.where, self.reason, self.key = where, reason, key

  def __str__(self):
    return f"{self.where} {self.reason}"


def masked_crc(data):
  """TensorFlow's masked CRC-32C of bytes: rotated right by 15 bits, plus a constant, modulo 2**32."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def frame(payload):
  """The bytes that hold `payload` in a TFRecord file."""
  length = struct.pack("<Q", len(payload))
  return b"".join((length, struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))))


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
    RecordError: the file ends early or cannot be read, a length differs from the index, or a checksum is wrong.
  """
  if not isinstance(file, int):
    descriptor = open_shard(file)
    try:
      return read_record(descriptor, offset, length, name or file, number)
    finally:
      os.close(descriptor)
  where = f"{name}: record at byte {offset}" if number is None else f"{name}: record {number} at byte {offset}"
  wanted = length + FRAME_BYTES
  try:
    there = wanted if length <= _LARGE else min(wanted, max(0, os.fstat(file).st_size - offset))
    data = os.pread(file, wanted, offset) if there == wanted else b""
    while there == wanted and len(data) < wanted:  # A mounted file system may give less than there is.
      more = os.pread(file, wanted - len(data), offset + len(data))
      data += more
      there = wanted if more else len(data)
  except OSError as error:
    raise _unreadable(error, where) from None
  if there < wanted:
    raise RecordError(where, f"is cut off: {there} of {wanted} bytes")
  stored_length, length_crc = struct.unpack_from("<QI", data)
  if length_crc != masked_crc(data[:8]) or stored_length != length:
    raise RecordError(where, f"has a broken header (length {stored_length}, the index says {length})")
  payload = data[HEADER_BYTES:-FOOTER_BYTES]
  if struct.unpack("<I", data[-FOOTER_BYTES:])[0] != masked_crc(payload):
    raise RecordError(where, "has a wrong checksum")
  return payload


def open_shard(path):
  """A descriptor for `read_record`, to be closed; `RecordError` if there is no such file or it cannot be opened."""
  try:
    return os.open(path, os.O_RDONLY)
  except OSError as error:
    raise _unreadable(error, f"{path}:") from None


def _unreadable(error, where):
  """The `RecordError` for a file that cannot be read; `UserError` where the process is to blame."""
  if error.errno in _LACKING:
    return UserError(f"{where.removesuffix(':')} cannot be read: {error.strerror}")
  return RecordError(where, error.strerror or str(error))


def scan(path):
  """Reads the headers of a shard.

  Args:
    path: of the shard.

  Returns:
    int64 [records, 2]: where each record's frame begins and its payload's length, in bytes.

  Raises:
    RecordError: a header is broken, or the file ends within a record.
  """
  index, error = _scan_to_damage(path)
  if error is not None:
    raise error
  return index


def _scan_to_damage(path):
  """(the index of the records up to the first that cannot be found, why there are no more or None)."""
  entries, position, error = [], 0, None
  try:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      while position < size:
        where = f"{path}: record {len(entries)} at byte {position}"
        file.seek(position)
        header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES:
          raise RecordError(where, "is cut off within its header")
        length, crc = struct.unpack("<QI", header)
        if crc != masked_crc(header[:8]):
          why = None if entries else _compressed(path)
          raise RecordError(where, f"has a broken header{f': {why}' if why else ''}")
        if position + length + FRAME_BYTES > size:
          raise RecordError(where, f"is cut off: {size - position} of {length + FRAME_BYTES} bytes")
        entries.append((position, length))
        position += length + FRAME_BYTES
  except OSError as caught:
    error = _unreadable(caught, f"{path}:")
  except RecordError as caught:
    error = caught
  return np.array(entries, np.int64).reshape(-1, 2), error


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
  index = _stored_index(path)
  if index is None:
    return _rebuild_index(path)
  expected = int(index[-1].sum()) + FRAME_BYTES if len(index) else 0
  if size != expected:
    why = _compressed(path) or "it is truncated or was changed"
    raise UserError(f"shard {path} has {size} bytes, its index says {expected}: {why}")
  return index


def _compressed(path):
  """Words about a shard that TensorFlow has compressed, None for one that it has not."""
  try:
    with open(path, "rb") as file:
      head = file.read(HEADER_BYTES)
  except OSError:
    return None
  if len(head) < HEADER_BYTES or struct.unpack_from("<I", head, 8)[0] == masked_crc(head[:8]):
    return None
  # The two bytes of zlib are a multiple of 31, of which the first names the method.
  kind = (
    "GZIP" if head[:2] == b"\x1f\x8b" else "ZLIB" if head[0] == 0x78 and (head[0] * 256 + head[1]) % 31 == 0 else ""
  )
  return f"it is compressed ({kind}), and shards are read as they are: decompress it" if kind else None


def _stored_index(path):
  """int64 [records, 2] from the file beside a shard, None where there is none; `UserError` if it makes no sense."""
  broken = f"index {index_path(path)} is broken (delete it to have it made anew)"
  try:
    data = index_path(path).read_bytes()
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(f"{broken}: {error.strerror}") from None
  if len(data) % 16:
    raise UserError(f"{broken}: {len(data)} bytes are not whole pairs")
  index = np.frombuffer(data, "<u8").astype(np.int64).reshape(-1, 2)
  ends = index.sum(axis=1) + FRAME_BYTES
  # A length of 2**63 or more has become negative here, and sums that run over end below where they began.
  if (
    (index < 0).any() or (ends < index[:, 0]).any() or not np.array_equal(index[1:, 0], ends[:-1]) or index[:1, 0].any()
  ):
    raise UserError(f"{broken}: its records do not follow each other")
  return index


def salvage_index(path, records):
  """The index of a shard that may be damaged: what can be known of where its records are.

  No record is dropped: there are as many rows as records. No index of a damaged shard is written.

  Args:
    path: of the shard.
    records: how many the shard held when it was written.

  Returns:
    (int64 [records, 2] as of `load_index`, -1 where a record's place is unknown; words for what is wrong, or None).

  Raises:
    UserError: the shard holds more records than that: it is another one.
  """
  problem = None
  try:
    index = load_index(path)
  except UserError as error:
    problem = str(error)
    try:
      index = _stored_index(pathlib.Path(path))
    except UserError:
      index = None
    if index is None or len(index) != records:
      index, _ = _scan_to_damage(path)
  if len(index) > records:
    raise UserError(f"shard {path} holds {len(index)} examples, the manifest says {records}")
  if len(index) < records:
    problem = problem or f"shard {path} holds {len(index)} examples, the manifest says {records}"
    index = np.concatenate([index, np.full((records - len(index), 2), -1)])
  return index, problem


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
  return index
