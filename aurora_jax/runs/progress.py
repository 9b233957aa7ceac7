"""How training goes, on stderr: a bar on a terminal, a line every ten seconds in a log file, nothing elsewhere."""

import sys
import time

_SECONDS_BETWEEN_LINES = 10.0


def make(total, *, primary=True, stream=None):
  """A display for `total` steps: `Bar`, `Lines` or `Nothing`, all context managers with the same two methods.

  Args:
    total: int.
    primary: whether this process is the one that talks.
    stream: stderr by default.
  """
  stream = sys.stderr if stream is None else stream
  if not primary:
    return Nothing()
  return Bar(total, stream) if stream.isatty() else Lines(total, stream)


class Bar:
  """A live bar at the bottom of a terminal; what is printed meanwhile appears above it."""

  def __init__(self, total, stream):
    from rich import console, progress

    self._bar = progress.Progress(
      progress.TextColumn("{task.description}"),
      progress.BarColumn(bar_width=20),
      progress.TextColumn("{task.completed:,}/{task.total:,}"),
      progress.TextColumn("{task.fields[words]}"),
      console=console.Console(file=stream),
      transient=True,
      refresh_per_second=4,
      redirect_stdout=sys.stdout.isatty(),  # else what is printed would miss the file that stdout goes to
    )
    self._task = self._bar.add_task("training", total=total, words="")

  def __enter__(self):
    self._bar.start()
    return self

  def __exit__(self, *_):
    self._bar.stop()

  def doing(self, words, brief=False):
    """Says what is going on other than steps; `brief`: something that comes often and is soon over."""
    del brief
    self._bar.update(self._task, words=words)

  def step(self, done, metrics, rate, left):
    """Shows the present step.

    Args:
      done: steps done.
      metrics: {name: float}, few.
      rate: images per second, or None.
      left: seconds left, or None.
    """
    self._bar.update(self._task, completed=done, words=describe(metrics, rate, left))


class Lines:
  """A plain line now and then."""

  def __init__(self, total, stream):
    self._total, self._stream = total, stream
    self._last = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def doing(self, words, brief=False):
    if not brief:
      print(f"training: {words}", file=self._stream, flush=True)

  def step(self, done, metrics, rate, left):
    now = time.monotonic()
    if self._last is None:
      self._last = now
    if now - self._last >= _SECONDS_BETWEEN_LINES:
      self._last = now
      print(
        f"training: step {done:,} of {self._total:,}  {describe(metrics, rate, left)}", file=self._stream, flush=True
      )


class Nothing:
  """Shows nothing: all processes but the first."""

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def doing(self, words, brief=False):
    pass

  def step(self, done, metrics, rate, left):
    pass


def describe(metrics, rate, left):
  """One line: "d_real 0.612  g 1.30  211 images/s  3:05 left"."""
  parts = [f"{name.removeprefix('loss/')} {value:.3g}" for name, value in metrics.items()]
  if rate is not None:
    parts.append(f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s")
  if left is not None:
    parts.append(f"{duration(left)} left")
  return "  ".join(parts)


def duration(seconds):
  """Seconds in words that fit a line: "45 s", "3:05", "2:00:00", "3 d 04:00"."""
  seconds = int(round(seconds))
  minutes, second = divmod(seconds, 60)
  hours, minute = divmod(minutes, 60)
  if hours >= 48:
    return f"{hours // 24} d {hours % 24:02d}:{minute:02d}"
  if hours:
    return f"{hours}:{minute:02d}:{second:02d}"
  return f"{minute}:{second:02d}" if minute else f"{second} s"
