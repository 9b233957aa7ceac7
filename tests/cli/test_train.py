"""`train` and `inspect` as a user runs them. The problem is a toy; bad input goes through processes of their own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import toy
from PIL import Image

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.data import build, sources
from aurora_jax.runs import checkpoint_reader, fingerprint, workdir
from aurora_jax.training import setup

_ROOT = pathlib.Path(__file__).parents[2]

_CONFIG = """
from aurora_jax import config_files

def get_config(variant=""):
  config = config_files.defaults()
  config.name = "small" + variant
  config.train.total_steps = 6
  config.train.checkpoint_every = 2
  config.train.log_every = 2
  config.train.sample_every = 3
  config.train.batch_size = 8
  config.data.path = "no/such/data"
  config.text.clip = "no/such/clip"
  return config
"""


@pytest.fixture(name="experiment")
def _experiment(tmp_path):
  path = tmp_path / "small.py"
  path.write_text(_CONFIG)
  return path


@pytest.fixture(name="prepare")
def _prepare(monkeypatch):
  """Puts the toy in the place of the networks; returns the toys that were made."""
  made = []

  def prepare(experiment):
    made.append(toy.Toy(experiment))
    return made[-1]

  monkeypatch.setattr(setup, "prepare", prepare)
  return made


def _process(*arguments, **environment):
  return subprocess.run(
    [sys.executable, "-m", "aurora_jax", *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
    cwd=_ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
  )


def _tree(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_train_then_go_on_then_inspect(experiment, prepare, tmp_path, capsys):
  command = ["train", "--config", str(experiment), "--workdir", str(tmp_path / "run")]
  assert main.main(command) == 0
  said = capsys.readouterr().out
  assert "generator 0.00 M parameters" in said and "all 6 steps are done" in said
  for step in (0, 3, 6):
    with Image.open(tmp_path / f"run/samples/step-{step:08d}.png") as picture:
      assert picture.width > 100

  assert main.main(command) == 0
  assert "all 6 steps are done (newest checkpoint: step 6)" in capsys.readouterr().out
  assert main.main(command + ["--config.train.total_steps=9"]) == 0
  assert "going on from the checkpoint of step 6, to 9" in capsys.readouterr().out
  assert [toy_run.seen[:1] for toy_run in prepare] == [[0], [], [6]]

  assert main.main(["inspect", str(tmp_path / "run")]) == 0
  said = capsys.readouterr().out
  for words in (
    "(small)",
    "step 9 of 9",
    "restarts   1",
    "step 6  resumed",
    "with train.total_steps 6 -> 9",
    "all steps are done",
    "saved      step 6 (",
    "newest 3",
    "samples    4, newest samples/step-00000009.png",
    "gradient of G",
  ):
    assert words in said, words
  assert len(said.splitlines()) < 30

  assert main.main(["inspect", str(tmp_path / "run"), "--fingerprint"]) == 0
  printed = capsys.readouterr().out.strip()
  assert printed == fingerprint.of_checkpoint(tmp_path / "run/checkpoints", 9)[1]
  assert main.main(["inspect", str(tmp_path / "run/checkpoints/6"), "--fingerprint"]) == 0
  assert capsys.readouterr().out.strip() not in ("", printed)
  assert main.main(["inspect", str(tmp_path / "run/checkpoints/9")]) == 0
  assert "9 steps were done" in capsys.readouterr().out


def test_a_changed_experiment(experiment, prepare, tmp_path, capsys):
  command = ["train", "--config", str(experiment), "--workdir", str(tmp_path / "run")]
  assert main.main(command) == 0
  changed = command + ["--config.loss.clip_weight=0.5", "--config.train.total_steps=8"]
  capsys.readouterr()
  assert main.main(changed) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "loss.clip_weight 0.2 -> 0.5" in error
  assert len(prepare) == 1  # refused before anything was loaded
  assert main.main(changed + ["--allow-config-change", "loss.clip_weight"]) == 0
  stored = json.loads((tmp_path / "run/config.json").read_text())
  assert stored["loss"]["clip_weight"] == 0.5


@pytest.mark.slow
def test_a_data_set_that_was_replaced_is_refused_unless_it_is_allowed(experiment, prepare, tmp_path, capsys):
  def data_set(checksum):
    (tmp_path / "data").mkdir(exist_ok=True)
    shard = {"file": "x", "examples": 3, "bytes": 10, "sha256": checksum}
    manifest = {"resolution": 8, "splits": {"train": {"examples": 3, "shards": [shard]}}}
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))

  command = ["train", "--config", str(experiment), "--workdir", str(tmp_path / "run")]
  command += [f"--config.data.path={tmp_path / 'data'}"]
  data_set("a")
  assert main.main(command) == 0
  assert main.main(command + ["--config.train.total_steps=7"]) == 0
  data_set("b")
  capsys.readouterr()
  assert main.main(command + ["--config.train.total_steps=9"]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and f"data.path: what is at {tmp_path / 'data'} is not what was there" in error
  assert len(prepare) == 2  # refused before anything was loaded
  assert main.main(["inspect", str(tmp_path / "run")]) == 0
  assert "changed    data.path: what is at" in capsys.readouterr().out
  allowed = ["--config.train.total_steps=9", "--allow-config-change", "data.path"]
  assert main.main(command + allowed) == 0
  assert "data.path: what is at" in capsys.readouterr().err
  assert main.main(command + ["--config.train.total_steps=10"]) == 0  # recorded


def test_a_folder_in_which_another_process_trains_is_refused_at_once(experiment, prepare, tmp_path, capsys):
  (tmp_path / "run").mkdir()
  with workdir.locked(tmp_path / "run"):
    assert main.main(["train", "--config", str(experiment), "--workdir", str(tmp_path / "run")]) == 2
  assert "another process is training in it" in capsys.readouterr().err and not prepare


def test_nan_is_status_3(experiment, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(setup, "prepare", lambda values: toy.Toy(values, nan_at=range(3, 99)))
  command = ["train", "--config", str(experiment), "--workdir", str(tmp_path / "run")]
  assert main.main(command + ["--config.train.max_skipped_in_a_row=3"]) == 3
  error = capsys.readouterr().err
  assert "step 5 was skipped (3 in a row): generator: loss/g is nan" in error
  assert "the last checkpoint, step 2, stands in" in error
  assert checkpoint_reader.steps(tmp_path / "run/checkpoints") == [2]
  assert main.main(["inspect", str(tmp_path / "run")]) == 0
  said = capsys.readouterr().out
  assert "3 steps in a row were skipped up to step 5" in said and "loss/g is nan" in said


def test_profile_steps(experiment, prepare, tmp_path, capsys):
  command = ["train", "--config", str(experiment), "--workdir", str(tmp_path / "run"), "--profile-steps"]
  assert main.main(command + ["5:3"]) == 2
  assert "--profile-steps 5:3" in capsys.readouterr().err and not (tmp_path / "run").exists()
  assert main.main(command + ["2:4"]) == 0
  assert "profile of steps 2 to 3: " in capsys.readouterr().out
  assert list((tmp_path / "run/profile/plugins/profile").glob("*/*.xplane.pb"))


@pytest.mark.parametrize(
  "arguments,words",
  [
    (["--workdir", "{tmp}/run"], "which config?"),
    (["--config", "configs/nowhere.py", "--workdir", "{tmp}/run"], "config file not found: configs/nowhere.py"),
    (["--config", "{config}", "--config.train.total_step=5", "--workdir", "{tmp}/run"], "total_step"),
    (["--config", "{config}", "--config.train.total_steps=-5", "--workdir", "{tmp}/run"], "got -5"),
    (["--config", "{config}", "--workdir", "{tmp}/run"], "no/such/data"),
    (["--config", "{config}", "--workdir", "{tmp}/small.py"], "small.py"),
    (["--config", "{config}", "--workdir", "/proc/nowhere/run"], "/proc/nowhere/run"),
    (["--config", "{config}"], "--workdir"),
  ],
)
def test_bad_input_is_one_line_and_status_2(experiment, tmp_path, arguments, words):
  before = _tree(tmp_path)
  done = _process("train", *[a.format(tmp=tmp_path, config=experiment) for a in arguments])
  assert done.returncode == 2, done
  lines = done.stderr.strip().splitlines()
  if words != "--workdir":  # argparse also prints the usage
    assert len(lines) == 1, done.stderr
  assert words in lines[-1] and done.stdout == ""
  assert _tree(tmp_path) == before


def test_inspect_tells_data_sets_and_experiments(tmp_path, experiment, capsys):
  pictures = tmp_path / "pictures"
  pictures.mkdir()
  for name, colour in (("red dot", (255, 0, 0)), ("blue dot", (0, 0, 255)), ("grey dot", (9, 9, 9))):
    Image.new("RGB", (8, 8), colour).save(pictures / f"{name}.png")
    (pictures / f"{name}.txt").write_text(name)
  (pictures / "broken.png").write_bytes(b"nothing")
  (pictures / "broken.txt").write_text("broken")
  build.build(sources.folder(str(pictures)), str(tmp_path / "data"), resolution=8, shards=2, heldout_fraction=0.0)
  assert main.main(["inspect", str(tmp_path / "data")]) == 0
  said = capsys.readouterr().out
  assert "3 images" in said and "red dot" in said and "broken" in said and "8x8" in said

  shard = sorted((tmp_path / "data").glob("*.tfrecord"))[0]
  shard.write_bytes(shard.read_bytes()[:-3])
  assert main.main(["inspect", str(tmp_path / "data")]) == 2
  assert shard.name in capsys.readouterr().err

  assert main.main(["inspect", "--config", str(_ROOT / "configs/openmoji_32.py")]) == 0
  said = capsys.readouterr().out
  cfg = config_files.load([f"--config={_ROOT / 'configs/openmoji_32.py'}"])
  assert f"{cfg.train.total_steps:,} steps" in said and "experts" in said and "discriminator:" in said


@pytest.mark.parametrize(
  "arguments,words",
  [
    ([], "inspect what?"),
    (["nowhere"], "nowhere"),
    (["{tmp}"], "is no run"),
    (["{tmp}", "--fingerprint"], "no checkpoint in"),
    (["configs/openmoji_32.py", "--fingerprint"], "--fingerprint is for a run"),
  ],
)
def test_inspect_bad_input(tmp_path, capsys, arguments, words):
  assert main.main(["inspect", *[a.format(tmp=tmp_path) for a in arguments]]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and words in error


def test_inspect_for_a_reader_that_has_seen_enough(tmp_path):
  """`inspect DATA | head` ends quietly."""
  pictures = tmp_path / "pictures"
  pictures.mkdir()
  Image.new("RGB", (8, 8), "red").save(pictures / "red.png")
  (pictures / "red.txt").write_text("red dot")
  build.build(sources.folder(str(pictures)), str(tmp_path / "data"), resolution=8, shards=1, heldout_fraction=0.0)
  process = subprocess.Popen(
    [sys.executable, "-m", "aurora_jax", "inspect", str(tmp_path / "data")],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.close()
  error = process.stderr.read()
  assert (process.wait(), error) == (0, "")


def test_inspect_says_whether_a_run_is_going_on(tmp_path, capsys):
  toy.run(tmp_path, **{"train.total_steps": 2})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
  assert main.main(["inspect", str(tmp_path)]) == 0
  assert "its process was killed" in capsys.readouterr().out
  with workdir.locked(tmp_path):
    assert main.main(["inspect", str(tmp_path)]) == 0
  assert "a process is training in it now" in capsys.readouterr().out
