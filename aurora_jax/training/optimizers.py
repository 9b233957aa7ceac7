"""Optimizers of networks, and the one function that applies gradients: guard, clipping, optimizer, moving average.

Learning rates, total steps and seeds are arguments of the compiled programs, never constants in them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aurora_jax.config import Ema, Optimizer, Schedule
from aurora_jax.ops import random_keys
from aurora_jax.parallel.mesh import Label
from aurora_jax.systems import base
from aurora_jax.training import guard as guard_lib
from aurora_jax.training import muon


class RmsState(NamedTuple):
  """What Adam without a first moment remembers.

  Attributes:
    count: int32, updates so far; with stages [stages], those since each began.
    nu: mean of squared gradients, not corrected, as the parameters.
  """

  count: jax.Array
  nu: Any


class AdamState(NamedTuple):
  """`RmsState` with `mu`, the mean of gradients, not corrected."""

  count: jax.Array
  mu: Any
  nu: Any


def make(
  cfg: Optimizer, label: Label, schedule: Schedule = Schedule(), resolution: int = 0
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a network: Adam, or Muon for its matrices; decoupled weight decay on labelled parameters.

  The learning rate is applied by `Updates`, so that the state holds no schedule.

  Args:
    cfg: the optimizer's configuration.
    label: of the network's parameters.
    schedule: progressive growing. Parameters that a stage does not use stay as they are, with what is remembered of them.
    resolution: of the present stage; ignored without stages.

  Returns:
    A transformation whose updates are the direction of ascent. Its `update` takes `keep`: (new array, old array) -> the one
    to keep, the same choice for all arrays. Each array is chosen where it is made and the next is made from it: one pass
    over memory. Chosen at the end, all second moments would exist twice.
  """
  in_use = lambda path: not schedule.resolutions or label(path).stage <= resolution
  first = _adam(cfg, label, schedule, resolution, in_use)
  if cfg.method == "muon":
    first = muon.for_matrices(cfg, label, in_use, others=first)
  parts = [first]
  if cfg.weight_decay:
    mask = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: label(path).decay and in_use(path), params)
    parts.append(optax.add_decayed_weights(cfg.weight_decay, mask))
  return optax.chain(*parts)


def _adam(cfg, label, schedule, resolution, in_use):
  """Adam; a first moment of zero is not stored.

  With stages, each stage's parameters have the bias correction of their own age: by that of the whole run, the first steps
  of new layers would be 1 / sqrt(1 - beta2) times too long. The moments of layers trained before go on.
  """
  stages = schedule.resolutions

  def init(params):
    count = jnp.zeros((len(stages),) if stages else (), jnp.int32)
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return AdamState(count, zeros(), zeros()) if cfg.beta1 else RmsState(count, zeros())

  def rescale(gradients, state, params=None, *, keep):
    del params
    running = np.asarray([reached <= resolution for reached in stages], np.int32) if stages else np.int32(1)
    count = keep(state.count + running, state.count)

    def averaged(decay, values, old):
      mean = lambda path, value, before: keep(decay * before + (1 - decay) * value, before) if in_use(path) else before
      return jax.tree_util.tree_map_with_path(mean, values, old)

    mu = averaged(cfg.beta1, gradients, state.mu) if cfg.beta1 else gradients
    nu = averaged(cfg.beta2, jax.tree.map(jnp.square, gradients), state.nu)

    def divide(path, mean, square):
      if not in_use(path):
        return jnp.zeros_like(mean)
      age = count[schedule.stage(label(path).stage)] if stages else count
      if cfg.beta1:
        mean = mean / (1 - cfg.beta1**age).astype(mean.dtype)
      return mean / (jnp.sqrt(square / (1 - cfg.beta2**age).astype(square.dtype)) + cfg.eps)

    updates = jax.tree_util.tree_map_with_path(divide, mu, nu)
    return updates, AdamState(count, mu, nu) if cfg.beta1 else RmsState(count, nu)

  return optax.GradientTransformationExtraArgs(init, rescale)


