"""When a stage ends, on planted measurements; and the loop through stages, stopped wherever it hurts."""

import dataclasses
import functools
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
import toy

from aurora_jax import config, config_files
from aurora_jax.runs import checkpoint_manager, checkpoint_reader, metrics
from aurora_jax.runs import fingerprint as fingerprint_lib
from aurora_jax.training import schedule, stopping

CFG = config.Schedule(
  resolutions=(4, 8, 16), factor=1.5, every_images=40, max_images=config.PerResolution({4: 100, 8: 200})
)


def progress(resolution, step, reference, *measured):
  """A stage that began at `step`, and (step, distance) measured in it."""
  return schedule.Progress(
    (schedule.Stage(resolution, step, schedule.START, reference),),
    tuple(schedule.Measurement(at, resolution, distance) for at, distance in measured),
  )


@pytest.mark.parametrize(
  "resolution,measured,step,expected",
  [
    (4, (), 11, None),
    (4, ((14, 3.1),), 14, None),  # not better than 1.5 x 2
    (4, ((14, 3.0),), 14, None),  # nor if as good
    (4, ((14, 2.99),), 14, (8, schedule.BEATEN)),
    (4, ((14, float("nan")),), 14, None),
    (4, ((18, 9.0), (20, 9.0)), 20, (8, schedule.CAP)),  # 10 steps of 10 images
    (4, ((18, 9.0), (20, 1.0)), 20, (8, schedule.BEATEN)),
    (4, ((18, 9.0),), 20, None),  # first its measurement
    (8, ((20, 9.0),), 20, None),  # 8 pixels have a cap of their own
    (16, ((400, 0.1),), 400, None),  # the last stage has no end
  ],
)
def test_a_stage_ends_when_its_reference_is_beaten_or_at_its_cap(resolution, measured, step, expected):
  assert schedule.next_stage(CFG, progress(resolution, 10, 2.0, *measured), step, batch_size=10) == expected


def test_measurements_are_due_every_so_many_images_of_a_stage_and_at_its_cap():
  due = lambda stage, steps: [step for step in steps if schedule.measurement_due(CFG, stage, step, batch_size=10)]
  assert due(progress(4, 10, 2.0), range(10, 20)) == [14, 18]
  assert due(progress(4, 10, 2.0), range(19, 22)) == [20, 21]  # an overdue one stays due
  assert due(progress(4, 10, 2.0, (18, 5.0)), range(15, 21)) == [20]
  assert due(progress(16, 10, 2.0), range(100, 120)) == [102, 106, 110, 114, 118]
  sparse = dataclasses.replace(CFG, every_images=1)  # less than a batch: after every step
  assert [step for step in range(3) if schedule.measurement_due(sparse, progress(16, 0, 1.0), step, 10)] == [1, 2]


def test_progress_survives_json_exactly():
  one = progress(8, 3, 0.1 + 0.2, (7, 1 / 3))
  assert schedule.Progress.from_json(json.loads(json.dumps(one.to_json()))) == one


class Planted:
  """Distances as of `frechet.Distances`: of the generator 10, 9, 8 ... by step. `interrupt`: the calls that send
  SIGINT.
  """

  name, features, count, description = "frechet_toy", "toy features", 3, "toy features, 3 images"

  def __init__(self, interrupt=()):
    self.calls, self._interrupt = 0, interrupt

  def _take(self, value, keep_on):
    self.calls += 1
    if self.calls in self._interrupt:
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.05)  # the thread that reads signals takes it
    return value if keep_on() else None

  def reference(self, resolution, keep_on):
    return self._take(resolution + 0.1, keep_on)

  def generated(self, resolution, state, keep_on):
    return self._take(14.1 - int(state.step) * 0.7, keep_on)


@functools.partial(jax.jit, static_argnums=1)
def _scaled(x, factor):
  return x * factor


@dataclasses.dataclass
class GrowingToy(toy.Toy):
  """The toy with stages: each multiplies its input by the resolution."""

  distances: Planted = dataclasses.field(default_factory=Planted)
  resolution: int = 0

  def at_stage(self, resolution):
    return dataclasses.replace(self, resolution=resolution)

  def step(self, step, state, batches):
    (batch,) = batches
    return super().step(step, state, [batch | {"image": _scaled(batch["image"], self.resolution)}])


def _experiment():
  values = config_files.to_mapping(toy.experiment())
  values["schedule"] |= {"resolutions": (4, 8, 64), "every_images": 16, "max_images": {4: 24, 8: 400}}
  return config_files.from_mapping(values)


