"""Encoded pictures to arrays and back, whatever their mode: always RGB, upright, on white."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class ImageError(Exception):
  """Bytes that are not a readable picture. The message says why."""


def open_image(data, least_side=None, size=None):
  """Decodes a picture.

  Args:
    data: bytes of a PNG, JPEG, WebP, BMP or GIF (its first frame).
    least_side: a JPEG may be reduced while it is decoded (by 2, 4 or 8, several times faster) as long as both its sides
      keep this many pixels.
    size: (width, height) that the encoded picture must have, in pixels, or None.

  Returns:
    PIL image of mode RGB: turned upright as its EXIF says, transparency laid on white, 16-bit values scaled to 8.

  Raises:
    ImageError: no picture, a broken one, or one of another size.
  """
  try:
    image = Image.open(io.BytesIO(data))
    if size is not None and image.size != tuple(size):
      raise ImageError(f"{image.width}x{image.height} pixels instead of {size[0]}x{size[1]}")
    if least_side is not None:
      image.draft(None, (least_side, least_side))
    image.load()
    return to_rgb(_upright(image))
  except ImageError:
    raise
  except UnidentifiedImageError:  # Its own message names an object in memory.
    raise ImageError(f"not a readable picture: {len(data)} bytes of no known format") from None
  # Pillow's decoders raise most of the built-in exceptions on broken files: OSError, SyntaxError, ValueError,
  # struct.error, ZeroDivisionError ... A broken picture must not stop a build of millions.
  except Exception as error:
    raise ImageError(f"not a readable picture: {error}") from None


def _upright(image):
  try:
    return ImageOps.exif_transpose(image)
  except Exception:
    return image  # A broken EXIF block says nothing about the orientation; the pixels are whole.


def to_rgb(image):
  """Converts a PIL image of any mode to RGB, transparency laid on white and 16 bits scaled to 8."""
  if image.mode.startswith("I"):  # I;16 and its byte orders, and I, as which Pillow opens 16-bit grey PNGs
    values = np.asarray(image).astype(np.int64)
    image = Image.fromarray(np.clip((values + 128) // 257, 0, 255).astype(np.uint8))
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")


def decode_image(data):
  """Decodes a picture to uint8 [H, W, 3]; see `open_image`."""
  return np.asarray(open_image(data))


def square(image, resolution, resampling=Image.Resampling.LANCZOS):
  """Cuts out the centre square over the short side and resamples it.

  Args:
    image: PIL image, RGB.
    resolution: side of the result, in pixels.
    resampling: Pillow's filter.

  Returns:
    PIL image [resolution, resolution], RGB.
  """
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  # Cropped first: a filter that runs over a `box` of the whole picture would look beyond its borders.
  image = image.crop((left, top, left + side, top + side))
  if resampling == Image.Resampling.BOX and side % resolution == 0:
    return image.reduce(side // resolution)  # The same, but rounded once instead of once per axis, and faster.
  return image.resize((resolution, resolution), resampling)


def encode_png(image):
  """Encodes a PIL image as PNG: fast rather than smallest (zlib level 3)."""
  buffer = io.BytesIO()
  image.save(buffer, "PNG", compress_level=3)
  return buffer.getvalue()
