"""The progress display: lines in a log, a bar on a terminal."""

import io

from aurora_jax.cli import progress as progress_module
from aurora_jax.cli.progress import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_log_gets_a_line_now_and_then(monkeypatch):
  clock = iter([0.0, 1.0, 4.9, 5.1, 6.0, 11.0])
  monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
  stream = io.StringIO()
  with progress("reading", stream) as update:
    for done in range(1, 6):
      update(done, 7)
  assert stream.getvalue() == "reading: 3 of 7\nreading: 5 of 7\n"


def test_a_terminal_gets_a_bar(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  stream = Terminal()
  with progress("reading", stream) as update:
    update(3, 7)
  assert "reading" in stream.getvalue() and "3/7" in stream.getvalue()
