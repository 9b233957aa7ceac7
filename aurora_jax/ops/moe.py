"""Sparse mixture of experts: the experts' GEGLU feed-forward on each expert's tokens, and the router's losses.

`expert_ffn` has four backends. All are exact; none drops a token.

  dense    every expert on every token, masked: the oracle, with E times the work;
  bucket   one bucket of C slots per expert and one batched product. C is the smallest of several capacities that holds
           the fullest expert of the step; beyond the largest one, the dense backend runs. Best on accelerators with
           balanced experts;
  grouped  tokens sorted by expert. Small experts: tiles of tokens of one expert each, the weights repeated per tile.
           Large experts: one after the other, each on its own tokens. The cost hardly depends on the balance of the
           experts. Best on a CPU;
  kernel   tokens sorted by expert, and the grouped products of tokamax (extra "kernels"): its kernels on GPUs and TPUs.

  G images (groups), N tokens of an image, T = G * N tokens, D width, F hidden width, E experts, C capacity
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from aurora_jax.errors import UserError
from aurora_jax.ops.geglu import ExpertParams, gated, geglu_ffn
from aurora_jax.ops.large_experts import one_after_the_other

# Capacities of the bucket backend as multiples of the mean load T / E.
CAPACITY_FACTORS = (1.25, 2.0)

BACKENDS = ("dense", "bucket", "grouped", "kernel")


def dense_ffn(x: jax.Array, expert: jax.Array, params: ExpertParams) -> jax.Array:
  """Every expert on every token, one expert at a time, masked. x [T, D], expert int [T] -> [T, D]."""

  def add(total, item):
    index, one = item
    out = jax.checkpoint(geglu_ffn)(x, one)
    return total + jnp.where((expert == index)[:, None], out, 0), None

  experts = params.in_weight.shape[0]
  total, _ = jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(experts), params))
  return total


@jax.custom_vjp
def _take_rows(x, index, inverse):
  """Rows of x by index; zeros if the index is out of range.

  `inverse` is the new place of each row of x, or out of range. The gradient of a permutation is the inverse gather,
  which is much cheaper than the scatter of automatic differentiation.
  """
  del inverse
  return x.at[index].get(mode="fill", fill_value=0)


def _take_rows_forward(x, index, inverse):
  return _take_rows(x, index, inverse), (index, inverse)


def _take_rows_backward(residuals, cotangent):
  index, inverse = residuals
  return _take_rows(cotangent, inverse, index), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def position_in_expert(expert: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
  """Each token's position among the tokens of its expert, and the number of tokens per expert.

  Args:
    expert: [T] int32.
    experts: E.

  Returns:
    (position [T] int32, load [E] int32).
  """
  one_hot = (expert[:, None] == jnp.arange(experts)).astype(jnp.int32)  # [T, E]
  queue = jnp.cumsum(one_hot, axis=0)
  position = jnp.take_along_axis(queue, expert[:, None], axis=1)[:, 0] - 1
  return position, queue[-1]


def through_slots(
  x: jax.Array, slot: jax.Array, slots: int, feed_forward: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """Moves each token to its slot, applies a function to the slots and moves the results back.

  Args:
    x: [T, D].
    slot: int [T], the slot of each token, all different. A token whose number is `slots` or more has no slot.
    slots: number of slots.
    feed_forward: [slots, D] -> [slots, D]. Empty slots hold zeros.

  Returns:
    [T, D]; zeros for tokens without a slot.
  """
  tokens = x.shape[0]
  token_of_slot = jnp.full(slots, tokens, jnp.int32)
  token_of_slot = token_of_slot.at[slot].set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
  out = feed_forward(_take_rows(x, token_of_slot, slot))
  return _take_rows(out, slot, token_of_slot)


def bucket_ffn(x: jax.Array, expert: jax.Array, position: jax.Array, params: ExpertParams, capacity: int) -> jax.Array:
  """Each token through its expert, in buckets of `capacity` slots.

  Args:
    x: [T, D].
    expert, position: int32 [T], as of `position_in_expert`.
    params: the experts' weights.
    capacity: C.

  Returns:
    [T, D]; zeros for tokens whose position is C or more.
  """
  experts = params.in_weight.shape[0]
  slots = experts * capacity
  slot = jnp.where(position < capacity, expert * capacity + position, slots)
  return through_slots(
    x, slot, slots, lambda buckets: geglu_ffn(buckets.reshape(experts, capacity, -1), params).reshape(slots, -1)
  )


# Experts are large, and go one after the other, if the repeated weights of all tiles would take more than this.
_REPEATED_BYTES = 1 << 27


def grouped_ffn(
  x: jax.Array, expert: jax.Array, position: jax.Array, load: jax.Array, params: ExpertParams
) -> jax.Array:
  """Each token through its expert, whatever the loads of the experts.

  Args:
    x: [T, D].
    expert, position: int32 [T], as of `position_in_expert`.
    load: int32 [E], tokens per expert.
    params: the experts' weights.

  Returns:
    [T, D].
  """
  tokens, experts = x.shape[0], params.in_weight.shape[0]
  tiles = _tiles(tokens, experts, _tile_size(tokens, experts))
  if sum(p.size * p.dtype.itemsize for p in params) // experts * tiles <= _REPEATED_BYTES:
    return _in_tiles(x, expert, position, load, params)
  slot = _sorted_slots(expert, position, load)
  return through_slots(x, slot, tokens, lambda rows: one_after_the_other(rows, load, params))


def _sorted_slots(expert, position, load):
  """Each token's place if tokens are sorted by expert."""
  return (jnp.cumsum(load) - load)[expert] + position


