"""Attention by Euclidean distance (Lipschitz attention, arXiv 2006.04710; GigaGAN section 3.1) and by dot product.

  B batch, N queries, M keys, A heads, D head width
"""

import functools

import jax
import jax.numpy as jnp


def safe_sqrt(x):
  """Square root whose gradient at zero is zero instead of infinite. x >= 0."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _attend(logits, values, dtype):
  """Softmax in float32, normalised after the product with the values: D numbers per query instead of M."""
  logits = logits.astype(jnp.float32)
  highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - highest)
  total = jnp.sum(weights, axis=-1).swapaxes(1, 2)  # [B, N, A]
  out = jnp.einsum("banm,bmad->bnad", weights.astype(dtype), values)
  return (out / total[..., None]).astype(dtype)


def _l2_attend(queries, keys, values):
  dtype = values.dtype
  queries, keys = queries.astype(jnp.float32), keys.astype(jnp.float32)
  squared = (jnp.einsum("bnad,bnad->ban", queries, queries)[..., None]
             + jnp.einsum("bmad,bmad->bam", keys, keys)[:, :, None]
             - 2 * jnp.einsum("bnad,bmad->banm", queries, keys))
  distance = safe_sqrt(jnp.maximum(squared, 0.0))
  return _attend(-distance * queries.shape[-1]**-0.5, values, dtype)


def l2_attention(queries, keys, values, *, chunk=None):
  """Softmax attention with logits -|q - k|_2 / sqrt(D): the distance itself, not its square.

  Args:
    queries: [B, N, A, D].
    keys, values: [B, M, A, D].
    chunk: at most this many queries at once, each chunk recomputed in the backward pass; None: all at once.

  Returns:
    [B, N, A, D], the dtype of `values`. Distances and softmax are float32.
  """
  count = queries.shape[1]
  if chunk is None or count <= chunk:
    return _l2_attend(queries, keys, values)
  if count % chunk:
    raise ValueError(f"attention chunk {chunk} does not divide {count} queries")
  chunks = queries.reshape(queries.shape[0], count // chunk, chunk, *queries.shape[2:]).swapaxes(0, 1)
  attend = jax.checkpoint(functools.partial(_l2_attend, keys=keys, values=values))
  out = jax.lax.map(attend, chunks)  # [N / chunk, B, chunk, A, D]
  return out.swapaxes(0, 1).reshape(queries.shape)


def dot_attention(queries, keys, values, mask=None):
  """Softmax attention with logits q . k / sqrt(D).

  Args:
    queries: [B, N, A, D].
    keys, values: [B, M, A, D].
    mask: broadcastable to [B, A, N, M], True where a query may look; None: everywhere.

  Returns:
    [B, N, A, D], the dtype of `values`.
  """
  logits = jnp.einsum("bnad,bmad->banm", queries, keys) * queries.shape[-1]**-0.5
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  return _attend(logits, values, values.dtype)
