"""Windows and metrics.jsonl."""

import json

import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.runs import metrics


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
  history = [(row["kind"], row["step"]) for row in metrics.history(tmp_path / "m")]
  assert history == [("start", 0), ("train", 10), ("resume", 10), ("train", 20)]
