"""Why a run stops: the reasons and their exit statuses, the decision that all processes share, and the last message."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable

from aurora_jax import local_copies
from aurora_jax.config import Train
from aurora_jax.runs.signals import Signals
from aurora_jax.runs.timer import Timer
from aurora_jax.systems import base

# How a run can end.
DONE = "done"  # total_steps are done
ALREADY_DONE = "already done"  # they were before this start
TIME = "time"  # train.max_seconds are over
INTERRUPT = "interrupt"  # Ctrl-C
TERMINATED = "terminated"  # SIGTERM
NON_FINITE = "non-finite"
CORRUPT_RECORDS = "damaged data"  # more records than data.max_skipped could not be read; the state is saved

_STATUS = {DONE: 0, ALREADY_DONE: 0, TIME: 0, INTERRUPT: 0, TERMINATED: 0, NON_FINITE: 3, CORRUPT_RECORDS: 2}
# Requests to stop. Of those of several processes the last one here counts.
_REQUESTS = (None, TIME, INTERRUPT, TERMINATED)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How training ended.

  Attributes:
    step: steps done.
    reason: one of the reasons above.
    state: the state at `step`; None if it was not loaded or is not finite.
  """

  step: int
  reason: str
  state: base.TrainState | None = None

  @property
  def status(self) -> int:
    """Exit status of the process."""
    return _STATUS[self.reason]


@dataclasses.dataclass(frozen=True)
class StopRule:
  """Decides when to stop. All processes decide alike, whichever of them got a signal or runs ahead in time.

  Attributes:
    train: total steps and time limit.
    signals: signals of this process.
    timer: timer of this process.
    vote: number of this process -> the largest of all processes (`hosts.vote`).
    no_data: () -> whether there is no next batch, or too many records were skipped; the same in all processes.
  """

  train: Train
  signals: Signals
  timer: Timer
  vote: Callable[[int], int]
  no_data: Callable[[], bool]

  def reason(self, step: int) -> str | None:
    """Why to stop after `step` steps; None to continue."""
    return DONE if step >= self.train.total_steps else self.request()

  def request(self) -> str | None:
    """Why to stop before the last step; None to continue. Every process must ask equally often."""
    request = self.signals.reason
    if request is None and self.train.max_seconds and self.timer.seconds_here >= self.train.max_seconds:
      request = TIME
    request = _REQUESTS[self.vote(_REQUESTS.index(request))]
    return CORRUPT_RECORDS if self.no_data() else request

  def seconds_left(self, step: int) -> float | None:
    """Estimate of the time to the end of the run after `step` steps; None if it is unknown."""
    seconds = self.timer.step_seconds
    left = None if seconds is None else seconds * (self.train.total_steps - step)
    if self.train.max_seconds:
      limit = max(0.0, self.train.max_seconds - self.timer.seconds_here)
      left = limit if left is None else min(left, limit)
    return left


def report_end(path: pathlib.Path, train: Train, step: int, reason: str, saved: pathlib.Path | None) -> None:
  """Prints how a run ended and what continues it.

  Args:
    path: the run's folder.
    train: its settings.
    step: steps done.
    reason: DONE, TIME, INTERRUPT or TERMINATED.
    saved: the newest checkpoint, or None.
  """
  end = {
    DONE: f"all {train.total_steps:,} steps are done",
    TIME: f"stopped at step {step:,} of {train.total_steps:,}: train.max_seconds = {train.max_seconds:g} are over",
    INTERRUPT: f"stopped at step {step:,} of {train.total_steps:,}",
    TERMINATED: f"stopped at step {step:,} of {train.total_steps:,} (SIGTERM)",
  }[reason]
  where = "nothing to save yet" if saved is None else f"saved in {saved}"
  again = "" if reason == DONE else f"; the same command {'begins again' if saved is None else 'goes on'}"
  print(local_copies.shown(f"{path}: {end}; {where}{again}"), flush=True)


def report_corrupt_records(problem: str, step: int, saved: pathlib.Path | None) -> None:
  """Prints to stderr that a run stopped since records cannot be read, and what continues it.

  Args:
    problem: a sentence on the records.
    step: steps done.
    saved: the newest checkpoint, or None.
  """
  where = "no checkpoint was saved yet" if saved is None else f"saved in {saved}"
  message = (
    f"aurora_jax train: {problem}; training stopped at step {step:,}; {where}; "
    "mend the data set, or let more go with --config.data.max_skipped, and the same command goes on"
  )
  print(local_copies.shown(message), file=sys.stderr, flush=True)


def report_non_finite(problem: str, folder: pathlib.Path, saved: int | None) -> None:
  """Prints to stderr that a run stopped since a number is not finite.

  Args:
    problem: names the number.
    folder: path of `checkpoints/`.
    saved: step of the newest checkpoint, or None.
  """
  where = "no checkpoint was saved yet" if saved is None else f"the last checkpoint, step {saved:,}, stands in {folder}"
  message = local_copies.shown(f"aurora_jax train: {problem}; training stopped; {where}")
  print(message, file=sys.stderr, flush=True)
