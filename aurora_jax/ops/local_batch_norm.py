"""Batch normalisation over small groups of neighbouring samples, the same in training and evaluation (StyleGAN-T's heads).

B batch, N tokens or pixels, C channels
"""

import jax
import jax.numpy as jnp

EPSILON = 1e-5


def group_count(batch: int, virtual_batch: int) -> int:
  """Into how many groups of at most `virtual_batch` samples a batch is split.

  Raises:
    ValueError: the groups cannot be of one size.
  """
  groups = -(-batch // virtual_batch)
  if batch % groups:
    raise ValueError(
      f"local batch norm: a batch of {batch} makes {groups} groups of at most {virtual_batch} samples, "
      f"which do not divide it; take a multiple of {virtual_batch} or at most {virtual_batch} samples"
    )
  return groups


def normalize(x: jax.Array, virtual_batch: int = 8) -> jax.Array:
  """Zero mean and unit variance (biased) per channel over each group's samples and tokens; no running statistics.

  Args:
    x: [B, N, C]. Groups are of B / ceil(B / virtual_batch) consecutive samples.
    virtual_batch: at most so many samples share statistics.

  Returns:
    float32 [B, N, C].

  Raises:
    ValueError: the batch cannot be split evenly.
  """
  groups = group_count(len(x), virtual_batch)
  grouped = x.astype(jnp.float32).reshape(groups, -1, x.shape[-1])  # [groups, B / groups * N, C]
  centred = grouped - jnp.mean(grouped, axis=1, keepdims=True)
  variance = jnp.mean(jnp.square(centred), axis=1, keepdims=True)
  return (centred * jax.lax.rsqrt(variance + EPSILON)).reshape(x.shape)
