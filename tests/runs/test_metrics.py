"""Windows, metrics.jsonl and TensorBoard."""

import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from aurora_jax.errors import UserError
from aurora_jax.runs import metrics, progress
from aurora_jax.runs.timer import Clock
from aurora_jax.runs.workdir import RunFolder
from aurora_jax.training import guard


def test_window_averages_and_expands_vectors():
  window = metrics.Window()
  window.add({"g": np.float32(1.0), "load": np.array([0.25, 0.75])})
  window.add({"g": np.float32(2.0), "load": np.array([0.75, 0.25]), "r1": np.float32(8.0)})
  assert window.take() == {"g": 1.5, "load/0": 0.5, "load/1": 0.5, "r1": 8.0}
  assert window.take() == {}


def test_window_survives_a_restart_exactly():
  values = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
  whole, first = metrics.Window(), metrics.Window()
  for row in values:
    whole.add({"a": row[0], "v": row})
  for row in values[:4]:
    first.add({"a": row[0], "v": row})
  second = metrics.Window(json.loads(json.dumps(first.to_json())))
  for row in values[4:]:
    second.add({"a": row[0], "v": row})
  assert second.take() == whole.take()


def test_lines_are_json_and_survive_a_kill(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = metrics.MetricsFile(path)
  lines.write("train", np.int32(3), 1.23456, {"loss/g": np.float32(0.1), "odd": float("nan"), "word": "x"})
  assert json.loads(path.read_text()) == {
    "step": 3,
    "seconds": 1.235,
    "kind": "train",
    "loss/g": 0.1,
    "odd": "nan",
    "word": "x",
  }
  lines.close()
  with open(path, "a") as file:
    file.write('{"step": 4, "secon')
  lines = metrics.MetricsFile(path)
  lines.write("resume", 3, 1.0)
  lines.close()
  assert [row["kind"] for row in metrics.read(path)] == ["train", "resume"]
  assert metrics.read(tmp_path / "none") == []
  with pytest.raises(UserError, match="cannot be written"):
    metrics.MetricsFile(tmp_path / "no/metrics.jsonl")


def test_history_leaves_out_what_was_lost(tmp_path):
  lines = metrics.MetricsFile(tmp_path / "m")
  for kind, step in (
    ("start", 0),
    ("train", 5),
    ("start", 0),
    ("train", 10),
    ("train", 20),
    ("train", 30),
    ("resume", 20),
    ("train", 30),
    ("resume", 10),
    ("train", 20),
  ):
    lines.write(kind, step, 0.0)
  kept = [(row["kind"], row["step"]) for row in metrics.history(tmp_path / "m")]
  assert kept == [("start", 0), ("train", 10), ("resume", 10), ("train", 20)]


def test_tensorboard_reads_the_event_files(tmp_path, monkeypatch):
  # With a module of this name TensorBoard reads by itself and does not import TensorFlow, which takes seconds.
  monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
  from tensorboard.backend.event_processing import event_accumulator

  folder = RunFolder(tmp_path)
  first = metrics.Log(folder)
  for step in (10, 20, 30):
    first.train(step, 1.0, {"loss/g": step / 10, "word": "not a number"})
  first.close()
  second = metrics.Log(folder)
  second._board._file.close()
  second._board._file = open(tmp_path / "tensorboard" / "events.out.tfevents.9999999999.later", "ab")
  second.note("resume", 20, 1.0)
  second.train(30, 2.0, {"loss/g": 7.0})
  second.picture(30, "samples", Image.new("RGB", (6, 4), (255, 0, 0)))
  second.close()
  read = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
  read.Reload()
  assert [(e.step, round(e.value, 5)) for e in read.Scalars("loss/g")] == [(10, 1.0), (20, 2.0), (30, 7.0)]
  (image,) = read.Images("samples")
  assert (image.step, image.width, image.height) == (30, 6, 4) and image.encoded_image_string[1:4] == b"PNG"


def test_guard_names_the_metric():
  guard.check_metrics(4, {"a": np.float32(1), "v": np.arange(3)})
  with pytest.raises(guard.NonFinite, match="v is inf at step 4"):
    guard.check_metrics(4, {"a": np.float32(1), "v": np.array([1, np.inf, np.nan])})
  with pytest.raises(guard.NonFinite, match="a is nan at step 5"):
    guard.check_metrics(5, {"v": np.array([np.inf]), "a": np.float32(np.nan)})


def test_clock_leaves_compilations_out_of_a_steps_duration(monkeypatch):
  now = [100.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  clock = Clock({"seconds": 50.0, "phases": {"step": 40.0}}, started=90.0)
  assert clock.seconds == 50.0 and clock.seconds_here == 10.0 and clock.step_seconds is None
  for step in range(40):
    with clock.phase("step"):
      now[0] += 30.0 if step in (0, 16) else 0.5
    clock.step_done()
    if step % 10 == 9:
      with clock.phase("samples"):
        now[0] += 5.0
  assert clock.step_seconds == pytest.approx(0.5)
  window = clock.take_window(batch_size=8)
  assert window["time/samples"] == pytest.approx(20.0) and window["time/step"] == pytest.approx(79.0)
  assert window["images_per_second"] == pytest.approx(8 * 40 / 79.0)
  assert clock.take_window(8)["images_per_second"] == 0.0
  assert clock.to_json()["phases"]["step"] == pytest.approx(119.0)
  assert clock.seconds == pytest.approx(149.0)


def test_display_degrades_to_lines(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  with progress.make(1000) as display:
    assert isinstance(display, progress.Lines)
    display.doing("compiling")
    display.doing("saving", brief=True)
    for step in range(1, 31):
      display.step(step, {"loss/d_real": 0.61234, "loss/g": 1.3}, 211.4, 185.2)
      now[0] += 1.0
  assert capsys.readouterr().err.splitlines() == [
    "training: compiling",
    "training: step 11 of 1,000  d_real 0.612  g 1.3  211 images/s  3:05 left",
    "training: step 21 of 1,000  d_real 0.612  g 1.3  211 images/s  3:05 left",
  ]
  assert isinstance(progress.make(10, primary=False), progress.Nothing)


def test_bar_on_a_terminal():
  import io

  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  with progress.make(1000, stream=stream) as display:
    display.doing("compiling")
    display.step(7, {"loss/g": 1.25}, None, None)
  assert "7/1,000" in stream.getvalue() and "g 1.25" in stream.getvalue()


@pytest.mark.parametrize(
  "seconds,words", [(44.6, "45 s"), (185, "3:05"), (7200, "2:00:00"), (14 * 86400, "14 d 00:00")]
)
def test_durations(seconds, words):
  assert progress.duration(seconds) == words
