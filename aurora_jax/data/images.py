"""Encoded pictures to arrays and back, whatever their mode: always RGB, upright, on white, in sRGB.

Pillow and the libraries under it say nothing on the terminal: what makes an image unreadable is an `ImageError` in words of
our own, and what does not (a broken EXIF block, tags out of order, many pixels) is of no interest to anybody.
"""

import contextlib
import ctypes
import functools
import io
import logging
import re
import struct
import warnings

import numpy as np
import PIL._imaging
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from aurora_jax.data import color_profiles

# Twice Pillow's own limit, as it has it: more pixels are taken for a decompression bomb.
MAXIMAL_PIXELS = 178_956_970
UNREADABLE, TOO_LARGE = "images that cannot be read", "images with too many pixels"

# Pillow starts Ghostscript for the first, and of the others it reads no more than the size.
_NOT_READ = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC")
# Formats whose first bytes can be mistaken for nothing else.
_SIGNED = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "PSD", "QOI")
_SIGNATURE_BYTES = 16
# Profiles of scanners and printers have megabytes; the limit guards against a few bytes that expand to gigabytes.
_MAXIMAL_CHUNK = 2**25
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT, _PNG_PROFILE = (b"tEXt", b"zTXt", b"iTXt"), (b"iCCP",)


def _quieten():
  """Keeps Pillow and libtiff from writing to the terminal, in this process."""
  warnings.filterwarnings("ignore", module=r"PIL\.")
  logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
  PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, _MAXIMAL_CHUNK)
  # libtiff prints its errors itself, from C. Pillow raises one for each of them, which says the same.
  with contextlib.suppress(OSError, AttributeError):  # a Pillow that is linked in another way
    set_handler = ctypes.CDLL(PIL._imaging.__file__).TIFFSetErrorHandler
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)


_quieten()


class ImageError(Exception):
  """Bytes that are not a readable picture. The message says why. `kind` is what to count it as."""

  def __init__(self, message: str, kind: str = UNREADABLE):
    super().__init__(message)
    self.kind = kind


@functools.cache
def _formats():
  """The formats that are read: all of Pillow's but those that run other programs or have no pixels."""
  Image.init()
  return tuple(name for name in Image.OPEN if name not in _NOT_READ)


@functools.cache
def readable_suffixes() -> frozenset[str]:
  """Suffixes of files that can be read, in lower case with the dot: a frozenset."""
  formats = _formats()
  return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def signature(head: bytes) -> str | None:
  """The format whose signature the first 16 bytes of a file are, such as "JPEG", or None."""
  _formats()
  for name in _SIGNED:
    if name in Image.OPEN and Image.OPEN[name][1](head[:_SIGNATURE_BYTES]):
      return name
  return None


def open_image(data: bytes, least_side: int | None = None, size: tuple[int, int] | None = None) -> Image.Image:
  """Decodes a picture.

  Args:
    data: bytes of a PNG, JPEG, WebP or of another format that Pillow reads (its first frame).
    least_side: a JPEG may be reduced while it is decoded (by 2, 4 or 8, several times faster) as long as both its sides
      keep this many pixels.
    size: (width, height) that the encoded picture must have, in pixels, or None.

  Returns:
    PIL image of mode RGB: turned upright as its EXIF says, transparency laid on white, 16-bit values scaled to 8, colours
    of an ICC profile converted to sRGB.

  Raises:
    ImageError: no picture, a broken one, one of another size, or one of more than `MAXIMAL_PIXELS`.
  """
  try:
    return _open(data, least_side, size)
  except ImageError:
    raise
  # Pillow's decoders raise most of the built-in exceptions on broken files: OSError, SyntaxError, ValueError,
  # struct.error, ZeroDivisionError ... A broken picture must not stop a build of millions.
  except Exception as error:
    reason = error
  # Comments and profiles that are damaged or huge say nothing about the pixels.
  for names in (_PNG_TEXT, _PNG_TEXT + _PNG_PROFILE):
    lean = _without_chunks(data, names)
    if lean is None:
      continue
    try:
      return _open(lean, least_side, size)
    except ImageError:
      raise
    except Exception:
      continue
  raise _image_error(reason, data) from None


def _open(data, least_side, size):
  image = Image.open(io.BytesIO(data), formats=_formats())
  if size is not None and image.size != tuple(size):
    raise ImageError(f"{image.width}x{image.height} pixels instead of {size[0]}x{size[1]}")
  if image.width * image.height > MAXIMAL_PIXELS:
    raise _too_large(f"{image.width * image.height:,} pixels")
  if least_side is not None:
    image.draft(None, (least_side, least_side))
  bits = _bits(image)
  image.load()
  return to_rgb(_upright(image), bits)


