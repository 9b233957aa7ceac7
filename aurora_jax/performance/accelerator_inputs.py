"""What the parts of `bench accelerator` share: settings, the time that is left, arrays for networks, timing.

Arrays are drawn once and repeated: drawing 1.5 billion normal numbers would take longer than most measurements.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from aurora_jax import config_files
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.performance import benchmarks, chips
from aurora_jax.systems import base, registry
from aurora_jax.training import step as step_lib

# A prime: no row and no expert of a stack gets the values of another.
_POOL = 4_194_301
_SECONDS_PER_ROW = 2.0
# An entry of results while a part runs.
DOING = "doing"
_MOST_REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Run:
  """One part's run.

  Attributes:
    config: the experiment, FILE[:VARIANT].
    toy: small sizes, for a CPU.
    out: the folder of the results.
    deadline: of `time.monotonic`, when the part has to be done.
    save: called with the results so far after each measurement, so that a part that is stopped has not measured for
      nothing.
  """

  config: str
  toy: bool
  out: pathlib.Path
  deadline: float
  save: Callable[[Mapping[str, Any]], None]

  def time_left(self) -> float:
    """Seconds until the deadline."""
    return self.deadline - time.monotonic()

  def require_time(self, seconds: float, what: str) -> None:
    """Raises UserError if fewer seconds are left."""
    if self.time_left() < seconds:
      raise UserError(
        f"{max(0.0, self.time_left()):.0f} s of its time were left before {what}, which needs about {seconds:.0f} s"
      )

  def doing(self, what: str, results: Mapping[str, Any]) -> None:
    """Saves the results so far with what begins now, for the reason if the part is stopped in it."""
    self.save({**results, DOING: what})

  def experiment(self, **fields: Any) -> Experiment:
    """The configuration: one stage, at its last resolution, and other fields of its networks.

    Args:
      **fields: of the generator and of the discriminator, as far as they have them.
    """
    experiment = config_files.load([f"--config={self.config}"])
    experiment = dataclasses.replace(experiment, schedule=dataclasses.replace(experiment.schedule, resolutions=()))
    networks = {}
    for name in ("generator", "discriminator"):
      cfg = getattr(experiment, name)
      known = {field.name for field in dataclasses.fields(cfg)}
      networks[name] = dataclasses.replace(cfg, **{key: value for key, value in fields.items() if key in known})
    return dataclasses.replace(experiment, **networks)

  def system(self, experiment: Experiment) -> base.System:
    """The system of an experiment on one device."""
    return registry.system_class(experiment.system)(experiment)


def chip() -> chips.Chip | None:
  """The data sheet of the first device, or None."""
  device = jax.devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  return chips.of_device_kind(device.device_kind, limit)


def normals(size: int, seed: int) -> np.ndarray:
  """`size` float32 numbers of a standard normal distribution; they repeat with a prime period."""
  pool = np.random.default_rng(seed).standard_normal(min(size, _POOL), np.float32)
  return np.resize(pool, size)


def filled(shapes: Any, seed: int, std: float = 1.0) -> Any:
  """Values for the variables of networks, as host arrays.

  Matrices and kernels are normal, as equalized learning rates start. Vectors are 0, those named "scale" are 1.

  Args:
    shapes: a tree of shapes.
    seed: of the numbers.
    std: standard deviation of matrices.
  """
  pool = normals(_POOL, seed)
  start = iter(range(0, 1 << 62, 104_729))

  def fill(path, leaf):
    if leaf.ndim < 2 or not np.issubdtype(leaf.dtype, np.floating):
      last = getattr(path[-1], "key", "") if path else ""
      return np.full(leaf.shape, 1 if last == "scale" else 0, leaf.dtype)
    values = np.roll(pool, -(next(start) % _POOL))
    return (np.resize(values, leaf.shape) * np.float32(std)).astype(leaf.dtype, copy=False)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def training_state(system: base.System, seed: int = 0) -> base.TrainState:
  """A first state of training on the device, without compiling the networks' initialization."""
  abstract = step_lib.abstract_state(system)
  place = lambda tree, shapes: jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), tree, shapes)
  zeros = lambda tree: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)

  def network(index, shapes):
    params = filled(shapes.params, seed + index)
    return base.NetworkState(
      place(params, shapes.params),
      place(filled(shapes.variables, seed + index), shapes.variables),
      place(zeros(shapes.opt_state), shapes.opt_state),
      None if shapes.ema is None else place(params, shapes.ema),
    )

  networks = {name: network(index, shapes) for index, (name, shapes) in enumerate(abstract.networks.items())}
  return base.TrainState(jax.device_put(np.int32(0), abstract.step.sharding), networks)


