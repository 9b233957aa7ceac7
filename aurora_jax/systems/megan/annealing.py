"""The decay of the gate's temperature and of the balance loss's weight over the iterations (released: `solver.py`)."""

import jax
import jax.numpy as jnp

from aurora_jax.systems.megan.config import Loss


def temperature(cfg: Loss, step: jax.Array | int) -> jax.Array:
  """The gate's temperature in iteration `step` (0, 1, ...): exponential decay in steps of `anneal_every`, with a floor.

  The released program computes it after every `anneal_every`-th iteration, from the number of iterations done. It stops
  there with an error, since it does not import `exp`; this function returns the value that the program means.

  Args:
    cfg: the loss configuration.
    step: int32 scalar, iterations done.

  Returns:
    float32 scalar.
  """
  return _annealed(cfg, step, cfg.temperature, cfg.temperature_min)


def balance_weight(cfg: Loss, step: jax.Array | int) -> jax.Array:
  """Weight of the balance loss in iteration `step`; decays as `temperature` does, with its own floor. float32
  scalar.
  """
  return _annealed(cfg, step, cfg.balance_weight, cfg.balance_weight_min)


def _annealed(cfg, step, initial, minimum):
  changed = jnp.asarray(step, jnp.int32) // cfg.anneal_every * cfg.anneal_every  # when it last changed
  elapsed = (changed - cfg.anneal_start).astype(jnp.float32)
  value = jnp.maximum(initial * jnp.exp(-cfg.anneal_rate * elapsed), minimum)
  return jnp.where((changed > 0) & (changed >= cfg.anneal_start), value, jnp.float32(initial))
