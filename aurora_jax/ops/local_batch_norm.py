"""Batch normalization over small groups of consecutive samples, the same in training and evaluation.

B batch, N tokens or pixels, C channels
"""

import jax
import jax.numpy as jnp

EPSILON = 1e-5


def group_count(batch: int, virtual_batch: int) -> int:
  """Number of groups of at most `virtual_batch` samples into which a batch is split.

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
  """Normalizes each channel to zero mean and unit variance (biased) over the samples and tokens of each group.

  There are no running statistics.

  Args:
    x: [B, N, C]. A group has B / ceil(B / virtual_batch) consecutive samples.
    virtual_batch: largest number of samples that share statistics.

  Returns:
    float32 [B, N, C].

  Raises:
    ValueError: the batch cannot be split evenly.
  """
  groups = group_count(len(x), virtual_batch)
  grouped = x.astype(jnp.float32).reshape(groups, -1, x.shape[-1])  # [groups, B / groups * N, C]
  centered = grouped - jnp.mean(grouped, axis=1, keepdims=True)
  variance = jnp.mean(jnp.square(centered), axis=1, keepdims=True)
  return (centered * jax.lax.rsqrt(variance + EPSILON)).reshape(x.shape)