def _run(folder, distances=None, after_batch=None):
  return toy.run(folder, toy=GrowingToy(_experiment(), distances=distances or Planted(), after_batch=after_batch))


def _rows(folder, *kinds):
  return [
    {
      name: value
      for name, value in row.items()
      if name not in ("seconds", "images_per_second") and not name.startswith("time/")
    }
    for row in metrics.history(folder / "metrics.jsonl")
    if row["kind"] in kinds
  ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """12 steps of 8 images: 4 pixels for 3 steps (cap), 8 pixels until step 9 (beaten: 7.8 < 8.1), 64 pixels."""
  folder = tmp_path_factory.mktemp("runs") / "whole"
  run, outcome = _run(folder)
  assert outcome.reason == stopping.DONE
  return folder, run.distances.calls


def test_the_loop_goes_through_the_stages(whole):
  folder, _ = whole
  stages = _rows(folder, "stage")
  assert [(row["step"], row["resolution"], row["reason"]) for row in stages] == [
    (0, 4, "start"),
    (3, 8, "cap"),
    (9, 64, "reference beaten"),
  ]
  assert [row["frechet_toy/reference_" + str(row["resolution"])] for row in stages] == [4.1, 8.1, 64.1]
  measured = _rows(folder, "evaluation")
  assert [(row["step"], row["resolution"]) for row in measured] == [(2, 4), (3, 4), (5, 8), (7, 8), (9, 8), (11, 64)]
  assert measured[4]["frechet_toy/8"] == pytest.approx(7.8) and measured[4]["frechet_toy/reference_8"] == 8.1
  assert {row["features"] for row in stages + measured} == {"toy features"}
  assert [row["resolution"] for row in _rows(folder, "train")] == [4, 8, 8, 64]  # of the window's last step
  stored = checkpoint_reader.stored_progress(folder / "checkpoints", 12)["schedule"]
  assert [(stage["resolution"], stage["step"]) for stage in stored["stages"]] == [(4, 0), (8, 3), (64, 9)]
  assert list((folder / "tensorboard").glob("*tfevents*"))[0].read_bytes().count(b"frechet_toy/8") == 3


@pytest.mark.parametrize("stop", [2, 9])
def test_a_stop_around_a_change_of_stage_changes_nothing(whole, tmp_path, capsys, stop):
  def interrupt(batch_step):
    if batch_step == stop:
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.05)

  _, outcome = _run(tmp_path, after_batch=interrupt)
  assert outcome.reason == stopping.INTERRUPT
  _same_in_the_end(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("call,step", [(1, 0), (4, 3), (7, 9), (8, 9)])
def test_a_measurement_that_is_cut_short_is_taken_when_the_run_goes_on(whole, tmp_path, capsys, call, step):
  """Of nine: the first reference, the second, the generator's before a change of stage and the reference after it."""
  assert whole[1] == 9
  _, outcome = _run(tmp_path, Planted(interrupt=(call,)))
  assert outcome.reason == stopping.INTERRUPT
  assert outcome.step == step  # at once
  _same_in_the_end(whole, tmp_path)


def _same_in_the_end(whole, folder):
  _, last = _run(folder)
  assert last.reason == stopping.DONE
  assert fingerprint_lib.of_checkpoint(folder / "checkpoints") == fingerprint_lib.of_checkpoint(
    whole[0] / "checkpoints"
  )
  for kinds in (("train",), ("stage", "evaluation")):
    assert _rows(folder, *kinds) == _rows(whole[0], *kinds)
  stored = lambda path: checkpoint_reader.stored_progress(path / "checkpoints", 12)["schedule"]
  assert stored(folder) == stored(whole[0])


def test_a_run_that_begins_with_anothers_networks_begins_at_their_stage(whole, tmp_path):
  first = lambda source: schedule.first_resolution(
    dataclasses.replace(_experiment(), train=dataclasses.replace(_experiment().train, init_from=str(source)))
  )
  assert schedule.first_resolution(_experiment()) == 4
  assert first(whole[0]) == 64
  assert first(whole[0] / "checkpoints" / "4") == 8
  parts = {"networks": {"generator": {"params": {"weight": np.zeros(2, np.float32)}}}}
  checkpoint_manager.write_parts(tmp_path / "converted" / "checkpoints", 0, parts, {})
  assert first(tmp_path / "converted") == 64  # nothing is said of stages: all of it is there
