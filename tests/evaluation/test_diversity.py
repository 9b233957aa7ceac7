"""Diversity of images whose distances are known."""

import math

import numpy as np
import pytest

from aurora_jax.evaluation.diversity import diversity


def test_diversity_by_hand():
  # One pixel per image: prompt 0 shows 0 and 0.5, prompt 1 shows -1 and -1.
  images = np.array([[0.0, 0.5], [-1.0, -1.0]])[:, :, None, None, None] * np.ones((2, 2, 1, 1, 3))
  result = diversity(images)
  assert result.within == pytest.approx((0.5 + 0.0) / 2, abs=1e-6)
  assert result.between == pytest.approx((1 + 1 + 1.5 + 1.5) / 4)
  assert result.ratio == pytest.approx(result.within / result.between)


def test_diversity_without_pairs():
  assert math.isnan(diversity(np.zeros((3, 1, 2, 2, 3))).within)
  assert math.isnan(diversity(np.zeros((1, 3, 2, 2, 3))).between)
