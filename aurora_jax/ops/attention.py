"""Attention by Euclidean distance (Lipschitz attention, arXiv 2006.04710; GigaGAN, section 3.1) and by dot product.

B batch, N queries, M keys, A heads, G = B * A, D head width
"""

import functools

import jax
import jax.numpy as jnp

from aurora_jax.ops import l2_flash
from aurora_jax.ops.l2_flash import heads_first as _heads_first
from aurora_jax.ops.l2_flash import heads_last as _heads_last

IMPLEMENTATIONS = ("xla", "pallas")


def safe_sqrt(x: jax.Array) -> jax.Array:
  """Square root whose gradient at zero is zero instead of infinite. x >= 0."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def _attend(logits, values):
  """Softmax in float32. It is normalized after the product with the values: D numbers per query instead of M.

  logits [G, N, M], values [G, M, D] -> [G, N, D].
  """
  logits = logits.astype(jnp.float32)
  highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - highest)
  return ((weights.astype(values.dtype) @ values) / jnp.sum(weights, axis=-1, keepdims=True)).astype(values.dtype)


def _l2_attend(queries, keys, key_squares, values):
  """queries [G, N, D], keys [G, D, M], key_squares [G, 1, M], all float32, values [G, M, D] -> [G, N, D]."""
  # For a query close to a key the squares and the product cancel, so a rounded product would dominate the distance.
  with jax.named_scope("l2_distance"):
    product = jnp.matmul(queries, keys, precision=jax.lax.Precision.HIGHEST)
  squared = jnp.sum(jnp.square(queries), axis=-1, keepdims=True) + key_squares - 2 * product
  distance = safe_sqrt(jnp.maximum(squared, 0.0))
  return _attend(-distance * queries.shape[-1] ** -0.5, values)


def l2_attention(
  queries: jax.Array, keys: jax.Array, values: jax.Array, *, chunk: int | None = None, implementation: str = "xla"
) -> jax.Array:
  """Softmax attention with logits -|q - k|_2 / sqrt(D): the distance itself, not its square.

  Args:
    queries: [B, N, A, D].
    keys, values: [B, M, A, D].
    chunk: queries per chunk, each recomputed in the backward pass; None: all queries at once. With "pallas" it applies
      to second derivatives, and to everything on a CPU.
    implementation: one of `IMPLEMENTATIONS`. "xla": logits of a chunk are in memory. "pallas": the fused kernels of
      `l2_flash.py` on TPUs and NVIDIA GPUs, XLA's operations elsewhere; it has no forward-mode derivative.

  Returns:
    [B, N, A, D] in the dtype of `values`. Distances and softmax are float32.

  Raises:
    ValueError: the chunk does not divide the number of queries; an unknown implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention implementation must be 'xla' or 'pallas', got {implementation!r}")
  if implementation == "pallas":
    return l2_flash.attend(queries, keys, values, by_xla(chunk))
  return by_xla(chunk)(queries, keys, values)


@functools.cache
def by_xla(chunk: int | None) -> l2_flash.Reference:
  """`l2_attention` by XLA's operations with a chunk size: one function object for each."""
  return functools.partial(_l2_attention, chunk=chunk)


def _l2_attention(queries, keys, values, chunk):
  """See `l2_attention`."""
  heads = queries.shape[2]
  queries, keys, values = (
    _heads_first(queries.astype(jnp.float32)),
    _heads_first(keys.astype(jnp.float32)),
    _heads_first(values),
  )
  attend = functools.partial(_chunked_l2_attend, chunk=chunk)
  if chunk is None or queries.shape[1] <= chunk or len(queries) == heads:
    return _heads_last(attend(queries, keys, values), heads)
  # A CPU processes one sample at a time, so that a chunk's logits stay in its cache.
  by_sample = lambda *args: jax.lax.map(lambda one: attend(*one), [x.reshape(-1, heads, *x.shape[1:]) for x in args])
  out = jax.lax.platform_dependent(
    queries,
    keys,
    values,
    default=attend,
    cpu=lambda *args: by_sample(*args).reshape(queries.shape[:2] + values.shape[2:]),
  )
  return _heads_last(out, heads)


def _chunked_l2_attend(queries, keys, values, chunk):
  """queries [G, N, D], keys [G, M, D], float32, values [G, M, D] -> [G, N, D]."""
  # The transposed keys and their squares are the same for every chunk.
  keys = keys.swapaxes(1, 2)
  attend = functools.partial(
    _l2_attend, keys=keys, key_squares=jnp.sum(jnp.square(keys), axis=1, keepdims=True), values=values
  )
  groups, count, width = queries.shape
  if chunk is None or count <= chunk:
    return attend(queries)
  if count % chunk:
    raise ValueError(f"attention chunk {chunk} does not divide {count} queries")
  chunks = queries.reshape(groups, count // chunk, chunk, width).swapaxes(0, 1)
  out = jax.lax.map(jax.checkpoint(attend), chunks)  # [N / chunk, G, chunk, D]
  return out.swapaxes(0, 1).reshape(groups, count, values.shape[-1])


def dot_attention(queries: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Softmax attention with logits q . k / sqrt(D).

  Args:
    queries: [B, N, A, D].
    keys, values: [B, M, A, D].
    mask: bool, broadcastable to [B, A, N, M], True where a query sees a key; None: everywhere.

  Returns:
    [B, N, A, D] in the dtype of `values`.
  """
  batch, _, heads, width = queries.shape
  logits = (_heads_first(queries) @ _heads_first(keys).swapaxes(1, 2)) * width**-0.5  # [B * A, N, M]
  if mask is not None:
    mask = jnp.broadcast_to(mask, (batch, heads, *logits.shape[1:])).reshape(logits.shape)
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  return _heads_last(_attend(logits, _heads_first(values)), heads)
