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
  """State of Adam without a first moment.

  Attributes:
    count: int32, number of updates; with stages [stages], the number since each stage began.
    nu: moving averages of squared gradients, without bias correction; a tree like the parameters.
  """

  count: jax.Array
  nu: Any


class AdamState(NamedTuple):
  """`RmsState` with `mu`, the moving averages of gradients, without bias correction."""

  count: jax.Array
  mu: Any
  nu: Any


def make(
  cfg: Optimizer, label: Label, schedule: Schedule = Schedule(), resolution: int = 0
) -> optax.GradientTransformationExtraArgs:
  """The optimizer of a network: Adam, or Muon for its matrices; decoupled weight decay on labelled parameters.

  `Updates` applies the learning rate, so the state holds no schedule.

  Args:
    cfg: the optimizer's configuration.
    label: labels of the network's parameters.
    schedule: progressive growing. A stage leaves parameters that it does not use as they are, with their moments.
    resolution: resolution of the present stage; ignored without stages.

  Returns:
    A transformation whose updates point along the gradient. Its `update` takes `keep`, a function of (new array, old
    array) that chooses the new ones or the old ones, alike for all arrays. Each moment is chosen where it is computed,
    in one pass over memory. With a choice at the end, all second moments would exist twice.
  """
  in_use = lambda path: not schedule.resolutions or label(path).stage <= resolution
  first = _adam(cfg, label, schedule, resolution, in_use)
  if cfg.method == "muon":
    first = muon.for_matrices(cfg, label, in_use, others=first)
  parts: list[optax.GradientTransformation] = [first]
  if cfg.weight_decay:
    mask = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: label(path).decay and in_use(path), params)
    parts.append(optax.add_decayed_weights(cfg.weight_decay, mask))
  return optax.chain(*parts)


def _adam(cfg, label, schedule, resolution, in_use):
  """Adam. With beta1 = 0 it stores no first moment.

  With stages, the bias correction counts the updates since a parameter's stage began. With the count of the whole run,
  the first steps of new layers would be 1 / sqrt(1 - beta2) times too long.
  """
  stages = schedule.resolutions

  def init(params):
    count = jnp.zeros((len(stages),) if stages else (), jnp.int32)
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return AdamState(count, zeros(), zeros()) if cfg.beta1 else RmsState(count, zeros())

  def update(updates, state, params=None, **extra_args):
    del params
    keep = extra_args["keep"]
    running = np.asarray([reached <= resolution for reached in stages], np.int32) if stages else np.int32(1)
    count = keep(state.count + running, state.count)

    def averaged(decay, values, old):
      mean = lambda path, value, before: keep(decay * before + (1 - decay) * value, before) if in_use(path) else before
      return jax.tree_util.tree_map_with_path(mean, values, old)

    mu = averaged(cfg.beta1, updates, state.mu) if cfg.beta1 else updates
    nu = averaged(cfg.beta2, jax.tree.map(jnp.square, updates), state.nu)

    def divide(path, mean, square):
      if not in_use(path):
        return jnp.zeros_like(mean)
      age = count[schedule.stage(label(path).stage)] if stages else count
      if cfg.beta1:
        mean = mean / (1 - cfg.beta1**age).astype(mean.dtype)
      return mean / (jnp.sqrt(square / (1 - cfg.beta2**age).astype(square.dtype)) + cfg.eps)

    ascent = jax.tree_util.tree_map_with_path(divide, mu, nu)
    return ascent, AdamState(count, mu, nu) if cfg.beta1 else RmsState(count, nu)

  return optax.GradientTransformationExtraArgs(init, update)


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
  """Decay of the moving average at a step. The half-life, in images, ramps up at the start (StyleGAN2-ADA)."""
  half_life = jnp.float32(cfg.half_life_images)
  if cfg.ramp_up:
    seen = step + 1 if cfg.ramp_up_includes_batch else step
    half_life = jnp.minimum(half_life, cfg.ramp_up * seen.astype(jnp.float32) * batch_size)
  return 0.5 ** (batch_size / jnp.maximum(half_life, 1e-8))


class Updates:
  """Applies gradients to the networks of a system; implements `base.Update`."""

  def __init__(self, system: base.System, total_steps: jax.Array | int):
    """Makes the optimizers.

    Args:
      system: at its present stage.
      total_steps: steps of the run; may be traced.
    """
    experiment = system.experiment
    self._system, self._total_steps = system, total_steps
    self._guard = guard_lib.of(experiment.train)
    self._batch_size = experiment.train.batch_size
    self._optimizers = {
      name: make(network.optimizer, network.label, experiment.schedule, experiment.resolution)
      for name, network in system.networks.items()
    }

  def __call__(
    self,
    state: base.TrainState,
    network: str,
    gradients: base.PyTree,
    metrics: base.Metrics,
    *,
    all_finite: jax.Array | bool = True,
    variables: base.PyTree | None = None,
    log_name: str | None = None,
  ) -> tuple[base.TrainState, jax.Array | bool, base.Metrics]:
    """See `base.Update`."""
    settings, old, guard = self._system.networks[network], state.networks[network], self._guard
    cfg, label, log_name = settings.optimizer, settings.label, log_name or settings.log_name
    metrics = metrics | guard.norms(f"grad_norm/{log_name}", gradients, label)
    all_finite = all_finite & guard.all_finite(metrics)
    keep = guard.keeper(all_finite)
    if cfg.clip_norm:
      scale = jnp.minimum(1.0, cfg.clip_norm / jnp.maximum(metrics[f"grad_norm/{log_name}"], 1e-12))
      gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
    if cfg.l2:
      gradients = jax.tree.map(lambda g, p: g + cfg.l2 * p, gradients, old.params)
    lr = cfg.learning_rate * learning_rate_factor(cfg, state.step, self._total_steps)
    ascent, opt_state = self._optimizers[network].update(gradients, old.opt_state, old.params, keep=keep)

    def scaled(path, step, param):
      return lr * (cfg.bias_lr_factor if label(path).bias else 1.0) * step.astype(param.dtype)

    moves = jax.tree_util.tree_map_with_path(scaled, ascent, old.params)
    params = jax.tree.map(lambda param, move: keep(param - move, param), old.params, moves)
    ema = old.ema
    if settings.ema is not None and log_name == settings.log_name:
      decay = ema_decay(settings.ema, state.step, self._batch_size)
      ema = jax.tree.map(lambda mean, value: keep(mean + (1 - decay) * (value - mean), mean), ema, params)
    others = old.variables if variables is None else jax.tree.map(keep, variables, old.variables)
    metrics |= guard.norms(f"update_norm/{log_name}", moves, label) | guard.verdict(log_name, all_finite)
    metrics[f"learning_rate/{log_name}"] = lr
    return state.with_network(network, base.NetworkState(params, others, opt_state, ema)), all_finite, metrics


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
