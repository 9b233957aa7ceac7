"""The figures of a judge whose embeddings are known."""

import numpy as np
import pytest

from aurora_jax.evaluation import figures
from aurora_jax.evaluation.judge import Judge


def fake_judge(captions):
  """Reads the caption's position off the first pixel's red."""
  return Judge(
    embed_images=lambda images: np.eye(len(captions))[np.rint(np.asarray(images)[:, 0, 0, 0]).astype(int)],
    embed_captions=lambda words: np.eye(len(captions))[[captions.index(w) for w in words]],
  )


def test_frechet_distances_of_embeddings():
  """Sets of known moments: one moved by 3 in one direction is at 9 from the other, whose halves are at 16."""
  rng = np.random.default_rng(0)
  half = rng.standard_normal((50, 3)).astype(np.float32)
  real = np.stack([half, half + np.array([0, 4, 0], np.float32)], axis=1).reshape(100, 3)
  features = {0: real, 1: real[::-1] + np.array([3, 0, 0], np.float32)}
  clip = Judge(lambda images: features[int(images[0, 0, 0, 0])][: len(images)], None)
  images = lambda kind, count=100: np.full((count, 2, 2, 3), kind, np.float32)
  found = figures.frechet_figures(clip, images(1), images(0))
  assert found == pytest.approx({"judge/frechet": 9, "judge/frechet_real_halves": 16}, rel=1e-5)
  assert set(figures.frechet_figures(clip, images(1), images(0, 1))) == {"judge/frechet"}


def test_judge_figures_repeat_each_caption_over_its_latents():
  captions = [f"caption {n}" for n in range(40)]
  images = np.zeros((3, 2, 4, 4, 3))
  images[..., 0] = np.array([[5, 5], [6, 39], [0, 0]])[:, :, None, None]
  found = figures.judge_figures(fake_judge(captions), images, [5, 6, 7], captions, prefix="judge/heldout_")
  assert found["judge/heldout_top1_of_all"] == pytest.approx(3 / 6)
  assert found["judge/heldout_top1_of_32"] == pytest.approx(3 / 6)  # the wrong ones tie with all but one: lost
  assert found["judge/heldout_images"] == 6 and found["judge/heldout_captions"] == 40
  assert found["judge/heldout_diversity_within"] > 0
  single = figures.judge_figures(fake_judge(captions), images[:, :1], [5, 6, 7], captions)
  assert "judge/diversity_within" not in single and single["judge/top1_of_all"] == pytest.approx(2 / 3)
