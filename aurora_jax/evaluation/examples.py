"""Examples of an evaluation that a report shows: images next to their prompts."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from aurora_jax.evaluation.color import ColorCheck


@dataclasses.dataclass(frozen=True)
class ExpertExample:
  """One generated image and the expert of each of its pixels.

  Attributes:
    caption: the prompt.
    image: [R, R, 3] in [-1, 1].
    layers: {layer: int [r, r] or [r * r]}, the expert of each feature point.
    experts: {layer: number of experts}.
  """

  caption: str
  image: np.ndarray
  layers: Mapping[str, np.ndarray]
  experts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class HeldOutExample:
  """A prompt that is not in the training data.

  Attributes:
    caption: the prompt.
    real: its image in the data set, [R, R, 3] in [-1, 1].
    generated: [L, R, R, 3] in [-1, 1], one image per latent.
  """

  caption: str
  real: np.ndarray
  generated: np.ndarray


@dataclasses.dataclass(frozen=True)
class ColorExample:
  """A prompt that names a color.

  Attributes:
    check: compares the colors of the images.
    real: the prompt's image in the data set, [R, R, 3] in [-1, 1].
    generated: [L, R, R, 3] in [-1, 1], one image per latent.
  """

  check: ColorCheck
  real: np.ndarray
  generated: np.ndarray
