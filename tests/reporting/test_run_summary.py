"""A run's story on one screen, from lines as training writes them."""

import dataclasses
import json
import pathlib

import pytest

from aurora_jax import config_files
from aurora_jax.data import corrupt_records
from aurora_jax.errors import UserError
from aurora_jax.reporting import run_summary
from aurora_jax.runs import workdir

_ROOT = pathlib.Path(__file__).parents[2]


def row(kind, step, seconds, **values):
  return {"kind": kind, "step": step, "seconds": seconds} | values


def window(step, seconds, loss, **values):
  return row(
    "train",
    step,
    seconds,
    images_per_second=40.0,
    **{
      "loss/g_clip": loss,
      "d/logit_real": 1.0,
      "moe/load/r8/0": 0.9,
      "moe/load/r8/1": 0.1,
      "time/step": 4.0,
      "time/input": 0.5,
      "grad_norm/g/r8_conv": 3.0,
    },
    **values,
  )


# Killed at 30, resumed from 20, stopped, resumed, ended by NaN.
STORY = [
  row("start", 0, 0.0, at="2026-11-22T19:20:00+0000", devices="8 tpu"),
  window(10, 5.0, 9.0),
  window(20, 10.0, 5.0),
  window(30, 15.0, 4.0),
  row(
    "resume",
    20,
    10.5,
    at="2026-11-22T21:00:00+0000",
    devices="4 tpu",
    phases={"step": 8.0, "input": 1.0},
    changed={"mesh.data": [8, 4]},
  ),
  window(30, 16.0, 3.0),
  row("warning", 30, 16.0, words="the discriminator has won: " + 30 * "very " + "much"),
  row("stop", 33, 17.0, at="2026-11-22T22:00:00+0000", reason="terminated", phases={"step": 14.0, "input": 2.0}),
  row("resume", 33, 17.0, at="2026-11-22T22:10:00+0000", devices="4 tpu", phases={"step": 14.0, "input": 2.0}),
  row("samples", 35, 18.0, **{"samples/diversity_within": 0.25}),
  window(40, 21.0, 1.25, **{"data/skipped": 3}),
  row("skipped", 42, 22.0, words="discriminator: loss/d_matching is nan"),
  row(
    "stop",
    43,
    25.0,
    at="2026-11-22T22:20:00+0000",
    reason="non-finite",
    metric="loss/d_matching",
    value="nan",
    words="10 steps in a row were skipped",
  ),
]


@pytest.fixture(name="run")
def _run(tmp_path):
  def make(rows, name="run", config="openmoji_32.py"):
    folder = tmp_path / name
    folder.mkdir()
    experiment = config_files.load(
      [f"--config={_ROOT / 'configs' / config}", "--config.train.total_steps=100", "--config.train.batch_size=10"]
    )
    (folder / "config.json").write_text(config_files.to_json(experiment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    (folder / "checkpoints/33").mkdir(parents=True)
    (folder / "checkpoints/33/data").write_bytes(bytes(1500))
    return folder

  return make


def test_the_story_of_an_eventful_run(run):
  folder = run(STORY)
  skips = [
    corrupt_records.Skip(7 * i, "openmoji-train-00000-of-00001.tfrecord", 7 * i, -1, "", "has a wrong checksum", 30 + i)
    for i in range(3)
  ]
  (folder / "skipped_records.jsonl").write_text("".join(json.dumps(dataclasses.asdict(skip)) + "\n" for skip in skips))
  lines = list(run_summary.lines(folder))
  said = "\n".join(lines)
  assert len(lines) < 40 and all(len(line) <= 100 for line in lines if str(folder) not in line), said
  for expected in (
    "43 %: step 43 of 100, 430 images in batches of 10",
    "speed      40.0 images/s in the last window, 40.0 in the median; 25 s of training, 14 s to go",
    "restarts   2",
    "history    2026-11-22 19:20  step  0  started on 8 tpu",
    "step 30  killed; 10 steps repeated",
    "2026-11-22 21:00  step 20  resumed on 4 tpu",
    "with mesh.data 8 -> 4",
    "2026-11-22 22:00  step 33  stopped: SIGTERM; saved",
    "2026-11-22 22:20  step 43  stopped: 10 steps in a row were skipped",
    # 14 + 4 of 25 s, 2 + 0.5, and what no phase counted: the last stop told nothing, the window after 33 did.
    "time       25 s: compute 72 %, waiting for input 10 %, the rest 18 %",
    "warnings   1",
    "step 30: the discriminator has won: very very",
    "skipped    1 step, 3 records (listed in",
    "discriminator: loss/d_matching is nan",
    "the newest record, at step 32: openmoji-train-00000-of-00001.tfrecord: record 14: has",
    "saved      step 33 (1.5 kB)",
    "G CLIP",
    "9 → 1.25",
    "█▄▃▁",
    "entropy of experts",
    "diversity, prompt",
    "next       read the skipped steps above",
    "the same `train` command continues (67 steps left)",
  ):
    assert expected in said, (expected, said)
  assert "r8_conv" not in said


def test_a_run_under_way_a_killed_one_and_one_that_never_was(run):
  folder = run(STORY[:3])
  assert "step 20  its process was killed" in "\n".join(run_summary.lines(folder))
  with workdir.locked(folder):
    said = "\n".join(run_summary.lines(folder))
  assert "a process is training in it now" in said and " killed" not in said and "tensorboard --logdir" in said
  said = "\n".join(run_summary.lines(run([], "empty")))
  assert "history    not started" in said and "warnings   none" in said and "skipped    no step, no record" in said
  with pytest.raises(UserError, match="run folder not found"):
    list(run_summary.lines(folder / "nowhere"))


def test_figures_of_another_command_do_not_hide_how_training_ended(run):
  rows = [
    row("start", 0, 0.0),
    window(10, 5.0, 9.0),
    row("stop", 100, 9.0, reason="done"),
    row("judge", 100, 9.0, **{"judge/top1_of_32": 0.875, "judge/heldout_top1_of_32": 0.5}),
  ]
  said = "\n".join(run_summary.lines(run(rows)))
  assert "step 100  all steps are done" in said and "killed" not in said
  assert "right among 32: training captions 88 %, held out 50 %" in said


def test_many_events_and_warnings_still_fit(run):
  rows = [row("start", 0, 0.0)]
  for step in range(1, 50):
    rows += [
      row("warning", step, 1.0, words=f"sign {step}"),
      row("stop", step, 1.0, reason="time"),
      row("resume", step, 1.0),
    ]
  lines = list(run_summary.lines(run(rows)))
  assert len(lines) < 40 and any("more, see metrics.jsonl" in line for line in lines)
  assert any("sign 49" in line for line in lines) and not any("sign 45" in line for line in lines)


def test_images_of_a_system_that_reads_several_batches_per_step(run):
  rows = [row("start", 0, 0.0), row("train", 20, 10.0, images=400, images_per_second=80.0)]
  summary = "\n".join(run_summary.lines(run(rows, config="megan_openmoji_32.py")))
  assert "step 20 of 100, 400 images in batches of 10, 2 per step" in summary
  assert "80.0 images/s in the last window, 80.0 in the median; 10 s of training, 20 s to go" in summary
