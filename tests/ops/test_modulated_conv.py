"""Modulated convolutions against per-sample filters in torch, deformable ones against arrays of the goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aurora_jax.ops import deform_conv, modulated_conv, resample


def released_conv(x, weight, style, mix, upsample):
  """The released layer's arithmetic with per-sample filters. x [B, H, W, I], weight [K, h, w, I, O]."""
  x, weight, style = (torch.tensor(np.asarray(a)) for a in (x, weight, style))
  mix = torch.ones(len(x), 1) if mix is None else torch.tensor(np.asarray(mix))
  filters = torch.einsum("bk,khwio->boihw", mix, weight)
  filters = filters * filters.square().mean((2, 3, 4), keepdim=True).rsqrt()
  style = style * style.square().mean().rsqrt()
  filters = filters * style[:, None, :, None, None]
  filters = filters * (filters.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
  out = []
  for image, kernel in zip(x.permute(0, 3, 1, 2), filters):
    if upsample:
      y = torch.nn.functional.conv_transpose2d(image[None], kernel.transpose(0, 1), stride=2)
      taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
      fir = (torch.outer(taps, taps) * 4)[None, None].expand(y.shape[1], 1, 4, 4)
      y = torch.nn.functional.conv2d(torch.nn.functional.pad(y, (1, 1, 1, 1)), fir, groups=y.shape[1])
    else:
      y = torch.nn.functional.conv2d(image[None], kernel, padding=kernel.shape[-1] // 2)
    out.append(y[0].permute(1, 2, 0))
  return torch.stack(out).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [1, 3])
@pytest.mark.parametrize("size,upsample", [(3, False), (3, True), (1, False)])
def test_equals_per_sample_filters(kernels, size, upsample):
  keys = jax.random.split(jax.random.key(kernels), 4)
  x = jax.random.normal(keys[0], (2, 6, 6, 5))
  weight = jax.random.normal(keys[1], (kernels, size, size, 5, 4))
  style = 1 + 0.5 * jax.random.normal(keys[2], (2, 5))
  mix = jax.nn.softmax(jax.random.normal(keys[3], (2, kernels))) if kernels > 1 else None
  ours = modulated_conv.modulated_conv(x, weight, style, mix, upsample=upsample)
  np.testing.assert_allclose(ours, released_conv(x, weight, style, mix, upsample), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_products_of_patches_are_the_convolution_of_each_sample(size):
  keys = jax.random.split(jax.random.key(0), 3)
  x, target = (jax.random.normal(key, (3, 5, 6, features)) for key, features in zip(keys, (4, 7)))
  kernels = jax.random.normal(keys[2], (3, size, size, 4, 7))
  plain = lambda x, kernels: jnp.concatenate(
    [modulated_conv._conv(image[None], kernel, "SAME") for image, kernel in zip(x, kernels)]
  )
  patches = modulated_conv._conv_by_patches
  run = lambda way: jax.value_and_grad(lambda *args: jnp.sum(way(*args) * target), (0, 1))(x, kernels)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), run(plain), run(patches))


@pytest.mark.slow
def test_taps_without_offsets_are_the_plain_convolution():
  keys = jax.random.split(jax.random.key(9), 4)
  x = jax.random.normal(keys[0], (2, 5, 5, 4))
  weight = jax.random.normal(keys[1], (2, 3, 3, 4, 3))
  style, mix = jax.random.normal(keys[2], (2, 4)), jax.nn.softmax(jax.random.normal(keys[3], (2, 2)))
  taps = deform_conv.sample_taps(x, jnp.zeros((2, 5, 5, 9, 2)), jnp.ones((2, 5, 5, 9)))
  ours = modulated_conv.modulated_taps(taps, weight, style, mix).reshape(2, 5, 5, 3)
  np.testing.assert_allclose(ours, modulated_conv.modulated_conv(x, weight, style, mix), rtol=1e-4, atol=1e-5)


def test_bilinear_taps_against_torch_grid_sample():
  keys = jax.random.split(jax.random.key(3), 3)
  x = jax.random.normal(keys[0], (1, 6, 6, 2))
  offsets = 2.5 * jax.random.normal(keys[1], (1, 6, 6, 9, 2))
  mask = jax.random.uniform(keys[2], (1, 6, 6, 9))
  ours = deform_conv.sample_taps(x, offsets, mask).reshape(6, 6, 9, 2)
  rows, columns = np.meshgrid(np.arange(6), np.arange(6), indexing="ij")
  for tap in range(9):
    y = rows + tap // 3 - 1 + np.asarray(offsets[0, :, :, tap, 0])
    x_position = columns + tap % 3 - 1 + np.asarray(offsets[0, :, :, tap, 1])
    grid = np.stack([(2 * x_position + 1) / 6 - 1, (2 * y + 1) / 6 - 1], -1)[None].astype(np.float32)
    theirs = (
      torch.nn.functional.grid_sample(
        torch.tensor(np.asarray(x)).permute(0, 3, 1, 2), torch.tensor(grid), padding_mode="zeros", align_corners=False
      )[0]
      .permute(1, 2, 0)
      .numpy()
    )
    np.testing.assert_allclose(ours[:, :, tap], theirs * np.asarray(mask[0, :, :, tap, None]), rtol=1e-3, atol=1e-4)


def test_upsample_and_downsample_keep_a_constant():
  inside = resample.upsample(jnp.ones((1, 4, 4, 1)))[0, 2:-2, 2:-2, 0]
  np.testing.assert_allclose(inside, 1.0, rtol=1e-6)
  np.testing.assert_allclose(resample.downsample(jnp.ones((1, 8, 8, 1))), 1.0, rtol=1e-6)
