"""How much the pictures of one prompt differ, beside how much those of different prompts do."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Diversity:
  """How much pictures differ, as root mean square distance of pixels in [-1, 1].

  Attributes:
    within: mean over pairs of pictures of the same prompt; 0 means that latents change nothing.
    between: mean over pairs of pictures of different prompts: the yardstick.
    ratio: within / between.
  """

  within: float
  between: float
  ratio: float


def diversity(images):
  """How much the pictures of one prompt differ, beside how much those of different prompts do.

  Args:
    images: [P, L, R, R, 3] in [-1, 1].

  Returns:
    Diversity; `within` is NaN for one latent, `between` for one prompt.
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
