"""Profiler traces on demand: a few steps of a run, for TensorBoard's profiler or xprof.

A trace costs time while it is taken and changes nothing else.
"""

import contextlib
import re

import jax

from aurora_jax.errors import UserError


def parse(text):
  """ "20:25" as (20, 25): steps 20 to 24, counted from 0 as everywhere; "20" is "20:21".

  Raises:
    UserError: it is not two whole numbers, the first one smaller.
  """
  match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
  first, last = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
  if first >= last:
    raise UserError(f"--profile-steps {text}: give two step numbers, FIRST:END with FIRST < END, such as 20:25")
  return first, last


class Profiler:
  """Takes a trace of the steps from `first` up to, not including, `end`; the first step of this process may be later.

  Attributes:
    folder: where the traces are; TensorBoard finds them from there or from any folder above.
  """

  def __init__(self, folder, first, end):
    self.folder, self._first, self._end = folder, first, end
    self._begun = None  # the first step that is traced, while a trace is taken

  def before(self, step):
    """Called before a step is dispatched. Begins the trace if it is due."""
    if self._begun is None and self._first <= step < self._end:
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # every Python call would be recorded, which slows the host down several times
      jax.profiler.start_trace(str(self.folder), profiler_options=options)
      self._begun = step

  def step(self, step):
    """A context in which a step is dispatched: names it in the trace."""
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def after(self, done, metrics):
    """Called when `done` steps are dispatched. Ends the trace if it is complete, once the devices are through with it.

    Returns:
      A line that says what was taken, or None.
    """
    if self._begun is None or done < self._end:
      return None
    jax.block_until_ready(metrics)
    return self.close(done)

  def close(self, done):
    """Ends a trace that is being taken. Returns a line that says what was taken, or None."""
    if self._begun is None:
      return None
    begun, self._begun, self._first = self._begun, None, self._end
    jax.profiler.stop_trace()
    return (
      f"profile of steps {begun:,} to {done - 1:,}: {self.folder} (tensorboard --logdir {self.folder}, with the "
      "package tensorboard-plugin-profile)"
    )


class NoProfiler:
  """The twin of `Profiler` that takes none."""

  def before(self, step):
    pass

  def step(self, step):
    return contextlib.nullcontext()

  def after(self, done, metrics):
    return None

  def close(self, done):
    return None
