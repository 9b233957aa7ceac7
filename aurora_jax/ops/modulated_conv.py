"""Modulated, demodulated convolution with sample-adaptive kernels (StyleGAN2; GigaGAN, arXiv 2303.05511, section 3.1).

The filter of sample b is W_b = sum_k mix[b, k] W_k, its input channels scaled by the style, its output channels by the
demodulation coefficient. Both scalings are applied to the activations, so without adaptive kernels all samples share a
filter:

  y = conv(x * style, W) * demodulation

With K kernels there are two methods. On small maps the K scaled copies of the input go through one convolution, which
costs K convolutions but no filters per sample. On large maps the filters are mixed per sample, which costs one
convolution.

The released code also divides filters and style by their RMS before the demodulation, which cancels these factors.

  B batch, H height, W width, K kernels, I input channels, O output channels, P pixels, T taps
"""

import jax
import jax.numpy as jnp

from aurora_jax.ops import resample


def _sum_over_taps(left, right):
  """sum_hw left[..., h, w, i, o] * right[..., h, w, i, o].

  Written out, because XLA's CPU back end compiles the reduction to code that is forty times slower.
  """
  height, width = left.shape[-4:-2]
  return sum(left[..., h, w, :, :] * right[..., h, w, :, :] for h in range(height) for w in range(width))


def demodulation(weight: jax.Array, style: jax.Array, mix: jax.Array | None = None, eps: float = 1e-8) -> jax.Array:
  """The factor that scales every output channel of the modulated filter to norm 1.

  Args:
    weight: [K, kh, kw, I, O].
    style: [B, I].
    mix: [B, K], or None for K = 1.
    eps: added to the squared norm.

  Returns:
    [B, O], float32.
  """
  weight = weight.astype(jnp.float32)
  style_squared = jnp.square(style.astype(jnp.float32))
  if mix is None:
    squared = style_squared @ _sum_over_taps(weight[0], weight[0])
  else:
    # |sum_k m_k W_k|^2 needs only the inner products of the filters, K x K numbers per pair of input and output
    # channel. They are elementwise sums, pair by pair: a batched product over (i, o) would multiply many tiny matrices.
    kernels = weight.shape[0]
    squared = 0.0
    for k in range(kernels):
      for l in range(k, kernels):
        pair = mix[:, k] * mix[:, l] * (1.0 if k == l else 2.0)
        squared = squared + (style_squared @ _sum_over_taps(weight[k], weight[l])) * pair[:, None]
  return jax.lax.rsqrt(squared + eps)


# Maps of at least this many pixels mix filters instead of inputs.
_MIXED_FILTERS_FROM = 256


def _demodulation_of_mixed(kernels, style, eps=1e-8):
  """`demodulation` of filters that are already mixed. kernels [B, kh, kw, I, O], style [B, I] -> [B, O]."""
  kernels = kernels.astype(jnp.float32)
  squared = jnp.einsum("bi,bio->bo", jnp.square(style.astype(jnp.float32)), _sum_over_taps(kernels, kernels))
  return jax.lax.rsqrt(squared + eps)


def _mixed_filters(weight, mix):
  """weight [K, kh, kw, I, O], mix [B, K] -> [B, kh, kw, I, O]."""
  return jnp.tensordot(mix.astype(weight.dtype), weight, 1)


def _conv_per_sample(x, kernels):
  """Each sample with its own filter. x [B, H, W, I], kernels [B, kh, kw, I, O] -> [B, H, W, O].

  A convolution in B groups would be correct everywhere. But it is slow on a CPU, and on GPUs XLA's partitioner gathers
  all samples and filters on every device for it (on a TPU v5e it does not).
  """
  conv = lambda image, kernel: _conv(image[None], kernel, "SAME")[0]
  if len(x) == 1:
    return conv(x[0], kernels[0])[None]
  return jax.lax.platform_dependent(
    x,
    kernels,
    cpu=lambda x, k: jax.lax.map(lambda item: conv(*item), (x, k)),
    tpu=jax.vmap(conv),
    default=_conv_by_patches,
  )


def _conv_by_patches(x, kernels):
  """`_conv_per_sample` as one product per sample, of the patches around all pixels with its filter."""
  batch, height, width, _ = x.shape
  rows, columns = kernels.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
  shifted = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
  return jnp.einsum("bhwi,bio->bhwo", jnp.concatenate(shifted, -1), kernels.reshape(batch, -1, kernels.shape[-1]))


def _conv(x, kernel, padding):
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _mixed_input(x, mix):
  """Stacks the K scaled copies of x along the channels, so that one convolution sums over kernels: [B, H, W, K * I]."""
  copies = x[..., None, :] * mix[:, None, None, :, None].astype(x.dtype)
  return copies.reshape(*x.shape[:-1], -1)


def _stacked_kernel(weight):
  """[K, kh, kw, I, O] -> [kh, kw, K * I, O]."""
  kernels, height, width, inputs, outputs = weight.shape
  return weight.transpose(1, 2, 0, 3, 4).reshape(height, width, kernels * inputs, outputs)


