"""The captions of a shard in one small file, so that they can be had without reading the images.

`NAME.captions` next to `NAME.tfrecord`, all integers little-endian:

| bytes       | what                                                                   |
| ----------- | ---------------------------------------------------------------------- |
| 8           | "ajcap001"                                                             |
| 8           | size of the shard in bytes                                             |
| 8           | number of records                                                      |
| 8           | number of captions                                                     |
| 4 a record  | number of its captions                                                 |
| 4 a caption | length in bytes                                                        |
|             | the captions in UTF-8, those of a record in its order                  |
| 4           | CRC-32C of everything before                                           |

The file can be deleted at any time: it is made again from the shard.
"""

import contextlib
import itertools
import os
import pathlib
import struct
from collections.abc import Iterable, Sequence

import google_crc32c
import numpy as np

_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"ajcap001"
_CRC_BYTES = 4


def caption_path(path: str | os.PathLike) -> pathlib.Path:
  """Path of the caption index of the shard at `path`."""
  return pathlib.Path(path).with_suffix(".captions")


def write(path: str | os.PathLike, captions: Sequence[Sequence[str]]) -> None:
  """Writes the caption index of a shard, whole or not at all.

  Args:
    path: path of the shard, which is complete.
    captions: of each record, in order.

  Raises:
    OSError: the file cannot be written, or there is no shard.
  """
  encoded = [caption.encode() for some in captions for caption in some]
  data = b"".join(
    (
      _HEADER.pack(_MAGIC, os.stat(path).st_size, len(captions), len(encoded)),
      np.array([len(some) for some in captions], "<u4").tobytes(),
      np.array([len(caption) for caption in encoded], "<u4").tobytes(),
      *encoded,
    )
  )
  place = caption_path(path)
  partial = place.with_suffix(f".captions.{os.getpid()}")
  try:
    partial.write_bytes(data + struct.pack("<I", google_crc32c.value(data)))
    os.replace(partial, place)
  except OSError:
    partial.unlink(missing_ok=True)
    raise


def read(path: str | os.PathLike, records: int) -> list[tuple[str, ...]] | None:
  """Reads the caption index of a shard.

  Args:
    path: path of the shard.
    records: number of its records.

  Returns:
    The captions of each record, or None if there is no index, it is broken, or it belongs to another shard.
  """
  try:
    size, data = os.stat(path).st_size, caption_path(path).read_bytes()
  except OSError:
    return None
  if len(data) < _HEADER.size + _CRC_BYTES:
    return None
  body, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
  magic, shard_size, count, total = _HEADER.unpack_from(body)
  if (magic, shard_size, count) != (_MAGIC, size, records) or struct.pack("<I", google_crc32c.value(body)) != crc:
    return None
  counts = np.frombuffer(body, "<u4", count, _HEADER.size)
  lengths = np.frombuffer(body, "<u4", total, _HEADER.size + 4 * count)
  ends = (_HEADER.size + 4 * (count + total) + np.cumsum(lengths, dtype=np.int64)).tolist()
  captions = (body[end - length : end].decode() for end, length in zip(ends, lengths.tolist()))
  return [tuple(itertools.islice(captions, some)) for some in counts.tolist()]


def make(path: str | os.PathLike, captions: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
  """Writes the caption index of a shard, if all its records can be read and the folder can be written.

  Args:
    path: path of the shard.
    captions: of each record; () of one that cannot be read.

  Returns:
    The captions as a list.
  """
  found = list(captions)
  if all(found):
    with contextlib.suppress(OSError):  # a read-only folder; the next start reads the shard again
      write(path, found)
  return found
