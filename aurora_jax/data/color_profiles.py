"""Converts images with an ICC profile to sRGB.

The values of an image define colors only together with its profile: (90, 160, 60) is another green in Adobe RGB than in
sRGB. Cameras, scanners and phones write profiles. A generator's images have none and are sRGB.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

# The mode that the transform of a profile reads, by the profile's color space.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "LAB": "LAB"}
# A profile that changes no color by more than this (of 255) is sRGB itself, with other rounding.
_TOLERANCE = 1
_NO_PROFILE = b""


def to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
  """Converts an image without transparency to sRGB.

  Args:
    image: 8 bits per value, any mode without an alpha channel.
    profile: ICC profile, or None. A profile that is broken, or has another color space than the image, is ignored. The
      values are then taken as sRGB; CMYK is converted without color management.

  Returns:
    PIL image of mode RGB.
  """
  profile = profile or _NO_PROFILE
  space = _space(profile)
  if space == "RGB" and image.mode != "CMYK":
    image = image.convert("RGB")
  if image.mode == "LAB" and space != "LAB":
    space, profile = "LAB", _NO_PROFILE  # Lab values need no profile
  if space is not None and image.mode == _MODES[space]:
    transform = _transform(profile, space)
    if transform is not None:
      return transform.apply(image)
  return image.convert("RGB")


def is_srgb(profile: bytes | None, mode: str) -> bool:
  """Whether `to_rgb` leaves the values of an image of mode L or RGB as they are: no usable profile, or that of sRGB."""
  space = _space(profile or _NO_PROFILE)
  if space is None or not (space == "RGB" or (space == "GRAY" and mode == "L")):
    return True
  return _transform(profile or _NO_PROFILE, space) is None


@functools.lru_cache(maxsize=64)
def _space(profile: bytes) -> str | None:
  """The color space of a profile; None for a broken profile or an unknown space."""
  if not profile:
    return None
  try:
    space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip().upper()
  except Exception:  # damaged bytes raise various exceptions
    return None
  return space if space in _MODES else None


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
  """The transform to sRGB, safe to share between threads; None if it changes nothing or the profile cannot be used."""
  mode = _MODES[space]
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    # The library's one-color cache is not safe to share between threads.
    transform = ImageCms.buildTransform(
      source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=ImageCms.Flags.NOCACHE
    )
    sample = _sample(mode)
    changed = np.abs(np.asarray(transform.apply(sample), int) - np.asarray(sample.convert("RGB"), int)).max()
  except Exception:  # damaged bytes, or a profile without a transform to sRGB
    return None
  return transform if changed > _TOLERANCE else None


def _sample(mode: str) -> Image.Image:
  """An image of all grays or of a grid of colors. For CMYK and Lab, one pixel that always changes in the conversion."""
  if mode == "L":
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
  if mode == "RGB":
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3))
  return Image.new(mode, (1, 1), (10, 100, 50, 30)[: len(mode)])
