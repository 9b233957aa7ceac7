"""The kernels of `l2_flash.py` for NVIDIA GPUs, by Triton.

A program has a block of queries (or of keys, for the gradients of keys and values) and loops over all blocks of the
other side. Tiles are [queries, keys].

G batch times heads, N queries, M keys, D head width
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from aurora_jax.ops import l2_flash
from aurora_jax.ops.l2_flash import Sizes, Softmax

# Rows of a block, at most and at least; Triton's arrays have sizes of powers of two, and its products 16 or more.
_FORWARD, _BACKWARD, _LEAST = 64, 64, 16
_WARPS, _STAGES = 4, 2


class _Plan:
  """Block sizes and padded sizes of an attention."""

  def __init__(self, queries: jax.Array, keys: jax.Array, values: jax.Array, most: int, interpret: bool):
    self.groups, self.count, self.width = queries.shape
    self.key_count, self.value_width = values.shape[1:]
    self.sizes = Sizes(self.key_count, self.width**-0.5)
    self.block, self.key_block = (min(most, _power_of_two(size)) for size in (self.count, self.key_count))
    self.padded = pl.cdiv(self.count, self.block) * self.block
    self.key_padded = pl.cdiv(self.key_count, self.key_block) * self.key_block
    self.interpret = interpret

  def of_queries(self, x):
    """[G, N, D] or [G, N], padded. Zeros after the last of D change no distance."""
    x = l2_flash.pad(x, 1, self.padded)
    return x if x.ndim == 2 else l2_flash.pad(x, 2, _power_of_two(x.shape[2]))

  def of_keys(self, x):
    """[G, M, D], padded."""
    return l2_flash.pad(l2_flash.pad(x, 1, self.key_padded), 2, _power_of_two(x.shape[2]))

  def call(self, kernel: Any, operands, results, of: str, products: int):
    """Runs a kernel for every block of queries or keys.

    Args:
      kernel: takes the references of operands and results.
      operands: pairs of an array and "query" or "key".
      results: shapes, of the side `of`.
      of: "query" or "key": the side whose blocks have a program each; a program sees all of the other side.
      products: of a tile, for the cost estimate.
    """
    block, padded = (self.block, self.padded) if of == "query" else (self.key_block, self.key_padded)

    def spec(x, kind):
      rest, zeros = x.shape[2:], (0,) * (x.ndim - 2)
      if kind == of:
        return pl.BlockSpec((None, block, *rest), lambda i, g: (g, i, *zeros))
      return pl.BlockSpec((None, *x.shape[1:]), lambda i, g: (g, 0, *zeros))

    tile = self.groups * self.padded * self.key_padded
    arrays = [x for x, _ in operands]
    return pl.pallas_call(
      kernel,
      grid=(padded // block, self.groups),
      in_specs=[spec(x, kind) for x, kind in operands],
      out_specs=[spec(x, of) for x in results],
      out_shape=results,
      compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
      cost_estimate=pl.CostEstimate(
        flops=2 * products * tile * self.width,
        transcendentals=2 * tile,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *results)),
      ),
      interpret=self.interpret,
    )(*arrays)


def _power_of_two(size):
  return max(_LEAST, pl.next_power_of_2(size))


def forward(queries: jax.Array, keys: jax.Array, values: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
  """See `l2_flash.Kernels`."""
  plan = _Plan(queries, keys, values, _FORWARD, interpret)
  query, key, value = plan.of_queries(queries), plan.of_keys(keys), plan.of_keys(values)
  out, log_sum = plan.call(
    functools.partial(_forward_kernel, plan.sizes, plan.key_block),
    [(query, "query"), (key, "key"), (value, "key")],
    [
      jax.ShapeDtypeStruct((*query.shape[:2], value.shape[2]), value.dtype),
      jax.ShapeDtypeStruct(query.shape[:2], jnp.float32),
    ],
    "query",
    2,
  )
  return out[:, : plan.count, : plan.value_width], log_sum[:, : plan.count]


def backward(
  queries: jax.Array,
  keys: jax.Array,
  values: jax.Array,
  log_sum: jax.Array,
  delta: jax.Array,
  gradient: jax.Array,
  interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `l2_flash.Kernels`."""
  plan = _Plan(queries, keys, values, _BACKWARD, interpret)
  operands = [
    *((plan.of_queries(x), "query") for x in (queries, gradient, log_sum, delta)),
    *((plan.of_keys(x), "key") for x in (keys, values)),
  ]
  like = lambda place: jax.ShapeDtypeStruct(operands[place][0].shape, operands[place][0].dtype)
  (dq,) = plan.call(functools.partial(_query_kernel, plan.sizes, plan.key_block), operands, [like(0)], "query", 3)
  dk, dv = plan.call(functools.partial(_key_kernel, plan.sizes, plan.block), operands, [like(4), like(5)], "key", 4)
  dk, dv = dk[:, : plan.key_count, : plan.width], dv[:, : plan.key_count, : plan.value_width]
  return dq[:, : plan.count, : plan.width], dk, dv


