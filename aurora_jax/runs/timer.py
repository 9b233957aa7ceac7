"""Where the time goes: input, step, samples, evaluation, checkpoint; kept over restarts."""

import collections
import contextlib
import time

PHASES = ("input", "step", "samples", "evaluation", "checkpoint")
_REMEMBERED_STEPS = 64


class Clock:
  """Counts the seconds of a run.

  Attributes:
    started: `time.monotonic()` when this process began.
  """

  def __init__(self, stored=None, started=None):
    """Begins to count, or goes on from what `to_json` gave before a restart.

    Args:
      stored: dict, or None.
      started: `time.monotonic()` when the process began its work; None takes now.
    """
    stored = stored or {}
    now = time.monotonic()
    self.started = now if started is None else started
    self._base = stored.get("seconds", 0.0) - now
    self._phases = {name: stored.get("phases", {}).get(name, 0.0) for name in PHASES}
    self._window = dict.fromkeys(PHASES, 0.0)
    self._window_steps = 0
    self._recent = collections.deque(maxlen=_REMEMBERED_STEPS)
    self._last_step = None

  @property
  def seconds(self):
    """Seconds of training, over all restarts."""
    return self._base + time.monotonic()

  @property
  def seconds_here(self):
    """Seconds since this process began."""
    return time.monotonic() - self.started

  @property
  def phases(self):
    """{phase: seconds}, over all restarts."""
    return {name: round(seconds, 3) for name, seconds in self._phases.items()}

  @contextlib.contextmanager
  def phase(self, name):
    """Counts what happens inside as one of PHASES."""
    begun = time.monotonic()
    try:
      yield
    finally:
      spent = time.monotonic() - begun
      self._phases[name] += spent
      self._window[name] += spent
      if name not in ("input", "step"):
        self._last_step = None  # a pause is no part of a step's duration

  def step_done(self):
    """Notes that one more step is complete."""
    now = time.monotonic()
    if self._last_step is not None:
      self._recent.append(now - self._last_step)
    self._last_step = now
    self._window_steps += 1

  @property
  def step_seconds(self):
    """A recent step's duration: the mean without the slowest tenth, where a compilation would be; None at first."""
    if not self._recent:
      return None
    durations = sorted(self._recent)
    durations = durations[: max(1, len(durations) - (len(durations) + 9) // 10)]
    return sum(durations) / len(durations)

  def take_window(self, batch_size):
    """Metrics of the time since the last call: "images_per_second" and "time/PHASE" in seconds."""
    busy = self._window["input"] + self._window["step"]
    values = {"images_per_second": batch_size * self._window_steps / busy if busy else 0.0}
    values |= {f"time/{name}": seconds for name, seconds in self._window.items()}
    self._window = dict.fromkeys(PHASES, 0.0)
    self._window_steps = 0
    return values

  def to_json(self):
    """What a checkpoint keeps."""
    return {"seconds": self.seconds, "phases": dict(self._phases)}
