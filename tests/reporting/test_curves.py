"""Reading a run's folder over time."""

import json

import numpy as np
import pytest
from PIL import Image

from aurora_jax.reporting import curves


def write(path, *rows):
  path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
  return path


def test_series_and_counters(tmp_path):
  log = curves.read_metrics(
    write(
      tmp_path / "metrics.jsonl",
      {"kind": "start", "step": 0, "seconds": 0},
      {"kind": "train", "step": 10, "seconds": 1.5, "images": 160, "loss/r1": 3, "note": "words", "flag": True},
      {"kind": "train", "step": 20, "seconds": 2.5, "images": 320, "loss/r1": 2.5, "d/logit_real": 1.0},
    )
  )
  assert set(log.series) == {"loss/r1", "d/logit_real"}
  assert [part.tolist() for part in log.series["loss/r1"]] == [[10, 20], [3.0, 2.5]]
  assert log.last == {"step": 20, "seconds": 2.5, "images": 320}
  assert log.skipped == 0 and log.latest("loss/") == {"loss/r1": 2.5}


def test_what_a_resumed_run_repeats_replaces_the_old(tmp_path):
  log = curves.read_metrics(
    write(
      tmp_path / "metrics.jsonl",
      *({"kind": "train", "step": s, "loss/a": 1.0} for s in (10, 20, 30, 40)),
      {"kind": "judge", "step": 30, "judge/top1_of_32": 0.5},
      {"kind": "resume", "step": 20},
      *({"kind": "train", "step": s, "loss/a": 2.0} for s in (30, 35)),
    )
  )
  assert [part.tolist() for part in log.series["loss/a"]] == [[10, 20, 30, 35], [1, 1, 2, 2]]
  assert log.resumes == (20,) and log.latest("judge/") == {"judge/top1_of_32": 0.5}


def test_warnings_and_skipped_steps_are_no_curves_and_are_forgotten_with_their_steps(tmp_path):
  warning = lambda step, words: {"kind": "warning", "step": step, "words": words, "value": 21.0, "limit": 20.0}
  log = curves.read_metrics(
    write(
      tmp_path / "metrics.jsonl",
      {"kind": "train", "step": 10, "loss/a": 1.0},
      warning(10, "first"),
      {"kind": "skipped", "step": 15, "words": "why"},
      warning(30, "undone"),
      {"kind": "resume", "step": 20},
      warning(30, "second"),
    )
  )
  assert set(log.series) == {"loss/a"}
  assert log.warnings == ((10, "first"), (30, "second")) and log.skipped_steps == ((15, "why"),)


def test_lines_that_cannot_be_read_are_counted(tmp_path):
  log = curves.read_metrics(
    write(
      tmp_path / "metrics.jsonl",
      {"step": 1, "loss/a": 1.0},
      "[1, 2]",
      '{"step": "x"}',
      "",
      '{"loss/a": 3}',
      '{"step": 2, "loss/a": NaN, "loss/b": Infinity}',
      '{"step": 3, "loss/a": 2.0}',
      '{"step": 4, "los',
    )
  )
  assert [part.tolist() for part in log.series["loss/a"]] == [[1, 3], [1.0, 2.0]]
  assert "loss/b" not in log.series and log.skipped == 4


def test_a_missing_file_is_an_empty_log(tmp_path):
  log = curves.read_metrics(tmp_path / "metrics.jsonl")
  assert log.series == {} and log.last == {} and curves.curve_groups(log) == [] and curves.expert_loads(log) == []


def test_thin_averages_and_keeps_the_end():
  steps, values = curves.thin(np.arange(10), np.arange(10.0), 4)
  assert len(steps) == 4 and steps[-1] == 9 and values[-1] == np.mean([7, 8, 9])
  assert np.average(values, weights=np.diff(np.concatenate([[-1], steps]))) == pytest.approx(4.5)
  steps, values = curves.thin(np.arange(10), np.arange(20.0).reshape(10, 2), 5)
  assert values.shape == (5, 2) and values[0].tolist() == [1.0, 2.0]
  assert curves.thin(np.arange(3), np.arange(3), 5)[0].tolist() == [0, 1, 2]


