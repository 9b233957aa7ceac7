"""Mean colors of images: does "red heart" come out as red as the real one?"""

import dataclasses

import numpy as np

# A pixel counts as colored from this chroma on (0: gray, 1: a pure primary).
CHROMA_FLOOR = 0.15
# Two mean hues agree within this many degrees: red, orange, yellow, green and blue are further apart than that.
HUE_TOLERANCE = 30.0


@dataclasses.dataclass(frozen=True)
class MeanColor:
  """The mean color of the colored pixels of one or more images.

  Attributes:
    hue: degrees in [0, 360); NaN if no pixel is colored.
    rgb: the chroma-weighted mean color, three floats in [0, 1]; NaN if no pixel is colored.
    share: share of pixels that are colored.
  """

  hue: float
  rgb: tuple[float, float, float]
  share: float


@dataclasses.dataclass(frozen=True)
class ColorCheck:
  """Compares the generated images of a prompt with the real image by color.

  Attributes:
    caption: the prompt.
    real: color of the real image.
    generated: color of the generated images.
    difference: degrees between the hues, in [0, 180]; NaN if one of them has none.
    agrees: whether the difference is within the tolerance.
  """

  caption: str
  real: MeanColor
  generated: MeanColor
  difference: float
  agrees: bool


def mean_color(images: np.ndarray) -> MeanColor:
  """The mean hue of the colored pixels, weighted by chroma.

  Hue and chroma are the angle and the length of a color's projection along the gray axis. The weighted circular mean of
  hues is therefore the hue of the mean projection. White, gray and black have no chroma and do not count.

  Args:
    images: float [..., R, R, 3] in [-1, 1].

  Returns:
    `MeanColor`.
  """
  rgb = np.clip((np.asarray(images, np.float64).reshape(-1, 3) + 1) / 2, 0, 1)
  along = rgb[:, 0] - (rgb[:, 1] + rgb[:, 2]) / 2
  across = (rgb[:, 1] - rgb[:, 2]) * np.sqrt(3) / 2
  chroma = np.hypot(along, across)
  colored = chroma >= CHROMA_FLOOR  # False for a pixel that is NaN
  if not colored.any():
    return MeanColor(float("nan"), (float("nan"),) * 3, 0.0)
  hue = np.degrees(np.arctan2(across[colored].sum(), along[colored].sum())) % 360.0
  red, green, blue = np.average(rgb[colored], axis=0, weights=chroma[colored])
  return MeanColor(float(hue), (float(red), float(green), float(blue)), float(colored.mean()))


def hue_difference(first: float, second: float) -> float:
  """Degrees between two hues, in [0, 180]; NaN if one of them is NaN."""
  return abs((first - second + 180.0) % 360.0 - 180.0)


def check_color(caption: str, generated: np.ndarray, real: np.ndarray, tolerance: float = HUE_TOLERANCE) -> ColorCheck:
  """Compares the color of generated images with that of the real image.

  Args:
    caption: the prompt.
    generated: [L, R, R, 3] in [-1, 1], images of L latents.
    real: [R, R, 3] in [-1, 1].
    tolerance: degrees.

  Returns:
    `ColorCheck`.
  """
  theirs, ours = mean_color(real), mean_color(generated)
  difference = hue_difference(theirs.hue, ours.hue)
  return ColorCheck(caption, theirs, ours, difference, bool(difference <= tolerance))
