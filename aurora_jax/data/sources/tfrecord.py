"""Image-text tfrecords of other programs, such as img2dataset's."""

import dataclasses
import os
import struct
from collections.abc import Iterable, Iterator

from aurora_jax import text
from aurora_jax.data import filters, images, schema, tfrecords
from aurora_jax.data.sources import base
from aurora_jax.data.sources.base import CaptionFields, FilePart, Item, PartedSource, Rejected
from aurora_jax.data.sources.listing import find_files

_IMAGE_FEATURES = ("image", "jpg", "jpeg", "png", "webp", "image/encoded", "image_raw", "image_bytes")
# `txt` first: img2dataset writes it as text also where `caption` is a number.
_CAPTION_FEATURES = ("txt", "caption", "text", "captions", "image/caption", "caption/text")
_KEY_FEATURES = ("key", "id", "image/filename", "image/key")


def tfrecord(
  path: str | os.PathLike, fields: CaptionFields = CaptionFields(), image_column: str | None = None
) -> PartedSource:
  """Files of `tf.train.Example` records with an encoded image and captions.

  Args:
    path: a file, or a folder that is searched for `*.tfrecord`, `*.tfrecords` and `*.tfrec`.
    fields: which features are captions.
    image_column: feature of the image; None takes the first of the usual names that holds an image. Others may be
      columns of a table, such as a file name in `image`.

  Returns:
    A source with one part per file.
  """
  fields = dataclasses.replace(fields, defaults=_CAPTION_FEATURES)
  shards = find_files(path, (".tfrecord", ".tfrecords", ".tfrec"), "tfrecord")
  names = (image_column,) if image_column else _IMAGE_FEATURES
  return PartedSource(
    name=base.name_of(path, "tfrecord"),
    description=f"tfrecords {base.shown(os.path.basename(os.path.abspath(path)))}",
    licence="unknown (the user's images)",
    list_parts=lambda: (ShardPart(shard, os.path.getsize(shard), fields, names) for shard in shards),
  )


@dataclasses.dataclass(frozen=True)
class ShardPart(FilePart):
  """One file of records."""

  path: str
  size: int
  fields: CaptionFields
  image_features: tuple[str, ...]

  def files(self) -> Iterable[str]:
    """See `base.Part`."""
    return (self.path,)

  def items(self) -> Iterator[Item | Rejected]:
    """See `base.Part`."""
    stem = os.path.splitext(os.path.basename(self.path))[0]
    number = 0
    try:
      for number, payload in enumerate(_payloads(self.path, self.size)):
        yield self._item(stem, number, payload)
    except (OSError, ValueError) as error:
      reason = f"shard is damaged after record {number:,}: {text.printable(error, 100)}"
      yield Rejected(text.printable(stem), reason, base.DAMAGED)

  def _item(self, stem, number, payload):
    try:
      record = schema.decode_features(payload)
    except schema.ExampleError as error:
      return Rejected(f"{text.printable(stem)}/{number}", str(error), base.DAMAGED)
    key = next((record[name][0] for name in _KEY_FEATURES if record.get(name)), str(number))
    key = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
    found = [record[name][0] for name in self.image_features if record.get(name)]
    found = [value for value in found if isinstance(value, bytes)]
    image = next((value for value in found if images.signature(value[:16])), found[0] if found else None)
    scores = filters.scores_of({name: values[0] for name, values in record.items() if len(values) == 1})
    return base.item_or_rejected(f"{stem}/{key}", record, self.fields, image=image, scores=scores)


def _payloads(path, size):
  """Yields the records of a file. ValueError says what is wrong with the next one."""
  with open(path, "rb") as file:
    while header := file.read(tfrecords.HEADER_BYTES):
      if len(header) < tfrecords.HEADER_BYTES:
        raise ValueError("it is cut off")
      length, crc = struct.unpack("<QI", header)
      if crc != tfrecords.masked_crc(header[:8]):
        raise ValueError("a header is broken (compressed files are not read)")
      if file.tell() + length + tfrecords.FOOTER_BYTES > size:
        raise ValueError("it is cut off")
      if length > 2 * base.MAXIMAL_IMAGE_BYTES:
        raise ValueError(f"a record has {length:,} bytes")
      payload, footer = file.read(length), file.read(tfrecords.FOOTER_BYTES)
      if len(footer) < tfrecords.FOOTER_BYTES:
        raise ValueError("it is cut off")
      if struct.unpack("<I", footer)[0] != tfrecords.masked_crc(payload):
        raise ValueError("a record has a wrong checksum")
      yield payload
