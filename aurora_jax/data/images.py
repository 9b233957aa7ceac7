"""Decodes and encodes images of any mode. Decoded images are RGB in sRGB, upright, on a white background.

Pillow and its libraries print nothing. An unreadable image raises an `ImageError` with our own message. What does not
make an image unreadable (a broken EXIF block, tags out of order, many pixels) is ignored.
"""

import contextlib
import ctypes
import dataclasses
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

# Pillow raises an error above twice its own limit, because such a file may be a decompression bomb.
MAXIMAL_PIXELS = 178_956_970
UNREADABLE, TOO_LARGE = "images that cannot be read", "images with too many pixels"

# For the first, Pillow starts Ghostscript. Of the others it reads only the size.
_NOT_READ = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC")
# Formats with an unmistakable signature.
_SIGNED = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "PSD", "QOI")
_SIGNATURE_BYTES = 16
# Profiles of scanners and printers take megabytes. The limit guards against small chunks that expand to gigabytes.
_MAXIMAL_CHUNK = 2**25
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that swap width and height
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT, _PNG_PROFILE = (b"tEXt", b"zTXt", b"iTXt"), (b"iCCP",)


def _quieten():
  """Keeps Pillow and libtiff from writing to the terminal, in this process."""
  warnings.filterwarnings("ignore", module=r"PIL\.")
  logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)
  PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, _MAXIMAL_CHUNK)
  # libtiff prints its errors from C. Pillow raises an exception for each of them.
  with contextlib.suppress(OSError, AttributeError):  # a Pillow that is linked differently
    set_handler = ctypes.CDLL(PIL._imaging.__file__).TIFFSetErrorHandler
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)


_quieten()


class ImageError(Exception):
  """Bytes that are not a readable image. `kind` is the kind of error under which it is counted."""

  def __init__(self, message: str, kind: str = UNREADABLE):
    super().__init__(message)
    self.kind = kind


@functools.cache
def _formats():
  """The formats that are read: all of Pillow's except those that run other programs or give no pixels."""
  Image.init()
  return tuple(name for name in Image.OPEN if name not in _NOT_READ)


@functools.cache
def readable_suffixes() -> frozenset[str]:
  """Suffixes of the files that can be read, in lower case with the dot."""
  formats = _formats()
  return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def signature(head: bytes) -> str | None:
  """The format of a file by its first 16 bytes, such as "JPEG"; None if they are no known signature."""
  _formats()
  for name in _SIGNED:
    if name in Image.OPEN and Image.OPEN[name][1](head[:_SIGNATURE_BYTES]):
      return name
  return None


def open_image(data: bytes, least_side: int | None = None, size: tuple[int, int] | None = None) -> Image.Image:
  """Decodes an image.

  Args:
    data: an encoded image in PNG, JPEG, WebP or another format that Pillow reads. Of several frames the first is taken.
    least_side: a JPEG may be reduced by 2, 4 or 8 while it is decoded, which is several times faster, as long as both
      sides have at least this many pixels.
    size: (width, height) that the encoded image must have, in pixels, or None.

  Returns:
    PIL image of mode RGB: rotated as its EXIF says, transparency on white, 16-bit values scaled to 8 bits, colors
    converted from the ICC profile to sRGB.

  Raises:
    ImageError: not an image, or one that is corrupt, has another size, or has more than `MAXIMAL_PIXELS` pixels.
  """
  try:
    return _open(data, least_side, size)
  except ImageError:
    raise
  # Pillow's decoders raise many exceptions on corrupt files: OSError, SyntaxError, ValueError, struct.error,
  # ZeroDivisionError. One corrupt image must not stop a build of millions.
  except Exception as error:
    reason = error
  # A corrupt or huge comment or profile does not affect the pixels.
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


@dataclasses.dataclass(frozen=True)
class Header:
  """What the header of an encoded image says.

  Attributes:
    format: such as "JPEG".
    size: (width, height) of the upright image, in pixels.
    frames: more than 1 for an animation.
    plain: whether the stored values are the image in sRGB, as every decoder gives it: JPEG, PNG or WebP of one frame
      with 8 bits per value, no transparency, no rotation in EXIF, no color profile other than sRGB.
  """

  format: str
  size: tuple[int, int]
  frames: int
  plain: bool


def header(data: bytes) -> Header | None:
  """Reads the header of an encoded image without decoding it; None if it cannot be read."""
  try:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
      # The frames of an MPO are views for both eyes, those of a TIFF are pages.
      frames = getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP", "AVIF") else 1
      orientation = image.getexif().get(_ORIENTATION, 1)
      size = image.size if orientation not in _TURNED else image.size[::-1]
      plain = (
        image.format in ("JPEG", "PNG", "WEBP")
        and frames == 1
        and image.mode in ("L", "RGB")
        and not image.has_transparency_data
        and orientation in (0, 1)
        and color_profiles.is_srgb(image.info.get("icc_profile"), image.mode)
      )
      return Header(image.format or "", size, frames, plain)
  except Exception:  # as in `open_image`
    return None


