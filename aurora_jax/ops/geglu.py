"""The feed-forward of an expert: GEGLU (arXiv 2002.05202).

D width, F hidden width, E experts, C tokens of an expert
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


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
  return project_out(project_in(x, params.in_weight, params.in_bias), params.out_weight, params.out_bias)


def project_in(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
  """x [..., C, D], weight [..., D, 2 F], bias [..., 2 F] -> value and gate [..., C, 2 F]."""
  # The factors 1 / sqrt(fan in) are applied to the activations, which are smaller than the weights.
  return (x @ weight.astype(x.dtype)) / math.sqrt(x.shape[-1]) + bias[..., None, :].astype(x.dtype)


def project_out(hidden: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
  """hidden [..., C, 2 F], weight [..., F, D], bias [..., D] -> [..., C, D]."""
  hidden = gated(hidden)
  return (hidden @ weight.astype(hidden.dtype)) / math.sqrt(weight.shape[-2]) + bias[..., None, :].astype(hidden.dtype)


def gated(hidden: jax.Array) -> jax.Array:
  """The value times GELU of the gate. [..., 2 F] -> [..., F]."""
  value, gate = jnp.split(hidden, 2, axis=-1)
  return value * jax.nn.gelu(gate, approximate=False)
