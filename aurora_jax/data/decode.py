"""Decodes an image to the pixels that training needs, in one go where the format allows it.

`shrink` reduces a JPEG by 2, 4 or 8 inside the decoder (DCT scaling), as far as both sides keep the wanted size. That
is several times faster than decoding every pixel. The pixels differ a little from decoding and averaging: the decoder
leaves out the high frequencies of each 8x8 block, averaging attenuates them. Other formats are not affected.

JPEGs of three or one channels without color profile and EXIF block are decoded by simplejpeg, all other images by
Pillow. Both contain libjpeg-turbo with the same settings and give the same pixels (tests/data/test_decode.py compares
them), so an image's pixels do not depend on which one decoded it. Both release Python's lock, so threads decode in
parallel.
"""

import numpy as np
import simplejpeg
from PIL import Image

from aurora_jax.data import images

FULL, SHRINK, AUTO = "full", "shrink", "auto"
_JPEG = b"\xff\xd8\xff"
_COLOR_SPACES = ("YCbCr", "Gray")
# Of smaller images, several scales can have the same size, and the two decoders may choose different ones.
_LEAST_SIDE = 16


def square_pixels(data: bytes, side: int, size: tuple[int, int] | None = None, shrink: bool = False) -> np.ndarray:
  """Decodes an image, crops the center square and resizes it.

  Args:
    data: an encoded image.
    side: side of the result, in pixels. A larger image is reduced by area averaging (Pillow's BOX), a smaller one
      enlarged (bicubic).
    size: (width, height) that the encoded image must have, in pixels, or None.
    shrink: whether a JPEG is first reduced inside the decoder, see above.

  Returns:
    uint8 [side, side, 3].

  Raises:
    images.ImageError: as `images.open_image`.
  """
  pixels = _plain_jpeg(data, side, size, shrink)
  if pixels is None:
    image = images.open_image(data, side if shrink else None, size)
  elif pixels.shape[:2] == (side, side):
    return pixels
  else:
    image = Image.fromarray(pixels)
  if image.size != (side, side):
    image = images.square(image, side, Image.Resampling.BOX if min(image.size) >= side else Image.Resampling.BICUBIC)
  return np.asarray(image)


def _plain_jpeg(data, side, size, shrink):
  """uint8 [H, W, 3] of a JPEG that simplejpeg decodes like Pillow; None for any other image, also a broken one."""
  # The names may also occur in the pixels' data by chance. Then Pillow decodes the image, with the same result.
  if not data.startswith(_JPEG) or b"ICC_PROFILE\0" in data or b"Exif\0\0" in data:
    return None
  try:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if (
      space not in _COLOR_SPACES
      or min(height, width) < _LEAST_SIDE
      or height * width > images.MAXIMAL_PIXELS
      or (size is not None and (width, height) != tuple(size))
    ):
      return None
    scale = _scale(height, width, side) if shrink else 1
    return simplejpeg.decode_jpeg(data, "RGB", min_height=-(-height // scale), min_width=-(-width // scale))
  except ValueError:  # cut off or corrupt: Pillow decides what can be had of it
    return None


def _scale(height, width, side):
  """The divisor that Pillow's draft mode chooses."""
  most = min(height // side, width // side)
  return next((scale for scale in (8, 4, 2) if most >= scale), 1)
