"""Smooth random warps of pictures: shift, scale, rotation, mirror image. White comes in from outside.

Where the stored pictures have at least twice the asked resolution, the means of all 2 x 2 neighbours are made once per
picture and the warp only interpolates between them, at the asked resolution: as smooth, at every shift, as a warp at
twice the resolution that is then averaged, at a third of its cost. Without a change it is exactly the average.
"""

import dataclasses

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
  """Side at which pictures must be had for `prepare`, in pixels: twice the asked one where the stored ones allow it."""
  return 2 * resolution if stored >= 2 * resolution else resolution


def prepare(pixels, resolution):
  """The part of the warp that does not depend on the draws.

  Args:
    pixels: uint8 [S, S, 3], S = `resolution` or twice that.
    resolution: of the result of `warp`.

  Returns:
    uint8, for `warp`: S = resolution: the pixels. Else [S + 1, S + 1, 3], the means around each inner and outer corner
    of the pixels, white outside.
  """
  if pixels.shape[0] == resolution:
    return pixels
  sums = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=255).astype(np.uint16)
  sums = sums[1:] + sums[:-1]
  sums = sums[:, 1:] + sums[:, :-1]
  return ((sums + 2) // 4).astype(np.uint8)


def warp(prepared, resolution, inverse):
  """Warps one picture.

  Args:
    prepared: result of `prepare`.
    resolution: of the result.
    inverse: float [6], a row of `inverse_affine`.

  Returns:
    uint8 [resolution, resolution, 3].
  """
  a, b, c, d, e, f = inverse
  if prepared.shape[0] == resolution:
    resampling = Image.Resampling.BICUBIC
    c, f = c * resolution, f * resolution
  else:
    # Two pixels per pixel of the result, and half a pixel because a mean at a corner is a pixel's middle now.
    resampling = Image.Resampling.BILINEAR
    a, b, d, e = 2 * a, 2 * b, 2 * d, 2 * e
    c, f = 2 * resolution * c + 0.5, 2 * resolution * f + 0.5
  image = Image.fromarray(prepared).transform(
    (resolution, resolution), Image.Transform.AFFINE, (a, b, c, d, e, f), resample=resampling, fillcolor=(255, 255, 255)
  )
  return np.asarray(image)


def inverse_affine(augment, draws):
  """Where each point of the result comes from.

  Args:
    augment: an `Augment`.
    draws: float [b, DRAWS] in [0, 1): horizontal and vertical shift, scale, rotation, mirror image; 1/2 (for the mirror
      image: below 1/2) is no change.

  Returns:
    float64 [b, 6], rows (a, b, c, d, e, f): the result's point (x, y) shows the picture's point
    (a x + b y + c, d x + e y + f), measured from the upper left corner in sides of the picture.
  """
  centred = 2 * np.asarray(draws, np.float64) - 1
  x = 0.5 + augment.shift * centred[:, 0]
  y = 0.5 + augment.shift * centred[:, 1]
  shrink = (1 + augment.scale) ** -centred[:, 2]
  angle = np.radians(augment.rotate * centred[:, 3])
  mirror = np.where(augment.flip & (centred[:, 4] >= 0), -1.0, 1.0)
  a, b = mirror * shrink * np.cos(angle), mirror * shrink * np.sin(angle)
  d, e = -shrink * np.sin(angle), shrink * np.cos(angle)
  return np.stack([a, b, 0.5 - a * x - b * y, d, e, 0.5 - d * x - e * y], axis=1)
