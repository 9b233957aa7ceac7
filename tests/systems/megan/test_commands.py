"""MEGAN as a user meets it: a folder of images, training with a stop, sampling, and what there is to read about a
run.
"""

import contextlib
import io
import json
import pathlib
import shutil

import numpy as np
import pytest
import random_run
import shared_programs
from PIL import Image

from aurora_jax.cli import main

ROOT = pathlib.Path(__file__).parents[3]
IMAGES = 12


def here(*args):
  """A command in this process: (status, stdout, stderr)."""
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    status = main.main([str(arg) for arg in args])
  return status, out.getvalue(), error.getvalue()


def succeed(*args):
  status, out, error = here(*args)
  assert status == 0, error
  return out


def fail(words, *args):
  """The command ends with status 2 and one line on stderr that holds `words`."""
  status, _, error = here(*args)
  assert status == 2 and len(error.strip().splitlines()) == 1, error
  assert words in error


@pytest.fixture(scope="module", autouse=True)
def _shared():
  with shared_programs.shared(weights_from_host=True):
    yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A data set of twelve images from a folder. No caption is read, but `build-data` wants one."""
  home = tmp_path_factory.mktemp("data")
  (home / "images").mkdir()
  rng = np.random.default_rng(0)
  for i in range(IMAGES):
    image = np.full((24, 24, 3), rng.integers(0, 255, 3), np.uint8)
    image[4:20, 4:20] = rng.integers(0, 255, 3)
    Image.fromarray(image).save(home / f"images/{i}.png")
    (home / f"images/{i}.txt").write_text(f"square number {i}\n")
  source = ("--source", "folder", "--path", home / "images", "--out", home / "built")
  succeed("build-data", *source, "--resolution", 32, "--shards", 2, "--heldout", 0)
  return home / "built"


def train(data, run, *more):
  config = f"{ROOT / 'configs/megan_openmoji_32.py'}:test"
  return succeed("train", "--config", config, "--workdir", run, f"--config.data.path={data}", *more)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
  """An uninterrupted run of six steps."""
  run = tmp_path_factory.mktemp("runs") / "whole"
  said = train(data, run)
  assert "generator 0." in said and "gate 0." in said and "discriminator 0." in said and "all 6 steps are done" in said
  return run


def fingerprint(run):
  return succeed("inspect", run, "--fingerprint").strip()


def rows(run):
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_losses_sheets_and_checkpoints(run):
  trained = [row for row in rows(run) if row["kind"] == "train"]
  assert [row["step"] for row in trained] == [2, 4, 6]
  for row in trained:
    losses = [row[f"loss/{name}"] for name in ("d_wasserstein", "g_wasserstein", "gp", "balance")]
    loads = [row[f"moe/load/generators/{k}"] for k in range(4)]
    norms = [row[f"grad_norm/{name}"] for name in ("d", "gp", "g", "gate", "balance")]
    assert np.isfinite(losses + norms).all() and row["guard/skipped"] == 0
    assert sum(loads) == pytest.approx(1, rel=1e-5)
  assert sorted(path.name for path in (run / "samples").glob("*.png")) == [f"step-{i:08d}.png" for i in (0, 3, 6)]
  assert sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()) == [2, 4, 6]
  assert (run / "report.html").is_file()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_state(data, run, tmp_path):
  """Killed in its sixth step: what it had logged by then stands, the checkpoint of step 4 is its newest.

  The batches that it goes on with, two per step, are part of what must be the same.
  """
  killed = shutil.copytree(run, tmp_path / "killed")
  shutil.rmtree(killed / "checkpoints" / "6")
  lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
  (killed / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 6))
  assert fingerprint(killed) == fingerprint(run / "checkpoints" / "4") != fingerprint(run)
  said = train(data, killed)
  assert "checkpoint of step 4" in said and "all 6 steps are done" in said
  assert fingerprint(killed) == fingerprint(run)
  assert rows(killed)[-1]["kind"] == "stop"


@pytest.mark.slow
def test_sampling_without_prompts(run, tmp_path):
  sample = ("sample", "--workdir", run, "--out")
  said = succeed(*sample, tmp_path / "sheet.png", "--latents", 6, "--save-latents", tmp_path / "latents.npz")
  assert "6 images, 32x32 pixels" in said and "step 6" in said
  with np.load(tmp_path / "latents.npz") as file:
    assert (file["z"].shape, file["uniform"].shape) == ((1, 6, 16), (1, 6, 4))
  succeed(*sample, tmp_path / "again.png", "--latents-file", tmp_path / "latents.npz")
  sheet, again = (np.asarray(Image.open(tmp_path / name)) for name in ("sheet.png", "again.png"))
  np.testing.assert_array_equal(sheet, again)
  assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100
  walk = ("interpolate", "--workdir", run, "--latent-walk", "--latents", 2, "--steps", 3, "--out")
  assert "3 steps" in succeed(*walk, tmp_path / "walk.gif", "--strip", tmp_path / "walk.png")
  with Image.open(tmp_path / "walk.gif") as gif:
    assert gif.n_frames == 4
  fail("takes no prompts", *sample, tmp_path / "x.png", "--prompt", "red heart")
  fail("has no truncation: psi must be 1", *sample, tmp_path / "x.png", "--psi", "0.5")
  assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_inspect_tells_of_the_run(run):
  story = succeed("inspect", run)
  assert "32x32 images, unconditional, by 4 generators and a gate" in story
  assert "step 6 of 6" in story and "g_wasserstein" in story and "entropy of experts" in story
  assert f"sample --workdir {run}" in story and "evaluate" not in story
  parts = succeed("inspect", run / "checkpoints" / "6")
  assert "gate" in parts and "megan_openmoji_32" in parts


def test_inspect_tells_of_the_configuration():
  story = succeed("inspect", "--config", ROOT / "configs/megan_cifar10.py")
  for words in ("by 10 generators and a gate", "generator: 12.89 M", "gate: 1.09 M", "discriminator: 0.66 M"):
    assert words in story
  flags = ("--config.train.batch_size=60", "--config.mesh.expert=5", "--config.mesh.data=2")
  placed = succeed("inspect", "--config", ROOT / "configs/megan_cifar10.py", "--sharding", "--devices", 10, *flags)
  assert "generator/generators/r4/kernel  [10, 128, 4, 4, 256] -> [2, 128, 4, 4, 256] per device" in placed


@pytest.mark.slow
def test_captions_cannot_be_retrieved(run, tmp_path):
  judge = random_run.make_clip(tmp_path / "judge")
  fail("reads no captions: nothing to retrieve", "evaluate", "--workdir", run, "--judge", judge)
