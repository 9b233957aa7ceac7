"""The training loop on a toy: nothing is lost, whatever stops it. Kills and faults of the disk: tests/cli."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy
from PIL import Image

from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_reader, fingerprint, metrics
from aurora_jax.runs import workdir as workdir_lib
from aurora_jax.training import loop, stopping

_ROOT = pathlib.Path(__file__).parents[2]
_TIMES = ("seconds", "images_per_second")


def _fingerprint(workdir):
  return fingerprint.of_checkpoint(pathlib.Path(workdir) / "checkpoints")


def _train_lines(workdir):
  """What was logged, without the times."""
  return [
    {name: value for name, value in row.items() if name not in _TIMES and not name.startswith("time/")}
    for row in metrics.history(pathlib.Path(workdir) / "metrics.jsonl")
    if row["kind"] == "train"
  ]


def _start(workdir, *arguments, **environment):
  """The toy in a process of its own."""
  return subprocess.Popen(
    [sys.executable, str(_ROOT / "tests/training/toy.py"), str(workdir), *arguments],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu"} | environment,
  )


def _wait_for_step(workdir, step, process):
  """Waits until a line of at least this step is logged."""
  deadline = time.monotonic() + 180  # a process on a busy machine takes long to start
  while time.monotonic() < deadline and process.poll() is None:
    if any(row["step"] >= step for row in metrics.read(pathlib.Path(workdir) / "metrics.jsonl")):
      return
    time.sleep(0.02)
  process.kill()  # else `communicate` would wait for the last step
  raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def _signal_at(step, number=signal.SIGINT):
  """For `Toy.after_batch`: sends this process a signal while the step after `step` is prepared."""

  def send(batch_step):
    if batch_step == step:
      os.kill(os.getpid(), number)
      time.sleep(0.05)  # the thread that reads signals takes it

  return send


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
  """A whole run of 12 steps: (folder, Toy)."""
  folder = tmp_path_factory.mktemp("runs") / "whole"
  toy_run, outcome = toy.run(folder)
  assert (outcome.step, outcome.reason, outcome.status) == (12, stopping.DONE, 0)
  return folder, toy_run


def test_a_run_leaves_its_folder(uninterrupted, capsys):
  folder, toy_run = uninterrupted
  assert json.loads((folder / "config.json").read_text())["name"] == "toy"
  assert checkpoint_reader.steps(folder / "checkpoints") == [4, 8, 12]
  assert list((folder / "tensorboard").glob("*tfevents*"))
  lines = metrics.read(folder / "metrics.jsonl")
  assert [(row["kind"], row["step"]) for row in lines if row["kind"] != "samples"] == [
    ("start", 0),
    ("train", 3),
    ("train", 6),
    ("train", 9),
    ("train", 12),
    ("stop", 12),
  ]
  assert [row["step"] for row in lines if row["kind"] == "samples"] == [0, 6, 12]
  # The time of each phase, whole in the last line.
  stop = lines[-1]["phases"]
  assert stop["step"] == pytest.approx(sum(row.get("time/step", 0) for row in lines), abs=0.1)
  assert 0 < sum(stop.values()) < lines[-1]["seconds"] + 0.01
  assert toy_run.seen[:12] == list(range(12))


def test_logged_values_are_averages_over_the_steps_that_had_them(tmp_path):
  toy.run(tmp_path / "each", **{"train.log_every": 1})
  toy.run(tmp_path / "every", **{"train.log_every": 4})
  each, every = _train_lines(tmp_path / "each"), _train_lines(tmp_path / "every")
  for window, row in enumerate(every):
    inside = each[4 * window : 4 * window + 4]
    np.testing.assert_allclose(row["loss/g"], np.mean([r["loss/g"] for r in inside]), rtol=1e-6)
    np.testing.assert_allclose(row["r1"], np.mean([r["r1"] for r in inside if "r1" in r]), rtol=1e-6)
    np.testing.assert_allclose(row["moe/load/layer/2"] - row["moe/load/layer/0"], 2, rtol=1e-5)


@pytest.mark.parametrize(
  "number,reason",
  [(signal.SIGINT, stopping.INTERRUPT), (signal.SIGTERM, stopping.TERMINATED), (signal.SIGHUP, stopping.TERMINATED)],
)
def test_resumed_equals_uninterrupted(uninterrupted, tmp_path, capsys, number, reason):
  whole, whole_toy = uninterrupted
  first = toy.Toy(toy.experiment(), after_batch=_signal_at(5, number))
  _, outcome = toy.run(tmp_path, toy=first)
  assert outcome.reason == reason and outcome.status == 0
  assert 5 <= outcome.step < 9 and outcome.step % 4  # not a step at which it would have been saved anyway
  assert checkpoint_reader.newest(tmp_path / "checkpoints") == outcome.step
  said = capsys.readouterr().out
  assert f"stopped at step {outcome.step} of 12" in said and "the same command goes on" in said

  second, last = toy.run(tmp_path)
  assert f"going on from the checkpoint of step {outcome.step}" in capsys.readouterr().out
  assert last.reason == stopping.DONE
  assert _fingerprint(tmp_path) == _fingerprint(whole)
  assert first.seen[: outcome.step] + second.seen[: 12 - outcome.step] == whole_toy.seen[:12]
  assert _train_lines(tmp_path) == _train_lines(whole)
  rows = metrics.read(tmp_path / "metrics.jsonl")
  kinds = [(row["kind"], row["step"]) for row in rows if row["kind"] not in ("train", "samples")]
  assert kinds == [("start", 0), ("stop", outcome.step), ("resume", outcome.step), ("stop", 12)]


def test_every_restart_counts_the_time_on(tmp_path):
  toy.run(tmp_path, **{"train.total_steps": 4})
  before = metrics.read(tmp_path / "metrics.jsonl")[-1]["seconds"]
  toy.run(tmp_path, **{"train.total_steps": 5})
  resumed, *_, after = [r for r in metrics.read(tmp_path / "metrics.jsonl") if r["kind"] in ("resume", "stop")][1:]
  assert 0 < resumed["seconds"] <= before + 1e-3 and after["seconds"] > resumed["seconds"]


def test_a_resumed_run_uses_the_programs_of_a_fresh_one(tmp_path):
  toy.run(tmp_path, **{"train.total_steps": 4})
  compiled = toy._step._cache_size()
  assert toy.run(tmp_path)[1].step == 12
  assert toy._step._cache_size() == compiled


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once(tmp_path):
  process = _start(tmp_path, "--set", "train.total_steps=100000", "--set", "train.log_every=1", "--delay", "0.4")
  _wait_for_step(tmp_path, 1, process)
  before = checkpoint_reader.newest(tmp_path / "checkpoints")
  process.send_signal(signal.SIGINT)
  time.sleep(0.1)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert "stopped at once" in err and "Traceback" not in err
  assert checkpoint_reader.newest(tmp_path / "checkpoints") == before


def test_max_seconds_stops_and_saves(tmp_path, capsys):
  drawn = []
  hooks = loop.Hooks(on_samples=lambda step, samples, folder: drawn.append(step))
  settings = {"train.total_steps": 10**6, "train.max_seconds": 1.0, "train.sample_every": 10**6}
  toy_run = toy.Toy(toy.experiment(**settings), delay=0.02)
  _, outcome = toy.run(tmp_path, toy=toy_run, hooks=hooks)
  assert outcome.reason == stopping.TIME and outcome.status == 0 and 0 < outcome.step < 100
  assert checkpoint_reader.newest(tmp_path / "checkpoints") == outcome.step
  assert drawn == [0, outcome.step]
  assert "train.max_seconds = 1 are over" in capsys.readouterr().out


def test_nothing_is_done_twice(uninterrupted, capsys):
  folder, _ = uninterrupted
  before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
  toy_run, outcome = toy.run(folder)
  assert outcome.reason == stopping.ALREADY_DONE and outcome.status == 0 and toy_run.seen == []
  assert "all 12 steps are done" in capsys.readouterr().out
  assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_samples_at_fixed_steps(tmp_path):
  drawn = []

  def on_samples(step, samples, folder):
    drawn.append((step, float(samples.images[0, 0, 0, 0, 0])))
    return Image.new("RGB", (8, 8), (step, 0, 0))

  toy.run(tmp_path, hooks=loop.Hooks(on_samples=on_samples), **{"train.total_steps": 8})
  assert drawn == [(0, 0.0), (6, 6.0), (8, 8.0)]


def test_nan_in_one_batch_is_skipped_and_training_goes_on(tmp_path, capsys):
  states = []

  class Recording(toy.Toy):
    def step(self, step, state, batches):
      with jax.transfer_guard("allow"):
        states.append(jax.device_get(state))
        return super().step(step, state, batches)

  _, outcome = toy.run(tmp_path, toy=Recording(toy.experiment(), nan_at=(6,)))
  assert (outcome.reason, outcome.status) == (stopping.DONE, 0)
  for before, after in zip(jax.tree.leaves(states[6].replace(step=0)), jax.tree.leaves(states[7].replace(step=0))):
    np.testing.assert_array_equal(before, after)
  weights = [state.networks["generator"].params["w"] for state in states]
  assert not np.array_equal(weights[7], weights[8])
  error = capsys.readouterr().err
  assert "step 6 was skipped: generator: loss/g is nan, gradient not finite in b (1 of 1 arrays)\n" in error
  rows = metrics.read(tmp_path / "metrics.jsonl")
  (line,) = [row for row in rows if row["kind"] == "skipped"]
  assert (line["step"], line["losses"], line["networks"]) == (7, {"loss/g": "nan"}, ["generator"])
  windows = {row["step"]: row for row in rows if row["kind"] == "train"}
  assert [windows[step]["guard/skipped"] for step in (3, 6, 9, 12)] == [0, 0, 1, 0]
  assert all(np.isfinite(value) for row in windows.values() for value in row.values() if not isinstance(value, str))
  # The window's averages are those of the steps that counted.
  toy.run(tmp_path / "each", toy=toy.Toy(toy.experiment(**{"train.log_every": 1}), nan_at=(6,)))
  each = [row["loss/g"] for row in _train_lines(tmp_path / "each") if 6 < row["step"] <= 9 and "loss/g" in row]
  assert len(each) == 2 and windows[9]["loss/g"] == pytest.approx(np.mean(each), rel=1e-6)


def test_nan_in_every_batch_stops_with_the_last_good_checkpoint_intact(tmp_path, capsys):
  settings = {"train.max_skipped_in_a_row": 5}
  _, outcome = toy.run(tmp_path, toy=toy.Toy(toy.experiment(**settings), nan_at=range(5, 99)))
  assert (outcome.reason, outcome.status, outcome.step) == (stopping.NON_FINITE, 3, 9)
  error = capsys.readouterr().err
  assert "step 9 was skipped (5 in a row)" in error
  assert (
    "5 steps in a row were skipped up to step 9 (train.max_skipped_in_a_row=5); training stopped; the last "
    f"checkpoint, step 4, stands in {tmp_path}/checkpoints"
  ) in error
  assert checkpoint_reader.steps(tmp_path / "checkpoints") == [4]  # not of step 8, in the midst of the trouble
  stop = metrics.read(tmp_path / "metrics.jsonl")[-1]
  assert (stop["reason"], stop["metric"], stop["value"]) == ("non-finite", "loss/g", "nan")
  toy.run(tmp_path / "four", **{"train.total_steps": 4})
  assert _fingerprint(tmp_path) == _fingerprint(tmp_path / "four")
  _, outcome = toy.run(tmp_path)  # without the NaN it goes on
  assert outcome.reason == stopping.DONE


def test_steps_skipped_in_a_row_are_counted_over_a_restart(tmp_path):
  settings = {"train.max_skipped_in_a_row": 5}
  first = toy.Toy(toy.experiment(**settings), nan_at=range(5, 99), after_batch=_signal_at(7))
  _, outcome = toy.run(tmp_path, toy=first)
  assert outcome.reason == stopping.INTERRUPT and outcome.step < 10
  _, outcome = toy.run(tmp_path, toy=toy.Toy(toy.experiment(**settings), nan_at=range(5, 99)))
  assert (outcome.reason, outcome.step) == (stopping.NON_FINITE, 9)


def test_without_the_guard_nan_stops_at_once(tmp_path, capsys):
  _, outcome = toy.run(tmp_path, toy=toy.Toy(toy.experiment(**{"train.guard": False}), nan_at=(6,)))
  assert (outcome.reason, outcome.status, outcome.step) == (stopping.NON_FINITE, 3, 6)
  error = capsys.readouterr().err
  assert "is nan at step 6; training stopped; the last checkpoint, step 4, stands in" in error
  assert checkpoint_reader.steps(tmp_path / "checkpoints") == [4]


def test_warnings_are_said_and_written_once(tmp_path, capsys):
  """The toy's loads are all but even: a limit just below 1 makes every window a reason."""
  _, outcome = toy.run(tmp_path, **{"health.expert_entropy": 0.99999})
  assert outcome.reason == stopping.DONE
  (line,) = [row for row in metrics.read(tmp_path / "metrics.jsonl") if row["kind"] == "warning"]
  assert (line["step"], line["warning"], line["limit"]) == (3, "moe/entropy/layer", 0.99999)
  error = capsys.readouterr().err
  assert error.count("warning at step") == 1 and f"warning at step 3: {line['message']}" in error