def _tile_size(tokens, experts):
  """Slots per tile: about half the mean load of an expert, a power of two from 64 to 256."""
  half = max(1, tokens // (2 * experts))
  return min(256, max(64, 1 << (half.bit_length() - 1)))


def _tiles(tokens, experts, tile):
  return -(-tokens // tile) + experts - 1  # enough for every load


def _in_tiles(x, expert, position, load, params):
  """`grouped_ffn` of small experts: tiles of slots of one expert each, the weights repeated per tile."""
  tokens, experts = x.shape[0], params.in_weight.shape[0]
  tile = _tile_size(tokens, experts)
  tiles = _tiles(tokens, experts, tile)
  ends = jnp.cumsum(-(-load // tile))  # [E], in tiles
  starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
  slot = starts[expert] * tile + position
  owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(tiles), side="right"), experts - 1)  # [tiles]

  def feed_forward(slots):
    # A product with a one-hot matrix, because the gradient of a gather would be a scatter of matrices.
    selector = jax.nn.one_hot(owner, experts, dtype=params.in_weight.dtype)
    repeated = jax.tree.map(lambda p: jnp.tensordot(selector, p, 1), params)
    return geglu_ffn(slots.reshape(tiles, tile, -1), repeated).reshape(tiles * tile, -1)

  return through_slots(x, slot, tiles * tile, feed_forward)


def kernel_ffn(
  x: jax.Array, expert: jax.Array, position: jax.Array, load: jax.Array, params: ExpertParams
) -> jax.Array:
  """Each token through its expert by `tokamax.ragged_dot`. Arguments and result as of `grouped_ffn`.

  Without tuned tiles for a shape, tokamax takes those of its heuristics: the same in every run of one version of it.

  Raises:
    UserError: tokamax is not installed.
  """
  ragged_dot = _grouped_product()
  experts, width, inner = len(load), x.shape[1], params.out_weight.shape[1]

  def feed_forward(rows):
    owner = jax.nn.one_hot(jnp.repeat(jnp.arange(experts), load, total_repeat_length=len(rows)), experts, dtype=x.dtype)

    def linear(rows, weight, bias, fan_in):
      # The gradient of a gather of biases would be a scatter.
      bias = jnp.matmul(owner, bias.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
      return ragged_dot(rows, weight.astype(x.dtype), load) / math.sqrt(fan_in) + bias

    hidden = linear(rows, params.in_weight, params.in_bias, width)
    return linear(gated(hidden), params.out_weight, params.out_bias, inner)

  return through_slots(x, _sorted_slots(expert, position, load), len(x), feed_forward)


def _grouped_product():
  """`tokamax.ragged_dot`: rows [T, K] sorted by group, [E, K, N], rows per group [E] -> [T, N]."""
  try:
    import tokamax
  except ImportError as error:
    raise UserError(f"generator.moe_backend='kernel': {error}; pip install 'aurora_jax[kernels]'") from None
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # tokamax would take the command line for flags of its own
  logging.getLogger("absl").addFilter(_is_not_about_tiles)
  return tokamax.ragged_dot


def _is_not_about_tiles(record):
  """False for a log record in which tokamax warns, at every product, that it has no tuned tiles."""
  return not str(record.msg).startswith("Autotuning cache miss")


def expert_ffn(
  x: jax.Array,
  expert: jax.Array,
  params: ExpertParams,
  backend: str = "bucket",
  capacity_factors: Sequence[float] = CAPACITY_FACTORS,
) -> jax.Array:
  """The output of its expert for every token.

  Args:
    x: [T, D].
    expert: int32 [T].
    params: the experts' weights.
    backend: one of `BACKENDS`.
    capacity_factors: capacities of "bucket" as multiples of T / E. If none holds the fullest expert, "dense" runs.

  Returns:
    [T, D]. All backends agree; no token is dropped.

  Raises:
    ValueError: an unknown backend.
    UserError: the backend is "kernel", and tokamax is not installed.
  """
  if backend == "dense":
    return dense_ffn(x, expert, params)
  tokens, experts = x.shape[0], params.in_weight.shape[0]
  if backend in ("grouped", "kernel"):
    position, load = position_in_expert(expert, experts)
    return (grouped_ffn if backend == "grouped" else kernel_ffn)(x, expert, position, load, params)
  if backend != "bucket":
    raise ValueError(f"no MoE backend {backend!r}; there are {', '.join(BACKENDS)}")
  capacities = [math.ceil(factor * tokens / experts) for factor in capacity_factors]
  capacities = sorted({min(capacity, tokens) for capacity in capacities})
  position, load = position_in_expert(expert, experts)
  branches = [functools.partial(bucket_ffn, capacity=capacity) for capacity in capacities]
  if capacities[-1] < tokens:
    branches.append(lambda x, expert, position, params: dense_ffn(x, expert, params))
  if len(branches) == 1:
    return branches[0](x, expert, position, params)
  rung = jnp.searchsorted(jnp.array(capacities[: len(branches) - 1]), load.max())
  return jax.lax.switch(rung, branches, x, expert, position, params)


def router_losses(logits: jax.Array, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Router z-loss (ST-MoE, arXiv 2202.08906) and load-balance loss per image (Switch, arXiv 2101.03961, eq. 4-6).

  Args:
    logits: float32 [G, N, E].
    expert: int32 [G, N], the chosen experts.

  Returns:
    (z_loss, balance_loss), float32 scalars, means over images.
  """
  experts = logits.shape[-1]
  z_loss = jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
  share = jnp.mean(jax.nn.one_hot(expert, experts), axis=-2)  # [G, E]
  probability = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=-2)
  return z_loss, jnp.mean(share * probability) * experts**2
