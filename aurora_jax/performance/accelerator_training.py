"""The part of `bench accelerator` that trains: the phases of a step at the largest batch that fits, with a profile.

Images, captions and all weights are random, CLIP's too. They do not change what a step computes, except which expert
gets a token; the load of the fullest expert is in the results.

A full step takes minutes to compile, so few batches are tried. The first is one that surely fits. It is compiled, run,
timed and profiled, and its results are stored. Then, if there is time to compile once more, comes the largest batch
that fits by the memory of the first program.
"""

import concurrent.futures
import dataclasses
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.performance import accelerator_inputs as inputs
from aurora_jax.performance import accelerator_profile as profile
from aurora_jax.performance import compile_report, estimate
from aurora_jax.systems import base, metric_names
from aurora_jax.training import step as step_lib

BATCHES = {False: (1, 2, 4, 8, 16, 32, 64, 128, 256), True: (2, 4)}
# For the first batch alone: `compile` counts 36.5 GiB per A100 at 32 images, of which the state is a small part
# (configs/aurora_64_a100_32.py). Gradients take a third of the state at most. Three quarters of the device leave room.
_BYTES_PER_IMAGE = 1.1 * 2**30
_WITH_GRADIENTS = 4 / 3
_SURE = 0.75
# Seconds to keep for running, timing and profiling what was compiled.
_RUNNING = {False: 30.0, True: 3.0}
_CLIP_STD = 0.02
_MOST_STEPS = 10


@dataclasses.dataclass
class _Ready:
  """Compiled phases with all their arguments.

  Attributes:
    programs: by the place of their phase; None: not compiled in time.
    memory: of the program that needs most, with the code of all.
  """

  step: step_lib.Step
  programs: Sequence[Any]
  memory: estimate.Memory
  state: base.TrainState
  frozen: Any
  batch: Mapping[str, Any]
  constants: Any
  repeat: Any
  useful: Mapping[str, Mapping[str, int]]
  metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def compiled(self) -> list[int]:
    """Places of the phases that can run."""
    return [index for index, program in enumerate(self.programs) if program is not None]

  def run(self, index: int) -> float:
    """Runs one phase; returns its seconds."""
    begin = time.perf_counter()
    self.state, metrics = self.programs[index](self.state, self.frozen, self.batch, self.constants, self.repeat)
    jax.block_until_ready((self.state, metrics))
    self.metrics |= metrics
    return time.perf_counter() - begin


def measure(run: inputs.Run) -> dict[str, Any]:
  """Times the phases at a batch that fits, then at a larger one, and profiles one step.

  Raises:
    UserError: no batch fits, a phase could not be compiled in time, there is no profile, or a value is not finite.
  """
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
  results: dict[str, Any] = {"batches_tried": [], "phases": [], "kernels": [], "memory_limit_bytes": limit}
  arithmetic = "float32" if run.toy else "bfloat16"
  results["arithmetic"] = arithmetic
  batches: Sequence[int] = BATCHES[run.toy]
  run.save(results)
  batch: int | None = first_batch(_state_bytes(run, arithmetic), limit, batches)
  problems: list[str] = []
  arguments: dict[str, _Ready] = {}
  while batch is not None:
    error = _try(run, batch, arithmetic, limit, arguments, results, problems)
    gc.collect()
    if not error:
      batch = next_batch(arguments["ready"], batch, limit, batches)
    elif _is_memory(error):
      batches = [size for size in batches if size < batch]
      batch = max((size for size in batches if size > results.get("batch", 0)), default=None)
    elif "batch" in results:
      break  # a smaller batch is measured
    else:
      raise UserError(f"batch {batch}: {error}")
  if "batch" not in results:
    raise UserError("no batch fits: " + "; ".join(inputs.failures(results["batches_tried"])))
  if problems:
    raise UserError("; ".join(problems))
  return results


def first_batch(state: int, limit: int | None, batches: Sequence[int]) -> int:
  """The largest batch that surely fits, by a rule of thumb; the smallest if there is none.

  Args:
    state: bytes of the training state.
    limit: bytes of the device; None: unknown, so that the smallest is taken.
    batches: ascending.
  """
  fits = lambda batch: _WITH_GRADIENTS * state + batch * _BYTES_PER_IMAGE <= _SURE * limit
  return max((batch for batch in batches if limit and fits(batch)), default=batches[0])