def test_a_profile_is_taken_and_changes_nothing(uninterrupted, tmp_path, capsys):
  toy_run = toy.Toy(toy.experiment())
  loop.run(toy_run, tmp_path, profile_steps=(5, 8))
  assert f"profile of steps 5 to 7: {tmp_path}/profile" in capsys.readouterr().out
  (trace,) = (tmp_path / "profile/plugins/profile").glob("*/*.xplane.pb")
  assert trace.stat().st_size > 1000 and b"train" in trace.read_bytes()
  assert _fingerprint(tmp_path) == _fingerprint(uninterrupted[0])
  assert _train_lines(tmp_path) == _train_lines(uninterrupted[0])


def test_a_state_with_a_nan_is_not_saved(tmp_path, capsys):
  class Poisoned(toy.Toy):
    def step(self, step, state, batches):
      state, values = super().step(step, state, batches)
      with jax.transfer_guard("allow"):
        network = state.networks["generator"]
        poisoned = network.replace(ema=network.ema | {"b": network.ema["b"] / 0.0 * 0.0})
        return (state.with_network("generator", poisoned) if step == 7 else state), values

  _, outcome = toy.run(tmp_path, toy=Poisoned(toy.experiment()))
  assert outcome.reason == stopping.NON_FINITE
  assert checkpoint_reader.steps(tmp_path / "checkpoints") == [4]
  assert "state.networks['generator'].ema['b'] is not finite at step 8" in capsys.readouterr().err


