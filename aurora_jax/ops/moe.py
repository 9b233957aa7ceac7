"""Sparse mixture of experts: the experts' GEGLU feed-forward on each expert's tokens, and the router's losses.

`expert_ffn` has three backends. All are exact; none drops a token.

  dense    every expert on every token, masked: the oracle, with E times the work;
  bucket   one bucket of C slots per expert and one batched product. C is the smallest of several capacities that holds
           the fullest expert of the step; beyond the largest one, the dense backend runs. Best on accelerators with
           balanced experts;
  grouped  tokens sorted by expert. Small experts: tiles of tokens of one expert each, the weights repeated per tile.
           Large experts: one after the other, each on its own tokens. The cost hardly depends on the balance of the
           experts. Best on a CPU.

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
  return _project_out(_project_in(x, params.in_weight, params.in_bias), params.out_weight, params.out_bias)


def _project_in(x, weight, bias):
  """x [..., C, D], weight [..., D, 2 F], bias [..., 2 F] -> value and gate [..., C, 2 F]."""
  # The factors 1 / sqrt(fan in) are applied to the activations, which are smaller than the weights.
  return (x @ weight.astype(x.dtype)) / math.sqrt(x.shape[-1]) + bias[..., None, :].astype(x.dtype)


def _project_out(hidden, weight, bias):
  """hidden [..., C, 2 F], weight [..., F, D], bias [..., D] -> [..., C, D]."""
  value, gate = jnp.split(hidden, 2, axis=-1)
  hidden = value * jax.nn.gelu(gate, approximate=False)
  return (hidden @ weight.astype(hidden.dtype)) / math.sqrt(weight.shape[-2]) + bias[..., None, :].astype(hidden.dtype)


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
  slot = (jnp.cumsum(load) - load)[expert] + position
  return through_slots(x, slot, tokens, lambda rows: _one_after_the_other(rows, load, params))


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


# Numbers of rows for which the products of a large expert are compiled, as multiples of the mean load.
_ROW_FACTORS = (0.5, 0.75, 1.0, 1.125, 1.25, 1.5, 2.0)


def _row_counts(tokens, experts):
  return sorted({min(tokens, 8 * math.ceil(factor * tokens / experts / 8)) for factor in _ROW_FACTORS})


def _for_each_expert(load, tokens, body, carry):
  """Loops over the experts' rows, in pieces of at most the largest row count.

  A piece takes the smallest row count that holds it. There is one loop per row count: loops change `carry` in place,
  while a `lax.switch` over the row counts would copy it for every piece.

  Args:
    load: int32 [E].
    tokens: T.
    body: (expert, first row, mask [rows, 1] of the piece's own rows, carry) -> carry. The rows are contiguous.
    carry: arrays.

  Returns:
    The last carry.
  """
  counts = _row_counts(tokens, load.size)
  largest = counts[-1]
  ends = jnp.cumsum(-(-load // largest))  # [E], in pieces
  piece = jnp.arange(load.size + tokens // largest)  # enough for every load
  owner = jnp.minimum(jnp.searchsorted(ends, piece, side="right"), load.size - 1)
  skipped = (piece - ends[owner] - (-load // largest)[owner]) * largest  # rows of the expert's earlier pieces
  start = (jnp.cumsum(load) - load)[owner] + skipped
  length = jnp.clip(load[owner] - skipped, 0, largest)
  order = jnp.argsort(length)  # so that the pieces of one row count follow each other
  bounds = jnp.searchsorted(length[order], jnp.array([0, *counts]), side="right")
  for count, begin, end in zip(counts, bounds[:-1], bounds[1:]):

    def step(place, carry, count=count):
      chosen = order[place]
      first = jnp.minimum(start[chosen], tokens - count)
      row = first + jnp.arange(count)[:, None]
      own = (start[chosen] <= row) & (row < start[chosen] + length[chosen])
      return body(owner[chosen], first, own, carry)

    carry = jax.lax.fori_loop(begin, end, step, carry)
  return carry


def _rows(array, first, count):
  return jax.lax.dynamic_slice_in_dim(array, first, count)


def _write(array, first, own, rows):
  rows = jnp.where(own, rows, _rows(array, first, own.size))
  return jax.lax.dynamic_update_slice_in_dim(array, rows, first, 0)


def _forward(x, load, params, keep):
  """x [T, D], sorted by expert -> the output [T, D] and, if `keep`, value and gate [T, 2 F]."""

  def body(expert, first, own, carry):
    one = jax.tree.map(lambda p: p[expert], params)
    hidden = _project_in(_rows(x, first, own.size), one.in_weight, one.in_bias)
    made = _project_out(hidden, one.out_weight, one.out_bias), hidden
    return tuple(_write(array, first, own, rows) for array, rows in zip(carry, made))

  carry = (jnp.zeros_like(x),)
  if keep:
    carry += (jnp.zeros_like(x, shape=(x.shape[0], params.in_weight.shape[-1])),)
  return _for_each_expert(load, x.shape[0], body, carry)


@jax.custom_vjp
def _one_after_the_other(x, load, params):
  """`grouped_ffn` of large experts on tokens that are sorted by expert. x [T, D], load int32 [E] -> [T, D].

  Automatic differentiation would add every expert's gradient to the sum of all of them, which is as large as all
  weights.
  """
  return _forward(x, load, params, keep=False)[0]


def _one_after_the_other_forward(x, load, params):
  out, hidden = _forward(x, load, params, keep=True)
  return out, (x, load, params, hidden)


def _one_after_the_other_backward(residuals, cotangent):
  x, load, params, hidden = residuals

  def body(expert, first, own, carry):
    d_x, d_params = carry
    one = jax.tree.map(lambda p: p[expert], params)
    rows = lambda array: _rows(array, first, own.size)
    d_hidden, *d_out = jax.vjp(_project_out, rows(hidden), one.out_weight, one.out_bias)[1](
      jnp.where(own, rows(cotangent), 0)
    )
    d_rows, *d_in = jax.vjp(_project_in, rows(x), one.in_weight, one.in_bias)[1](d_hidden)
    add = lambda total, part: total.at[expert].add(part)
    return _write(d_x, first, own, d_rows), jax.tree.map(add, d_params, ExpertParams(*d_in, *d_out))

  carry = jnp.zeros_like(x), jax.tree.map(jnp.zeros_like, params)
  d_x, d_params = _for_each_expert(load, x.shape[0], body, carry)
  return d_x, None, d_params


_one_after_the_other.defvjp(_one_after_the_other_forward, _one_after_the_other_backward)


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
