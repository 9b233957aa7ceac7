"""The project's own benchmarks: ratios measured side by side in one run, medians after warm-up."""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.config import Experiment
from aurora_jax.performance import flop_count
from aurora_jax.systems import base, registry

if TYPE_CHECKING:
  from aurora_jax.runs import metrics
  from aurora_jax.training import guard, setup  # read data; the other benchmarks need none of its packages


class SampleSpeed(NamedTuple):
  """The speed of a generator at one batch size.

  Attributes:
    batch: images per call.
    first_seconds: of the first call, compilation included (short if the compilation cache has the program).
    seconds: of a call after warm-up, median.
    flops: useful floating-point operations per image, see `useful_flops`.
    floor_seconds: of a call, if all its useful operations ran at the speed of a plain matrix product.
    peak_bytes: the largest memory of the process so far.
  """

  batch: int
  first_seconds: float
  seconds: float
  flops: int
  floor_seconds: float
  peak_bytes: int


def median_seconds(function: Callable[[], Any], repeats: int, warm_up: int = 1) -> float:
  """Median seconds of a call, until its result is ready.

  Args:
    function: to call; returns a pytree of arrays.
    repeats: calls that count.
    warm_up: calls before them.
  """
  seconds = []
  for i in range(warm_up + repeats):
    begin = time.perf_counter()
    jax.block_until_ready(function())
    if i >= warm_up:
      seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)


def matmul_flops_per_second(repeats: int = 15) -> float:
  """The speed of a float32 matrix product of 4096 x 512 x 4096 on this machine."""
  left = jax.random.normal(jax.random.key(0), (4096, 512))
  right = jax.random.normal(jax.random.key(1), (512, 4096))
  multiply = jax.jit(jnp.matmul)
  return 2 * 4096 * 512 * 4096 / median_seconds(lambda: multiply(left, right), repeats, warm_up=3)


class Sampling(NamedTuple):
  """The arguments of one call of `System.sample`, as shapes."""

  networks: Mapping[str, Any]
  condition: Any
  latents: Any


def sampling_shapes(system: base.System, batch: int) -> Sampling:
  """The arguments of `System.sample` for `batch` images, as shapes."""
  variables = jax.eval_shape(system.init, jax.random.key(0))
  networks = {name: dict(variables[name]) for name in system.sampled}
  inputs = system.abstract_inputs(batch)
  condition = jax.eval_shape(system.condition, networks, system.abstract_frozen(), inputs)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
  return Sampling(networks, condition, jax.eval_shape(jax.vmap(system.draw_latents), keys))


def useful_flops(experiment: Experiment) -> int:
  """Floating-point operations of one image, in the products and convolutions that every implementation needs."""
  return sum(useful_flops_by_precision(experiment).values())


def useful_flops_by_precision(experiment: Experiment) -> Mapping[str, int]:
  """`useful_flops` by precision, see `flop_count.by_precision`."""
  system = registry.system_class(experiment.system)(experiment).with_least_work()
  draw = lambda *arguments: system.sample(arguments[0], {}, *arguments[1:]).image
  return flop_count.by_precision(jax.make_jaxpr(draw)(*sampling_shapes(system, 1)).jaxpr)


def random_values(shapes: Any, seed: int = 0) -> Any:
  """Standard normal arrays of these shapes, on the device. Also for weights that start at zero, so that all work is
  done.
  """
  rng = np.random.default_rng(seed)
  draw = lambda leaf: jax.device_put(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype))
  return jax.tree.map(draw, shapes)


def sample_speed(experiment: Experiment, batches: Sequence[int], repeats: int = 5) -> Iterator[SampleSpeed]:
  """Times `System.sample` with random weights, one batch size after the other.

  Args:
    experiment: the configuration.
    batches: images per call, of each measurement.
    repeats: calls after warm-up, of which the median is taken.

  Yields:
    `SampleSpeed` of each batch size.
  """
  system, flops = registry.system_class(experiment.system)(experiment), useful_flops(experiment)
  networks = random_values(sampling_shapes(system, 1).networks)
  run = jax.jit(lambda networks, condition, latents: system.sample(networks, {}, condition, latents).image)
  for batch in batches:
    shapes = sampling_shapes(system, batch)
    arguments = networks, *random_values((shapes.condition, shapes.latents), 1)
    begin = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    first = time.perf_counter() - begin
    floor = flops * batch / matmul_flops_per_second()
    seconds = median_seconds(lambda: run(*arguments), repeats)
    yield SampleSpeed(batch, first, seconds, flops, floor, peak_bytes())


def parameter_bytes(experiment: Experiment) -> int:
  """Bytes of the float32 variables of the networks that `System.sample` needs."""
  system = registry.system_class(experiment.system)(experiment)
  return sum(4 * leaf.size for leaf in jax.tree.leaves(sampling_shapes(system, 1).networks))


def peak_bytes() -> int:
  """The largest resident memory of this process so far, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else peak * 1024


class GuardCost(NamedTuple):
  """The cost of the numerical guard: training with and without it, in alternating steps.

  Attributes:
    on: seconds of a step with the guard, median.
    off: seconds of a step without it, median.
    low: first quartile of off / on over pairs of adjacent steps.
    high: third quartile. The distance to `low` shows how noisy the machine is.
    work_on: processor seconds of a step with the guard, all threads of this process, median. Other processes on the
      machine hardly affect it.
    work_off: processor seconds of a step without it, median.
    pairs: number of pairs.
  """

  on: float
  off: float
  low: float
  high: float
  work_on: float
  work_off: float
  pairs: int

  @property
  def share(self) -> float:
    """Steps per second with the guard, relative to those without."""
    return self.off / self.on

  @property
  def work_share(self) -> float:
    """The same ratio by processor time."""
    return self.work_off / self.work_on


def guard_cost(experiment: Experiment, pairs: int = 100, warm_up: int = 3) -> GuardCost:
  """Trains two runs in turn on the same batches, one with `train.guard` and one without.

  The time of a step is what the training loop waits for: the step, including R1 when it is due, and its metrics on the
  host. The two runs alternate in going first.

  Args:
    experiment: with data and CLIP.
    pairs: pairs of steps that count.
    warm_up: pairs before them, in addition to the one that compiles.
  """
  from aurora_jax.runs import checkpoint_manager, metrics
  from aurora_jax.training import batch_feed, guard, setup

  arms = {}
  for on in (True, False):
    train = dataclasses.replace(experiment.train, guard=on)
    prepared = setup.prepare(dataclasses.replace(experiment, train=train))
    state = checkpoint_manager.place(prepared.init(), prepared.abstract_state)
    arms[on] = _Arm(prepared, state, guard.Skips(pairs, prepared.log_names), metrics.Window())
  warm_up += 1  # the pair that compiles
  batches = iter(arms[True].prepared.batches(0))
  seconds, work = {True: [], False: []}, {True: [], False: []}
  try:
    for step in range(warm_up + pairs):
      prepared = arms[True].prepared
      step_batches = [batch_feed.put(next(batches), prepared.batch_sharding) for _ in range(prepared.batches_per_step)]
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

  prepared: "setup.Prepared"
  state: base.TrainState
  skips: "guard.Skips"
  window: "metrics.Window"

  def train(self, step, batches):
    self.state, phases = self.prepared.step(step, self.state, batches)
    values, _ = self.skips.look(step, phases, detail=(step + 1) % self.prepared.experiment.train.log_every == 0)
    self.window.add(values)
    jax.block_until_ready(self.state)