def test_a_differing_config_is_refused(tmp_path):
  toy.run(tmp_path, **{"train.total_steps": 4})
  before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
  with pytest.raises(UserError) as error:
    toy.run(tmp_path, **{"loss.clip_weight": 0.5, "generator.experts": {4: 2, 8: 4, 16: 8, 32: 16, 64: 16}})
  message = str(error.value)
  assert "loss.clip_weight 0.2 -> 0.5" in message and "--allow-config-change loss.clip_weight" in message
  assert 'generator.experts {"8": 4, "16": 8, "32": 16, "64": 16} -> {"4": 2' in message
  assert "train." not in message and "\n" not in message
  assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

  with pytest.raises(UserError, match="loss.clip_weight 0.2 -> 0.5"):
    toy.run(tmp_path, allow=("generator",), **{"loss.clip_weight": 0.5})
  with pytest.raises(UserError, match="--allow-config-change los: the config has no such"):
    toy.run(tmp_path, allow=("los",), **{"loss.clip_weight": 0.5})
  _, outcome = toy.run(tmp_path, allow=("loss",), **{"loss.clip_weight": 0.5, "train.checkpoint_every": 5})
  assert outcome.reason == stopping.DONE
  resumed = next(row for row in metrics.read(tmp_path / "metrics.jsonl") if row["kind"] == "resume")
  assert resumed["changed"] == {
    "loss.clip_weight": [0.2, 0.5],
    "train.total_steps": [4, 12],
    "train.checkpoint_every": [4, 5],
  }
  assert json.loads((tmp_path / "config.json").read_text())["loss"]["clip_weight"] == 0.5


