"""Resampling by two with the FIR filter [1, 3, 3, 1] (StyleGAN2, arXiv 1912.04958, appendix B).

Written as sums of shifted slices, one polyphase component per output parity: the same arithmetic as zero insertion
followed by a depthwise convolution, at a quarter of the work, and free of dilated or depthwise convolutions, which are
slow on CPU.

  B batch, H height, W width, C channels
"""

import jax
import jax.numpy as jnp


def _pad(x, axis, before, after):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (before, after)
  return jnp.pad(x, padding)


def _slice(x, axis, start, size, stride=1):
  return jax.lax.slice_in_dim(x, start, start + (size - 1) * stride + 1, stride, axis)


def interleave(even, odd, axis):
  """Merges two arrays of equal shape along `axis`: even[0], odd[0], even[1], ..."""
  stacked = jnp.stack([even, odd], axis + 1)
  shape = list(even.shape)
  shape[axis] *= 2
  return stacked.reshape(shape)


def upsample(x):
  """Doubles height and width. x: [B, H, W, C] -> [B, 2H, 2W, C], zeros beyond the border."""
  for axis in (1, 2):
    size = x.shape[axis]
    padded = _pad(x, axis, 1, 1)
    before, after = _slice(padded, axis, 0, size), _slice(padded, axis, 2, size)
    x = interleave(0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after, axis)
  return x


def downsample(x):
  """Halves height and width. x: [B, 2H, 2W, C] -> [B, H, W, C]; the border's pixels are repeated beyond it."""
  for axis in (1, 2):
    size = x.shape[axis] // 2
    first, last = _slice(x, axis, 0, 1), _slice(x, axis, x.shape[axis] - 1, 1)
    padded = jnp.concatenate([first, x, last], axis)
    taps = [_slice(padded, axis, k, size, 2) for k in range(4)]
    x = 0.125 * (taps[0] + taps[3]) + 0.375 * (taps[1] + taps[2])
  return x


def smooth_transposed(x):
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
