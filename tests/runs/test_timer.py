"""The timer of a run."""

import pytest

from aurora_jax.runs.timer import Timer


def test_compilations_are_no_part_of_a_steps_duration(monkeypatch):
  now = [100.0]
  monkeypatch.setattr("time.monotonic", lambda: now[0])
  timer = Timer({"seconds": 50.0, "phases": {"step": 40.0}}, started=90.0)
  assert timer.seconds == 50.0 and timer.seconds_here == 10.0 and timer.step_seconds is None
  for step in range(40):
    with timer.phase("step"):
      now[0] += 30.0 if step in (0, 16) else 0.5
    timer.step_done()
    if step % 10 == 9:
      with timer.phase("samples"):
        now[0] += 5.0
  assert timer.step_seconds == pytest.approx(0.5)
  window = timer.take_window(images_per_step=8)
  assert window["time/samples"] == pytest.approx(20.0) and window["time/step"] == pytest.approx(79.0)
  assert window["images_per_second"] == pytest.approx(8 * 40 / 79.0)
  assert timer.take_window(8)["images_per_second"] == 0.0
  assert timer.to_json()["phases"]["step"] == pytest.approx(119.0)
  assert timer.seconds == pytest.approx(149.0)
