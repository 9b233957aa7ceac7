"""The training state and its optimisers: Adam without a first moment, EMA, the average of w."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from aurora_jax import config as config_lib


@flax.struct.dataclass
class TrainState:
  """Everything a run needs to go on, and nothing else.

  Attributes:
    step: int32 scalar, steps done.
    generator: parameters of `Generator`.
    buffers: its buffers; `w_avg` moves.
    ema: exponential moving average of `generator`.
    discriminator: parameters of `Discriminator`.
    generator_opt, discriminator_opt: optax states.
  """

  step: jax.Array
  generator: Any
  buffers: Any
  ema: Any
  discriminator: Any
  generator_opt: Any
  discriminator_opt: Any


def _decays(path, _):
  """Attention matrices only (GigaGAN A2)."""
  names = [str(getattr(entry, "key", entry)) for entry in path]
  return names[-1] == "weight" and any("attention" in name for name in names) and "norm" not in names


def adam(cfg, beta2):
  """Adam with a first moment of zero, which is not stored; decoupled weight decay on attention matrices.

  The learning rate is applied by the caller (`scaled`), so that the state holds no schedule.

  Args:
    cfg: `config.Optimizer`.
    beta2: decay of the second moment.

  Returns:
    `optax.GradientTransformation` whose updates are the direction of ascent.
  """
  parts = [optax.scale_by_rms(beta2, cfg.eps, eps_in_sqrt=False, bias_correction=True)]
  if cfg.attention_weight_decay:
    mask = lambda params: jax.tree_util.tree_map_with_path(_decays, params)
    parts.append(optax.add_decayed_weights(cfg.attention_weight_decay, mask))
  return optax.chain(*parts)


def learning_rate_factor(cfg, step, total_steps):
  """Warm-up times cosine decay: the factor on both learning rates at `step`."""
  step = jnp.asarray(step, jnp.float32)
  warm = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
  if cfg.final_lr_fraction == 1:
    return warm  # without total_steps the program stays the same, in JAX's cache too, when a run goes further
  progress = jnp.clip(step / total_steps, 0, 1)
  floor = cfg.final_lr_fraction
  return warm * (floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def update(cfg, optimizer, gradients, opt_state, params, learning_rate):
  """One optimiser step; biases at their own fraction of the learning rate. Returns (params, opt_state)."""
  updates, opt_state = optimizer.update(gradients, opt_state, params)

  def move(path, param, step):
    rate = learning_rate * (cfg.bias_lr_factor if path[-1].key == "bias" else 1.0)
    return param - rate * step.astype(param.dtype)

  return jax.tree_util.tree_map_with_path(move, params, updates), opt_state


def ema_decay(cfg: config_lib.Optimizer, step, batch_size):
  """Decay of the EMA at a step: a half-life in images, short at the start (StyleGAN2-ADA's ramp-up)."""
  half_life = jnp.float32(cfg.ema_half_life_images)
  if cfg.ema_ramp_up:
    half_life = jnp.minimum(half_life, cfg.ema_ramp_up * (step + 1).astype(jnp.float32) * batch_size)
  return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))
