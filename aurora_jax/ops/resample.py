"""Resampling by two with the FIR filter [1, 3, 3, 1] (StyleGAN2, arXiv 1912.04958, appendix B).

The filters are sums of shifted slices, one polyphase component per output parity. The arithmetic is that of zero
insertion followed by a depthwise convolution, at a quarter of the work. Dilated and depthwise convolutions are slow on
a CPU.

  B batch, H height, W width, C channels
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def _pad(x, axis, before, after):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (before, after)
  return jnp.pad(x, padding)


def _slice(x, axis, start, size, stride=1):
  return jax.lax.slice_in_dim(x, start, start + (size - 1) * stride + 1, stride, axis)


def interleave(even: jax.Array, odd: jax.Array, axis: int) -> jax.Array:
  """Merges two arrays of equal shape along `axis`: even[0], odd[0], even[1], ..."""
  stacked = jnp.stack([even, odd], axis + 1)
  shape = list(even.shape)
  shape[axis] *= 2
  return stacked.reshape(shape)


def upsample(x: jax.Array) -> jax.Array:
  """Doubles height and width, with zeros beyond the border. [B, H, W, C] -> [B, 2H, 2W, C]."""
  for axis in (1, 2):
    size = x.shape[axis]
    padded = _pad(x, axis, 1, 1)
    before, after = _slice(padded, axis, 0, size), _slice(padded, axis, 2, size)
    x = interleave(0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after, axis)
  return x


def downsample(x: jax.Array) -> jax.Array:
  """Halves height and width, with the border repeated beyond it. [B, 2H, 2W, C] -> [B, H, W, C]."""
  for axis in (1, 2):
    size = x.shape[axis] // 2
    first, last = _slice(x, axis, 0, 1), _slice(x, axis, x.shape[axis] - 1, 1)
    padded = jnp.concatenate([first, x, last], axis)
    taps = [_slice(padded, axis, k, size, 2) for k in range(4)]
    x = 0.125 * (taps[0] + taps[3]) + 0.375 * (taps[1] + taps[2])
  return x


def smooth_transposed(x: jax.Array) -> jax.Array:
  """The FIR filter, gain 4, on the output of a stride-2 transposed convolution.

  Args:
    x: [B, 2H + 1, 2W + 1, C].

  Returns:
    [B, 2H, 2W, C].
  """
  for axis in (1, 2):
    size = x.shape[axis] - 1
    padded = _pad(x, axis, 1, 1)
    taps = [_slice(padded, axis, k, size) for k in range(4)]
    x = 0.25 * (taps[0] + taps[3]) + 0.75 * (taps[1] + taps[2])
  return x


# ----------------------------------------------------------------------------------------------------------------------
# To any size, by one constant matrix per axis


def area_matrix(given: int, wanted: int) -> np.ndarray:
  """Weights of adaptive average pooling along one axis, to a smaller or a larger size.

  Output i is the mean of the inputs from floor(i * given / wanted) to ceil((i + 1) * given / wanted) - 1. A larger size
  repeats pixels, and averages two if a window straddles them. PyTorch has it as `adaptive_avg_pool2d` and as
  `interpolate` with mode "area".

  Args:
    given: size of the input.
    wanted: size of the output.

  Returns:
    float32 [wanted, given].
  """
  matrix = np.zeros((wanted, given), np.float32)
  for i in range(wanted):
    begin, end = i * given // wanted, -(-(i + 1) * given // wanted)
    matrix[i, begin:end] = 1 / (end - begin)
  return matrix


def bicubic_matrix(given: int, wanted: int) -> np.ndarray:
  """Weights of cubic interpolation along one axis: half-pixel centers, A = -0.75, repeated borders, no antialiasing.

  This is PyTorch's `interpolate` with mode "bicubic". `jax.image.resize` has A = -0.5.

  Args:
    given: size of the input.
    wanted: size of the output.

  Returns:
    float32 [wanted, given].
  """
  a = -0.75
  place = (np.arange(wanted) + 0.5) * given / wanted - 0.5
  before = np.floor(place).astype(int)
  matrix = np.zeros((wanted, given))
  for tap in (-1, 0, 1, 2):
    distance = np.abs(place - (before + tap))
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * a * distance - 4 * a
    np.add.at(matrix, (np.arange(wanted), np.clip(before + tap, 0, given - 1)), np.where(distance <= 1, near, far))
  return matrix.astype(np.float32)


def resize_by_matrices(x: jax.Array, rows: jax.Array | np.ndarray, columns: jax.Array | np.ndarray) -> jax.Array:
  """Applies one matrix to the rows and one to the columns, in full float32 precision.

  Args:
    x: [B, H, W, C].
    rows: [P, H].
    columns: [Q, W].

  Returns:
    float32 [B, P, Q, C].
  """
  x = jnp.einsum("qw,bhwc->bhqc", columns, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
  return jnp.einsum("ph,bhqc->bpqc", rows, x, precision=jax.lax.Precision.HIGHEST)


def resize_area(x: jax.Array, height: int, width: int) -> jax.Array:
  """Adaptive average pooling to any size (see `area_matrix`). [B, H, W, C] -> float32 [B, height, width, C]."""
  if x.shape[1:3] == (height, width):
    return x.astype(jnp.float32)
  return resize_by_matrices(x, area_matrix(x.shape[1], height), area_matrix(x.shape[2], width))


def resize_bicubic(x: jax.Array, height: int, width: int) -> jax.Array:
  """PyTorch's bicubic resize without antialiasing (see `bicubic_matrix`).

  [B, H, W, C] -> float32 [B, height, width, C].
  """
  if x.shape[1:3] == (height, width):
    return x.astype(jnp.float32)
  return resize_by_matrices(x, bicubic_matrix(x.shape[1], height), bicubic_matrix(x.shape[2], width))


def image_pyramid(image: jax.Array, resolutions: Sequence[int]) -> dict[int, jax.Array]:
  """Halves images with the FIR filter, level by level. image [B, R, R, 3] -> {r: [B, r, r, 3]}."""
  pyramid, r = {}, image.shape[1]
  while r >= min(resolutions):
    if r in resolutions:
      pyramid[r] = image
    image, r = downsample(image), r // 2
  return pyramid