def next_batch(ready: Any, batch: int, limit: int | None, batches: Sequence[int]) -> int | None:
  """The largest batch that fits, by the memory of the programs for a smaller one; None if there is none.

  Gradients and everything that is not a temporary stay as they are; the other temporaries grow with the batch.

  Args:
    ready: `_Ready` for `batch`.
    batch: images.
    limit: bytes of the device; None: unknown, so that the next larger one is taken.
    batches: ascending.
  """
  larger = [size for size in batches if size > batch]
  if limit is None:
    return min(larger, default=None)
  memory = ready.memory
  gradients = min(memory.temporaries, compile_report.state_bytes(ready.step.state)["parameters"])
  fixed = memory.arguments + memory.outputs + memory.code + gradients
  growing = (memory.temporaries - gradients) / batch
  return max((size for size in larger if fixed + growing * size <= limit), default=None)


def _is_memory(error):
  return "RESOURCE_EXHAUSTED" in error or error.startswith("too large")


def _try(run, batch, arithmetic, limit, arguments, results, problems):
  """Compiles, runs and measures one batch. Returns the reason if it failed; `arguments` keep what the next can use."""
  tried = results["batches_tried"]
  before = next((row["compile_seconds"] for row in reversed(tried) if "error" not in row), None)
  with inputs.attempts(tried, {"batch": batch}) as row:
    if before is None:
      run.require_time(_RUNNING[run.toy], f"batch {batch}")
    else:
      run.require_time(before + _RUNNING[run.toy], f"compiling for batch {batch}")
    run.doing(f"compiling for batch {batch}", results)
    ready = _prepare(run, batch, arithmetic, limit, arguments, row)
    run.doing(f"running batch {batch}", results)
    for index in ready.compiled:
      ready.run(index)
    arguments["ready"] = ready
    measured = {"batch": batch} | _time(run, ready, row)
    results |= measured
    run.save(results)
    _profile(run, ready, results, problems)
    problems += [
      f"batch {batch}: {name} is not finite" for name, value in measured["metrics"].items() if not np.isfinite(value)
    ]
    if missing := row.get("not_compiled"):
      problems.append(f"batch {batch}: no time was left to compile {', '.join(missing)}")
  run.save(results)
  return tried[-1].get("error", "")


def _experiment(run, batch, arithmetic):
  """The recipe for accelerators (bfloat16; only the generator is recomputed), at a batch size."""
  experiment = run.experiment(compute_dtype=arithmetic)
  if not run.toy:
    experiment = dataclasses.replace(
      experiment, discriminator=dataclasses.replace(experiment.discriminator, remat=False)
    )
  data = dataclasses.replace(experiment.data, pairs=0)
  return dataclasses.replace(experiment, data=data, train=dataclasses.replace(experiment.train, batch_size=batch))


def _state_bytes(run, arithmetic):
  state = step_lib.abstract_state(run.system(_experiment(run, 1, arithmetic)))
  return sum(compile_report.state_bytes(state).values())


def _prepare(run, batch, arithmetic, limit, arguments, row):
  """Compiles the phases and makes their arguments. Records sizes in `row`."""
  system = run.system(_experiment(run, batch, arithmetic))
  step, frozen = step_lib.build(system), system.abstract_frozen()
  begin = time.monotonic()
  programs, useful = _compile(run, step, frozen)
  row["compile_seconds"] = time.monotonic() - begin
  if missing := [step.programs[index].name for index, program in enumerate(programs) if program is None]:
    row["not_compiled"] = missing
  sizes = [estimate.memory_of(program) for program in programs if program is not None]
  largest = max(sizes, key=lambda item: item.arguments + item.outputs + item.temporaries)
  memory = largest._replace(code=sum(item.code for item in sizes))
  predicted = memory.arguments + memory.outputs + memory.temporaries + memory.code
  row["predicted_bytes"] = predicted
  if limit and predicted > limit:
    raise UserError(f"too large: {predicted:,} bytes by the compiler, {limit:,} are there")
  previous = arguments.pop("ready", None)
  if previous is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(previous.state)):
    state = inputs.training_state(system)
    placed = jax.device_put(inputs.filled(frozen, 7, _CLIP_STD), system.layout.replicated)
  else:
    state, placed = previous.state, previous.frozen
  del previous  # with its programs
  return _Ready(
    step,
    programs,
    memory,
    state,
    placed,
    _batch(system, batch),
    step_lib.constants(system),
    jax.device_put(np.int32(0), system.layout.replicated),
    useful,
  )