def test_a_field_that_is_gone_by_now_can_be_let_go(tmp_path):
  toy.run(tmp_path, **{"train.total_steps": 4})
  stored = json.loads((tmp_path / "config.json").read_text())
  stored["loss"]["phlogiston"] = 0.5
  (tmp_path / "config.json").write_text(json.dumps(stored))
  with pytest.raises(UserError, match="loss.phlogiston 0.5 -> .*--allow-config-change loss.phlogiston"):
    toy.run(tmp_path)
  _, outcome = toy.run(tmp_path, allow=("loss.phlogiston",))
  assert outcome.reason == stopping.DONE
  assert "phlogiston" not in json.loads((tmp_path / "config.json").read_text())["loss"]


def test_a_config_written_before_a_field_existed_is_accepted(tmp_path):
  toy.run(tmp_path, **{"train.total_steps": 4})
  stored = json.loads((tmp_path / "config.json").read_text())
  del stored["optimizer"]["generator"]["beta2"]
  (tmp_path / "config.json").write_text(json.dumps(stored))
  assert toy.run(tmp_path)[1].reason == stopping.DONE


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nowhere/run", "ftp://bucket/run"])
def test_an_unwritable_workdir(tmp_path, where):
  (tmp_path / "file").write_text("x")
  workdir = where if "//" in where or where.startswith("/") else tmp_path / where
  toy_run = toy.Toy(toy.experiment())
  with pytest.raises(UserError, match="workdir .*") as error:
    toy.run(workdir, toy=toy_run)
  assert str(workdir) in str(error.value) and "\n" not in str(error.value)
  assert toy_run.seen == [] and os.listdir(tmp_path) == ["file"]


def test_one_trainer_at_a_time(tmp_path):
  with workdir_lib.locked(tmp_path):
    with pytest.raises(UserError, match="another process is training in it"):
      toy.run(tmp_path)
  assert toy.run(tmp_path)[1].reason == stopping.DONE


def test_an_unasked_transfer_is_an_error(tmp_path):
  class Careless(toy.Toy):
    def step(self, step, state, batches):
      return super().step(step, state, [batches[0] | {"poison": np.zeros(1, np.float32)}])

  with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
    toy.run(tmp_path, toy=Careless(toy.experiment()))


def test_the_next_batch_is_fetched_while_a_step_runs(tmp_path):
  """Batch s+1 is asked for before the metrics of step s are, and never more than one ahead."""
  ahead = []

  class Recording(toy.Toy):
    def step(self, step, state, batches):
      ahead.append(len(self.seen) - step)
      return super().step(step, state, batches)

  toy.run(tmp_path, toy=Recording(toy.experiment()))
  assert set(ahead) == {1}
