"""A tiny training problem with the interface of `training/setup.py`; run as a script it trains in a process of its own.

python tests/training/toy.py WORKDIR [--set train.total_steps=20 ...] [--delay 0.01] [--nan-from 7]
"""

import argparse
import dataclasses
import functools
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aurora_jax import config_files
from aurora_jax.errors import UserError
from aurora_jax.parallel.mesh import ParamLabel, names_of
from aurora_jax.systems import base
from aurora_jax.systems.aurora.config import Experiment
from aurora_jax.training import guard as guard_lib
from aurora_jax.training import loop, setup


def experiment(**fields):
  """An `Experiment` with some fields set: experiment(**{"train.total_steps": 20})."""
  values = config_files.to_mapping(Experiment())
  defaults = {
    "train.total_steps": 12,
    "train.checkpoint_every": 4,
    "train.log_every": 3,
    "train.sample_every": 6,
    "train.batch_size": 8,
    "name": "toy",
  }
  for name, value in (defaults | fields).items():
    group = values
    *path, last = name.split(".")
    for part in path:
      group = group[part]
    group[last] = value
  return config_files.from_mapping(values)


_OPTIMIZER = optax.adam(1e-2)


@functools.partial(jax.jit, static_argnames="width")
def _init(key, width=4):
  params = {"w": jax.random.normal(key, (16, width)), "b": jnp.zeros(width)}
  generator = base.NetworkState(params, {}, _OPTIMIZER.init(params), params)
  discriminator = base.NetworkState({"scale": jnp.ones(3)}, {}, ())
  return base.TrainState(jnp.zeros((), jnp.int32), {"generator": generator, "discriminator": discriminator})


def _label(path):
  name = names_of(path)[0]
  return ParamLabel(module=name, group=name)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("every_third", "guarded"))
def _step(state, batch, key, every_third, guarded):
  guard = guard_lib.Guard() if guarded else guard_lib.NoGuard()

  def loss(params):
    noise = jax.random.normal(jax.random.fold_in(key, state.step), batch["image"].shape)
    images = batch["image"] + noise
    return jnp.mean(jnp.square(images @ params["w"] + params["b"])) + batch["poison"][0] * jnp.sum(params["b"])

  old = state.networks["generator"]
  value, gradient = jax.value_and_grad(loss)(old.params)
  update, opt = _OPTIMIZER.update(gradient, old.opt_state)
  params = optax.apply_updates(old.params, update)
  ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, old.ema, params)
  metrics = {"loss/g": value + batch["poison"][0], "moe/load/layer": jnp.arange(3.0) + value}
  metrics |= guard.norms("grad_norm/g", gradient, _label)
  all_finite = guard.all_finite(metrics)
  metrics |= guard.verdict("g", all_finite)
  if every_third:
    metrics["r1"] = 2.0 * value
  discriminator = state.networks["discriminator"]
  scale = discriminator.params["scale"] * 0.9 + value
  after = {
    "generator": base.NetworkState(params, {}, opt, ema),
    "discriminator": discriminator.replace(params={"scale": scale}),
  }
  after = jax.tree.map(guard.keeper(all_finite), after, state.networks)
  return base.TrainState(state.step + 1, after), {"toy": metrics}


@dataclasses.dataclass
class Toy:
  """The toy's `Prepared`. `delay`: seconds per batch; `nan_at`: steps whose loss is NaN; `width`: architecture."""

  experiment: Experiment
  delay: float = 0.0
  nan_at: object = ()
  width: int = 4
  after_batch: object = None
  seen: list = dataclasses.field(default_factory=list)

  dataset = None
  batch_sharding = None
  batches_per_step = 1
  headline = ()
  log_names = {"g": "generator", "d": "discriminator"}
  remedies = {}

  def __post_init__(self):
    self._key = jax.device_put(jax.random.key(self.experiment.train.seed))

  @property
  def abstract_state(self):
    return jax.eval_shape(functools.partial(_init, width=self.width), self._key)

  def begin(self):
    """Compiles nothing in the background."""

  def init(self):
    return _init(self._key, width=self.width)

  def batches(self, start_step):
    step = start_step
    while True:
      rng = np.random.default_rng((self.experiment.train.seed, step))
      self.seen.append(step)
      time.sleep(self.delay)
      yield {
        "image": rng.standard_normal((8, 16)).astype(np.float32),
        "index": np.arange(8) + step,
        "poison": np.full(1, np.nan if step in self.nan_at else 0.0, np.float32),
        "caption": ["a"] * 8,
      }
      if self.after_batch is not None:
        self.after_batch(step)
      step += 1

  def step(self, step, state, batches):
    (batch,) = batches
    return _step(state, batch, self._key, every_third=step % 3 == 0, guarded=self.experiment.train.guard)

  def sample(self, state):
    images = np.full((2, 1, 8, 8, 3), float(state.step), np.float32)
    return setup.SampleSet(images, ("one", "two"))


def run(workdir, *, toy=None, allow=(), hooks=loop.Hooks(), **fields):
  """Trains the toy. Returns (Toy, Outcome)."""
  toy = toy or Toy(experiment(**fields))
  return toy, loop.run(toy, workdir, hooks=hooks, allow_config_change=allow)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("workdir")
  parser.add_argument("--set", action="append", default=[])
  parser.add_argument("--delay", type=float, default=0.0)
  parser.add_argument("--nan-from", type=int, default=10**9)
  args = parser.parse_args()
  fields = {name: json.loads(value) for name, value in (entry.split("=") for entry in args.set)}
  try:
    _, outcome = run(args.workdir, toy=Toy(experiment(**fields), delay=args.delay, nan_at=range(args.nan_from, 10**9)))
  except UserError as error:
    print(error, file=sys.stderr)
    return 2
  return outcome.status


if __name__ == "__main__":
  sys.exit(main())
