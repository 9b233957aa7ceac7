"""TFRecord files (TensorFlow's framing) with an index file next to each, for random access.

A record in the file: its length (uint64), a masked CRC-32C of the length (uint32), the bytes, a masked CRC-32C of the
bytes (uint32), all little-endian. The index `NAME.index` next to `NAME.tfrecord` is a bare array of little-endian
uint64 pairs, one per record: where its frame begins in the file, and how many bytes its payload has.

A record is read at the place in its index, and both checksums are always checked. A corrupt record therefore does not
affect the next one, and no changed byte goes unnoticed.
"""

import array
import errno
import hashlib
import os
import pathlib
import struct
import types
from collections.abc import Iterator

import google_crc32c
import numpy as np

from aurora_jax import storage
from aurora_jax.data import remote_shards
from aurora_jax.errors import UserError

HEADER_BYTES = 12
FOOTER_BYTES = 4
FRAME_BYTES = HEADER_BYTES + FOOTER_BYTES
_MASK_DELTA = 0xA282EAD8


# Errors of the process, not of the file: they must not count as a corrupt record.
_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# A larger record is read only if the file is that long: a corrupt index may hold any length.
_LARGE = 2**26
ROW_BYTES = 16  # of an index
_CHECKED_ROWS = 2**15  # of an index at a time, so that checking a long one takes little memory


class RecordError(Exception):
  """A record that cannot be read. The message names the file and the record.

  Attributes:
    where: file and record, the beginning of the message.
    reason: the end of the message, such as "has a wrong checksum".
    key: key of the example; "" if it cannot be read.
  """

  def __init__(self, where: str, reason: str, key: str = ""):
    super().__init__(where, reason, key)  # all arguments, so that it can be pickled
    self.where, self.reason, self.key = where, reason, key

  def __str__(self) -> str:
    return f"{self.where} {self.reason}"


def masked_crc(data: bytes) -> int:
  """TensorFlow's masked CRC-32C of bytes: rotated right by 15 bits, plus a constant, modulo 2**32."""
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
  """The bytes of one record in a TFRecord file."""
  length = struct.pack("<Q", len(payload))
  return b"".join((length, struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))))


def shard_name(name: str, split: str, shard: int, shards: int) -> str:
  """File name of a shard, `NAME-SPLIT-00003-of-00128.tfrecord`."""
  return f"{name}-{split}-{shard:05d}-of-{shards:05d}.tfrecord"


def index_path(path: str | os.PathLike) -> pathlib.Path:
  """Path of the index of the shard at `path`."""
  return pathlib.Path(path).with_suffix(".index")


