"""Losses, blur and CLIP's view against the public code's numbers and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from systems.stylegan_t import goldens
from systems.stylegan_t.goldens import nhwc, relative

from aurora_jax.models import layers
from aurora_jax.systems.stylegan_t import config, losses, synthesis


@pytest.fixture(scope="module")
def parts():
  return goldens.arrays("parts")


@pytest.fixture(scope="module")
def traced_blur():
  return jax.jit(lambda image, sigma: losses.blur(image, sigma, 32.0))


@pytest.mark.parametrize("sigma", ["0.3", "0.4", "2.0", "5.3", "32.0"])
def test_blur(parts, traced_blur, sigma):
  image, expected = nhwc(parts["blur.in.image"]), nhwc(parts[f"blur.out.sigma{sigma}"])
  assert relative(traced_blur(image, jnp.float32(sigma)), expected) < goldens.OUTPUT
  if sigma == "0.3":
    np.testing.assert_array_equal(expected, image)
  if sigma == "5.3":
    number = jax.jit(lambda image: losses.blur(image, 5.3))  # instead of a traced value
    assert relative(number(image), expected) < goldens.OUTPUT


def test_a_faded_blur_changes_nothing(parts, traced_blur):
  image = nhwc(parts["blur.in.image"])
  np.testing.assert_array_equal(traced_blur(image, jnp.float32(0)), image)


def test_blur_schedule():
  cfg = config.Loss()
  assert [float(losses.blur_sigma(n, cfg)) for n in (0, 250_000, 1_000_000, 250_000_000)] == [32, 24, 0, 0]
  step = goldens.config("step_tiny")
  cfg = config.Loss(blur_fade_kimg=step["blur_fade_kimg"])
  assert float(losses.blur_sigma(step["cur_nimg"], cfg)) == pytest.approx(step["blur_sigma"], rel=1e-5)
  assert float(losses.blur_sigma(0, config.Loss(blur_fade_kimg=1.0))) == 0


def test_squared_angle(parts):
  assert relative(losses.squared_angle(parts["spherical.in.x"], parts["spherical.in.y"]), parts["spherical.out"]) < 1e-5


def test_activation_with_gain_and_clamp(parts):
  """What a layer does behind its convolution."""
  x, bias = nhwc(parts["bias_act.in.x"]), parts["bias_act.in.b"]
  for name, gain in (("lrelu", 1.0), ("lrelu_gain0.5", synthesis.RESIDUAL_GAIN)):
    y = jnp.clip(layers.leaky_relu(x + bias) * gain, -synthesis.CLAMP * gain, synthesis.CLAMP * gain)
    assert relative(y, nhwc(parts[f"bias_act.{name}"])) < 1e-6
  assert relative(jnp.clip(x + bias, -synthesis.CLAMP, synthesis.CLAMP), nhwc(parts["bias_act.linear"])) < 1e-6


def test_clip_sees_one_window_resized_twice():
  cfg = config.Loss(clip_crop=6, clip_size=20)
  image = np.random.default_rng(0).uniform(-1, 1, (2, 9, 9, 3)).astype(np.float32)
  cut = torch.tensor(image[:, 2:8, 1:7]).permute(0, 3, 1, 2)
  area = torch.nn.functional.interpolate(cut, size=(20, 20), mode="area")
  expected = torch.nn.functional.interpolate(area, size=(13, 13), mode="bicubic").permute(0, 2, 3, 1)
  assert relative(losses.clip_view(image, 13, cfg, (2, 1)), expected.numpy()) < 1e-5
  # No larger than the window: all of it, whatever the window's place.
  np.testing.assert_array_equal(
    losses.clip_view(image[:, :6, :6], 20, cfg, (3, 3)), losses.clip_view(image[:, :6, :6], 20, cfg)
  )
  draws = np.array([losses.clip_window(jax.random.key(seed), 9, 8, 6) for seed in range(40)])
  assert set(draws[:, 0]) == {0, 1, 2, 3} and set(draws[:, 1]) == {0, 1, 2}
  assert np.array(losses.clip_window(jax.random.key(0), 5, 6, 6)).tolist() == [0, 0]


def test_only_larger_images_are_resized_for_the_discriminator():
  image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
  view = jax.jit(losses.discriminator_view, static_argnums=(1, 3))
  for cfg in (config.Loss(), config.Loss(blur_fade_kimg=0.0)):  # with a blur that has faded, and with none at all
    np.testing.assert_array_equal(view(image, 16, 0.0, cfg), image)
  pooled = image.reshape(1, 4, 2, 4, 2, 3).mean((2, 4))
  assert relative(view(image, 4, 0.0, config.Loss()), pooled) < 1e-6
  assert relative(view(image, 16, 2.0, config.Loss()), image) > 0.1
