"""Progress on stderr: a live bar on a terminal, a line every few seconds in a log file."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from types import TracebackType
from typing import TextIO

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_TRAINING_LINES = 10.0


class Silent:
  """Shows nothing: the display of all processes but the primary one. `Bar` and `Lines` have the same methods."""

  def __enter__(self) -> "Silent":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    pass

  def update(self, done: int, total: int | None, detail: str | None = None) -> None:
    """Shows that `done` of `total` items are done.

    Args:
      done: number of items.
      total: number of items, or None if it is not known.
      detail: text behind the numbers; None shows an estimate of the time left where that is possible.
    """

  def status(self, message: str, brief: bool = False) -> None:
    """Shows what happens between items, such as "compiling". `brief`: it happens often and is over soon."""


class Bar(Silent):
  """A live bar at the bottom of a terminal. Printed lines appear above it."""

  def __init__(self, description: str, stream: TextIO):
    from rich import console, progress

    self._bar = progress.Progress(
      progress.SpinnerColumn(),
      progress.TextColumn("{task.description}"),
      progress.BarColumn(bar_width=20),
      progress.TextColumn("{task.fields[numbers]}"),
      progress.TextColumn("{task.fields[detail]}"),
      console=console.Console(file=stream),
      transient=True,
      refresh_per_second=4,
      redirect_stdout=sys.stdout.isatty(),  # a redirected stdout must get the printed lines itself
    )
    self._task = self._bar.add_task(description, total=None, numbers="", detail="")

  def __enter__(self) -> "Bar":
    self._bar.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._bar.stop()

  def update(self, done: int, total: int | None, detail: str | None = None) -> None:
    numbers = f"{done:,}" if total is None else f"{done:,}/{total:,}"
    self._bar.update(self._task, completed=done, total=total, numbers=numbers)
    if detail is None:
      left = self._bar.tasks[0].time_remaining
      detail = "" if left is None else f"{duration(left)} left"
    self._bar.update(self._task, detail=detail)

  def status(self, message: str, brief: bool = False) -> None:
    del brief
    self._bar.update(self._task, detail=message)


class Lines(Silent):
  """A plain line every few seconds; while nothing is done yet, or something else goes on, a line that says so."""

  def __init__(self, description: str, stream: TextIO, seconds_between_lines: float, item: str = ""):
    """`item` is what the numbers count, such as "step"."""
    self._description, self._stream, self._item = description, stream, item
    self._seconds_between_lines = seconds_between_lines
    self._last = time.monotonic()
    self._end_of_waiting = threading.Event()

  def __enter__(self) -> "Lines":
    self._wait("working")
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._end_of_waiting.set()

  def update(self, done: int, total: int | None, detail: str | None = None) -> None:
    self._end_of_waiting.set()
    now = time.monotonic()
    if now - self._last >= self._seconds_between_lines or (done == total and detail):
      self._last = now
      numbers = f"{done:,}" if total is None else f"{done:,} of {total:,}"
      self._print(f"{self._item} {numbers}  {detail or ''}".strip())

  def status(self, message: str, brief: bool = False) -> None:
    if not brief:
      self._print(message)
      self._wait(message)

  def _wait(self, message):
    """Repeats a message every few seconds, until there is something else to show."""
    self._end_of_waiting.set()
    ended = self._end_of_waiting = threading.Event()

    def repeat():
      count = 0
      while not ended.wait(self._seconds_between_lines):
        count += 1
        self._print(f"{message} ({duration(count * self._seconds_between_lines)})")

    threading.Thread(target=repeat, name="progress", daemon=True).start()

  def _print(self, message):
    print(f"{self._description}: {message}", file=self._stream, flush=True)


def _make(description, stream, seconds_between_lines, item=""):
  stream = sys.stderr if stream is None else stream
  return Bar(description, stream) if stream.isatty() else Lines(description, stream, seconds_between_lines, item)


@contextlib.contextmanager
def progress(
  description: str, stream: TextIO | None = None
) -> Generator[Callable[[int, int | None], None], None, None]:
  """Shows the progress of a command.

  Args:
    description: what is done, such as "reading".
    stream: None takes stderr.

  Yields:
    A function of (done, total), total being None if it is not known. It may be called often.
  """
  with _make(description, stream, _SECONDS_BETWEEN_LINES) as display:
    yield display.update


def training(*, primary: bool = True, stream: TextIO | None = None, description: str = "training") -> Silent:
  """The display of a training run.

  Args:
    description: what is trained.
    primary: whether this process is the primary one; the others show nothing.
    stream: None takes stderr.

  Returns:
    A context manager with the methods of `Silent`.
  """
  return _make(description, stream, _SECONDS_BETWEEN_TRAINING_LINES, "step") if primary else Silent()


def step_detail(metrics: Mapping[str, float], images_per_second: float | None, seconds_left: float | None) -> str:
  """The detail of a training step: "d_real 0.612  g 1.3  211 images/s  3:05 left".

  Args:
    metrics: few of the step's metrics.
    images_per_second: None if unknown.
    seconds_left: None if unknown.
  """
  parts = [f"{name.removeprefix('loss/')} {value:.3g}" for name, value in metrics.items()]
  if images_per_second is not None:
    digits = ",.0f" if images_per_second >= 10 else ".2g"
    parts.append(f"{images_per_second:{digits}} images/s")
  if seconds_left is not None:
    parts.append(f"{duration(seconds_left)} left")
  return "  ".join(parts)


def duration(seconds: float) -> str:
  """Formats seconds: "45 s", "3:05", "2:00:00", "3 d 04:00"."""
  seconds = int(round(seconds))
  minutes, second = divmod(seconds, 60)
  hours, minute = divmod(minutes, 60)
  if hours >= 48:
    return f"{hours // 24} d {hours % 24:02d}:{minute:02d}"
  if hours:
    return f"{hours}:{minute:02d}:{second:02d}"
  return f"{minute}:{second:02d}" if minute else f"{second} s"
