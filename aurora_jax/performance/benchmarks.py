"""The project's own measurements: ratios taken side by side in one run, medians after warm-up, the floor beside them."""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.config import Experiment
from aurora_jax.performance import flop_count
from aurora_jax.runs import checkpoint_manager, metrics
from aurora_jax.systems import base, registry
from aurora_jax.training import guard, setup


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


class _Sampling(NamedTuple):
  """What one call of `System.sample` takes, as shapes."""

  networks: Mapping[str, Any]
  condition: Any
  latents: Any


def _sampling_shapes(system: base.System, batch: int) -> _Sampling:
  variables = jax.eval_shape(system.init, jax.random.key(0))
  networks = {name: dict(variables[name]) for name in system.sampled}
  inputs = system.abstract_inputs(batch)
  condition = jax.eval_shape(system.condition, networks, system.abstract_frozen(), inputs)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  return _Sampling(networks, condition, jax.eval_shape(jax.vmap(system.draw_latents), keys))


def useful_flops(experiment: Experiment) -> int:
  """Products and convolutions of one image that no implementation can do without."""
  system = registry.system_class(experiment.system)(experiment).with_least_work()
  shapes = _sampling_shapes(system, 1)
  return flop_count.count(lambda *arguments: system.sample(arguments[0], {}, *arguments[1:]).image, *shapes)


def random_values(shapes: Any, seed: int = 0) -> Any:
  """Standard normal arrays of these shapes, weights that start at zero too, so that nothing is skipped."""
  rng = np.random.default_rng(seed)
  draw = lambda leaf: jax.device_put(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))
  return jax.tree.map(draw, shapes)


def sample_speed(experiment: Experiment, batches: Sequence[int], repeats: int = 5) -> Iterator[SampleSpeed]:
  """Times `System.sample` with random weights, one batch size after the other.

  Args:
    experiment: the configuration.
    batches: images per call, several.
    repeats: calls whose median counts, after one for warming up.
  """
  system, flops = registry.system_class(experiment.system)(experiment), useful_flops(experiment)
  networks = random_values(_sampling_shapes(system, 1).networks)
  run = jax.jit(lambda networks, condition, latents: system.sample(networks, {}, condition, latents).image)
  for batch in batches:
    shapes = _sampling_shapes(system, batch)
    arguments = networks, *random_values((shapes.condition, shapes.latents), 1)
    begin = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    first = time.perf_counter() - begin
    floor = flops * batch / matmul_flops_per_second()
    seconds = median_seconds(lambda: run(*arguments), repeats)
    yield SampleSpeed(batch, first, seconds, flops, floor, peak_bytes())


def parameter_bytes(experiment: Experiment) -> int:
  """Bytes of the sampled networks' float32 variables."""
  system = registry.system_class(experiment.system)(experiment)
  return sum(4 * leaf.size for leaf in jax.tree.leaves(_sampling_shapes(system, 1).networks))


def peak_bytes() -> int:
  """The largest resident memory of this process so far."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


class GuardCost(NamedTuple):
  """Training with and without the numerical guard, steps taken in turn.

  Attributes:
    on, off: median seconds of a step.
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


def guard_cost(experiment: Experiment, pairs: int = 100, warm_up: int = 3) -> GuardCost:
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
    state = checkpoint_manager.place(prepared.init(), prepared.abstract_state)
    arms[on] = _Arm(prepared, state, guard.Skips(pairs, prepared.log_names), metrics.Window())
  warm_up += 1  # the step that compiles
  batches = iter(arms[True].prepared.batches(0))
  seconds, work = {True: [], False: []}, {True: [], False: []}
  try:
    for step in range(warm_up + pairs):
      prepared = arms[True].prepared
      step_batches = [
        {
          name: jax.make_array_from_process_local_data(prepared.batch_sharding, value)
          for name, value in next(batches).items()
          if isinstance(value, np.ndarray)
        }
        for _ in range(prepared.batches_per_step)
      ]
      for on in (step % 2 == 0, step % 2 == 1):
        begin, begin_work = time.perf_counter(), time.process_time()
        arms[on].train(step, step_batches)
        if step >= warm_up:
          seconds[on].append(time.perf_counter() - begin)
          work[on].append(time.process_time() - begin_work)
  finally:
    batches.close()
  low, high = np.quantile(np.divide(seconds[False], seconds[True]), (0.25, 0.75))
  median = statistics.median
  return GuardCost(
    median(seconds[True]),
    median(seconds[False]),
    float(low),
    float(high),
    median(work[True]),
    median(work[False]),
    pairs,
  )


@dataclasses.dataclass
class _Arm:
  """One of the two runs."""

  prepared: setup.Prepared
  state: base.TrainState
  skips: guard.Skips
  window: metrics.Window

  def train(self, step, batches):
    self.state, phases = self.prepared.step(step, self.state, batches)
    values, _ = self.skips.look(step, phases, detail=(step + 1) % self.prepared.experiment.train.log_every == 0)
    self.window.add(values)
    jax.block_until_ready(self.state)
