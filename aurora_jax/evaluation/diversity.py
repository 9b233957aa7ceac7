"""Diversity: how much images of one prompt differ, compared with images of different prompts."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Diversity:
  """Differences of images, as root mean square distances of pixels in [-1, 1].

  Attributes:
    within: mean over pairs of images of the same prompt; 0 if the latents change nothing.
    between: mean over pairs of images of different prompts.
    ratio: within / between.
  """

  within: float
  between: float
  ratio: float


def diversity(images: np.ndarray) -> Diversity:
  """Compares the images of each prompt with each other and with those of other prompts.

  Args:
    images: [P, L, R, R, 3] in [-1, 1].

  Returns:
    `Diversity`. With one latent `within` is NaN; with one prompt `between` is.
  """
  images = np.asarray(images, np.float32)
  prompts, latents = images.shape[:2]
  flat = images.reshape(prompts * latents, -1).astype(np.float64)
  squares = np.mean(flat**2, axis=1)
  distance = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * (flat @ flat.T) / flat.shape[1], 0))
  prompt = np.repeat(np.arange(prompts), latents)
  same = prompt[:, None] == prompt[None]
  pairs = ~np.eye(len(flat), dtype=bool)
  within = float(distance[same & pairs].mean()) if latents > 1 else float("nan")
  between = float(distance[~same].mean()) if prompts > 1 else float("nan")
  return Diversity(within, between, within / between if between else float("nan"))
