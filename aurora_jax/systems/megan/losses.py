"""MEGAN's losses: Wasserstein with gradient penalty (arXiv 1704.00028) and the gate's balance (arXiv 1805.02481).

All are float32 means over the batch; with a sharded batch, over the global one.

  B batch, n generators
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from aurora_jax.ops.attention import safe_sqrt


def discriminator_wasserstein(real: jax.Array, fake: jax.Array) -> jax.Array:
  """-mean D(real) + mean D(fake). [B] each -> scalar."""
  return jnp.mean(fake) - jnp.mean(real)


def generator_wasserstein(fake: jax.Array) -> jax.Array:
  """-mean D(fake). [B] -> scalar."""
  return -jnp.mean(fake)


def interpolate(real: jax.Array, fake: jax.Array, alpha: jax.Array) -> jax.Array:
  """Images between real and generated ones: [B, S, S, 3] each and alpha [B] from U[0, 1), 1 for the real one."""
  alpha = alpha.reshape(-1, 1, 1, 1)
  return alpha * real + (1 - alpha) * fake


def gradient_norm(score: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
  """Euclidean norm of the score's gradient per image: [B, S, S, 3] -> [B].

  There is no epsilon below the root; only a norm of exactly 0 has a gradient of 0, where the released code has NaN.

  Args:
    score: images -> [B], each entry depending on its own image only.
    images: [B, S, S, 3].
  """
  gradient = jax.grad(lambda x: jnp.sum(score(x)))(images)
  return safe_sqrt(jnp.sum(jnp.square(gradient), axis=(1, 2, 3)))


def gradient_penalty(score: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
  """mean((gradient norm - 1)^2) at `images`, as of `gradient_norm`. Scalar, without the weight of 10."""
  return jnp.mean(jnp.square(gradient_norm(score, images) - 1))


def load(gate: jax.Array) -> jax.Array:
  """Each generator's share of the batch. gate [B, n] -> [n], of sum 1."""
  return jnp.sum(gate, axis=0) / jnp.sum(gate)


def balance(gate: jax.Array) -> jax.Array:
  """mean((load - 1/n)^2) over the generators. gate [B, n] -> scalar, without its weight."""
  return jnp.mean(jnp.square(load(gate) - 1 / gate.shape[-1]))