def _compile(run, step, frozen):
  """(programs, None for a phase that is not compiled in time; useful operations of each phase).

  The first phase runs at every step, so it must be compiled.
  """
  device = jax.devices()[0].platform
  pool, futures = concurrent.futures.ThreadPoolExecutor(len(step.programs)), []
  for index in range(len(step.programs)):
    # Tracing holds Python, so phases are traced in turn. The compiler leaves Python alone.
    futures.append(pool.submit(step.trace(index, frozen).lower().compile))
  pool.shutdown(wait=False)
  useful = compile_report.useful_flops_by_precision(step.system, "cuda" if device == "gpu" else device)
  programs = []
  for future in futures:
    concurrent.futures.wait([future], timeout=max(0.0, run.time_left() - _RUNNING[run.toy]))
    programs.append(future.result() if future.done() else None)
  if programs[0] is None:
    raise UserError(f"{step.programs[0].name} was not compiled in its time; --part training --minutes N gives it more")
  return programs, useful


def _batch(system, batch):
  """Random images and captions. A caption's largest token is its end, as CLIP has it."""
  rng, values = np.random.default_rng(3), {}
  for name, shape in system.batch_spec(batch).items():
    if np.issubdtype(shape.dtype, np.floating):
      values[name] = rng.uniform(-1, 1, shape.shape).astype(shape.dtype)
    elif len(shape.shape) == 1:
      values[name] = np.arange(batch, dtype=shape.dtype)
    else:
      tokens = rng.integers(1, 100, shape.shape).astype(shape.dtype)
      tokens[:, 20 % shape.shape[1] :] = 0
      tokens[:, 20 % shape.shape[1]] = 101
      values[name] = tokens
  return jax.device_put(values, system.layout.batch)


def _time(run, ready, row):
  """Medians of the phases, and what they compare with. The step's numbers go into `row` too."""
  sheet, system = inputs.chip(), ready.step.system
  seconds: dict[int, list[float]] = {index: [] for index in ready.compiled}
  for count in range(_MOST_STEPS):
    if count and run.time_left() < _RUNNING[run.toy] / 2:
      break
    for index, measured in seconds.items():
      measured.append(ready.run(index))
  measured_phases, step_seconds, step_flops = [], 0.0, dict[str, float]()
  for index, measured in seconds.items():
    program = ready.step.programs[index]
    median, flops = statistics.median(measured), ready.useful[program.name]
    step_seconds += median * program.runs_per_step
    for precision, count in flops.items():
      step_flops[precision] = step_flops.get(precision, 0) + count * program.runs_per_step
    measured_phases.append(
      {
        "phase": program.name,
        "milliseconds": median * 1e3,
        "slowest_milliseconds": max(measured) * 1e3,
        "of_the_steps": program.runs_per_step,
        "runs": len(measured),
      }
      | inputs.shares(flops, median, sheet)
    )
  found: dict[str, Any] = {"phases": measured_phases, "step": None}
  if len(seconds) == len(ready.programs):  # else the step is longer than what was measured
    found["step"] = {
      "milliseconds": step_seconds * 1e3,
      "images_per_second": system.experiment.train.batch_size / step_seconds,
    } | inputs.shares(step_flops, step_seconds, sheet)
    row |= {name: found["step"][name] for name in ("milliseconds", "images_per_second", "share_of_bfloat16_peak")}
  row["peak_memory_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  found |= {"peak_memory_bytes": row["peak_memory_bytes"], "predicted_memory_bytes": row["predicted_bytes"]}
  values = {name: np.asarray(value) for name, value in ready.metrics.items()}
  loads = [value for name, value in values.items() if name.startswith(metric_names.EXPERT_LOAD)]
  found["fullest_expert"] = max((float(load.max() * load.size) for load in loads), default=None)
  found["metrics"] = {
    name: float(value) for name, value in values.items() if value.ndim == 0 and name.startswith("loss/")
  }
  return found


def _profile(run, ready, results, problems):
  """Records the phases once. A profile that cannot be read is one of the `problems`."""
  folder = run.out / "profile_training" / f"batch_{results['batch']}"
  try:
    with profile.recorded(folder):
      for index in ready.compiled:
        ready.run(index)
    results["profile"] = str(folder)
    results["kernels"] = profile.kernels(folder)
  except UserError as error:
    results["kernels"] = []
    problems.append(str(error))
