"""Profiler traces of a few steps of a run, for TensorBoard's profiler or xprof. A trace does not change the result."""

import contextlib
import os
import pathlib
import re
from typing import Any

from aurora_jax.errors import UserError


def parse(text: str) -> tuple[int, int]:
  """Parses "20:25" as (20, 25), which means steps 20 to 24 counted from 0. "20" is "20:21".

  Raises:
    UserError: the text is not two whole numbers, or the first is not smaller than the second.
  """
  match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
  first, last = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
  if first >= last:
    raise UserError(f"--profile-steps {text}: give two step numbers, FIRST:END with FIRST < END, such as 20:25")
  return first, last


class NoProfiler:
  """Takes no trace. `Profiler` has the same methods."""

  def before(self, step: int) -> None:
    """Called before a step is dispatched. Starts the trace if it is due."""

  def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
    """A context in which a step is dispatched. It names the step in the trace."""
    del step
    return contextlib.nullcontext()

  def after(self, done: int, metrics: Any) -> str | None:
    """Called when `done` steps are dispatched. If the trace is complete, waits for the devices and ends it.

    Args:
      done: number of steps.
      metrics: arrays of the last step, to wait for.

    Returns:
      A line that says what was traced, or None.
    """
    del done, metrics

  def close(self, done: int) -> str | None:
    """Ends a running trace. Returns a line that says what was traced, or None."""
    del done


class Profiler(NoProfiler):
  """Traces the steps from `first` up to, not including, `end`. The first step of this process may be later.

  Attributes:
    folder: where the traces are. TensorBoard finds them from there or from any folder above.
  """

  def __init__(self, folder: str | os.PathLike, first: int, end: int):
    self.folder, self._first, self._end = pathlib.Path(folder), first, end
    self._begun: int | None = None  # the first traced step, while a trace runs

  def before(self, step: int) -> None:
    if self._begun is None and self._first <= step < self._end:
      import jax

      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # every Python call would be recorded, which slows the host down several times
      jax.profiler.start_trace(str(self.folder), profiler_options=options)
      self._begun = step

  def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
    import jax

    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def after(self, done: int, metrics: Any) -> str | None:
    if self._begun is None or done < self._end:
      return None
    import jax

    jax.block_until_ready(metrics)
    return self.close(done)

  def close(self, done: int) -> str | None:
    if self._begun is None:
      return None
    begun, self._begun, self._first = self._begun, None, self._end
    import jax

    jax.profiler.stop_trace()
    return (
      f"profile of steps {begun:,} to {done - 1:,}: {self.folder} (tensorboard --logdir {self.folder}, with the "
      "package tensorboard-plugin-profile)"
    )
