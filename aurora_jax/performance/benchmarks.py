"""The project's own measurements: ratios taken side by side in one run, medians after warm-up, the floor beside them."""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax import config as config_lib
from aurora_jax.performance import flop_count
from aurora_jax.runs import checkpoint_manager, metrics
from aurora_jax.systems.aurora import generator as generator_lib
from aurora_jax.training import ahead, guard, setup

_TOKENS = 77  # of a CLIP caption


class SampleSpeed(NamedTuple):
  """What one image of a generator costs at one batch size.

  Attributes:
    batch: images per call.
    first_seconds: the first call, compilation included (short if the compilation cache held it).
    seconds: median of a call, after warm-up.
    flops: useful floating-point operations per image, `useful_flops`.
    floor_seconds: of a call, if all of it ran at the speed of a plain matrix product.
    peak_bytes: the process's largest memory so far.
  """

  batch: int
  first_seconds: float
  seconds: float
  flops: int
  floor_seconds: float
  peak_bytes: int


def median_seconds(function: Callable, repeats: int, warm_up: int = 1) -> float:
  """Median seconds of a call whose result is waited for."""
  seconds = []
  for i in range(warm_up + repeats):
    begin = time.perf_counter()
    jax.block_until_ready(function())
    if i >= warm_up:
      seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)


def matmul_flops_per_second(repeats: int = 15) -> float:
  """What a float32 matrix product of 4096 x 512 x 4096 reaches here: the floor of everything else."""
  left = jax.random.normal(jax.random.key(0), (4096, 512))
  right = jax.random.normal(jax.random.key(1), (512, 4096))
  multiply = jax.jit(jnp.matmul)
  return 2 * 4096 * 512 * 4096 / median_seconds(lambda: multiply(left, right), repeats, warm_up=3)


def useful_flops(cfg: config_lib.Generator) -> int:
  """Products and convolutions of one image that no implementation can do without.

  Counted on the generator with a single expert (each token sees one) and without the reads of deformed pixels.
  """
  cfg = dataclasses.replace(
    cfg, experts=config_lib.PerResolution({r: 1 for r in cfg.experts}), deformable_max_resolution=0, remat=False
  )
  shape = jax.ShapeDtypeStruct
  return flop_count.count(
    lambda *arguments: generator_lib.Generator(cfg).apply(*arguments).image,
    generator_lib.abstract_variables(cfg),
    shape((1, cfg.z_dim), jnp.float32),
    shape((1, _TOKENS, cfg.text_feature_dim), jnp.float32),
    shape((1,), jnp.int32),
  )


def random_variables(cfg: config_lib.Generator, seed: int = 0) -> Mapping:
  """Standard normal weights, those that start at zero too, so that nothing is skipped; w's average is zero."""
  rng = np.random.default_rng(seed)
  draw = lambda leaf: jax.device_put(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))
  return jax.tree.map(draw, dict(generator_lib.abstract_variables(cfg)))


def sample_speed(cfg: config_lib.Generator, batches, repeats: int = 5):
  """Times the generator with random weights, one batch size after the other.

  Args:
    cfg: the generator; its `for_sampling` is what runs.
    batches: images per call, several.
    repeats: calls whose median counts, after one for warming up.

  Yields:
    `SampleSpeed`.
  """
  flops, variables, cfg = useful_flops(cfg), random_variables(cfg), cfg.for_sampling(jax.default_backend())
  run = jax.jit(lambda *arguments: generator_lib.Generator(cfg).apply(*arguments).image)
  rng = np.random.default_rng(1)
  for batch in batches:
    z = jnp.asarray(rng.standard_normal((batch, cfg.z_dim), np.float32))
    text = jnp.asarray(rng.standard_normal((batch, _TOKENS, cfg.text_feature_dim), np.float32))
    eot = jnp.full((batch,), 9, jnp.int32)
    begin = time.perf_counter()
    jax.block_until_ready(run(variables, z, text, eot))
    first = time.perf_counter() - begin
    floor = flops * batch / matmul_flops_per_second()
    seconds = median_seconds(lambda: run(variables, z, text, eot), repeats)
    yield SampleSpeed(batch, first, seconds, flops, floor, peak_bytes())


