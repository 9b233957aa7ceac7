"""What the judge finds, as named scalars for metrics.jsonl. Values that are not finite are left out: JSON has none."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.evaluation.color import ColorCheck
from aurora_jax.evaluation.diversity import diversity
from aurora_jax.evaluation.judge import Judge
from aurora_jax.evaluation.retrieval import caption_key
from aurora_jax.ops import frechet


def judge_figures(
  judge: Judge,
  images: np.ndarray,
  caption_indices: Sequence[int] | np.ndarray,
  captions: Sequence[str],
  prefix: str = "judge/",
) -> dict[str, float]:
  """Retrieval and diversity of a set of images.

  Args:
    judge: ranks the captions.
    images: [P, L, R, R, 3] in [-1, 1], L images per prompt.
    caption_indices: int [P], positions in `captions`.
    captions: all captions that compete.
    prefix: put before every name, "judge/" or "judge/heldout_".

  Returns:
    top1_of_32 (top1_of_M with only M < 32 distinct captions), top1_of_all, their chance levels, and the numbers of
    captions and images. With more than one latent and prompt also diversity_within, diversity_between and
    diversity_ratio.

  Raises:
    UserError: images of another number of axes.
  """
  images = np.asarray(images)
  if images.ndim != 5:
    raise UserError(f"images [prompts, latents, R, R, 3] expected, not {images.shape}")
  result = judge.retrieval(
    images.reshape((-1,) + images.shape[2:]), np.repeat(np.asarray(caption_indices), images.shape[1]), captions
  )
  figures = {
    f"top1_of_{result.few}": result.top1_of_few,
    "top1_of_all": result.top1_of_all,
    f"chance_of_{result.few}": result.chance_of_few,
    "chance_of_all": result.chance_of_all,
    "captions": result.captions,
    "images": result.images,
  }
  figures = _finite({prefix + name: float(value) for name, value in figures.items()})
  if images.shape[1] > 1 and images.shape[0] > 1:
    figures |= diversity_figures(images, prefix)
  return figures


def diversity_figures(images: np.ndarray, prefix: str = "judge/") -> dict[str, float]:
  """How much images [P, L, R, R, 3] of one prompt differ: the fields of `diversity.Diversity`, after `prefix`."""
  spread = dataclasses.asdict(diversity(images))
  return _finite({f"{prefix}diversity_{name}": value for name, value in spread.items()})


def frechet_figures(judge: Judge, generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
  """Frechet distances of the judge's embeddings. Their units are the judge's own: only values of one judge compare.

  Args:
    judge: embeds the images.
    generated: [n, R, R, 3] in [-1, 1].
    real: [m, R, R, 3] in [-1, 1].

  Returns:
    judge/frechet, the distance between both sets. With two real images or more also judge/frechet_real_halves, the
    distance between two halves of the real ones: the fewer images, the larger the distance of equal sets.
  """
  features = judge.embed_images(real)
  pairs = {"judge/frechet": (judge.embed_images(generated), features)}
  if len(features) > 1:
    pairs["judge/frechet_real_halves"] = features[::2], features[1::2]
  return _finite({name: frechet.distance(*map(_moments, pair)) for name, pair in pairs.items()})


def color_figures(checks: Sequence[ColorCheck], prefix: str = "judge/colour/") -> dict[str, float]:
  """Color checks: hues and difference per prompt (degrees), how many agree and how many there are."""
  figures = {}
  for check in checks:
    name = "_".join(caption_key(check.caption))
    figures[f"{prefix}{name}/hue"] = check.generated.hue
    figures[f"{prefix}{name}/hue_real"] = check.real.hue
    figures[f"{prefix}{name}/difference"] = check.difference
  figures[prefix + "right"] = float(sum(check.agrees for check in checks))
  figures[prefix + "asked"] = float(len(checks))
  return _finite(figures)


def _moments(features: np.ndarray) -> frechet.Moments:
  moments = frechet.Moments(features.shape[1])
  moments.add(features)
  return moments


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
  return {name: value for name, value in figures.items() if np.isfinite(value)}
