"""Smooth random warps of pictures: shift, scale, rotation, mirror image. White comes in from outside."""

import dataclasses
import math

import numpy as np
from PIL import Image

from aurora_jax.errors import UserError

DRAWS = 5


@dataclasses.dataclass(frozen=True)
class Augment:
  """Strength of the warp; all off by default.

  Attributes:
    shift: largest shift along each axis, as a fraction of the side.
    scale: the picture is enlarged by at most 1 + scale and shrunk by at most 1 / (1 + scale), evenly in the logarithm.
    rotate: largest rotation to either side, in degrees.
    flip: mirror every other picture left to right (wrong for pictures of text).
  """

  shift: float = 0.0
  scale: float = 0.0
  rotate: float = 0.0
  flip: bool = False

  def __post_init__(self):
    for name, limit in (("shift", 1), ("scale", 10), ("rotate", 180)):
      if not 0 <= getattr(self, name) <= limit:
        raise UserError(f"augment {name} must be between 0 and {limit}, not {getattr(self, name)}")

  @property
  def active(self):
    return bool(self.shift or self.scale or self.rotate or self.flip)


def working_side(stored, resolution):
  """Side at which pictures are warped, in pixels: twice the asked resolution where the stored pictures allow it.

  A bilinear warp at twice the resolution, then averaged 2 x 2, is smooth at every shift and costs half of a bicubic one.
  """
  return 2 * resolution if stored >= 2 * resolution else resolution


def warp(pixels, resolution, augment, draws):
  """Warps one picture.

  Args:
    pixels: uint8 [S, S, 3], S = `resolution` or twice that (see `working_side`).
    resolution: of the result.
    augment: an `Augment`.
    draws: float [DRAWS] in [0, 1): horizontal and vertical shift, scale, rotation, mirror image.

  Returns:
    uint8 [resolution, resolution, 3].
  """
  side = pixels.shape[0]
  doubled = side == 2 * resolution
  image = Image.fromarray(pixels).transform(
      (side, side),
      Image.Transform.AFFINE,
      inverse_affine(side, augment, draws),
      resample=Image.Resampling.BILINEAR if doubled else Image.Resampling.BICUBIC,
      fillcolor=(255, 255, 255),
  )
  return np.asarray(image.reduce(2) if doubled else image)


def inverse_affine(side, augment, draws):
  """Coefficients (a, b, c, d, e, f): the output's point (x, y) shows the input's (a x + b y + c, d x + e y + f).

  Points are measured in pixels from the upper left corner. A draw of 1/2 (below 1/2 for the mirror image) is no change.
  """
  shift_x, shift_y, scale, angle = 2 * np.asarray(draws[:4], float) - 1
  shift_x, shift_y = shift_x * augment.shift * side, shift_y * augment.shift * side
  shrink = (1 + augment.scale) ** -scale
  angle = math.radians(augment.rotate * angle)
  mirror = -1.0 if augment.flip and draws[4] >= 0.5 else 1.0
  a, b = mirror * shrink * math.cos(angle), mirror * shrink * math.sin(angle)
  d, e = -shrink * math.sin(angle), shrink * math.cos(angle)
  middle = side / 2
  x, y = middle + shift_x, middle + shift_y
  return a, b, middle - a * x - b * y, d, e, middle - d * x - e * y
