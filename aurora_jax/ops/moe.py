"""Sparse mixture of experts: which expert a token goes to, and the experts' GEGLU feed-forward.

Three backends behind `expert_ffn`, all exact, none ever drops a token:

  dense    every expert on every token, masked: the oracle, E times the work;
  bucket   one bucket of C slots per expert, one batched product; C comes from a ladder by the fullest expert of the
           step, and the last rung takes any load. Best on accelerators with balanced experts;
  grouped  tokens in tiles of one expert each, the expert's weights repeated per tile. Costs the same however unbalanced
           the experts are; best for the small widths of a CPU run, where repeating weights is cheap.

  G images (groups), N tokens of an image, T = G * N tokens, D width, F hidden width, E experts, C capacity
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Rungs of the ladder as multiples of the mean load T / E.
CAPACITY_FACTORS = (1.25, 2.0)

BACKENDS = ("dense", "bucket", "grouped")


class ExpertParams(NamedTuple):
  """The experts' weights as they are stored, stacked; `geglu_ffn` applies the equalised learning rate's factors."""

  in_weight: jax.Array  # [E, D, 2 F]: value and gate
  in_bias: jax.Array  # [E, 2 F]
  out_weight: jax.Array  # [E, F, D]
  out_bias: jax.Array  # [E, D]


def geglu_ffn(x, params):
  """The feed-forward of one expert (arXiv 2002.05202), or of all, each on its own bucket.

  Args:
    x: [..., C, D].
    params: ExpertParams with the same leading axes as x, if any.

  Returns:
    [..., C, D].
  """
  dtype, width, inner = x.dtype, x.shape[-1], params.out_weight.shape[-2]
  # The factors 1 / sqrt(fan in) go onto the activations, which are the smaller ones.
  hidden = (x @ params.in_weight.astype(dtype)) / math.sqrt(width) + params.in_bias[..., None, :].astype(dtype)
  value, gate = jnp.split(hidden, 2, axis=-1)
  hidden = value * jax.nn.gelu(gate, approximate=False)
  return (hidden @ params.out_weight.astype(dtype)) / math.sqrt(inner) + params.out_bias[..., None, :].astype(dtype)


def dense_ffn(x, expert, params):
  """Every expert on every token, one expert after the other, masked. x: [T, D], expert: [T] -> [T, D]."""

  def add(total, item):
    index, one = item
    out = jax.checkpoint(geglu_ffn)(x, one)
    return total + jnp.where((expert == index)[:, None], out, 0), None

  experts = params.in_weight.shape[0]
  total, _ = jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(experts), params))
  return total


@jax.custom_vjp
def _take_rows(x, index, inverse):
  """Rows of x by index, zeros where the index is out of range. `inverse` is where each row of x went (or out of range):
  the gradient of a permutation is the inverse gather, much cheaper than the scatter that autodiff would write."""
  del inverse
  return x.at[index].get(mode="fill", fill_value=0)


def _take_rows_forward(x, index, inverse):
  return _take_rows(x, index, inverse), (index, inverse)


def _take_rows_backward(residuals, cotangent):
  index, inverse = residuals
  return _take_rows(cotangent, inverse, index), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def position_in_expert(expert, experts):
  """Each token's place in its expert's queue, and the queues' lengths.

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


def through_slots(x, slot, slots, feed_forward):
  """Moves each token to its slot, applies `feed_forward` [slots, D] -> [slots, D] and moves the results back.

  A slot number beyond `slots` means no slot: zeros. Empty slots hold zeros.
  """
  tokens = x.shape[0]
  token_of_slot = jnp.full(slots, tokens, jnp.int32)
  token_of_slot = token_of_slot.at[slot].set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
  out = feed_forward(_take_rows(x, token_of_slot, slot))
  return _take_rows(out, slot, token_of_slot)


def bucket_ffn(x, expert, position, params, capacity):
  """Each token through its own expert, in buckets of `capacity` slots; tokens beyond it would give zeros.

  Args:
    x: [T, D].
    expert, position: [T] int32, position < capacity.
    params: ExpertParams.
    capacity: C.

  Returns:
    [T, D].
  """
  experts = params.in_weight.shape[0]
  slots = experts * capacity
  slot = jnp.where(position < capacity, expert * capacity + position, slots)
  return through_slots(
    x, slot, slots, lambda buckets: geglu_ffn(buckets.reshape(experts, capacity, -1), params).reshape(slots, -1)
  )


# Tiles whose weights, all together, are larger than this go one after the other.
_REPEATED_BYTES = 1 << 27


def _tile_size(tokens, experts):
  """Slots of a tile: about half an expert's mean load, a power of two from 64 to 256."""
  half = max(1, tokens // (2 * experts))
  return min(256, max(64, 1 << (half.bit_length() - 1)))


def grouped_ffn(x, expert, position, load, params):
  """Each token through its own expert, in tiles of slots that belong to one expert each.

  Small experts: the weights are repeated per tile and all tiles go through one batched product. Large ones: one tile
  after the other, and those that hold no token are passed over.

  Args:
    x: [T, D].
    expert, position: [T] int32.
    load: [E] int32, tokens per expert.
    params: ExpertParams.

  Returns:
    [T, D].
  """
  tokens, experts = x.shape[0], params.in_weight.shape[0]
  tile = _tile_size(tokens, experts)
  tiles = -(-tokens // tile) + experts - 1  # the most that any load needs
  ends = jnp.cumsum(-(-load // tile))  # [E], in tiles
  starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
  slot = starts[expert] * tile + position
  owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(tiles), side="right"), experts - 1)  # [tiles]

  def all_at_once(slots):
    # A product with a one-hot matrix: its gradient is a product too, where a gather's would be a scatter of matrices.
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


def expert_ffn(x, expert, params, backend="bucket", capacity_factors=CAPACITY_FACTORS):
  """The chosen expert's output for every token.

  Args:
    x: [T, D].
    expert: [T] int32.
    params: ExpertParams.
    backend: one of `BACKENDS`.
    capacity_factors: of "bucket": ascending multiples of T / E to try before the rung that takes any load.

  Returns:
    [T, D]. All backends agree; no token is dropped.
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


def router_losses(logits, expert):
  """Router z-loss (ST-MoE, arXiv 2202.08906) and load balance per image (Switch, arXiv 2101.03961, eq. 4-6).

  Args:
    logits: [G, N, E] float32.
    expert: [G, N] int32, the chosen expert.

  Returns:
    (z_loss, balance_loss), float32 scalars: means over images.
  """
  experts = logits.shape[-1]
  z_loss = jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
  share = jnp.mean(jax.nn.one_hot(expert, experts), axis=-2)  # [G, E]
  probability = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=-2)
  return z_loss, jnp.mean(share * probability) * experts**2
