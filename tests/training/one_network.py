"""A system of one network whose parameters a test gives, to look at optimizers through `optimizers.Updates`."""

import dataclasses

import jax.numpy as jnp

from aurora_jax.config import Schedule
from aurora_jax.systems import base
from aurora_jax.systems.aurora.config import Experiment
from aurora_jax.systems.aurora.labels import label
from aurora_jax.training import optimizers


class OneNetwork(base.System):
  """`optimizer` on parameters with Aurora's names; `schedule` and `resolution`: the present stage."""

  def __init__(self, optimizer, schedule=Schedule(), resolution=64, ema=None, guard=True):
    experiment = dataclasses.replace(Experiment(), schedule=schedule).at_stage(resolution)
    super().__init__(
      dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, guard=guard, batch_size=100))
    )
    self.networks = {"generator": base.Network("g", optimizer, label, ema)}
    self.update = optimizers.Updates(self, 1000)

  def begin(self, params):
    """The state at step 0."""
    network = self.networks["generator"]
    opt_state = optimizers.make(network.optimizer, label, self.experiment.schedule, self.experiment.resolution).init(
      params
    )
    ema = params if network.ema is not None else None
    return base.TrainState(jnp.int32(0), {"generator": base.NetworkState(params, {}, opt_state, ema)})

  def step(self, state, gradients, all_finite=True):
    """The state after one more step, its number not counted."""
    return self.update(state, "generator", gradients, {}, all_finite=all_finite)[0]


def params(state):
  return state.networks["generator"].params


def opt_state(state):
  return state.networks["generator"].opt_state
