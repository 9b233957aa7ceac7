"""What a source is: an ordered list of parts, each of which streams items.

A part is a unit of work: a tar, some row groups of a table, a slice of a listing. It is small, can be pickled, and is
read by one process. Nothing depends on which process reads it, or when.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from PIL import Image

from aurora_jax import text
from aurora_jax.data import images

# A longer file or record is no image that anybody trains on. It could fill the memory.
MAXIMAL_IMAGE_BYTES = 2**28
PART_ITEMS = 4096  # items of a part, where the source is a listing

# Kinds of records that are left out. The manifest counts them by kind.
NO_CAPTION, BAD_CAPTION, NO_IMAGE = "no caption", "captions that cannot be used", "no image"
SAME_KEY, BAD_NAME, DAMAGED = "keys that occur twice", "names that are not allowed", "damaged parts of the source"


def words(caption: str) -> tuple[str, ...]:
  """The lower-cased alphanumeric words of a caption, in order."""
  return tuple(re.findall(r"[^\W_]+", caption.lower()))


@dataclasses.dataclass(frozen=True)
class Item:
  """One image of a source, not yet decoded.

  Attributes:
    key: names it within the source.
    captions: at least one; the first is the primary caption.
    group: items of one group stay on one side of the held-out split by words.
    location: path of the image file, or what else `Part.read` needs.
    image: the encoded image; None if it is in a file.
    scores: numbers that the source has about the item, by the names of `filters.SCORES`.
    features: float features that are stored in the record.
    weights: mixing weights of the captions; empty if there are none.
  """

  key: str
  captions: tuple[str, ...]
  group: str = ""
  location: str = ""
  image: bytes | None = None
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
  features: Mapping[str, float] = dataclasses.field(default_factory=dict)
  weights: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rejected:
  """A record of a source that cannot be used.

  Attributes:
    key: names it within the source.
    reason: one line.
    kind: under which it is counted.
  """

  key: str
  reason: str
  kind: str


class Part(Protocol):
  """A part of a source. It can be pickled."""

  def items(self) -> Iterator[Item | Rejected]:
    """Yields the items in a fixed order. What cannot be read is a `Rejected`, never an exception."""
    ...

  def files(self) -> Iterable[str]:
    """Paths of the files that it reads, as far as they are known: a part whose files have changed is built again."""
    ...

  def read(self, item: Item, resolution: int) -> bytes | Image.Image:
    """The encoded image of an item, or a rendered one, [resolution, resolution].

    Raises:
      images.ImageError: it cannot be read.
    """
    ...


class FilePart:
  """A base class of parts whose items hold their image or the path of its file."""

  def items(self) -> Iterator[Item | Rejected]:
    """See `Part`."""
    raise NotImplementedError

  def files(self) -> Iterable[str]:
    """See `Part`. These are the items' own; a part of an archive replaces this."""
    return (item.location for item in self.items() if isinstance(item, Item) and item.location)

  def read(self, item: Item, resolution: int) -> bytes | Image.Image:
    """See `Part`."""
    del resolution
    return item.image if item.image is not None else read_image_file(item.location)


class Source(Protocol):
  """A collection of images with captions.

  Attributes:
    name: short, used in file names.
    description: one line for the manifest.
    licence: one line for the manifest.
    count: number of items, if that is known without reading them.
  """

  name: str
  description: str
  licence: str
  count: int | None

  def parts(self) -> Iterable[Part]:
    """The parts, in a fixed order. Cheap: nothing is read but listings and headers."""
    ...


@dataclasses.dataclass(frozen=True)
class PartedSource:
  """A `Source` of which `list_parts` gives the parts."""

  name: str
  description: str
  licence: str
  list_parts: Callable[[], Iterable[Part]]
  count: int | None = None

  def parts(self) -> Iterable[Part]:
    """See `Source`."""
    return self.list_parts()


def read_image_file(path: str) -> bytes:
  """The bytes of an image file. `images.ImageError` if it cannot be read or is too long."""
  try:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      if size > MAXIMAL_IMAGE_BYTES:
        raise too_long(size)
      return file.read(MAXIMAL_IMAGE_BYTES)
  except OSError as error:
    raise images.ImageError(error.strerror or "the file cannot be read") from None