def log_of(**series):
  return curves.RunLog(
    {name.replace("__", "/"): (np.arange(len(v)), np.asarray(v, float)) for name, v in series.items()}, {}, (), 0
  )


def test_curves_are_grouped_by_what_they_measure():
  names = [
    "loss__d_adversarial",
    "loss__g_adversarial",
    "d__logit_real",
    "d__logit_fake",
    "loss__d_matching",
    "loss__r1",
    "loss__g_clip",
    "clip__accuracy",
    "loss__moe",
    "grad_norm__g",
    "images_per_second",
    "judge__top1_of_32",
    "judge__captions",
    "something__else",
    "moe__load__r8/0",
    "grad_norm__g__r8_conv",
    "grad_norm__g__mapping",
    "update_norm__d__last",
    "moe__entropy__r8",
    "samples__diversity_within",
    "guard__skipped",
  ]
  charts = curves.curve_groups(log_of(**{name: [1.0, 2.0] for name in names}))
  found = {chart["title"]: [series["name"] for series in chart["series"]] for chart in charts}
  assert found == {
    "Adversarial: loss": ["d_adversarial", "g_adversarial"],
    "Adversarial: discriminator": ["logit_fake", "logit_real"],
    "Matching": ["d_matching"],
    "CLIP: loss": ["g_clip"],
    "CLIP: accuracy": ["accuracy"],
    "Mixture of experts: loss": ["moe"],
    "Mixture of experts: moe": ["entropy/r8"],
    "R1": ["r1"],
    "Diversity": ["diversity_within"],
    "Learning: images per second": ["images_per_second"],
    "Learning: gradient norm": ["g"],
    "Norms per module: gradient of the generator": ["mapping", "r8_conv"],
    "Norms per module: update of the discriminator": ["last"],
    "Skipped": ["skipped"],
    "Judge": ["top1_of_32"],
    "Other": ["else"],
  }


def test_one_point_is_no_curve_and_long_ones_are_thinned():
  charts = curves.curve_groups(log_of(loss__r1=[1.0], loss__moe=np.ones(5000)), most_points=100)
  assert [chart["title"] for chart in charts] == ["Mixture of experts"]
  assert len(charts[0]["series"][0]["steps"]) == 100


@pytest.mark.parametrize(
  "values, expected",
  [(np.geomspace(1e-3, 10, 50), True), (np.linspace(1, 2, 50), False), (np.linspace(-1, 50, 50), False)],
)
def test_a_logarithmic_axis_is_suggested_for_wide_spans(values, expected):
  assert curves.curve_groups(log_of(loss__r1=values))[0]["log"] is expected


def test_expert_loads(tmp_path):
  rows = [
    {
      "step": s,
      "moe/load/r16_block0_layer0/0": 0.25,
      "moe/load/r16_block0_layer0/1": 0.75,
      "moe/load/r8_block10_layer0/0": 2.0,
      "moe/load/r8_block9_layer0/0": 1.0,
    }
    for s in (1, 2)
  ]
  rows.append({"step": 3, "moe/load/r16_block0_layer0/0": 1.0})  # the other expert is missing: left out
  loads = curves.expert_loads(curves.read_metrics(write(tmp_path / "m.jsonl", *rows)))
  assert [load.layer for load in loads] == ["r8_block9_layer0", "r8_block10_layer0", "r16_block0_layer0"]
  assert loads[2].steps.tolist() == [1, 2] and loads[2].shares.tolist() == [[0.25, 0.75]] * 2
  assert loads[1].shares.tolist() == [[1.0], [1.0]]


def test_sample_sheets_come_in_order_of_steps(tmp_path):
  for name in ("step-00000200.png", "step-00010000.png", "step-00000030.png", ".step-1.png", "notes.txt", "grid.png"):
    Image.new("RGB", (2, 2)).save(tmp_path / name, format="PNG")
  found, count = curves.sample_sheets(tmp_path)
  assert [step for step, _ in found] == [30, 200, 10000] and count == 3
  found, count = curves.sample_sheets(tmp_path, most=2)
  assert [step for step, _ in found] == [30, 10000] and count == 3
  assert curves.sample_sheets(tmp_path / "missing") == ([], 0)
