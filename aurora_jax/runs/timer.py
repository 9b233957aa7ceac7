"""Time spent on input, steps, samples, evaluation and checkpoints, summed over restarts."""

import collections
import contextlib
import time
from collections.abc import Generator, Mapping
from typing import Any

PHASES = ("input", "step", "samples", "evaluation", "checkpoint")
_REMEMBERED_STEPS = 64


class Timer:
  """Measures a run.

  Attributes:
    started: `time.monotonic()` when this process began.
  """

  def __init__(self, stored: Mapping[str, Any] | None = None, started: float | None = None):
    """Starts from zero, or continues from `to_json` of an earlier process.

    Args:
      stored: what `to_json` returned before a restart, or None.
      started: `time.monotonic()` when the process began its work; None takes now.
    """
    stored = stored or {}
    now = time.monotonic()
    self.started = now if started is None else started
    self._base = stored.get("seconds", 0.0) - now
    self._phases = {name: stored.get("phases", {}).get(name, 0.0) for name in PHASES}
    self._window = dict.fromkeys(PHASES, 0.0)
    self._window_steps = 0
    self._recent: collections.deque[float] = collections.deque(maxlen=_REMEMBERED_STEPS)
    self._last_step: float | None = None

  @property
  def seconds(self) -> float:
    """Seconds of training over all restarts."""
    return self._base + time.monotonic()

  @property
  def seconds_here(self) -> float:
    """Seconds since this process began."""
    return time.monotonic() - self.started

  @property
  def phases(self) -> dict[str, float]:
    """{phase: seconds} over all restarts."""
    return {name: round(seconds, 3) for name, seconds in self._phases.items()}

  @contextlib.contextmanager
  def phase(self, name: str) -> Generator[None, None, None]:
    """Counts the time inside as one of PHASES."""
    start = time.monotonic()
    try:
      yield
    finally:
      spent = time.monotonic() - start
      self._phases[name] += spent
      self._window[name] += spent
      if name not in ("input", "step"):
        self._last_step = None  # a pause is not part of a step's duration

  def step_done(self) -> None:
    """Counts one complete step."""
    now = time.monotonic()
    if self._last_step is not None:
      self._recent.append(now - self._last_step)
    self._last_step = now
    self._window_steps += 1

  @property
  def step_seconds(self) -> float | None:
    """Mean duration of recent steps without the slowest tenth, which may have compiled; None before the second step."""
    if not self._recent:
      return None
    durations = sorted(self._recent)
    durations = durations[: max(1, len(durations) - (len(durations) + 9) // 10)]
    return sum(durations) / len(durations)

  def take_window(self, images_per_step: int) -> dict[str, float]:
    """Metrics of the time since the last call: "images_per_second", and "time/PHASE" in seconds.

    Args:
      images_per_step: images that a step reads.
    """
    busy = self._window["input"] + self._window["step"]
    values = {"images_per_second": images_per_step * self._window_steps / busy if busy else 0.0}
    values |= {f"time/{name}": seconds for name, seconds in self._window.items()}
    self._window = dict.fromkeys(PHASES, 0.0)
    self._window_steps = 0
    return values

  def to_json(self) -> dict[str, Any]:
    """Plain values for a checkpoint."""
    return {"seconds": self.seconds, "phases": dict(self._phases)}
