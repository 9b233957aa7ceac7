"""Augmentation on the device, where its result follows by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.ops import augment

transform = jax.jit(augment.augment, static_argnums=2)
STILL = dict(shift=0.0, scale=0.0, rotate=0.0, coarsen=0.0, colour=0.0, noise=0.0)


@pytest.fixture(scope="module")
def images():
  return jax.random.uniform(jax.random.key(1), (3, 8, 8, 3), minval=-1.0)


def test_zeros_change_nothing(images):
  same = transform(jax.random.key(0), images, augment.Augmentation(**STILL))
  np.testing.assert_allclose(same, images, atol=1e-5)


def test_every_image_is_changed_in_its_own_way(images):
  repeated = jnp.repeat(images[:1], 3, axis=0)
  out = transform(jax.random.key(0), repeated, augment.Augmentation())
  assert out.shape == repeated.shape
  assert all(float(jnp.abs(out[i] - out[j]).max()) > 0.05 for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("rows, columns", [(0, 0), (1, 0), (0, -2), (3, 2)])
def test_whole_shifts_move_pixels_and_bring_white(images, rows, columns):
  shift = jnp.array([[rows, columns]] * 3, jnp.float32)
  moved = augment.shift_and_scale(images, shift, jnp.ones(3))
  framed = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=1.0)
  np.testing.assert_allclose(moved, framed[:, 4 + rows : 12 + rows, 4 + columns : 12 + columns], atol=1e-5)


def test_a_half_shift_averages_neighbors():
  image = jnp.array([-1.0, 0.0, 1.0, 0.5]).reshape(1, 1, 4, 1)
  moved = augment.shift_and_scale(image, jnp.array([[0.0, 0.5]]), jnp.ones(1))
  np.testing.assert_allclose(moved[0, 0, :, 0], [-0.5, 0.5, 0.75, 0.75], atol=1e-6)  # white, 1, beside the last


def test_scale_is_source_pixels_per_pixel_of_the_result():
  # Pixels -1.5, -0.5, 0.5, 1.5 from the center are read at half of that: between their neighbors.
  image = jnp.array([0.0, 0.4, 0.8, -0.4]).reshape(1, 1, 4, 1)
  enlarged = augment.shift_and_scale(image, jnp.zeros((1, 2)), jnp.array([0.5]))
  np.testing.assert_allclose(enlarged[0, 0, :, 0], [0.3, 0.5, 0.7, 0.5], atol=1e-6)


def test_roughen_keeps_white_nearly_white_and_has_gradients():
  white = jnp.ones((4, 16, 16, 3))
  out = jax.jit(augment.roughen)(jax.random.key(0), white)
  assert np.abs(out - 1).mean() < 0.12
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(augment.roughen(jax.random.key(0), x))))(white)
  assert 0.5 < float(gradient.mean()) < 1.3
