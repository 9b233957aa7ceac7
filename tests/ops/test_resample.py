"""Resampling against the public StyleGAN-T code's numbers and PyTorch."""

import pathlib

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from aurora_jax.ops import modulated_conv, resample

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "stylegan_t"


@pytest.fixture(scope="module")
def parts():
  return load_file(GOLDENS / "parts.safetensors")


def nhwc(array):
  return np.asarray(array).transpose(0, 2, 3, 1)


def close(ours, theirs, tolerance=1e-6):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("size", [6, 14, 25])
def test_area_resize_of_the_golden(parts, size):
  close(resample.resize_area(nhwc(parts["resize.in.10"]), size, size), nhwc(parts[f"resize.area.10to{size}"]))


@pytest.mark.parametrize("size", [7, 24])
def test_bicubic_resize_of_the_golden(parts, size):
  ours = resample.resize_bicubic(nhwc(parts["resize.in.10"]), size, size)
  close(ours, nhwc(parts[f"resize.bicubic.10to{size}"]))


@pytest.mark.parametrize(
  ("given", "wanted"), [((7, 11), (5, 13)), ((64, 9), (224, 9)), ((5, 6), (1, 2)), ((1, 3), (4, 7))]
)
def test_resizes_of_other_sizes(given, wanted):
  # In double precision: in single it places the taps of large images by up to 1e-5 of a pixel wrongly.
  image = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, *given)))
  area = torch.nn.functional.adaptive_avg_pool2d(image, wanted)
  close(resample.resize_area(nhwc(image), *wanted), nhwc(area))
  cubic = torch.nn.functional.interpolate(image, size=wanted, mode="bicubic", align_corners=False)
  close(resample.resize_bicubic(nhwc(image), *wanted), nhwc(cubic))


def test_enlarging_64_to_224_repeats_and_averages():
  """Every 7 outputs see 2 inputs: 0 0 0 (0 and 1) 1 1 1."""
  matrix = resample.area_matrix(64, 224)
  np.testing.assert_array_equal(matrix[:7, :2], [[1, 0]] * 3 + [[0.5, 0.5]] + [[0, 1]] * 3)
  np.testing.assert_array_equal(matrix[7:14, 2:4], matrix[:7, :2])
  np.testing.assert_allclose(matrix.sum(1), 1)
  np.testing.assert_allclose(resample.bicubic_matrix(9, 23).sum(1), 1, rtol=1e-6)


def test_upsampling_by_two(parts):
  close(jax.jit(resample.upsample)(nhwc(parts["resample.in.x"])), nhwc(parts["resample.upsample2d"]))


def test_upsampling_convolution(parts):
  """A stride-2 transposed convolution with the released kernel as it stands, then the filter: with respect to all other
  convolutions the kernel is mirrored."""
  np.testing.assert_array_equal(parts["resample.filter"], np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64)
  x, kernel = nhwc(parts["resample.in.x"]), parts["resample.in.weight"].transpose(2, 3, 1, 0)
  run = jax.jit(lambda kernel: resample.smooth_transposed(modulated_conv.transposed_conv(x, kernel)))
  close(run(kernel), nhwc(parts["resample.conv_up2"]))
  assert np.abs(run(kernel[::-1, ::-1]) - nhwc(parts["resample.conv_up2"])).max() > 0.1
  # The other description of the same: zeros between the pixels, one padding, the filter, the mirrored kernel.
  zeros = np.zeros((1, 12, 12, 3), np.float32)
  zeros[:, ::2, ::2] = x
  padded = np.pad(zeros, ((0, 0), (3, 2), (3, 2), (0, 0)))
  fir = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 16
  smooth = sum(fir[i, j] * padded[:, i : i + 14, j : j + 14] for i in range(4) for j in range(4))
  mirrored = np.ascontiguousarray(kernel[::-1, ::-1])
  convolved = jax.lax.conv_general_dilated(
    smooth, mirrored, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  close(run(kernel), convolved)
