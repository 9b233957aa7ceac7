"""Sparse mixture of experts: the experts' GEGLU feed-forward on each expert's tokens, and the router's losses.

`expert_ffn` has three backends. All are exact; none drops a token.

  dense    every expert on every token, masked: the oracle, with E times the work;
  bucket   one bucket of C slots per expert and one batched product. C is the smallest of several capacities that holds
           the fullest expert of the step; beyond the largest one, the dense backend runs. Best on accelerators with
           balanced experts;
  grouped  tiles of tokens of one expert each, with the expert's weights repeated per tile. The cost does not depend on
           the balance of the experts. Best for the small widths of a CPU run, where repeating weights is cheap.

  G images (groups), N tokens of an image, T = G * N tokens, D width, F hidden width, E experts, C capacity
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Capacities of the bucket backend as multiples of the mean load T / E.
CAPACITY_FACTORS = (1.25, 2.0)

BACKENDS = ("dense", "bucket", "grouped")


class ExpertParams(NamedTuple):
  """The experts' stored weights, stacked. `geglu_ffn` applies the factors of the equalized learning rate."""

  in_weight: jax.Array  # [E, D, 2 F]: value and gate
  in_bias: jax.Array  # [E, 2 F]
  out_weight: jax.Array  # [E, F, D]
  out_bias: jax.Array  # [E, D]


def geglu_ffn(x: jax.Array, params: ExpertParams) -> jax.Array:
  """The feed-forward of one expert (GEGLU, arXiv 2002.05202), or of all experts on one bucket each.

  Args:
    x: [..., C, D].
    params: weights with the same leading axes as x.

  Returns:
    [..., C, D].
  """
  dtype, width, inner = x.dtype, x.shape[-1], params.out_weight.shape[-2]
  # The factors 1 / sqrt(fan in) are applied to the activations, which are smaller than the weights.
  hidden = (x @ params.in_weight.astype(dtype)) / math.sqrt(width) + params.in_bias[..., None, :].astype(dtype)
  value, gate = jnp.split(hidden, 2, axis=-1)
  hidden = value * jax.nn.gelu(gate, approximate=False)
  return (hidden @ params.out_weight.astype(dtype)) / math.sqrt(inner) + params.out_bias[..., None, :].astype(dtype)


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


# If the repeated weights of all tiles are larger than this, the tiles are computed one at a time.
_REPEATED_BYTES = 1 << 27


def _tile_size(tokens, experts):
  """Slots per tile: about half the mean load of an expert, a power of two from 64 to 256."""
  half = max(1, tokens // (2 * experts))
  return min(256, max(64, 1 << (half.bit_length() - 1)))


def grouped_ffn(
  x: jax.Array, expert: jax.Array, position: jax.Array, load: jax.Array, params: ExpertParams
) -> jax.Array:
  """Each token through its expert, in tiles of slots that belong to one expert each.

  The weights of small experts are repeated per tile, for one batched product over all tiles. Tiles of large experts are
  computed one at a time; those without tokens are skipped.

  Args:
    x: [T, D].
    expert, position: int32 [T], as of `position_in_expert`.
    load: int32 [E], tokens per expert.
    params: the experts' weights.

  Returns:
    [T, D].
  """
  tokens, experts = x.shape[0], params.in_weight.shape[0]
  tile = _tile_size(tokens, experts)
  tiles = -(-tokens // tile) + experts - 1  # enough for every load
  ends = jnp.cumsum(-(-load // tile))  # [E], in tiles
  starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
  slot = starts[expert] * tile + position
  owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(tiles), side="right"), experts - 1)  # [tiles]

  def all_at_once(slots):
    # A product with a one-hot matrix, because the gradient of a gather would be a scatter of matrices.
    selector = jax.nn.one_hot(owner, experts, dtype=params.in_weight.dtype)
    repeated = jax.tree.map(lambda p: jnp.tensordot(selector, p, 1), params)
    return geglu_ffn(slots.reshape(tiles, tile, -1), repeated)

  def one_by_one(slots):
    def feed_forward(item):
      index, rows = item
      run = lambda rows: geglu_ffn(rows, jax.tree.map(lambda p: p[owner[index]], params))
      return jax.lax.cond(index < ends[-1], run, jnp.zeros_like, rows)

    return jax.lax.map(feed_forward, (jnp.arange(tiles), slots.reshape(tiles, tile, -1)))

  weights = sum(p.size * p.dtype.itemsize for p in params) // experts * tiles
  apply = all_at_once if weights <= _REPEATED_BYTES else one_by_one
  return through_slots(x, slot, tiles * tile, lambda slots: apply(slots).reshape(tiles * tile, -1))


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
  """
  if backend == "dense":
    return dense_ffn(x, expert, params)
  tokens, experts = x.shape[0], params.in_weight.shape[0]
  if backend == "grouped":
    position, load = position_in_expert(expert, experts)
    return grouped_ffn(x, expert, position, load, params)
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