def _tile(sizes: Sizes, query, query_squares, key, first):
  """Logits and 1 / d [queries, keys]; `first` is the position of the first key. Padding has logit -inf."""
  found, inverse = l2_flash.logits(
    l2_flash.split_product(query, key, (1, 1)),
    query_squares,
    jnp.sum(jnp.square(key.astype(jnp.float32)), axis=1)[None],
    sizes.scale,
  )
  if sizes.keys % len(key):
    position = first + jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
    found = jnp.where(position < sizes.keys, found, -jnp.inf)
  return found, inverse


def _forward_kernel(sizes, rows, query_ref, key_ref, value_ref, out_ref, log_sum_ref):
  query = query_ref[...]
  query_squares = l2_flash.squares(query, 1)
  count = len(query)

  def add(block, carry):
    state, sums = carry
    tile = pl.ds(block * rows, rows)
    value = value_ref[tile, :]
    logits, _ = _tile(sizes, query, query_squares, key_ref[tile, :], block * rows)
    state, weights, factor = state.add(logits, axis=1)
    return state, sums * factor + l2_flash.product(weights.astype(value.dtype), value, (1, 0))

  start = Softmax(jnp.full((count, 1), -jnp.inf), jnp.zeros((count, 1))), jnp.zeros((count, value_ref.shape[1]))
  state, sums = jax.lax.fori_loop(0, key_ref.shape[0] // rows, add, start)
  out_ref[...] = (sums / state.total).astype(out_ref.dtype)
  log_sum_ref[...] = state.log_sum[:, 0]


def _weights(sizes, query, gradient, log_sum, delta, key, value, first):
  """P and c [queries, keys] of a tile; log_sum and delta are [queries]."""
  logits, inverse = _tile(sizes, query, l2_flash.squares(query, 1), key, first)
  weights = jnp.exp(logits - log_sum[:, None])
  weight_gradients = l2_flash.product(gradient, value, (1, 1))
  return weights, l2_flash.coefficients(weights, weight_gradients, delta[:, None], inverse, sizes.scale)


def _query_kernel(sizes, rows, query_ref, gradient_ref, log_sum_ref, delta_ref, key_ref, value_ref, dq_ref):
  query, gradient, log_sum, delta = query_ref[...], gradient_ref[...], log_sum_ref[...], delta_ref[...]

  def add(block, carry):
    total, sums = carry
    tile = pl.ds(block * rows, rows)
    key = key_ref[tile, :]
    _, c = _weights(sizes, query, gradient, log_sum, delta, key, value_ref[tile, :], block * rows)
    return total + jnp.sum(c, axis=1, keepdims=True), sums + l2_flash.split_product(c, key, (1, 0))

  start = jnp.zeros((len(query), 1)), jnp.zeros(query.shape)
  total, sums = jax.lax.fori_loop(0, key_ref.shape[0] // rows, add, start)
  dq_ref[...] = (query.astype(jnp.float32) * total - sums).astype(dq_ref.dtype)


def _key_kernel(sizes, rows, query_ref, gradient_ref, log_sum_ref, delta_ref, key_ref, value_ref, dk_ref, dv_ref):
  key, value = key_ref[...], value_ref[...]
  first = pl.program_id(0) * len(key)

  def add(block, carry):
    total, sums, value_sums = carry
    tile = pl.ds(block * rows, rows)
    query, gradient = query_ref[tile, :], gradient_ref[tile, :]
    weights, c = _weights(sizes, query, gradient, log_sum_ref[tile], delta_ref[tile], key, value, first)
    return (
      total + jnp.sum(c, axis=0),
      sums + l2_flash.split_product(c, query, (0, 0)),
      value_sums + l2_flash.product(weights.astype(value.dtype), gradient, (0, 0)),
    )

  start = jnp.zeros(len(key)), jnp.zeros(key.shape), jnp.zeros(value.shape)
  total, sums, value_sums = jax.lax.fori_loop(0, query_ref.shape[0] // rows, add, start)
  dk_ref[...] = (key.astype(jnp.float32) * total[:, None] - sums).astype(dk_ref.dtype)
  dv_ref[...] = value_sums.astype(dv_ref.dtype)
