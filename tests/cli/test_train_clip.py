"""train-clip the way a user meets it: as a process, on good input, bad input and a signal."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from aurora_jax.cli import main
from aurora_jax.data import build, sources
from aurora_jax.interop import clip_hf

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = (
  "--resolution",
  16,
  "--patch",
  8,
  "--image-width",
  16,
  "--image-layers",
  1,
  "--text-width",
  16,
  "--text-layers",
  1,
  "--heads",
  2,
  "--embedding-width",
  16,
  "--vocabulary-size",
  600,
  "--batch-size",
  8,
)


def command(*arguments):
  return [sys.executable, "-m", "aurora_jax", "train-clip", *map(str, arguments)]


def environment():
  return os.environ | {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def run(*arguments, cwd=ROOT):
  return subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def here(capsys, *arguments):
  """Like `run`, in this process."""
  capsys.readouterr()
  status = main.main(["train-clip", *map(str, arguments)])
  return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())


def assert_refused(done, words):
  assert done.returncode == 2, done
  assert done.stdout == ""
  lines = done.stderr.splitlines()
  assert len(lines) == 1 and lines[0].startswith("aurora_jax train-clip: "), done.stderr
  assert words in lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """20 pictures: colours by shape."""
  folder = tmp_path_factory.mktemp("pictures")
  generator = np.random.default_rng(0)
  for colour, shape in itertools.product(("red", "green", "blue", "black"), ("box", "disc", "star", "moon", "ring")):
    Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{colour}_{shape}.png")
    (folder / f"{colour}_{shape}.txt").write_text(f"{colour} {shape}\n")
  out = tmp_path_factory.mktemp("data") / "shapes"
  build.build(sources.folder(folder), out, resolution=16, shards=1, heldout_fraction=0.2, name="shapes")
  return out


@pytest.mark.slow
def test_trains_measures_and_writes(data, tmp_path, capsys):
  out = tmp_path / "clips" / "small"
  done = run("--data", data, "--out", out, "--steps", 5, "--seed", 3, *SMALL)
  assert done.returncode == 0, done.stderr
  train, heldout, written = done.stdout.splitlines()
  for line, name in ((train, "train"), (heldout, "heldout")):
    expected = rf"real images, {name}: the right caption first among 20: [\d.]+%, among all 20: [\d.]+%"
    assert re.fullmatch(expected, line)
  assert re.fullmatch(f"{re.escape(str(out))}: 5 steps in [0-9.]+ s .*", written)
  assert re.search(r"^train-clip: step 5 of 5  loss \d\.\d+, right caption of 8: [\d.]+%$", done.stderr, re.MULTILINE)
  assert "Traceback" not in done.stderr
  assert [path.name for path in out.parent.iterdir()] == ["small"]

  bundle = clip_hf.load(out)
  assert bundle.config.image.size == 16 and bundle.config.text.width == 16
  notes = json.loads((out / "training.json").read_text())
  assert notes["steps"] == 5 and notes["split"] == "train" and notes["settings"]["seed"] == 3
  assert notes["figures"]["train"]["all"] == 20
  transformers = pytest.importorskip("transformers")
  assert transformers.CLIPModel.from_pretrained(out).num_parameters() > 10_000

  assert_refused(here(capsys, "--data", data, "--out", out, "--steps", 1, *SMALL), f"{out} is not empty")
  assert json.loads((out / "training.json").read_text()) == notes
  done = here(capsys, "--data", data, "--out", out, "--steps", 1, "--split", "all", "--overwrite", *SMALL)
  assert done.returncode == 0, done.stderr
  assert json.loads((out / "training.json").read_text())["split"] == "all"


@pytest.mark.slow
def test_interrupted_leaves_nothing(data, tmp_path):
  process = subprocess.Popen(
    command("--data", data, "--out", tmp_path / "out", "--steps", 10**7, *SMALL),
    cwd=ROOT,
    env=environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    for line in process.stderr:
      if line.startswith("train-clip: step "):
        break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 130 and stdout == ""
  assert stderr.splitlines()[-1] == "aurora_jax train-clip: interrupted" and "Traceback" not in stderr
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  "arguments, words",
  [
    (("--data", "nowhere"), "data set nowhere does not exist"),
    (("--data", "empty"), "data set empty has no manifest.json"),
    (("--resolution", 64, "--steps", 1), "resolution 64"),
    (("--patch", 7, "--steps", 1), "size 16 is not a multiple of the patch 7"),
    (("--steps", 0), "nothing to train: 0 steps"),
    (("--seconds", -5), "nothing to train: -5.0 seconds"),
    (("--out", "file"), "file is a file, not a folder"),
    (("--out", "full"), "full is not empty"),
  ],
)
def test_bad_input(data, tmp_path, monkeypatch, capsys, arguments, words):
  """In this process, but for the first."""
  (tmp_path / "empty").mkdir()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.txt").write_text("dear to me")
  (tmp_path / "file").write_text("")
  before = sorted(tmp_path.rglob("*"))
  flags = ("--data", data, "--out", "out", "--resolution", 16, *arguments)
  if "nowhere" in arguments:
    done = run(*flags, cwd=tmp_path)
  else:
    monkeypatch.chdir(tmp_path)
    done = here(capsys, *flags)
  assert_refused(done, words)
  assert sorted(tmp_path.rglob("*")) == before
