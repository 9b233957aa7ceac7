"""The progress display: lines in a log file, a bar on a terminal, nothing in other processes."""

import io
import re
import time

import pytest

from aurora_jax.runs import progress

DETAIL = progress.step_detail({"loss/d_real": 0.61234, "loss/g": 1.3}, 211.4, 185.2)


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_command_writes_a_line_every_few_seconds(monkeypatch):
  now = iter([0.0, 1.0, 4.9, 5.1, 6.0, 11.0])
  monkeypatch.setattr("time.monotonic", lambda: next(now))
  stream = io.StringIO()
  with progress.progress("reading", stream) as update:
    for done in range(1, 6):
      update(done, 7000)
  assert stream.getvalue() == "reading: 3 of 7,000\nreading: 5 of 7,000\n"


def test_the_number_of_items_may_be_unknown(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  now = iter([0.0, 1.0, 5.1])
  monkeypatch.setattr("time.monotonic", lambda: next(now))
  stream = io.StringIO()
  with progress.progress("reading", stream) as update:
    update(0, None)
    update(1234, None)
  assert stream.getvalue() == "reading: 1,234\n"
  monkeypatch.undo()
  terminal = Terminal()
  with progress.progress("reading", terminal) as update:
    update(0, None)
    update(1234, None)
  assert "1,234" in terminal.getvalue() and "/" not in terminal.getvalue()


def test_training_writes_lines_to_a_log_file(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  with progress.training() as display:
    display.status("compiling")
    display.status("saving", brief=True)
    for step in range(1, 31):
      display.update(step, 1000, DETAIL)
      now[0] += 1.0
  assert capsys.readouterr().err.splitlines() == [
    "training: compiling",
    "training: step 11 of 1,000  d_real 0.612  g 1.3  211 images/s  3:05 left",
    "training: step 21 of 1,000  d_real 0.612  g 1.3  211 images/s  3:05 left",
  ]


def test_other_processes_show_nothing(capsys):
  with progress.training(primary=False) as display:
    display.status("compiling")
    display.update(1, 10)
  assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  stream = Terminal()
  with progress.training(stream=stream) as display:
    display.status("compiling")
    display.update(7, 1000, DETAIL)
  assert "training" in stream.getvalue() and "7/1,000" in stream.getvalue() and "3:05 left" in stream.getvalue()


def test_a_bar_without_details_estimates_the_time_left(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  stream = Terminal()
  with progress.progress("reading", stream) as update:
    for done in range(1, 11):
      update(done, 10_000)
      time.sleep(0.01)
  assert "reading" in stream.getvalue() and "10/10,000" in stream.getvalue()
  assert re.search(r"\d left|\d s left", stream.getvalue())


@pytest.mark.parametrize("seconds,text", [(44.6, "45 s"), (185, "3:05"), (7200, "2:00:00"), (14 * 86400, "14 d 00:00")])
def test_durations(seconds, text):
  assert progress.duration(seconds) == text


def test_unknown_speed_and_time_are_left_out():
  assert progress.step_detail({"loss/g": 1.25}, None, None) == "g 1.25"
  assert progress.step_detail({}, 0.25, 50) == "0.25 images/s  50 s left"