class ShardWriter:
  """Writes one shard and, when closed, its index file. A context manager.

  Attributes:
    path: path of the shard.
    index: list of (offset of the record's frame, length of its payload), in bytes.
    size: bytes written.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = pathlib.Path(path)
    self.index = []
    self.size = 0
    self._hash = hashlib.sha256()
    self._file = open(self.path, "wb")
    self.path.with_suffix(".captions").unlink(missing_ok=True)  # of a former shard of this name

  @property
  def sha256(self) -> str:
    """SHA-256 of the bytes written so far, as hexadecimal digits."""
    return self._hash.hexdigest()

  def write(self, payload: bytes) -> None:
    """Appends one record (bytes)."""
    framed = frame(payload)
    self._file.write(framed)
    self._hash.update(framed)
    self.index.append((self.size, len(payload)))
    self.size += len(framed)

  def close(self) -> None:
    """Closes the shard and writes its index file."""
    self._file.close()
    index_path(self.path).write_bytes(np.array(self.index, "<u8").tobytes())

  def __enter__(self) -> "ShardWriter":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, traceback: types.TracebackType | None
  ) -> None:
    self.close()


def read_record(
  file: str | os.PathLike | int | storage.RangeReader,
  offset: int,
  length: int,
  name: str | os.PathLike | None = None,
  number: int | None = None,
) -> bytes:
  """Reads one record and checks it.

  Args:
    file: a path, or a descriptor open for reading. Threads may share a descriptor: its position is not used.
    offset: offset of the record's frame, in bytes.
    length: length of the payload, in bytes.
    name: name of the file for messages, if `file` is a descriptor.
    number: number of the record for messages.

  Returns:
    The payload.

  Raises:
    RecordError: the file is truncated or cannot be read, a length differs from the index, or a checksum is wrong.
  """
  if isinstance(file, (str, os.PathLike)):
    opened = open_shard(file)
    try:
      return read_record(opened, offset, length, name or file, number)
    finally:
      remote_shards.close_file(opened)
  where = _where(name, offset, number)
  wanted = length + FRAME_BYTES
  try:
    data, there = read_bytes(file, offset, wanted)
  except OSError as error:
    raise unreadable(error, where) from None
  if there < wanted:
    raise RecordError(where, f"is cut off: {there} of {wanted} bytes")
  return _payload(data, length, where)


def read_records(
  file: str | os.PathLike | int | storage.RangeReader, rows: np.ndarray, name: str | os.PathLike, first: int
) -> list[bytes | RecordError]:
  """Reads neighboring records of a shard at once and checks each of them.

  Args:
    file: a path, or a descriptor open for reading (see `read_record`).
    rows: int64 [n, 2], rows of the shard's index that follow each other.
    name: name of the file for messages.
    first: number of the first of these records in the shard.

  Returns:
    For each record its payload, or the error that `read_record` would raise.
  """
  offset, rows = int(rows[0, 0]), rows.tolist()
  wanted = sum(rows[-1]) + FRAME_BYTES - offset
  whole = wanted <= _LARGE and all(a[0] + a[1] + FRAME_BYTES == b[0] for a, b in zip(rows, rows[1:]))
  data = b""
  if whole:
    try:
      opened = open_shard(file) if isinstance(file, (str, os.PathLike)) else file
      try:
        data, _ = read_bytes(opened, offset, wanted)
      finally:
        if opened is not file:
          remote_shards.close_file(opened)
    except (OSError, RecordError):
      whole = False
  if not whole or len(data) < wanted:  # each record on its own, for its own error
    return [_read_or_error(file, begin, length, name, first + i) for i, (begin, length) in enumerate(rows)]
  found = []
  for i, (begin, length) in enumerate(rows):
    try:
      part = data[begin - offset : begin - offset + length + FRAME_BYTES]
      found.append(_payload(part, length, _where(name, begin, first + i)))
    except RecordError as error:
      found.append(error)
  return found


def _read_or_error(file, offset, length, name, number):
  try:
    return read_record(file, offset, length, name, number)
  except RecordError as error:
    return error


def _where(name, offset, number):
  return f"{name}: record at byte {offset}" if number is None else f"{name}: record {number} at byte {offset}"


def read_bytes(file: int | storage.RangeReader, offset: int, wanted: int) -> tuple[bytes, int]:
  """(bytes, number of bytes that are there) of an open file. The bytes are empty if a long read cannot succeed."""
  if isinstance(file, storage.RangeReader):
    there = wanted if wanted <= _LARGE + FRAME_BYTES else min(wanted, max(0, file.size - offset))
    data = file.pread(wanted, offset) if there == wanted else b""
    return data, min(there, len(data)) if data else there
  there = wanted if wanted <= _LARGE + FRAME_BYTES else min(wanted, max(0, os.fstat(file).st_size - offset))
  data = os.pread(file, wanted, offset) if there == wanted else b""
  while there == wanted and len(data) < wanted:  # a mounted file system may return fewer bytes
    more = os.pread(file, wanted - len(data), offset + len(data))
    data += more
    there = wanted if more else len(data)
  return data, there


def _payload(data, length, where):
  """The payload of a frame of `length` bytes, after its checks."""
  stored_length, length_crc = struct.unpack_from("<QI", data)
  if length_crc != masked_crc(data[:8]) or stored_length != length:
    raise RecordError(where, f"has a broken header (length {stored_length}, the index says {length})")
  payload = data[HEADER_BYTES:-FOOTER_BYTES]
  if struct.unpack_from("<I", data, len(data) - FOOTER_BYTES)[0] != masked_crc(payload):
    raise RecordError(where, "has a wrong checksum")
  return payload


def open_shard(path: str | os.PathLike) -> int | storage.RangeReader:
  """Opens a file for `read_record`; `remote_shards.close_file` closes it. Raises `RecordError` if that fails."""
  try:
    return remote_shards.open_file(path)
  except OSError as error:
    raise unreadable(error, f"{path}:") from None


def unreadable(error: OSError, where: str) -> RecordError | UserError:
  """The `RecordError` for a file that cannot be read, or a `UserError` if the process lacks resources."""
  if error.errno in _LACKING:
    return UserError(f"{where.removesuffix(':')} cannot be read: {error.strerror}")
  return RecordError(where, error.strerror or str(error))


def scan(path: str | os.PathLike) -> np.ndarray:
  """Reads the headers of all records of a shard.

  Args:
    path: path of the shard.

  Returns:
    int64 [records, 2]: offset of each record's frame and length of its payload, in bytes.

  Raises:
    RecordError: a header is broken, or the file ends within a record.
  """
  index, error = scan_to_error(path)
  if error is not None:
    raise error
  return index


def scan_to_error(path: str | os.PathLike) -> tuple[np.ndarray, RecordError | UserError | None]:
  """(index of the records before the first error, the error or None)."""
  entries, position, error = array.array("q"), 0, None
  try:
    with remote_shards.stream(path) as file:
      size = os.path.getsize(path)
      while position < size:
        where = f"{path}: record {len(entries) // 2} at byte {position}"
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
        entries.extend((position, length))
        position += length + FRAME_BYTES
  except OSError as caught:
    error = unreadable(caught, f"{path}:")
  except RecordError as caught:
    error = caught
  return np.array(entries, np.int64).reshape(-1, 2), error


def load_index(path: str | os.PathLike) -> np.ndarray:
  """Reads the index file of a shard. If there is none, the shard is scanned and the index file written if possible.

  Args:
    path: path of the shard.

  Returns:
    int64 [records, 2]: offset of each record's frame and length of its payload, in bytes.

  Raises:
    UserError: the shard is missing, its size differs from the index, the index is broken, or a scan fails.
  """
  path = pathlib.Path(path)
  size = shard_size(path)
  index = stored_index(path)
  if index is None:
    return _rebuild_index(path)
  check_size(path, size, int(index[-1].sum()) + FRAME_BYTES if len(index) else 0)
  return index


def shard_size(path: pathlib.Path) -> int:
  """Size of a shard in bytes. Raises `UserError` if it is missing."""
  try:
    return path.stat().st_size
  except OSError:
    raise UserError(f"shard {path} is missing") from None


def check_size(path: pathlib.Path, size: int, expected: int) -> None:
  """Raises `UserError` unless the shard ends where the last record of its index ends."""
  if size != expected:
    why = _compressed(path) or "it is truncated or was changed"
    raise UserError(f"shard {path} has {size} bytes, its index says {expected}: {why}")


def _compressed(path):
  """A message if TensorFlow has compressed the shard, else None."""
  try:
    with remote_shards.stream(path) as file:
      head = file.read(HEADER_BYTES)
  except OSError:
    return None
  if len(head) < HEADER_BYTES or struct.unpack_from("<I", head, 8)[0] == masked_crc(head[:8]):
    return None
  # The first two bytes of zlib data are a multiple of 31; the first of them names the method.
  kind = (
    "GZIP" if head[:2] == b"\x1f\x8b" else "ZLIB" if head[0] == 0x78 and (head[0] * 256 + head[1]) % 31 == 0 else ""
  )
  return f"it is compressed ({kind}), and shards are read as they are: decompress it" if kind else None


def stored_index(path: pathlib.Path) -> np.ndarray | None:
  """int64 [records, 2] from the index file of a shard; None if there is none. `UserError` if it is broken."""
  try:
    parts = list(index_rows(path))
  except FileNotFoundError:
    return None
  return np.concatenate(parts) if parts else np.zeros((0, 2), np.int64)


def index_rows(path: str | os.PathLike) -> Iterator[np.ndarray]:
  """Yields the index file of a shard in parts, int64 [n, 2].

  Raises:
    FileNotFoundError: there is none.
    UserError: it is broken.
  """
  broken = f"index {index_path(path)} is broken (delete it to have it made anew)"
  end = 0
  try:
    with open(index_path(path), "rb") as file:
      size = os.fstat(file.fileno()).st_size
      if size % ROW_BYTES:
        raise UserError(f"{broken}: {size} bytes are not whole pairs")
      while data := file.read(ROW_BYTES * _CHECKED_ROWS):
        rows = np.frombuffer(data, "<u8").astype(np.int64).reshape(-1, 2)
        ends = rows.sum(axis=1) + FRAME_BYTES
        # A length of 2**63 or more is negative here, and a sum that overflows ends below its beginning.
        if (rows < 0).any() or (ends < rows[:, 0]).any() or (rows[:, 0] != np.append(end, ends[:-1])).any():
          raise UserError(f"{broken}: its records do not follow each other")
        end = int(ends[-1])
        yield rows
  except FileNotFoundError:
    raise
  except OSError as error:
    raise UserError(f"{broken}: {error.strerror}") from None


def _rebuild_index(path):
  try:
    index = scan(path)
  except RecordError as error:
    raise UserError(str(error)) from None
  partial = index_path(path).with_suffix(f".index.{os.getpid()}")
  try:
    partial.write_bytes(index.astype("<u8").tobytes())
    os.replace(partial, index_path(path))
  except OSError:  # a read-only folder; the next start scans again
    pass
  return index
