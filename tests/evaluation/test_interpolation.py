"""Walks between latents, against the definition of a great circle."""

import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.evaluation import interpolation


def test_a_quarter_of_a_circle():
  path = interpolation.latent_path(np.array([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]]), 3)
  half = np.sqrt(2)
  np.testing.assert_allclose(path, [[2, 0], [half, half], [0, 2], [-half, half], [-2, 0]], atol=1e-6)


def test_equal_angles_and_lengths_in_many_dimensions():
  points = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)
  points /= np.linalg.norm(points, axis=-1, keepdims=True)
  path = interpolation.latent_path(points, 6)
  assert path.dtype == np.float32 and path.shape == (6, 3, 64)
  np.testing.assert_array_equal(path[[0, -1]], points)
  np.testing.assert_allclose(np.linalg.norm(path, axis=-1), 1, atol=1e-6)
  angles = np.arccos(np.sum(path[1:] * path[:-1], -1))
  np.testing.assert_allclose(angles, np.broadcast_to(angles[0], angles.shape), atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0, 0.0])
def test_latents_on_one_line(factor):
  start = np.array([[1.0, -2.0, 0.5]])
  path = interpolation.latent_path(np.stack([start, factor * start]), 3)
  np.testing.assert_allclose(path[1], (1 + factor) / 2 * start, atol=1e-6)
  np.testing.assert_allclose(path[2], factor * start, atol=1e-6)


def test_too_few():
  with pytest.raises(UserError, match="at least two of them, got 1"):
    interpolation.latent_path(np.ones((1, 4)), 3)
  with pytest.raises(UserError, match="at least 2 steps"):
    interpolation.latent_path(np.ones((2, 4)), 1)
