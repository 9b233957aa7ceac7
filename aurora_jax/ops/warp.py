"""Differentiable shift and scale of images, as two matrix products (a gather's gradient would be a scatter).

B batch, H height, W width, C channels
"""

import jax.numpy as jnp


def _line_matrix(shift, scale, size):
  """Linear interpolation along one axis, white outside handled by the caller. shift, scale [B] -> [B, out, in]."""
  centre = (size - 1) / 2
  line = jnp.arange(size, dtype=jnp.float32) - centre
  source = line * scale[:, None] + shift[:, None] + centre  # [B, out]
  return jnp.maximum(0, 1 - jnp.abs(source[..., None] - jnp.arange(size, dtype=jnp.float32)))


def shift_and_scale(images, shift, scale):
  """Moves and resizes pictures about their centre, bilinear; white comes in from outside.

  Args:
    images: [B, H, W, C] in [-1, 1].
    shift: [B, 2] in pixels (rows, columns).
    scale: [B], source pixels per result pixel.

  Returns:
    [B, H, W, C].
  """
  rows = _line_matrix(shift[:, 0], scale, images.shape[1])
  columns = _line_matrix(shift[:, 1], scale, images.shape[2])
  moved = jnp.einsum("bih,bhwc->biwc", rows, images - 1)
  return 1 + jnp.einsum("bjw,biwc->bijc", columns, moved)
