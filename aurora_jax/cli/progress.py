"""A progress bar on stderr; plain lines where that is not a terminal (a log file, a CI run)."""

import contextlib
import sys
import time

from rich import console as rich_console
from rich import progress as rich_progress

_SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def progress(words, stream=None):
  """Shows how far something is.

  Args:
    words: what is being done, e.g. "rendering".
    stream: where to; stderr by default.

  Yields:
    A function of (done, total), to be called as often as one likes.
  """
  stream = sys.stderr if stream is None else stream
  if not stream.isatty():
    yield _plain_lines(words, stream)
    return
  with rich_progress.Progress(
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TimeRemainingColumn(),
    console=rich_console.Console(file=stream),
    transient=True,
  ) as bar:
    task = bar.add_task(words, total=None)
    yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_lines(words, stream):
  last = time.monotonic()

  def update(done, total):
    nonlocal last
    now = time.monotonic()
    if now - last >= _SECONDS_BETWEEN_LINES:
      last = now
      print(f"{words}: {done} of {total}", file=stream, flush=True)

  return update
