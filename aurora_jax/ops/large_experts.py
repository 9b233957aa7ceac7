"""The feed-forward of large experts on a CPU, one expert at a time. The tokens are sorted by expert.

T tokens, D width, F hidden width, E experts
"""

import functools
import math

import jax
import jax.numpy as jnp

from aurora_jax.ops.geglu import ExpertParams, project_in, project_out

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
  pieces = -(-load // largest)  # [E]
  ends = jnp.cumsum(pieces)
  piece = jnp.arange(load.size + tokens // largest)  # enough for every load
  owner = jnp.minimum(jnp.searchsorted(ends, piece, side="right"), load.size - 1)
  skipped = (piece - (ends - pieces)[owner]) * largest  # rows of the expert's earlier pieces
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


def _counted(products, x, params, function, *arguments):
  """Calls a function under a name from which `performance.flop_count` reads its operations.

  Nothing can be counted in loops of unknown length.

  Args:
    products: how many products of T x D x F.
    x: [T, D].
    params: the experts' weights.
    function: called with the arguments.
    *arguments: arrays.
  """
  flops = 2 * products * x.size * params.out_weight.shape[1]
  called = lambda *arguments: function(*arguments)
  called.__name__ = f"counts_{flops}_flops"
  return jax.jit(called)(*arguments)


def _forward(x, load, params, keep):
  """x [T, D], sorted by expert -> the output [T, D] and, if `keep`, value and gate [T, 2 F]."""

  def body(expert, first, own, carry):
    one = jax.tree.map(lambda p: p[expert], params)
    hidden = project_in(_rows(x, first, own.size), one.in_weight, one.in_bias)
    made = project_out(hidden, one.out_weight, one.out_bias), hidden
    return tuple(_write(array, first, own, rows) for array, rows in zip(carry, made))

  carry = (jnp.zeros_like(x),)
  if keep:
    carry += (jnp.zeros_like(x, shape=(x.shape[0], params.in_weight.shape[-1])),)
  return _for_each_expert(load, x.shape[0], body, carry)


@jax.custom_vjp
def one_after_the_other(x: jax.Array, load: jax.Array, params: ExpertParams) -> jax.Array:
  """The feed-forward of each expert on its tokens.

  Args:
    x: [T, D], sorted by expert.
    load: int32 [E], tokens per expert.
    params: the experts' weights.

  Returns:
    [T, D].

  Automatic differentiation would add every expert's gradient to the sum of all of them, which is as large as all
  weights.
  """
  return _counted(3, x, params, functools.partial(_forward, keep=False), x, load, params)[0]


def _one_after_the_other_forward(x, load, params):
  out, hidden = _counted(3, x, params, functools.partial(_forward, keep=True), x, load, params)
  return out, (x, load, params, hidden)


def _one_after_the_other_backward(residuals, cotangent):
  x, _, params, _ = residuals
  d_x, d_params = _counted(6, x, params, _gradients, *residuals, cotangent)
  return d_x, None, d_params


def _gradients(x, load, params, hidden, cotangent):
  """Of the tokens and of all weights."""

  def body(expert, first, own, carry):
    d_x, d_params = carry
    one = jax.tree.map(lambda p: p[expert], params)
    rows = lambda array: _rows(array, first, own.size)
    d_hidden, *d_out = jax.vjp(project_out, rows(hidden), one.out_weight, one.out_bias)[1](
      jnp.where(own, rows(cotangent), 0)
    )
    d_rows, *d_in = jax.vjp(project_in, rows(x), one.in_weight, one.in_bias)[1](d_hidden)
    add = lambda total, part: total.at[expert].add(part)
    return _write(d_x, first, own, d_rows), jax.tree.map(add, d_params, ExpertParams(*d_in, *d_out))

  carry = jnp.zeros_like(x), jax.tree.map(jnp.zeros_like, params)
  return _for_each_expert(load, x.shape[0], body, carry)


one_after_the_other.defvjp(_one_after_the_other_forward, _one_after_the_other_backward)
