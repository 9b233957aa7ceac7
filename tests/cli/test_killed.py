"""Training that is killed and restarted, again and again, ends as if nothing had happened."""

import os
import random
import signal
import time

import fork_server
import numpy as np
import pytest
from PIL import Image

from aurora_jax.cli import main
from aurora_jax.data import build, sources
from aurora_jax.runs import checkpoint_reader, metrics

pytestmark = pytest.mark.slow

KILLS, STEPS = 20, 150
CONFIG = f"""
from aurora_jax import config_files

def get_config(variant=""):
  config = config_files.defaults()
  config.train.total_steps, config.train.batch_size = {STEPS}, 8
  config.train.checkpoint_every, config.train.log_every, config.train.sample_every = 2, 3, 5
  config.train.keep_checkpoints, config.train.keep_every = 2, 20
  return config
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """A data set and a config; the arguments of `train` but for the workdir."""
  home = tmp_path_factory.mktemp("home")
  (home / "pictures").mkdir()
  rng = np.random.default_rng(0)
  for i in range(30):
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(home / f"pictures/{i}.png")
    (home / f"pictures/{i}.txt").write_text(f"picture {i}")
  build.build(sources.folder(str(home / "pictures")), str(home / "data"), resolution=8, shards=2, heldout_fraction=0.0)
  (home / "small.py").write_text(CONFIG)
  return ["train", "--config", home / "small.py", f"--config.data.path={home / 'data'}", "--workdir"]


@pytest.fixture(scope="module")
def server():
  with fork_server.ForkServer("linear") as running:
    yield running


def history(run):
  """All that was measured on the way to the present state, but for the times."""
  return [
    {
      name: value
      for name, value in row.items()
      if name not in ("seconds", "images_per_second") and not name.startswith("time/")
    }
    for row in metrics.history(run / "metrics.jsonl")
    if row["kind"] == "train"
  ]


def fingerprint(run, capsys):
  capsys.readouterr()
  assert main.main(["inspect", str(run), "--fingerprint"]) == 0
  return capsys.readouterr().out.strip()


# Where in its life a process is killed: a random while after this comes true.
MOMENTS = {
  "starting": lambda run: True,
  "stepping": lambda run: True,
  "saving": lambda run: any((run / "checkpoints").glob("*.orbax-checkpoint-tmp*")),
  "removing": lambda run: any((run / "checkpoints/.removed").glob("*")),
  "sampling": lambda run: any((run / "samples").glob(".*.partial")),
}


def wait_until(true, seconds):
  deadline = time.monotonic() + seconds
  while not true() and time.monotonic() < deadline:
    time.sleep(0.002)


def test_killed_at_20_random_moments(server, command, tmp_path, capsys):
  rng = random.Random(1)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  started = time.monotonic()
  server.start(tmp_path / "whole.log", *command, whole)
  while not any(row["kind"] == "train" for row in metrics.read(whole / "metrics.jsonl")):
    time.sleep(0.005)
    assert time.monotonic() < started + 300, (tmp_path / "whole.log").read_text()
  start_up = time.monotonic() - started
  assert server.wait() == 0, (tmp_path / "whole.log").read_text()

  chosen = ["starting"] * 6 + ["stepping"] * 5 + ["saving"] * 5 + ["removing"] * 2 + ["sampling"] * 2
  assert len(chosen) == KILLS
  rng.shuffle(chosen)
  reached, in_a_save = [], 0
  for moment in chosen:
    lines = lambda: len(metrics.read(killed / "metrics.jsonl"))
    wanted = 0 if moment == "starting" else lines() + rng.randint(1, 4)  # the first one says "start" or "resume"
    pid = server.start(tmp_path / "killed.log", *command, killed)
    wait_until(lambda: lines() >= wanted, 20 * start_up)
    wait_until(lambda: MOMENTS[moment](killed), start_up)
    time.sleep(rng.uniform(0, {"starting": start_up, "stepping": 0.1}.get(moment, 0.01)))
    os.kill(pid, signal.SIGKILL)
    assert server.wait() == -signal.SIGKILL, (moment, (tmp_path / "killed.log").read_text()[-3000:])
    in_a_save += any((killed / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    reached.append(checkpoint_reader.newest(killed / "checkpoints") or 0)
    for step in checkpoint_reader.steps(killed / "checkpoints"):  # whatever has a number is whole
      assert checkpoint_reader.describe(killed / "checkpoints", step)
  story = f"{list(zip(chosen, reached))}, {in_a_save} of them in a save"
  (tmp_path / "story.txt").write_text(story)
  assert reached == sorted(reached) and reached[-1] < STEPS and in_a_save >= 3, story
  server.start(tmp_path / "killed.log", *command, killed)
  assert server.wait() == 0, (tmp_path / "killed.log").read_text()[-3000:]

  assert fingerprint(killed, capsys) == fingerprint(whole, capsys)
  assert history(killed) == history(whole)
  for run in (killed, whole):
    assert checkpoint_reader.steps(run / "checkpoints") == [20, 40, 60, 80, 100, 120, 140, 148, 150]
  pictures = lambda run: {path.name: path.read_bytes() for path in (run / "samples").glob("*.png")}
  assert pictures(killed) == pictures(whole) and len(pictures(whole)) == STEPS // 5 + 1
  assert not list((killed / "checkpoints").glob("*tmp*")) and not (killed / "checkpoints/.removed").exists()


def test_sigterm_while_starting_and_two_while_training(server, command, tmp_path):
  log, run = tmp_path / "log", tmp_path / "run"
  said = lambda: log.read_text() if log.is_file() else ""
  # Start-up takes a minute; nothing is to be saved, so nothing is waited for.
  pid = server.start(log, *command, run, "--stopped-status", 7, "--config.name=slow")
  wait_until(lambda: "initializing" in said(), 60)
  assert "initializing" in said()
  sent = time.monotonic()
  os.kill(pid, signal.SIGTERM)
  assert server.wait() == 7 and time.monotonic() - sent < 30, said()
  assert "stopped at once; no step was done since the newest checkpoint" in said()
  assert checkpoint_reader.steps(run / "checkpoints") == []

  pid = server.start(
    log,
    *command,
    run,
    "--config.train.total_steps=100000",
    "--config.train.checkpoint_every=99999",
    "--config.train.keep_every=0",
  )
  wait_until(lambda: any(row["kind"] == "train" for row in metrics.read(run / "metrics.jsonl")), 60)
  os.kill(pid, signal.SIGTERM)
  os.kill(pid, signal.SIGTERM)
  assert server.wait() == 0, said()
  stop = metrics.read(run / "metrics.jsonl")[-1]
  assert (stop["kind"], stop["reason"], [stop["step"]]) == (
    "stop",
    "terminated",
    checkpoint_reader.steps(run / "checkpoints"),
  )
  assert "finishing this step, then saving" in said() and not (run / "report.html").exists()
