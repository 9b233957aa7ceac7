"""Bilinear reads of a modulated deformable convolution (arXiv 1811.11168), as one matrix product.

A bilinear read with zeros outside is a product with an interpolation matrix. Its entries are products of a row weight
and a column weight. For small maps (4 to 16 pixels) this matrix product costs less than gathers, whose gradients are
scatters, and it runs on matrix units.

  B batch, H height, W width, C channels, P = H * W output pixels, T taps (9 for 3x3)
"""

import jax
import jax.numpy as jnp


def _line_weights(position, size):
  """Bilinear weights along one line, zero outside. position: [...] in pixels -> [..., size].

  The floor is constant for differentiation, so the derivative at a whole number is the one to the right, as in
  torchvision's deform_conv2d.
  """
  low = jax.lax.stop_gradient(jnp.floor(position))
  fraction = position - low
  index = jnp.arange(size, dtype=position.dtype)
  offset = index - low[..., None]
  return jnp.where(offset == 0, 1 - fraction[..., None], 0) + jnp.where(offset == 1, fraction[..., None], 0)


def sample_taps(x: jax.Array, offsets: jax.Array, mask: jax.Array) -> jax.Array:
  """Reads the 3x3 neighborhood of every pixel at displaced positions.

  Args:
    x: [B, H, W, C].
    offsets: [B, H, W, 9, 2], displacement (dy, dx) in pixels of each tap, taps in row-major order.
    mask: [B, H, W, 9], factor of each tap.

  Returns:
    [B, H * W, 9, C]: `mask * x(p + tap + offset)`, bilinear, zero outside; the dtype of x.
  """
  batch, height, width, channels = x.shape
  offsets = offsets.astype(jnp.float32)
  tap = jnp.arange(-1, 2, dtype=jnp.float32)
  rows = jnp.arange(height, dtype=jnp.float32)[:, None, None] + jnp.repeat(tap, 3)  # [H, 1, 9]
  columns = jnp.arange(width, dtype=jnp.float32)[None, :, None] + jnp.tile(tap, 3)  # [1, W, 9]
  row_weights = _line_weights(rows + offsets[..., 0], height) * mask.astype(jnp.float32)[..., None]  # [B, H, W, 9, H]
  column_weights = _line_weights(columns + offsets[..., 1], width)  # [B, H, W, 9, W]
  matrix = (row_weights[..., :, None] * column_weights[..., None, :]).astype(x.dtype)
  matrix = matrix.reshape(batch, height * width * 9, height * width)
  taps = matrix @ x.reshape(batch, height * width, channels)
  return taps.reshape(batch, height * width, 9, channels)