def too_long(size: int) -> images.ImageError:
  """The error for an encoded image of too many bytes."""
  return images.ImageError(f"the file has {size:,} bytes, at most {MAXIMAL_IMAGE_BYTES:,} are read", images.TOO_LARGE)


def name_of(path: str | os.PathLike, default: str = "pictures") -> str:
  """A data set's name from the name of a file or folder: lower-case letters, digits and underscores."""
  stem = os.path.basename(os.path.abspath(path))
  return re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_").lower() or default


def shown(path: str | os.PathLike) -> str:
  """A path for messages."""
  return text.printable(text.path_text(path))


def is_inside(name: str) -> bool:
  """Whether a name in an archive or a table stays within its folder: not absolute, no "..", no null byte."""
  return bool(name) and not name.startswith(("/", "\\")) and "\0" not in name and ".." not in re.split(r"[/\\]", name)


def caption_lines(raw: object) -> tuple[tuple[str, ...], str | None]:
  """The captions in a field of a table or file.

  Args:
    raw: text, UTF-8 bytes, a number (captions such as "1984" become numbers in tables), or a list of these. Each is one
      caption; runs of white space become one space. None, NaN and booleans are no captions.

  Returns:
    (captions without repetitions, why one of them cannot be used or None).
  """
  captions, problem = [], None
  for value in raw if isinstance(raw, (list, tuple)) else (raw,):
    if isinstance(value, bytes):
      try:
        value = text.decode(value)
      except text.TextError as error:
        problem = problem or f"a caption {error}"
        continue
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf:
      value = str(value)
    if not isinstance(value, str):
      continue
    line = " ".join(text.lines(value))
    reason = text.unusable(line) if line else None
    if reason:
      problem = problem or f"a caption {reason}: {text.printable(line, 60)}"
    elif line:
      captions.append(line)
  return tuple(dict.fromkeys(captions)), problem


@dataclasses.dataclass(frozen=True)
class CaptionFields:
  """Which fields of a record are captions.

  Attributes:
    weights: {field: mixing weight}, the first field first. Empty: the first of `defaults` that a record has.
    defaults: names that are tried.
  """

  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
  defaults: tuple[str, ...] = ("caption", "text", "captions", "txt", "prompt", "label_text")

  def choose(self, available: Iterable[str]) -> str | None:
    """The caption field among a table's columns, or None; with `weights`, the first of them that is there."""
    available = set(available)
    return next((name for name in self.weights or self.defaults if name in available), None)

  def collect(self, record: Mapping[str, object]) -> tuple[tuple[str, ...], tuple[float, ...], str | None]:
    """The captions of a record.

    Returns:
      (captions, their weights if fields were named, why a caption cannot be used or None). The weight of a field is
      shared by its captions.
    """
    names = list(self.weights) or [name for name in self.defaults if name in record][:1]
    found, problem = {}, None
    for name in names:
      captions, reason = caption_lines(record.get(name))
      problem = problem or reason
      for caption in captions:
        found.setdefault(caption, self.weights.get(name, 1.0) / len(captions))
    return tuple(found), tuple(found.values()) if len(self.weights) > 1 else (), problem


def item_or_rejected(
  key: str,
  record: Mapping[str, object],
  fields: CaptionFields,
  *,
  image: bytes | None = None,
  location: str = "",
  scores: Mapping[str, float] | None = None,
  features: Mapping[str, float] | None = None,
) -> Item | Rejected:
  """The item of a record; a `Rejected` if it has no image or no usable caption."""
  key = text.printable(key)
  captions, weights, problem = fields.collect(record)
  if not captions:
    return Rejected(key, problem or "no caption", BAD_CAPTION if problem else NO_CAPTION)
  if not image and not location:
    return Rejected(key, "no image", NO_IMAGE)
  if image is not None and len(image) > MAXIMAL_IMAGE_BYTES:
    error = too_long(len(image))
    return Rejected(key, str(error), error.kind)
  return Item(key, captions, key, location, image, scores or {}, features or {}, weights)
