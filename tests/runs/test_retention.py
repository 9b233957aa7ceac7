"""Which checkpoints of a run are retained, and why."""

import json

import pytest
import toy

from aurora_jax.cli import main
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_reader, retention, workdir


def _log(path, *rows):
  """A metrics.jsonl of (kind, step, {metric: value})."""
  path.write_text(
    "".join(json.dumps({"kind": kind, "step": step, "seconds": 0.0} | values) + "\n" for kind, step, values in rows)
  )
  return str(path)


def test_reasons():
  steps = [10, 20, 30, 40, 50, 60]
  assert retention.Policy(2, 30).reasons(steps) == {
    10: [],
    20: [],
    30: ["every 30"],
    40: [],
    50: ["newest 2"],
    60: ["newest 2", "every 30"],
  }
  assert retention.Policy(0).reasons([3, 8]) == {3: ["all are retained"], 8: ["all are retained"]}
  assert retention.Policy(5).reasons([]) == {}
  assert retention.Policy(1).reasons([0, 7]) == {0: [], 7: ["newest"]}


def test_the_best_by_what_was_measured_at_a_checkpoint_or_since_the_one_before(tmp_path):
  log = _log(
    tmp_path / "log",
    ("start", 0, {}),
    ("train", 8, {"fid": 3.0}),
    ("train", 10, {"fid": 9.0}),
    ("train", 15, {"fid": 5.0}),
    ("train", 21, {"fid": "nan", "other": 1.0}),
    ("train", 35, {"fid": 0.5}),
    ("resume", 30, {}),
    ("stop", 36, {}),
    ("train", 36, {"fid": 5.0}),
  )  # 35 was left behind by the resume
  policy = retention.Policy(1, best="lower:fid", window=10, history=log)
  assert policy.values() == {10: 9.0, 8: 3.0, 20: 5.0, 15: 5.0, 40: 5.0, 36: 5.0}
  assert policy.reasons([10, 20, 30, 40]) == {10: [], 20: ["best by fid = 5"], 30: [], 40: ["newest"]}
  higher = retention.Policy(1, best="higher:fid", window=10, history=log)
  assert higher.reasons([10, 20, 30, 40])[10] == ["best by fid = 9"]
  assert higher.reasons([20, 30, 40])[20] == ["best by fid = 5"]  # the earlier of equals
  assert retention.Policy(1, best="lower:none", history=log).reasons([10, 20]) == {10: [], 20: ["newest"]}


@pytest.mark.slow
def test_a_run_keeps_them_and_inspect_says_why(tmp_path, capsys):
  """The toy's loss falls, so the highest is the first one; an evaluation that comes later counts too."""
  keep = {
    "train.checkpoint_every": 2,
    "train.log_every": 1,
    "train.keep_checkpoints": 2,
    "train.keep_every": 6,
    "train.keep_best": "higher:judge",
  }
  toy.run(tmp_path, **keep, **{"train.total_steps": 4})
  with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write(json.dumps({"kind": "judge", "step": 2, "seconds": 0.0, "judge": 0.7}) + "\n")
    file.write(json.dumps({"kind": "judge", "step": 4, "seconds": 0.0, "judge": 0.6}) + "\n")
  toy.run(tmp_path, **keep, **{"train.total_steps": 16})
  folder = workdir.RunFolder(tmp_path)
  assert checkpoint_reader.steps(folder.checkpoints) == [2, 6, 12, 14, 16]
  assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
    "12",
    "14",
    "16",
    "2",
    "6",
  ]  # nothing else is left
  assert main.main(["inspect", str(tmp_path)]) == 0
  said = " ".join(capsys.readouterr().out.split())
  for expected in ("step 2 (", "), best by judge = 0.7 step 6 (", "), every 6 step 12 (", "), newest 2 step 16 ("):
    assert expected in said, said
  # A removed checkpoint cannot come back; one that is no longer wanted is removed at the next save.
  toy.run(tmp_path, **keep | {"train.total_steps": 18, "train.keep_checkpoints": 1, "train.keep_best": "lower:jugde"})
  assert checkpoint_reader.steps(folder.checkpoints) == [6, 12, 18]
  assert main.main(["inspect", str(tmp_path)]) == 0
  assert "has train.keep_best's metric jugde" in capsys.readouterr().out


@pytest.mark.parametrize(
  "field,value,message",
  [
    ("train.keep_best", "fid", "'lower:NAME' or 'higher:NAME' of a metric, got 'fid'"),
    ("train.keep_best", "lower:", "got 'lower:'"),
    ("train.keep_every", -4, "got -4"),
    ("train.keep_checkpoints", -1, "got -1"),
    ("train.keep_every", 5, "5 must be a multiple of train.checkpoint_every 4"),
  ],
)
def test_what_makes_no_sense_is_refused(field, value, message):
  with pytest.raises(UserError, match=message):
    toy.experiment(**{field: value})


def test_removal_that_was_cut_off_is_finished_and_no_half_checkpoint_is_seen(tmp_path):
  """A kill while the files of an old checkpoint are removed: they are out of the way before the first one goes."""
  toy.run(tmp_path, **{"train.total_steps": 8})
  checkpoints = tmp_path / "checkpoints"
  (checkpoints / ".removed").mkdir()
  (checkpoints / "4").rename(checkpoints / ".removed/4")
  (checkpoints / ".removed/4/_CHECKPOINT_METADATA").unlink()
  assert checkpoint_reader.steps(checkpoints) == [8]
  toy.run(tmp_path)
  assert sorted(path.name for path in checkpoints.iterdir()) == ["12", "8"]
