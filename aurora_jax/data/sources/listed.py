"""A source whose items are all listed in memory."""

import dataclasses
from collections.abc import Callable, Iterator

from PIL import Image

from aurora_jax.data import shaping
from aurora_jax.data.sources.base import FilePart, Item, Rejected

_LEAST_PART, _MOST_PARTS = 512, 4096


@dataclasses.dataclass(frozen=True)
class Files:
  """The files that a source found and that are not images of its items.

  Attributes:
    counts: {kind: number}, such as "images without a caption file". Every file counts once.
    passed_over: (key, reason) of files that are neither images of items nor rejected nor caption files of items.
    captions_left_out: (key of the caption file, reason) of lines that are not captions.
  """

  counts: dict[str, int]
  passed_over: tuple[tuple[str, str], ...] = ()
  captions_left_out: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class ListedSource:
  """A collection of items.

  Attributes:
    name: short, used in file names.
    description: one line for the manifest.
    licence: one line for the manifest.
    items: in a fixed order.
    rejected: (key, reason) of images that cannot be used.
    reader: (item, resolution) -> the encoded image or a PIL image of mode RGB, [resolution, resolution]. It raises
      `images.ImageError`. None reads the file at `Item.location`.
    files: the other files, for a source that searches files.
  """

  name: str
  description: str
  licence: str
  items: tuple[Item, ...]
  rejected: tuple[tuple[str, str], ...]
  reader: Callable[[Item, int], bytes | Image.Image] | None = None
  files: Files | None = None

  @property
  def count(self) -> int | None:
    """See `Source`."""
    return len(self.items)

  def parts(self) -> list["ListedPart"]:
    """See `Source`."""
    size = max(_LEAST_PART, len(self.items) // _MOST_PARTS)
    starts = range(0, len(self.items), size)
    return [ListedPart(self.items[start : start + size], self.reader) for start in starts]

  def render(self, item: Item, resolution: int) -> Image.Image:
    """The image of an item, [resolution, resolution]. Raises `images.ImageError`."""
    part = ListedPart((item,), self.reader)
    return shaping.render(part.read(item, resolution), resolution).image


@dataclasses.dataclass(frozen=True)
class ListedPart(FilePart):
  """Items of a `ListedSource`."""

  listed: tuple[Item, ...]
  reader: Callable[[Item, int], bytes | Image.Image] | None = dataclasses.field(default=None, repr=False)

  def items(self) -> Iterator[Item | Rejected]:
    """See `Part`."""
    return iter(self.listed)

  def read(self, item: Item, resolution: int) -> bytes | Image.Image:
    """See `Part`."""
    return super().read(item, resolution) if self.reader is None else self.reader(item, resolution)
