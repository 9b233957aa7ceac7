"""Whatever keeps a run from saving stops it at once: status 2, one line, and the checkpoints before it intact."""

import errno
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import toy

from aurora_jax.cli import main
from aurora_jax.runs import checkpoint_reader, fingerprint, metrics
from aurora_jax.training import setup

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from aurora_jax import config_files

def get_config(variant=""):
  config = config_files.defaults()
  config.train.total_steps, config.train.batch_size = 3000, 8
  config.train.checkpoint_every, config.train.log_every, config.train.sample_every = 4, 3, 1_000_000
  return config
"""


@pytest.fixture(name="train")
def _train(tmp_path, monkeypatch, capsys):
  """train(fault): a run in whose sixth step, when the checkpoint of step 4 is whole, `fault` happens. Returns the line
  on stderr that it ends with."""
  (tmp_path / "small.py").write_text(CONFIG)
  run, before = tmp_path / "run", []

  def train(fault, step=6, *flags):
    def after_batch(number):
      if number == step:
        while step > 4 and not checkpoint_reader.steps(run / "checkpoints"):
          time.sleep(0.005)
        before.extend(fingerprint.of_checkpoint(run / "checkpoints") if step > 4 else ())
        fault(run)

    monkeypatch.setattr(
      setup, "prepare", lambda values: toy.Toy(values, delay=0.002, width=5000, after_batch=after_batch)
    )
    status = main.main(["train", "--config", str(tmp_path / "small.py"), "--workdir", str(run), *flags])
    error = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("training:")]
    assert status == 2 and len(error) == 1, (status, error)
    return run, error[0]

  train.before = before
  return train


def _intact(run, train):
  """The checkpoint of before the fault is the only one, bit by bit, and nothing else is taken for one."""
  assert checkpoint_reader.steps(run / "checkpoints") == [4]
  assert list(fingerprint.of_checkpoint(run / "checkpoints")) == train.before


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_save_writes_in_the_background(train):
  old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    run, error = train(lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, old[1])))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)
  assert "checkpoint of step 8 could not be saved" in error and "File too large" in error
  assert "the last complete one is of step 4" in error
  assert metrics.read(run / "metrics.jsonl")[-1]["reason"] == "save failed"
  _intact(run, train)


_READ_ONLY = """
import errno, os, runpy, sys, toy
from aurora_jax.runs import checkpoint_reader
from aurora_jax.training import setup

mkdir, run = os.mkdir, sys.argv.pop(1)

def read_only(path, *args, **options):
  if str(path).startswith(run):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
  return mkdir(path, *args, **options)

def after_batch(step):
  if step > 4 and checkpoint_reader.steps(run + "/checkpoints"):
    os.mkdir = read_only

setup.prepare = lambda values: toy.Toy(values, delay=0.002, width=5000, after_batch=after_batch)
runpy.run_module("aurora_jax", run_name="__main__")
"""


@pytest.mark.slow
def test_a_file_system_that_has_become_read_only(tmp_path):
  """As a process: Orbax leaves threads behind that would keep it from ending for five minutes."""
  (tmp_path / "small.py").write_text(CONFIG)
  run = tmp_path / "run"
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      _READ_ONLY,
      str(run),
      "train",
      "--config",
      str(tmp_path / "small.py"),
      "--workdir",
      str(run),
    ],
    capture_output=True,
    text=True,
    check=False,
    timeout=150,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/training"},
  )
  [error] = [line for line in done.stderr.splitlines() if line and not line.startswith("training:")]
  assert done.returncode == 2 and "could not be saved" in error and "Read-only file system" in error
  last = checkpoint_reader.newest(run / "checkpoints")
  assert f"the last complete one is of step {last}" in error
  assert fingerprint.of_checkpoint(run / "checkpoints")[0] == last


@pytest.mark.slow
def test_a_save_whose_last_act_fails_in_the_background(train, monkeypatch):
  """All is written, but the folder cannot take its name, without which it counts for nothing."""

  def refuse(run):
    for name in ("rename", "replace"):

      def fail(source, target, *, move=getattr(os, name), **options):
        if str(target).endswith("checkpoints/8"):
          raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return move(source, target, **options)

      monkeypatch.setattr(os, name, fail)

  run, error = train(refuse)
  assert "checkpoint of step 8 could not be saved" in error and "Input/output error" in error
  _intact(run, train)


@pytest.mark.parametrize("which", ["checkpoints", "."])
def test_a_folder_that_vanishes_between_two_saves(train, which):
  """It is noticed within seconds, not at the next save, which is thousands of steps away."""
  _, error = train(
    lambda run: shutil.rmtree(run / which),
    3,
    "--config.train.checkpoint_every=1000000",
    "--config.train.total_steps=100000000",
  )
  assert "has vanished" in error


def test_a_log_that_cannot_be_written(train, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
  _, error = train(lambda run: None, 0)
  assert "metrics.jsonl cannot be written: No space left on device" in error


def test_a_line_of_the_log_that_cannot_be_written(train):
  def fill(run):
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "metrics.jsonl").stat().st_size + 10, old[1]))

  old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    run, error = train(fill, 4, "--config.train.log_every=2", "--config.train.checkpoint_every=100000")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)
  assert "metrics.jsonl cannot be written: File too large" in error
  assert all(isinstance(row["step"], int) for row in metrics.read(run / "metrics.jsonl"))