def _too_large(what):
  return ImageError(f"not a readable picture: {what}, at most {MAXIMAL_PIXELS:,} are read", TOO_LARGE)


def _image_error(error, data):
  """The `ImageError` for what a decoder raised."""
  if isinstance(error, Image.DecompressionBombError):
    size = re.search(r"\d+", str(error))  # of the image or of a frame in it
    return _too_large(f"{int(size[0]):,} pixels" if size else "too many pixels")
  if isinstance(error, MemoryError):
    return ImageError("not a readable picture: it needs too much memory", TOO_LARGE)
  if not data:
    return ImageError("not a readable picture: an empty file")
  known = signature(data)
  if known is None and isinstance(error, UnidentifiedImageError):  # Its own message names an object in memory.
    return ImageError(f"not a readable picture: {len(data)} bytes of no known format")
  words = str(error).lower()
  state = "cut off" if "truncated" in words or "end of file" in words else "damaged"
  return ImageError(f"not a readable picture: {known or 'its'} data are {state}")


def _without_chunks(data, names):
  """A PNG without chunks of some names; None if it is no PNG or has none of them."""
  if not data.startswith(_PNG_SIGNATURE):
    return None
  kept, position = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
  found = False
  while position + 8 <= len(data):
    length, name = struct.unpack_from(">I4s", data, position)
    end = position + 12 + length
    if name in names:
      found = True
    else:
      kept.append(data[position:end])
    position = end
  return b"".join(kept) if found else None


def _upright(image):
  try:
    return ImageOps.exif_transpose(image)
  except Exception:
    return image  # A broken EXIF block says nothing about the orientation; the pixels are whole.


def to_rgb(image: Image.Image, bits: int = 16) -> Image.Image:
  """Converts a PIL image of any mode to RGB in sRGB: transparency laid on white, more than 8 bits scaled to 8.

  Args:
    image: the image.
    bits: of its values, where they are integers of more than 8.
  """
  profile = image.info.get("icc_profile")
  image = _eight_bits(image, bits)
  if image.mode == "La":
    image = image.convert("LA")
  if not image.has_transparency_data:
    image = color_profiles.to_rgb(image, profile)
  else:
    with_alpha = image.convert("RGBA")
    if profile:  # A profile of greys wants greys.
      colors = image.getchannel("L") if image.mode == "LA" else with_alpha.convert("RGB")
      colors = color_profiles.to_rgb(colors, profile)
      colors.putalpha(with_alpha.getchannel("A"))
      with_alpha = colors
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, with_alpha).convert("RGB")
  image.info = {}  # or the profile would be written into the next file, as if it still held
  return image


def _eight_bits(image, bits):
  """An image of 8 bits per value: of greys with more and of floats one of mode L or LA, else the same."""
  if image.mode.startswith("I"):  # I;16 and its byte orders, and I, as which Pillow opens some 16-bit greys
    values = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    largest = 2**bits - 1
    grey = Image.fromarray(np.clip((values * 255 + largest // 2) // largest, 0, 255).astype(np.uint8))
    if isinstance(transparent, int):
      grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
  if image.mode == "F":
    return Image.fromarray(_bytes_of_floats(np.asarray(image, np.float64)))
  return image


def _bits(image):
  """Bits of a grey image's values, if they have more than 8: of a TIFF what it says, if that is below 16; else 16."""
  stored = getattr(image, "tag_v2", {}).get(258, (16,))  # BitsPerSample
  bits = stored[0] if isinstance(stored, tuple) and stored else stored
  return bits if isinstance(bits, int) and 8 < bits < 16 else 16


def _bytes_of_floats(values):
  """uint8 from floats, whose range nothing names: 0 to 1, else 0 to 255, else 0 to 65535, whichever holds them first."""
  finite = np.isfinite(values)
  if not finite.all():
    raise ImageError("not a readable picture: some of its values are not finite")
  low, high = values.min(), values.max()
  for scale in (1, 255, 65535):
    if high <= scale:
      return np.clip(np.rint(values * (255 / scale)), 0, 255).astype(np.uint8)
  raise ImageError(f"not a readable picture: its values go from {low:g} to {high:g}")


def decode_image(data: bytes) -> np.ndarray:
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


def encode_png(image: Image.Image) -> bytes:
  """Encodes a PIL image as PNG: fast rather than smallest (zlib level 3)."""
  buffer = io.BytesIO()
  image.save(buffer, "PNG", compress_level=3)
  return buffer.getvalue()