def transposed_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Stride-2 transposed convolution with a 3x3 kernel: one matrix product for all taps, then overlapping sums.

  Output row n is sum_m x[m] kernel[n - 2m]: even rows use taps 0 and 2, odd rows tap 1. There is no dilated
  convolution, and no small-kernel convolution, whose weight gradient is 35 times slower in XLA's CPU back end.

  Args:
    x: [B, H, W, I].
    kernel: [3, 3, I, O].

  Returns:
    [B, 2H + 1, 2W + 1, O].
  """
  inputs, outputs = kernel.shape[2:]
  taps = x @ kernel.transpose(2, 0, 1, 3).reshape(inputs, 9 * outputs)
  taps = taps.reshape(*x.shape[:-1], 3, 3, outputs)  # [B, H, W, 3, 3, O]

  def spread(first, second, third, axis):
    before, after = [(0, 0)] * first.ndim, [(0, 0)] * first.ndim
    before[axis], after[axis] = (1, 0), (0, 1)
    even = jnp.pad(first, after) + jnp.pad(third, before)
    doubled = resample.interleave(even, jnp.pad(second, after), axis)
    return jax.lax.slice_in_dim(doubled, 0, doubled.shape[axis] - 1, axis=axis)

  rows = spread(taps[:, :, :, 0], taps[:, :, :, 1], taps[:, :, :, 2], 1)  # [B, 2H + 1, W, 3, O]
  return spread(rows[:, :, :, 0], rows[:, :, :, 1], rows[:, :, :, 2], 2)


def modulated_conv(
  x: jax.Array,
  weight: jax.Array,
  style: jax.Array,
  mix: jax.Array | None = None,
  *,
  demodulate: bool = True,
  upsample: bool = False,
) -> jax.Array:
  """Modulated convolution with "same" padding, or with doubled resolution.

  Args:
    x: [B, H, W, I].
    weight: [K, kh, kw, I, O].
    style: [B, I], including the factor of the equalized learning rate.
    mix: [B, K], weights of the kernels (a softmax), or None for K = 1.
    demodulate: whether output channels are scaled to filters of norm 1.
    upsample: whether to apply a stride-2 transposed convolution and the FIR filter; for 3x3 kernels only.

  Returns:
    [B, H, W, O], or [B, 2H, 2W, O] with `upsample`; the dtype of x.
  """
  dtype = x.dtype
  x = x * style[:, None, None].astype(dtype)
  if mix is not None and x.shape[1] * x.shape[2] >= _MIXED_FILTERS_FROM:
    kernels = _mixed_filters(weight, mix)
    factor = _demodulation_of_mixed(kernels, style) if demodulate else None
    kernels = kernels.astype(dtype)
    if upsample:
      y = resample.smooth_transposed(
        jax.vmap(lambda image, kernel: transposed_conv(image[None], kernel)[0])(x, kernels)
      )
    elif kernels.shape[1:3] == (1, 1):
      y = jnp.einsum("bhwi,bio->bhwo", x, kernels[:, 0, 0])
    else:
      y = _conv_per_sample(x, kernels)
    return y * factor[:, None, None].astype(dtype) if demodulate else y
  if mix is not None:
    x = _mixed_input(x, mix)
  kernel = _stacked_kernel(weight).astype(dtype)
  if upsample:
    y = resample.smooth_transposed(transposed_conv(x, kernel))
  elif kernel.shape[:2] == (1, 1):
    y = x @ kernel[0, 0]
  else:
    y = _conv(x, kernel, "SAME")
  if demodulate:
    y = y * demodulation(weight, style, mix)[:, None, None].astype(dtype)
  return y


def modulated_taps(taps: jax.Array, weight: jax.Array, style: jax.Array, mix: jax.Array | None = None) -> jax.Array:
  """The demodulated convolution of input pixels that are already gathered per tap.

  Args:
    taps: [B, P, T, I], T = kh * kw in row-major order.
    weight: [K, kh, kw, I, O].
    style: [B, I].
    mix: [B, K] or None.

  Returns:
    [B, P, O].
  """
  dtype, pixels = taps.dtype, taps.shape[1]
  outputs = weight.shape[-1]
  taps = (taps * style[:, None, None].astype(dtype)).reshape(*taps.shape[:2], -1)  # [B, P, T * I]
  if mix is None:
    y = taps @ weight[0].reshape(-1, outputs).astype(dtype)
    return y * demodulation(weight, style)[:, None].astype(dtype)
  if pixels >= _MIXED_FILTERS_FROM:
    kernels = _mixed_filters(weight, mix)
    y = jnp.einsum("bpi,bio->bpo", taps, kernels.reshape(len(kernels), -1, outputs).astype(dtype))
    return y * _demodulation_of_mixed(kernels, style)[:, None].astype(dtype)
  matrix = weight.reshape(len(weight), -1, outputs).astype(dtype)
  each = taps @ matrix.transpose(1, 0, 2).reshape(matrix.shape[1], -1)  # [B, P, K * O]
  y = jnp.einsum("bpko,bk->bpo", each.reshape(*each.shape[:2], -1, outputs), mix.astype(dtype))
  return y * demodulation(weight, style, mix)[:, None].astype(dtype)
