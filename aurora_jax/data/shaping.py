"""Shapes an image for a data set: center square, Lanczos to the resolution, and encoding.

An image that needs no change keeps its bytes (`Encoding.method` "keep"): its format is JPEG, PNG or WebP, it has one
frame and the resolution's size, no transparency, no rotation in EXIF and no color profile other than sRGB.
"""

import dataclasses
import io

from PIL import Image

from aurora_jax.data import images
from aurora_jax.errors import UserError

METHODS = ("keep", "png", "jpeg", "webp")
_QUALITY_WITHOUT_SUBSAMPLING = 90  # from here on, colors have the resolution of the image


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How images are stored.

  Attributes:
    method: "png", "jpeg", "webp" (lossy), or "keep": an image that needs no change keeps its bytes; of the others, a
      JPEG becomes a JPEG, a lossy WebP a WebP, and the rest PNG.
    quality: of JPEG and WebP, from 1 to 100.
  """

  method: str = "png"
  quality: int = 95

  def __post_init__(self):
    if self.method not in METHODS:
      raise UserError(f"encoding must be one of {', '.join(METHODS)}, not {self.method}")
    if not 1 <= self.quality <= 100:
      raise UserError(f"quality must be between 1 and 100, not {self.quality}")


@dataclasses.dataclass(frozen=True)
class Rendered:
  """A decoded and resized image.

  Attributes:
    image: PIL image of mode RGB, [resolution, resolution].
    original: (width, height) of the encoded image, upright, in pixels.
    format: of the encoded image, such as "JPEG"; "" for an image that was rendered.
    unchanged: whether the encoded image could be stored as it is.
  """

  image: Image.Image
  original: tuple[int, int]
  format: str = ""
  unchanged: bool = False

  @property
  def enlarged(self) -> bool:
    """Whether the original is smaller than the result."""
    return min(self.original) < self.image.width


def render(source: bytes | Image.Image, resolution: int, header: images.Header | None = None) -> Rendered:
  """Decodes an image, crops its center square and resamples it.

  Args:
    source: an encoded image, or a PIL image of mode RGB.
    resolution: side of the result, in pixels.
    header: header of the encoded image, if the caller has read it.

  Returns:
    A `Rendered`.

  Raises:
    images.ImageError: the image cannot be read.
  """
  if not isinstance(source, bytes):
    return Rendered(images.square(source, resolution), (resolution, resolution))
  opened = images.open_image(source, least_side=2 * resolution)
  header = header or images.header(source)
  size = header.size if header else opened.size
  unchanged = header is not None and header.plain and opened.size == (resolution, resolution) == size
  square = opened if unchanged else images.square(opened, resolution)
  return Rendered(square, size, header.format if header else "", unchanged)


def encode(rendered: Rendered, source: bytes | Image.Image, encoding: Encoding) -> bytes:
  """The bytes to store.

  Args:
    rendered: the image.
    source: what it was rendered from.
    encoding: how it is stored.
  """
  method = encoding.method
  if method == "keep":
    if rendered.unchanged and isinstance(source, bytes):
      return source
    method = {"JPEG": "jpeg", "MPO": "jpeg", "WEBP": "webp"}.get(rendered.format, "png")
  if method == "png":
    return images.encode_png(rendered.image)
  buffer = io.BytesIO()
  if method == "jpeg":
    fine = encoding.quality >= _QUALITY_WITHOUT_SUBSAMPLING
    rendered.image.save(buffer, "JPEG", quality=encoding.quality, subsampling=0 if fine else 2)
  else:
    rendered.image.save(buffer, "WEBP", quality=encoding.quality)
  return buffer.getvalue()
