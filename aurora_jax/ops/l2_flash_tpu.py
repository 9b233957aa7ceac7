"""The kernels of `l2_flash.py` for TPUs, by Mosaic.

Tiles are [keys, queries]: what belongs to a query is a row along the lanes, and sums over keys run along the sublanes,
where they are cheap. Arrays of queries are therefore passed as [G, D, N], which also leaves no lane unused at D < 128.

G batch times heads, N queries, M keys, D head width, i block of queries, j block of keys
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aurora_jax.ops import l2_flash
from aurora_jax.ops.l2_flash import Sizes, Softmax

_QUERIES, _KEYS = 512, 512  # of a tile, at most: several float32 arrays of a tile fit 16 MiB
_LANES, _SUBLANES = 128, 16  # a block is a multiple of them (16: bfloat16)


class _Plan:
  """Block sizes, padded sizes and block specifications of an attention."""

  def __init__(self, queries: jax.Array, keys: jax.Array, values: jax.Array, interpret: bool):
    self.groups, self.count, self.width = queries.shape
    self.key_count, self.value_width = values.shape[1:]
    self.sizes = Sizes(self.key_count, self.width**-0.5)
    self.block, self.blocks = l2_flash.blocks(self.count, _QUERIES, _LANES)
    self.key_block, self.key_blocks = l2_flash.blocks(self.key_count, _KEYS, _SUBLANES)
    self.padded, self.key_padded = self.block * self.blocks, self.key_block * self.key_blocks
    self.interpret = interpret

  def of_queries(self, x):
    """[G, N, ...] -> [G, ..., padded N]; [G, N] -> [G, 1, padded N]."""
    x = x[:, None] if x.ndim == 2 else x.swapaxes(1, 2)
    return l2_flash.pad(x, 2, self.padded)

  def of_keys(self, x):
    """[G, M, D] -> [G, padded M, D]."""
    return l2_flash.pad(x, 1, self.key_padded)

  def call(self, kernel, operands, results, scratch, keys_outside=False, products=2):
    """Runs a kernel over a grid (groups, blocks of queries, blocks of keys), or keys before queries.

    Args:
      kernel: takes the references of operands, results and scratch.
      operands: pairs of an array and "query" or "key".
      results: pairs of a shape and "query" or "key".
      scratch: shapes of float32 arrays that last over the innermost axis of the grid.
      keys_outside: whether blocks of queries are the innermost axis.
      products: of a tile, for the cost estimate.
    """
    where = {"query": lambda g, i, j: (g, 0, i), "key": lambda g, i, j: (g, j, 0)}
    if keys_outside:
      where = {"query": lambda g, j, i: (g, 0, i), "key": lambda g, j, i: (g, j, 0)}
    shapes = {"query": lambda x: (1, x.shape[1], self.block), "key": lambda x: (1, self.key_block, x.shape[2])}
    specs = lambda pairs: [pl.BlockSpec(shapes[kind](x), where[kind]) for x, kind in pairs]
    inner = (self.key_blocks, self.blocks) if keys_outside else (self.blocks, self.key_blocks)
    tile = self.groups * self.padded * self.key_padded
    size = lambda pairs: sum(x.size * x.dtype.itemsize for x, _ in pairs)
    return pl.pallas_call(
      functools.partial(kernel, self.sizes),
      grid=(self.groups, *inner),
      in_specs=specs(operands),
      out_specs=specs(results),
      out_shape=[x for x, _ in results],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
      cost_estimate=pl.CostEstimate(
        flops=2 * products * tile * self.width, transcendentals=2 * tile, bytes_accessed=size(operands) + size(results)
      ),
      interpret=self.interpret,
    )(*(x for x, _ in operands))


def forward(queries: jax.Array, keys: jax.Array, values: jax.Array, interpret: bool) -> tuple[jax.Array, jax.Array]:
  """See `l2_flash.Kernels`."""
  plan = _Plan(queries, keys, values, interpret)
  shape = jax.ShapeDtypeStruct
  out, log_sum = plan.call(
    _forward_kernel,
    [(plan.of_queries(queries), "query"), (plan.of_keys(keys), "key"), (plan.of_keys(values), "key")],
    [
      (shape((plan.groups, plan.value_width, plan.padded), values.dtype), "query"),
      (shape((plan.groups, 1, plan.padded), jnp.float32), "query"),
    ],
    [(1, plan.block), (1, plan.block), (plan.value_width, plan.block)],
  )
  return out[:, :, : plan.count].swapaxes(1, 2), log_sum[:, 0, : plan.count]


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
  plan = _Plan(queries, keys, values, interpret)
  shape = jax.ShapeDtypeStruct
  operands = [
    *((plan.of_queries(x), "query") for x in (queries, gradient, log_sum, delta)),
    *((plan.of_keys(x), "key") for x in (keys, values)),
  ]
  (dq,) = plan.call(
    _query_kernel,
    operands,
    [(shape((plan.groups, plan.width, plan.padded), queries.dtype), "query")],
    [(1, plan.block), (plan.width, plan.block)],
    products=3,
  )
  dk, dv = plan.call(
    _key_kernel,
    operands,
    [
      (shape((plan.groups, plan.key_padded, plan.width), keys.dtype), "key"),
      (shape((plan.groups, plan.key_padded, plan.value_width), values.dtype), "key"),
    ],
    [(plan.key_block, 1), (plan.key_block, plan.width), (plan.key_block, plan.value_width)],
    keys_outside=True,
    products=4,
  )
  return dq[:, :, : plan.count].swapaxes(1, 2), dk[:, : plan.key_count], dv[:, : plan.key_count]


def _tile(sizes, query, key, block):
  """Logits and 1 / d [keys, queries] of a query block [D, queries] and key block [keys, D]. Padding has logit -inf."""
  found, inverse = l2_flash.logits(
    l2_flash.split_product(key, query, (1, 0)), l2_flash.squares(query, 0), l2_flash.squares(key, 1), sizes.scale
  )
  if sizes.keys % len(key):
    position = block * len(key) + jax.lax.broadcasted_iota(jnp.int32, found.shape, 0)
    found = jnp.where(position < sizes.keys, found, -jnp.inf)
  return found, inverse


def _forward_kernel(sizes, query, key, value, out, log_sum, largest, total, sums):
  block = pl.program_id(2)

  @pl.when(block == 0)
  def _():
    largest[...] = jnp.full(largest.shape, -jnp.inf)
    total[...] = jnp.zeros(total.shape)
    sums[...] = jnp.zeros(sums.shape)

  logits, _ = _tile(sizes, query[0], key[0], block)
  state, weights, factor = Softmax(largest[...], total[...]).add(logits, axis=0)
  largest[...], total[...] = state
  sums[...] = sums[...] * factor + l2_flash.product(value[0], weights.astype(value.dtype), (0, 0))

  @pl.when(block == pl.num_programs(2) - 1)
  def _():
    out[0] = (sums[...] / total[...]).astype(out.dtype)
    log_sum[0] = Softmax(largest[...], total[...]).log_sum


def _weights(sizes, query, gradient, log_sum, delta, key, value, block):
  """P and c [keys, queries] of a tile."""
  logits, inverse = _tile(sizes, query[0], key[0], block)
  weights = jnp.exp(logits - log_sum[0])
  weight_gradients = l2_flash.product(value[0], gradient[0], (1, 0))
  return weights, l2_flash.coefficients(weights, weight_gradients, delta[0], inverse, sizes.scale)


def _query_kernel(sizes, query, gradient, log_sum, delta, key, value, dq, total, sums):
  block = pl.program_id(2)

  @pl.when(block == 0)
  def _():
    total[...] = jnp.zeros(total.shape)
    sums[...] = jnp.zeros(sums.shape)

  _, c = _weights(sizes, query, gradient, log_sum, delta, key, value, block)
  total[...] += jnp.sum(c, axis=0, keepdims=True)
  sums[...] += l2_flash.split_product(key[0], c, (0, 0))

  @pl.when(block == pl.num_programs(2) - 1)
  def _():
    dq[0] = (query[0].astype(jnp.float32) * total[...] - sums[...]).astype(dq.dtype)


def _key_kernel(sizes, query, gradient, log_sum, delta, key, value, dk, dv, total, sums, value_sums):
  block = pl.program_id(2)

  @pl.when(block == 0)
  def _():
    total[...] = jnp.zeros(total.shape)
    sums[...] = jnp.zeros(sums.shape)
    value_sums[...] = jnp.zeros(value_sums.shape)

  weights, c = _weights(sizes, query, gradient, log_sum, delta, key, value, pl.program_id(1))
  total[...] += jnp.sum(c, axis=1, keepdims=True)
  sums[...] += l2_flash.split_product(c, query[0], (1, 1))
  value_sums[...] += l2_flash.product(weights.astype(value.dtype), gradient[0], (1, 1))

  @pl.when(block == pl.num_programs(2) - 1)
  def _():
    dk[0] = (key[0].astype(jnp.float32) * total[...] - sums[...]).astype(dk.dtype)
    dv[0] = value_sums[...].astype(dv.dtype)