def seconds_of(function: Callable[[], Any]) -> float:
  """Median seconds of a call after warm-up; more calls for short ones."""
  once = benchmarks.median_seconds(function, 1, warm_up=1)
  repeats = max(3, min(_MOST_REPEATS, math.ceil(_SECONDS_PER_ROW / max(once, 1e-9))))
  return benchmarks.median_seconds(function, repeats, warm_up=1)


def seconds_at_peak(flops: Mapping[str, float], sheet: chips.Chip | None) -> float | None:
  """Seconds that operations take at the data sheet's rates, {precision: operations}; None where it is unknown."""
  if sheet is None:
    return None
  rates = {precision: sheet.peak(precision) for precision in flops}
  return None if None in rates.values() else sum(count / rates[precision] for precision, count in flops.items())


def shares(flops: Mapping[str, float], seconds: float, sheet: chips.Chip | None) -> dict[str, float | None]:
  """Useful operations and how they compare with the chip's peaks.

  Args:
    flops: {precision: operations}.
    seconds: measured.
    sheet: of the chip.

  Returns:
    {"useful_tflops": 10^12 operations; "tflops_per_second"; "share_of_bfloat16_peak"; "share_of_own_peak": of the time
    that the operations take at the peaks of their own precisions}.
  """
  total, bound = sum(flops.values()), seconds_at_peak(flops, sheet)
  return {
    "useful_tflops": total / 1e12,
    "tflops_per_second": total / seconds / 1e12,
    "share_of_bfloat16_peak": None if sheet is None or not sheet.bfloat16 else total / seconds / sheet.bfloat16,
    "share_of_own_peak": None if bound is None else bound / seconds,
  }


def one_line(error: BaseException) -> str:
  """An exception as one line of at most 300 characters."""
  text = " ".join(str(error).split()) or type(error).__name__
  return (text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")[:300]


def attempts(rows: list[dict[str, Any]], described: Mapping[str, Any]) -> "Attempt":
  """A context that appends a row to `rows`: what is set in it, or the reason why it failed."""
  return Attempt(rows, dict(described))


class Attempt:
  """One measurement of several; a failure becomes a row with "error" and does not end the others."""

  def __init__(self, rows: list[dict[str, Any]], row: dict[str, Any]):
    self._rows, self._row = rows, row

  def __enter__(self) -> dict[str, Any]:
    return self._row

  def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> bool:
    del trace
    if error is not None and not isinstance(error, Exception):
      return False
    if error is not None:
      self._row["error"] = one_line(error)
    self._rows.append(self._row)
    return True


def raise_failures(rows: list[dict[str, Any]]) -> None:
  """Raises UserError with the reasons in rows that failed, if there are any."""
  reasons = list(failures(rows))
  if reasons:
    raise UserError(reasons[0] if len(reasons) == 1 else f"{len(reasons)} rows failed, the first: {reasons[0]}")


def failures(rows: list[dict[str, Any]]) -> Iterator[str]:
  """The reasons in rows that failed."""
  for row in rows:
    if "error" in row:
      what = ", ".join(f"{name} {value}" for name, value in row.items() if name != "error")
      yield f"{what}: {row['error']}"
