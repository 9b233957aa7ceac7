"""`sample` and `interpolate` as a user runs them, on a generator with random weights."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import random_run
import shared_programs
from PIL import Image
from safetensors.numpy import load_file, save_file

from aurora_jax.cli import main

ROOT = pathlib.Path(__file__).parents[2]

Z = 8


@pytest.fixture(scope="module", autouse=True)
def _shared():
  with shared_programs.shared():
    yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  return random_run.make_home(tmp_path_factory.mktemp("home"))


def process(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "aurora_jax", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )


def run(*arguments):
  assert main.main([*map(str, arguments)]) == 0


def pixels(path):
  with Image.open(path) as picture:
    return np.asarray(picture.convert("RGB"))


@pytest.mark.slow
def test_a_sweep_as_a_process(home, tmp_path):
  done = process(
    "sample",
    "--workdir",
    home / "run",
    "--prompt",
    "red circle",
    "--prompt",
    "blue square",
    "--psi",
    "0,0.2,1",
    "--latents",
    2,
    "--out",
    tmp_path / "new" / "sheet.png",
    "--singles",
    tmp_path / "singles",
  )
  assert done.returncode == 0 and "2 prompts, 2 latents each, 16x16 pixels, psi 0,0.2,1, step 3" in done.stdout, (
    done.stderr[-2000:]
  )
  names = sorted(path.name for path in (tmp_path / "singles").iterdir())
  assert names == [f"{p:04d}-{l:02d}-psi{psi}.png" for p in (0, 1) for l in (0, 1) for psi in ("0.2", "0", "1")]
  single = lambda name: pixels(tmp_path / "singles" / f"{name}.png")
  assert single("0000-00-psi0").shape == (16, 16, 3)
  # At psi 0 all latents of a prompt are its mean, at 1 each is itself.
  assert (single("0000-00-psi0") == single("0000-01-psi0")).all()
  assert (single("0000-00-psi1") != single("0000-01-psi1")).any()
  assert (single("0000-00-psi0") != single("0001-00-psi0")).any()
  assert pixels(tmp_path / "new" / "sheet.png").shape[1] > 3 * 96


@pytest.mark.slow
def test_saved_latents_give_the_same_pictures_and_others_do_not(home, tmp_path):
  common = (
    "sample",
    "--workdir",
    home / "run",
    "--prompt",
    "red circle",
    "--prompt",
    "green bar",
    "--psi",
    0.7,
    "--latents",
    2,
  )
  run(*common, "--seed", 7, "--out", tmp_path / "a.png", "--save-latents", tmp_path / "l.npz")
  run(
    *common,
    "--latents-file",
    tmp_path / "l.npz",
    "--out",
    tmp_path / "b.png",
    "--save-latents",
    tmp_path / "m.safetensors",
  )
  assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()
  latents = load_file(tmp_path / "m.safetensors")
  assert {name: array.shape for name, array in latents.items()} == {"z": (2, 2, Z), "mean_z": (2, 16, Z)}
  with np.load(tmp_path / "l.npz") as stored:
    assert all((stored[name] == latents[name]).all() for name in ("z", "mean_z"))
  # The prompt's mean comes from the file too.
  save_file(latents | {"mean_z": latents["mean_z"] + 1}, tmp_path / "other.safetensors")
  run(*common, "--latents-file", tmp_path / "other.safetensors", "--out", tmp_path / "d.png")
  assert (pixels(tmp_path / "a.png") != pixels(tmp_path / "d.png")).any()


@pytest.mark.slow
def test_another_clip_folder_and_bfloat16(home, tmp_path, capsys):
  random_run.make_run(tmp_path / "moved", "no/such/clip", seed=3)
  common = ("sample", "--workdir", tmp_path / "moved", "--prompt", "red circle", "--latents", 2)
  assert main.main([*map(str, common), "--out", str(tmp_path / "x.png")]) == 2
  assert "no/such/clip" in (error := capsys.readouterr().err) and "--clip DIR" in error
  run(*common, "--clip", home / "clip", "--out", tmp_path / "a.png", "--singles", tmp_path / "a")
  run(*common, "--clip", home / "clip", "--dtype", "bfloat16", "--out", tmp_path / "b.png", "--singles", tmp_path / "b")
  a, b = (pixels(tmp_path / name / "0000-00-psi1.png").astype(int) for name in "ab")
  assert 0 < np.abs(a - b).mean() < 0.1 * np.abs(a - a.mean()).mean()


@pytest.mark.slow
def test_interpolate_as_a_process(home, tmp_path):
  done = process(
    "interpolate",
    "--workdir",
    home / "run",
    "--prompt",
    "red circle",
    "--prompt",
    "green bar",
    "--steps",
    5,
    "--latents",
    2,
    "--out",
    tmp_path / "walk.gif",
    "--strip",
    tmp_path / "walk.png",
  )
  assert done.returncode == 0 and "5 steps, 2 latents, psi 0.2, step 3" in done.stdout, done.stderr[-2000:]
  with Image.open(tmp_path / "walk.gif") as gif:
    assert gif.n_frames == 8 and gif.info["loop"] == 0  # five forth, three back
  assert pixels(tmp_path / "walk.png").shape[1] > 5 * 96


@pytest.mark.parametrize(
  "arguments, words",
  [
    (("sample", "--psi", "0,x"), "'x' is no number"),
    (("sample", "--psi", "0.1,1.5"), "1.5"),
    (("sample", "--psi", "nan"), "nan"),
    (("sample", "--psi", "0.5,0.50"), "0.50 stands there twice"),
    (("sample", "--latents", "0"), "--latents must lie between 1 and 1,000, got 0"),
    (("sample", "--mean-latents", "-1"), "got -1"),
    (("sample", "--out", "{tmp}/x.jpg"), "must end in .png, got {tmp}/x.jpg"),
    (("sample", "--out", "{tmp}/file/x.png"), "{tmp}/file is not a folder"),
    (("sample", "--singles", "{tmp}/file"), "{tmp}/file is not a folder"),
    (("sample", "--clip", "{home}/wide"), "text features are 48 wide, generator.text_feature_dim is 32"),
    (("sample", "--clip", "nowhere"), "nowhere"),
    (("sample", "--step", "5"), "no checkpoint of step 5"),
    (("sample", "--columns", "-1"), "got -1"),
    (("sample", "--latents-file", "nowhere.npz"), "nowhere.npz"),
    (("sample", "--latents-file", "{tmp}/wide.npz"), "'z' is 9 wide, the generator's latents are 8"),
    (("sample", "--latents-file", "{tmp}/empty.npz"), "must hold an array 'z'"),
    (("sample", "--latents-file", "{tmp}/broken.npz"), "cannot read"),
    (("sample", "--latents-file", "{tmp}/broken.safetensors"), "cannot read"),
    (("sample", "--latents-file", "{tmp}/file"), "ends in .npz or .safetensors"),
    (("sample", "--latents-file", "{tmp}/good.npz", "--latents", "2"), "3 latents per prompt, not 2"),
    (("sample", "--latents-file", "{tmp}/good.npz", "--mean-latents", "2"), "5 latents, not the 2"),
    (("sample", "--save-latents", "{tmp}/l.pt"), "l.pt"),
    (("sample", "--prompt", "x" * 10_000), "10,000 characters"),
    (("sample", "--prompts", "{tmp}/broken.npz"), "broken.npz is not UTF-8"),
    (("interpolate",), "at least two --prompt TEXT, got 1"),
    (("interpolate", "--prompt", "x" * 10_000), "10,000 characters"),
    (("interpolate", "--prompt", "b", "--psi", ""), "'' is no number"),
    (("interpolate", "--latent-walk", "--global"), "--global is for a walk between prompts"),
    (("interpolate", "--latent-walk", "--latents", "1"), "--latents of 2 or more, got 1"),
    (("interpolate", "--prompt", "b", "--steps", "1"), "--steps must lie between 2 and 1000, got 1"),
    (("interpolate", "--prompt", "b", "--psi", "0.1,0.2"), "one truncation"),
    (("interpolate", "--prompt", "b", "--out", "{tmp}/x.png"), "must end in .gif"),
    (("interpolate", "--prompt", "b", "--strip", "{tmp}/x.gif"), "must end in .png"),
    (("interpolate", "--prompt", "b", "--latents", "13"), "between 1 and 12, got 13"),
  ],
)
def test_bad_input_is_one_line_and_status_2(home, tmp_path, capsys, arguments, words):
  (tmp_path / "file").write_text("in the way")
  (tmp_path / "broken.npz").write_bytes(b"PK\xff\xfe")
  (tmp_path / "broken.safetensors").write_bytes(b"nothing")
  np.savez(tmp_path / "wide.npz", z=np.zeros((2, Z + 1)))
  np.savez(tmp_path / "empty.npz", w=np.zeros((2, Z)))
  np.savez(tmp_path / "good.npz", z=np.zeros((3, Z)), mean_z=np.zeros((5, Z)))
  before = sorted(tmp_path.iterdir())
  fill = lambda text: text.format(tmp=tmp_path, home=home)
  command, *rest = arguments
  out = () if "--out" in rest else ("--out", str(tmp_path / ("x.gif" if command == "interpolate" else "x.png")))
  assert main.main([command, "--workdir", str(home / "run"), "--prompt", "a", *out, *map(fill, rest)]) == 2
  said = capsys.readouterr()
  assert said.err.count("\n") == 1 and said.out == "" and fill(words) in said.err, said.err
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
  "arguments, words",
  [
    (("sample", "--psi", "2", "--out", "x.png"), "between 0 and 1, got 2"),
    (("sample", "--latents-file", "nowhere.npz", "--out", "x.png"), "file of latents not found: nowhere.npz"),
    (("interpolate", "--out", "x.gif"), "at least two --prompt TEXT, got 1"),
  ],
)
def test_bad_input_as_a_process(home, arguments, words):
  done = process(*arguments, "--workdir", home / "run", "--prompt", "a")
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
  assert words in done.stderr
