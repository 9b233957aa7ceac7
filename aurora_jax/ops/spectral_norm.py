"""Spectral normalization (arXiv 1802.05957) of weights as matrices [O, K], as in PyTorch's `spectral_norm`.

Two vectors estimate the largest singular value. One step of power iteration per training forward updates them. They are
state, not parameters: gradients flow through the weight and through sigma, with both vectors constant.

  O output channels, K inputs to one of them
"""

import jax
import jax.numpy as jnp

EPSILON = 1e-12


def unit(x: jax.Array) -> jax.Array:
  """x [N] divided by its length, or by `EPSILON` if that is larger."""
  return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x))), EPSILON)


def power_iteration(matrix: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
  """One step of power iteration, without gradient.

  Args:
    matrix: float32 [O, K].
    u: float32 [O], the stored left vector.

  Returns:
    The new (u [O], v [K]), both of length 1.
  """
  matrix = jax.lax.stop_gradient(matrix)
  exact = jax.lax.Precision.HIGHEST
  v = unit(jnp.matmul(matrix.T, jax.lax.stop_gradient(u), precision=exact))
  return unit(jnp.matmul(matrix, v, precision=exact)), v


def sigma(matrix: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
  """The estimate u . (matrix v) of the largest singular value. Only the matrix has a gradient.

  Before the first power iteration the estimate may be tiny or negative.

  Args:
    matrix: float32 [O, K].
    u: [O].
    v: [K].

  Returns:
    float32 scalar.
  """
  exact = jax.lax.Precision.HIGHEST
  product = jnp.matmul(matrix, jax.lax.stop_gradient(v), precision=exact)
  return jnp.matmul(jax.lax.stop_gradient(u), product, precision=exact)
