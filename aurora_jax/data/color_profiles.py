"""Colours as an ICC profile means them, converted to sRGB.

The numbers of an image mean colours only together with its profile: (90, 160, 60) is another green in Adobe RGB than in
sRGB. Cameras, scanners and phones write profiles; the generator's images have none, so they are sRGB.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

# Colour space of a profile: the mode that its transform reads.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "LAB": "LAB"}
# A profile that changes no colour by more than this (of 255) is sRGB itself, rounded in some other way.
_TOLERANCE = 1
_NO_COLOUR_MANAGEMENT = b""


def to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
  """An image without transparency as sRGB.

  Args:
    image: of 8 bits per value and any mode that has no alpha channel.
    profile: ICC profile, or None. One that is broken, or is of another colour space than the image, does not count: then
      the numbers are taken for sRGB, and those of CMYK are converted without colour management.

  Returns:
    PIL image of mode RGB.
  """
  profile = profile or _NO_COLOUR_MANAGEMENT
  space = _space(profile)
  if space == "RGB" and image.mode != "CMYK":
    image = image.convert("RGB")
  if image.mode == "LAB" and space != "LAB":
    space, profile = "LAB", _NO_COLOUR_MANAGEMENT  # Lab values mean colours by themselves
  if space is not None and image.mode == _MODES[space]:
    transform = _transform(profile, space)
    if transform is not None:
      return transform.apply(image)
  return image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _space(profile: bytes) -> str | None:
  """The colour space of a profile; None for a broken one or one of another kind."""
  if not profile:
    return None
  try:
    space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip().upper()
  except Exception:  # whatever the library makes of damaged bytes
    return None
  return space if space in _MODES else None


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, space: str) -> ImageCms.ImageCmsTransform | None:
  """The transform to sRGB, which threads may share; None if there is nothing to convert or the profile cannot be used."""
  mode = _MODES[space]
  try:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    # The library's cache of one colour would be shared by the threads, too.
    transform = ImageCms.buildTransform(
      source, ImageCms.createProfile("sRGB"), mode, "RGB", flags=ImageCms.Flags.NOCACHE
    )
    sample = _sample(mode)
    changed = np.abs(np.asarray(transform.apply(sample), int) - np.asarray(sample.convert("RGB"), int)).max()
  except Exception:  # likewise, and profiles without a way to sRGB
    return None
  return transform if changed > _TOLERANCE else None


def _sample(mode: str) -> Image.Image:
  """An image of all greys, or of colours from everywhere; of CMYK and Lab one that is never the same after conversion."""
  if mode == "L":
    return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
  if mode == "RGB":
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(27, 27, 3))
  return Image.new(mode, (1, 1), (10, 100, 50, 30)[: len(mode)])
