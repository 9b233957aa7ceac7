"""Smooth random warps of images: shift, scale, rotation and reflection. Pixels from outside are white.

If the stored images have at least twice the wanted resolution, the means of all 2 x 2 neighbors are computed once per
image. The warp then interpolates between the means. The result is as smooth as a warp at twice the resolution followed
by averaging, at a third of its cost. The identity warp gives exactly the average.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from aurora_jax.errors import UserError

DRAWS = 5


@dataclasses.dataclass(frozen=True)
class Augment:
  """Strength of the warp. By default nothing is changed.

  Attributes:
    shift: largest shift along each axis, as a fraction of the side.
    scale: the image is enlarged or shrunk by a factor of at most 1 + scale, uniform in the logarithm.
    rotate: largest rotation in each direction, in degrees.
    flip: reflect half of the images left to right (wrong for images of text).
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
  def active(self) -> bool:
    """Whether anything is changed."""
    return bool(self.shift or self.scale or self.rotate or self.flip)


def working_side(stored: int, resolution: int) -> int:
  """Side of the images for `prepare`, in pixels: twice the wanted resolution if the stored side allows it."""
  return 2 * resolution if stored >= 2 * resolution else resolution


def prepare(pixels: np.ndarray, resolution: int) -> np.ndarray:
  """The part of the warp that does not depend on the random numbers.

  Args:
    pixels: uint8 [S, S, 3] with S = `resolution` or S = 2 * `resolution`.
    resolution: side of the result of `warp`.

  Returns:
    The argument `prepared` of `warp`, uint8. With S = `resolution` these are the pixels. Otherwise [S + 1, S + 1, 3],
    the mean of the four pixels at each corner of the pixel grid; pixels outside are white.
  """
  if pixels.shape[0] == resolution:
    return pixels
  sums = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), constant_values=255).astype(np.uint16)
  sums = sums[1:] + sums[:-1]
  sums = sums[:, 1:] + sums[:, :-1]
  return ((sums + 2) // 4).astype(np.uint8)


def warp(prepared: np.ndarray, resolution: int, inverse: Sequence[float]) -> np.ndarray:
  """Warps one image.

  Args:
    prepared: result of `prepare`.
    resolution: side of the result.
    inverse: float [6], a row of `inverse_affine`.

  Returns:
    uint8 [resolution, resolution, 3].
  """
  a, b, c, d, e, f = inverse
  if prepared.shape[0] == resolution:
    resampling = Image.Resampling.BICUBIC
    c, f = c * resolution, f * resolution
  else:
    # Two pixels per pixel of the result. Half a pixel is added because the means lie at corners of the pixel grid.
    resampling = Image.Resampling.BILINEAR
    a, b, d, e = 2 * a, 2 * b, 2 * d, 2 * e
    c, f = 2 * resolution * c + 0.5, 2 * resolution * f + 0.5
  image = Image.fromarray(prepared).transform(
    (resolution, resolution), Image.Transform.AFFINE, (a, b, c, d, e, f), resample=resampling, fillcolor=(255, 255, 255)
  )
  return np.asarray(image)


def inverse_affine(augment: Augment, draws: np.ndarray) -> np.ndarray:
  """The affine maps from points of the result to points of the image.

  Args:
    augment: strength of the warp.
    draws: float [b, DRAWS] in [0, 1): horizontal shift, vertical shift, scale, rotation, reflection. A value of 1/2
      changes nothing; for the reflection any value below 1/2.

  Returns:
    float64 [b, 6], rows (a, b, c, d, e, f). Point (x, y) of the result shows the image's point
    (a x + b y + c, d x + e y + f). Coordinates start at the upper left corner; the unit is the side of the image.
  """
  centered = 2 * np.asarray(draws, np.float64) - 1
  x = 0.5 + augment.shift * centered[:, 0]
  y = 0.5 + augment.shift * centered[:, 1]
  shrink = (1 + augment.scale) ** -centered[:, 2]
  angle = np.radians(augment.rotate * centered[:, 3])
  mirror = np.where(augment.flip & (centered[:, 4] >= 0), -1.0, 1.0)
  a, b = mirror * shrink * np.cos(angle), mirror * shrink * np.sin(angle)
  d, e = -shrink * np.sin(angle), shrink * np.cos(angle)
  return np.stack([a, b, 0.5 - a * x - b * y, d, e, 0.5 - d * x - e * y], axis=1)
