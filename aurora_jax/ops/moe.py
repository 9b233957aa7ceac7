"""Sparse mixture of experts: which expert a token goes to, and the experts' GEGLU feed-forward.

Two backends behind `expert_ffn`: `dense` computes every expert on every token (the oracle); `bucket` sorts tokens into
one bucket per expert and computes each token once. Nothing is ever dropped: the bucket's capacity is chosen from a
ladder by the fullest expert of the step, and the last rung takes any load.

  G images (groups), N tokens of an image, T = G * N tokens, D width, F hidden width, E experts, C capacity
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Rungs of the ladder as multiples of the mean load T / E.
CAPACITY_FACTORS = (1.25, 2.0)


class ExpertParams(NamedTuple):
  """The experts' weights, stacked, with the equalised learning rate's factors applied."""

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
  dtype = x.dtype
  hidden = x @ params.in_weight.astype(dtype) + params.in_bias[..., None, :].astype(dtype)
  value, gate = jnp.split(hidden, 2, axis=-1)
  hidden = value * jax.nn.gelu(gate, approximate=False)
  return hidden @ params.out_weight.astype(dtype) + params.out_bias[..., None, :].astype(dtype)


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
  tokens, width = x.shape
  experts = params.in_weight.shape[0]
  slot = expert * capacity + jnp.where(position < capacity, position, experts * capacity)  # [T]
  token_of_slot = jnp.full(experts * capacity, tokens, jnp.int32)
  token_of_slot = token_of_slot.at[slot].set(jnp.arange(tokens, dtype=jnp.int32), mode="drop")
  buckets = _take_rows(x, token_of_slot, slot).reshape(experts, capacity, width)
  out = geglu_ffn(buckets, params).reshape(experts * capacity, width)
  return _take_rows(out, slot, token_of_slot)


def expert_ffn(x, expert, params, backend="bucket", capacity_factors=CAPACITY_FACTORS):
  """The chosen expert's output for every token.

  Args:
    x: [T, D].
    expert: [T] int32.
    params: ExpertParams.
    backend: "bucket" or "dense".
    capacity_factors: ascending multiples of T / E to try before the rung that takes any load.

  Returns:
    [T, D]. Both backends agree; no token is dropped.
  """
  if backend == "dense":
    return dense_ffn(x, expert, params)
  if backend != "bucket":
    raise ValueError(f"no MoE backend {backend!r}; there are 'bucket' and 'dense'")
  tokens, experts = x.shape[0], params.in_weight.shape[0]
  capacities = [math.ceil(factor * tokens / experts) for factor in capacity_factors]
  capacities = sorted({min(capacity, tokens) for capacity in capacities})
  position, load = position_in_expert(expert, experts)
  branches = [functools.partial(bucket_ffn, capacity=capacity) for capacity in capacities]
  if capacities[-1] < tokens:
    branches.append(lambda x, expert, position, params: dense_ffn(x, expert, params))
  if len(branches) == 1:
    return branches[0](x, expert, position, params)
  rung = jnp.searchsorted(jnp.array(capacities[:len(branches) - 1]), load.max())
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