def _too_large(what):
  return ImageError(f"not a readable image: {what}, at most {MAXIMAL_PIXELS:,} are read", TOO_LARGE)


def _image_error(error, data):
  """The `ImageError` for an exception of a decoder."""
  if isinstance(error, Image.DecompressionBombError):
    size = re.search(r"\d+", str(error))  # of the image or of a frame in it
    return _too_large(f"{int(size[0]):,} pixels" if size else "too many pixels")
  if isinstance(error, MemoryError):
    return ImageError("not a readable image: it needs too much memory", TOO_LARGE)
  if not data:
    return ImageError("not a readable image: an empty file")
  known = signature(data)
  if known is None and isinstance(error, UnidentifiedImageError):  # Its own message names an object in memory.
    return ImageError(f"not a readable image: {len(data)} bytes of no known format")
  words = str(error).lower()
  state = "cut off" if "truncated" in words or "end of file" in words else "damaged"
  return ImageError(f"not a readable image: {known or 'its'} data are {state}")


def _without_chunks(data, names):
  """A PNG without the chunks of some names; None if it is no PNG or has none of these chunks."""
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
    return image  # the orientation of a broken EXIF block is unknown


def to_rgb(image: Image.Image, bits: int = 16) -> Image.Image:
  """Converts a PIL image of any mode to RGB in sRGB: transparency on white, more than 8 bits scaled to 8.

  Args:
    image: the image.
    bits: bits per value, for integers of more than 8 bits.

  Returns:
    PIL image of mode RGB.
  """
  profile = image.info.get("icc_profile")
  image = _eight_bits(image, bits)
  if image.mode == "La":
    image = image.convert("LA")
  if not image.has_transparency_data:
    image = color_profiles.to_rgb(image, profile)
  else:
    with_alpha = image.convert("RGBA")
    if profile:  # a gray profile converts gray values
      colors = image.getchannel("L") if image.mode == "LA" else with_alpha.convert("RGB")
      colors = color_profiles.to_rgb(colors, profile)
      colors.putalpha(with_alpha.getchannel("A"))
      with_alpha = colors
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, with_alpha).convert("RGB")
  image.info = {}  # the profile no longer applies and must not be written to the next file
  return image


def _eight_bits(image, bits):
  """Converts gray images of more bits, or of floats, to mode L or LA. Other images are returned unchanged."""
  if image.mode.startswith("I"):  # I;16 and its byte orders, and I, as which Pillow opens some 16-bit grays
    values = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    largest = 2**bits - 1
    gray = Image.fromarray(np.clip((values * 255 + largest // 2) // largest, 0, 255).astype(np.uint8))
    if isinstance(transparent, int):
      gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray
  if image.mode == "F":
    return Image.fromarray(_bytes_of_floats(np.asarray(image, np.float64)))
  return image


def _bits(image):
  """Bits per value of a gray image of more than 8 bits: for a TIFF its tag, if that is below 16; otherwise 16."""
  stored = getattr(image, "tag_v2", {}).get(258, (16,))  # BitsPerSample
  bits = stored[0] if isinstance(stored, tuple) and stored else stored
  return bits if isinstance(bits, int) and 8 < bits < 16 else 16


def _bytes_of_floats(values):
  """Floats as uint8. Their range is the first of [0, 1], [0, 255] and [0, 65535] that holds them."""
  finite = np.isfinite(values)
  if not finite.all():
    raise ImageError("not a readable image: some of its values are not finite")
  low, high = values.min(), values.max()
  for scale in (1, 255, 65535):
    if high <= scale:
      return np.clip(np.rint(values * (255 / scale)), 0, 255).astype(np.uint8)
  raise ImageError(f"not a readable image: its values go from {low:g} to {high:g}")


def decode_image(data: bytes) -> np.ndarray:
  """Decodes an image to uint8 [H, W, 3]; see `open_image`."""
  return np.asarray(open_image(data))


def square(image: Image.Image, resolution: int, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
  """Crops the center square and resamples it.

  Args:
    image: PIL image of mode RGB.
    resolution: side of the result, in pixels.
    resampling: Pillow's filter.

  Returns:
    PIL image of mode RGB, [resolution, resolution].
  """
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  # Cropped first, because a filter on a `box` of the image reads beyond the borders of the box.
  image = image.crop((left, top, left + side, top + side))
  if resampling == Image.Resampling.BOX and side % resolution == 0:
    return image.reduce(side // resolution)  # the same filter, faster, and rounded once instead of once per axis
  return image.resize((resolution, resolution), resampling)


def encode_png(image: Image.Image) -> bytes:
  """Encodes a PIL image as PNG with zlib level 3, for speed."""
  buffer = io.BytesIO()
  image.save(buffer, "PNG", compress_level=3)
  return buffer.getvalue()