def parameter_bytes(cfg: config_lib.Generator) -> int:
  """Bytes of the generator's float32 variables."""
  return sum(4 * leaf.size for leaf in jax.tree.leaves(generator_lib.abstract_variables(cfg)))


def peak_bytes() -> int:
  """The largest resident memory of this process so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


class GuardCost(NamedTuple):
  """Training with and without the numerical guard, steps taken in turn.

  Attributes:
    on, off: seconds of a step, the mean of the medians of each kind: with or without R1, with or without update norms.
    low, high: the middle half of (off / on) over pairs of neighbouring steps: how noisy the machine is.
    work_on, work_off: the same in seconds of processor time that this process spent, all threads together. What other
      processes do to the machine hardly shows in them.
    pairs: how many.
  """

  on: float
  off: float
  low: float
  high: float
  work_on: float
  work_off: float
  pairs: int

  @property
  def share(self):
    """Steps per second with the guard, relative to without."""
    return self.off / self.on

  @property
  def work_share(self):
    """The same by processor time."""
    return self.work_off / self.work_on


def guard_cost(experiment: config_lib.Experiment, pairs: int = 100, warm_up: int = 3) -> GuardCost:
  """Trains twice at once, one run with `train.guard` and one without, on the same batches.

  A step's time is what the loop waits for: the step (R1 where it is due) and its metrics on the host, judged and
  averaged. Which of the two goes first alternates.

  Args:
    experiment: with data and CLIP.
    pairs: pairs of steps that count.
    warm_up: pairs before, after those that compile.
  """
  arms = {}
  for on in (True, False):
    train = dataclasses.replace(experiment.train, guard=on)
    prepared = setup.prepare(dataclasses.replace(experiment, train=train))
    arms[on] = _Arm(
      prepared, checkpoint_manager.place(prepared.init(), prepared.abstract_state), guard.Skips(pairs), metrics.Window()
    )
  interval = experiment.loss.r1_interval if experiment.loss.r1_gamma else 1
  compiling = {0, 1 % interval}  # steps with and without R1
  batches = iter(arms[True].prepared.batches(0))
  seconds, work, kinds = {True: [], False: []}, {True: [], False: []}, []
  try:
    for step in range(len(compiling) + warm_up + pairs):
      batch = {
        name: jax.make_array_from_process_local_data(arms[True].prepared.batch_sharding, value)
        for name, value in next(batches).items()
        if name in ahead.INPUTS
      }
      if step >= len(compiling) + warm_up:
        kinds.append((step % interval == 0, (step + 1) % experiment.train.log_every == 0))
      for on in (step % 2 == 0, step % 2 == 1):
        begin, begin_work = time.perf_counter(), time.process_time()
        arms[on].train(step, batch)
        if step >= len(compiling) + warm_up:
          seconds[on].append(time.perf_counter() - begin)
          work[on].append(time.process_time() - begin_work)
  finally:
    batches.close()
  low, high = np.quantile(np.divide(seconds[False], seconds[True]), (0.25, 0.75))
  mean = lambda values: sum(statistics.median(v for v, k in zip(values, kinds) if k == kind) for kind in kinds) / pairs
  return GuardCost(
    mean(seconds[True]), mean(seconds[False]), float(low), float(high), mean(work[True]), mean(work[False]), pairs
  )


@dataclasses.dataclass
class _Arm:
  """One of the two runs."""

  prepared: setup.Prepared
  state: object
  skips: guard.Skips
  window: metrics.Window

  def train(self, step, batch):
    self.state, values = self.prepared.step(step, self.state, batch)
    values, _ = self.skips.look(step, metrics.to_host(values))
    self.window.add(values)
    jax.block_until_ready(self.state)