def learning_rate_factor(cfg: Optimizer, step: jax.Array, total_steps: jax.Array | int) -> jax.Array:
  """Warm-up times cosine decay: the factor on the learning rate at `step`."""
  step = jnp.asarray(step, jnp.float32)
  warm = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
  if cfg.final_lr_fraction == 1:
    return warm
  progress = jnp.clip(step / total_steps, 0, 1)
  floor = cfg.final_lr_fraction
  return warm * (floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))


def ema_decay(cfg: Ema, step: jax.Array, batch_size: int) -> jax.Array:
  """Decay of the moving average at a step: a half-life in images, short at the start (StyleGAN2-ADA's ramp-up)."""
  half_life = jnp.float32(cfg.half_life_images)
  if cfg.ramp_up:
    half_life = jnp.minimum(half_life, cfg.ramp_up * (step + 1).astype(jnp.float32) * batch_size)
  return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))


class Updates:
  """Applies gradients to the networks of a system; implements `base.Update`."""

  def __init__(self, system: base.System, total_steps: jax.Array | int):
    """Makes the optimizers.

    Args:
      system: at its present stage.
      total_steps: of the run; may be traced.
    """
    experiment = system.experiment
    self._system, self._total_steps = system, total_steps
    self._guard = guard_lib.of(experiment.train)
    self._batch_size = experiment.train.batch_size
    self._optimizers = {
      name: make(network.optimizer, network.label, experiment.schedule, experiment.resolution)
      for name, network in system.networks.items()
    }

  def __call__(self, state, network, gradients, metrics, *, healthy=True, variables=None, log_name=None):
    """See `base.Update`."""
    settings, old, guard = self._system.networks[network], state.networks[network], self._guard
    cfg, label, log_name = settings.optimizer, settings.label, log_name or settings.log_name
    metrics = metrics | guard.norms(f"grad_norm/{log_name}", gradients, label)
    healthy = healthy & guard.healthy(metrics)
    keep = guard.keeper(healthy)
    if cfg.clip_norm:
      scale = jnp.minimum(1.0, cfg.clip_norm / jnp.maximum(metrics[f"grad_norm/{log_name}"], 1e-12))
      gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
    if cfg.l2:
      gradients = jax.tree.map(lambda g, p: g + cfg.l2 * p, gradients, old.params)
    rate = cfg.learning_rate * learning_rate_factor(cfg, state.step, self._total_steps)
    ascent, opt_state = self._optimizers[network].update(gradients, old.opt_state, old.params, keep=keep)

    def scaled(path, step, param):
      return rate * (cfg.bias_lr_factor if label(path).bias else 1.0) * step.astype(param.dtype)

    moves = jax.tree_util.tree_map_with_path(scaled, ascent, old.params)
    params = jax.tree.map(lambda param, move: keep(param - move, param), old.params, moves)
    ema = old.ema
    if settings.ema is not None and log_name == settings.log_name:
      decay = ema_decay(settings.ema, state.step, self._batch_size)
      ema = jax.tree.map(lambda mean, value: keep(mean + (1 - decay) * (value - mean), mean), ema, params)
    others = old.variables if variables is None else jax.tree.map(keep, variables, old.variables)
    metrics |= guard.norms(f"update_norm/{log_name}", moves, label) | guard.verdict(log_name, healthy)
    metrics[f"learning_rate/{log_name}"] = rate
    return state.with_network(network, base.NetworkState(params, others, opt_state, ema)), healthy, metrics


def init_state(system: base.System) -> Callable[[jax.Array], base.TrainState]:
  """The pure function key -> fresh `TrainState` of a system."""
  updates = Updates(system, 1)

  def network(name, variables):
    params = variables["params"]
    others = {collection: tree for collection, tree in variables.items() if collection != "params"}
    ema = jax.tree.map(jnp.copy, params) if system.networks[name].ema is not None else None
    return base.NetworkState(params, others, updates._optimizers[name].init(params), ema)

  def init(key):
    variables = system.init(random_keys.fold(key, "init"))
    return base.TrainState(jnp.int32(0), {name: network(name, variables[name]) for name in system.networks})

  return init
