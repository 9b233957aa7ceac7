"""The training state and its optimisers: Adam without a first moment or Muon, EMA, the average of w."""

from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from aurora_jax import config as config_lib
from aurora_jax.systems.aurora import growth
from aurora_jax.training import muon


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


class RmsState(NamedTuple):
  """What Adam remembers.

  Attributes:
    count: int32, updates so far; with stages [stages], those since each began.
    nu: mean of squared gradients, not corrected, as the parameters.
  """

  count: jax.Array
  nu: Any


def _decays(path):
  """Attention matrices only (GigaGAN A2), not the feed-forward layers and routers beside them."""
  names = [str(getattr(entry, "key", entry)) for entry in path]
  return (
    names[-1] == "weight"
    and any("attention" in name for name in names)
    and not {"norm", "feed_forward", "mlp_in", "mlp_out"} & set(names)
  )


def optimizer(cfg, beta2, schedule=config_lib.Schedule(), resolution=0):
  """The optimiser of a network: Adam, or Muon for its matrices (`cfg.method`); decoupled weight decay on attention matrices.

  The learning rate is applied by the caller (`update`), so that the state holds no schedule.

  Args:
    cfg: `config.Optimizer`.
    beta2: decay of Adam's second moment.
    schedule: `config.Schedule`. What a stage does not use stays as it is, its weights and what is remembered of them.
    resolution: of the present stage; without stages it is not looked at.

  Returns:
    `optax.GradientTransformationExtraArgs` whose updates are the direction of ascent; `keep` is as of `update`.
  """

  def in_use(path):
    return not schedule.resolutions or growth.lowest_resolution(path) <= resolution

  first = _adam(cfg, beta2, schedule, resolution, in_use)
  if cfg.method == "muon":
    first = muon.for_matrices(cfg, in_use, others=first)
  parts = [first]
  if cfg.attention_weight_decay:
    mask = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: _decays(path) and in_use(path), params)
    parts.append(optax.add_decayed_weights(cfg.attention_weight_decay, mask))
  return optax.chain(*parts)


def _adam(cfg, beta2, schedule, resolution, in_use):
  """Adam with a first moment of zero, which is not stored.

  With stages, each stage's layers have the bias correction of their own age: by that of the whole run, the first steps of
  new layers would be 1 / sqrt(1 - beta2) times too long. The second moments of layers trained before go on.
  """
  stages = schedule.resolutions

  def init(params):
    return RmsState(jnp.zeros((len(stages),) if stages else (), jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def rescale(gradients, state, params=None, *, keep):
    del params
    running = np.asarray([reached <= resolution for reached in stages], np.int32) if stages else np.int32(1)
    count = keep(state.count + running, state.count)
    averaged = lambda gradient, nu: beta2 * nu + (1 - beta2) * jnp.square(gradient)
    nu = jax.tree_util.tree_map_with_path(
      lambda path, gradient, nu: keep(averaged(gradient, nu), nu) if in_use(path) else nu, gradients, state.nu
    )

    def divide(path, gradient, nu):
      if not in_use(path):
        return jnp.zeros_like(gradient)
      age = count[schedule.stage(growth.lowest_resolution(path))] if stages else count
      return gradient / (jnp.sqrt(nu / (1 - beta2**age).astype(nu.dtype)) + cfg.eps)

    return jax.tree_util.tree_map_with_path(divide, gradients, nu), RmsState(count, nu)

  return optax.GradientTransformationExtraArgs(init, rescale)


def learning_rate_factor(cfg, step, total_steps):
  """Warm-up times cosine decay: the factor on both learning rates at `step`."""
  step = jnp.asarray(step, jnp.float32)
  warm = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
  if cfg.final_lr_fraction == 1:
    return warm  # without total_steps the program stays the same, in JAX's cache too, when a run goes further
  progress = jnp.clip(step / total_steps, 0, 1)
  floor = cfg.final_lr_fraction
  return warm * (floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def update(cfg, optimizer, gradients, opt_state, params, learning_rate, keep=lambda new, old: new):
  """One optimiser step; biases at their own fraction of the learning rate.

  Args:
    cfg: `config.Optimizer`.
    optimizer: of `optimizer`.
    gradients, opt_state, params: trees.
    learning_rate: scalar.
    keep: (new array, old array) -> the one to have, the same choice for all. Each array is chosen where it is made and
      the next is made of it: one pass over memory. Chosen at the end, all second moments would be there twice.

  Returns:
    (params, opt_state).
  """
  updates, opt_state = optimizer.update(gradients, opt_state, params, keep=keep)

  def move(path, param, step):
    rate = learning_rate * (cfg.bias_lr_factor if path[-1].key == "bias" else 1.0)
    return keep(param - rate * step.astype(param.dtype), param)

  return jax.tree_util.tree_map_with_path(move, params, updates), opt_state


def ema_decay(cfg: config_lib.Optimizer, step, batch_size):
  """Decay of the EMA at a step: a half-life in images, short at the start (StyleGAN2-ADA's ramp-up)."""
  half_life = jnp.float32(cfg.ema_half_life_images)
  if cfg.ema_ramp_up:
    half_life = jnp.minimum(half_life, cfg.ema_ramp_up * (step + 1).astype(jnp.float32) * batch_size)
  return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))
