"""`export --format onnx` as a user runs it: onnxruntime draws our images."""

import re
import shutil

import pytest
import random_run
from PIL import Image
from test_export import make_run, refused, run, tower_of

from aurora_jax.cli import main
from aurora_jax.evaluation import onnx_export
from aurora_jax.interop.hub import onnx_files

for package in ("torch", "onnx", "onnxscript", "onnxruntime"):
  pytest.importorskip(package)
pytestmark = pytest.mark.slow  # the exporter takes tens of seconds


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A run of MEGAN, exported into `folder`."""
  home = tmp_path_factory.mktemp("onnx")
  # One image depends on the whole batch only where the config says so.
  make_run(home / "run", "megan_cifar10.py:test", "--config.generator.bn_at_eval=running")
  run("export", "--workdir", home / "run", "--out", home / "folder", "--format", "onnx", "--license", "mit")
  return home


def export(workdir, out, *more):
  return ("export", "--workdir", workdir, "--out", out, "--format", "onnx", "--no-samples", *more)


def draw(folder, monkeypatch):
  """Runs the example of the card."""
  monkeypatch.chdir(folder)
  code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
  exec(compile(code, "README.md", "exec"), {})
  return [Image.open(folder / f"{i}.png") for i in range(4)]


def test_a_folder_and_its_card(home, tmp_path, monkeypatch):
  folder = shutil.copytree(home / "folder", tmp_path / "folder")
  assert {path.name for path in folder.iterdir()} == {
    "README.md",
    "generator.onnx",
    "generator.onnx.data",
    "samples.png",
    "training.json",
  }
  card = (folder / "README.md").read_text()
  assert "library_name: onnx" in card and "opset 20" in card and "Sampling needs onnxruntime, not JAX." in card
  assert float(re.search(r"images within (\S+) of", card)[1]) <= 1e-3
  images = draw(folder, monkeypatch)
  assert len({image.tobytes() for image in images}) == 4 and images[0].size == (32, 32)


def test_what_is_refused_leaves_nothing(home, tmp_path, capsys, monkeypatch):
  assert "no checkpoint of step 9" in refused(capsys, *export(home / "run", tmp_path / "out", "--step", 9))
  assert "is not empty" in refused(capsys, *export(home / "run", home / "folder"))

  def copy(source, folder):
    for path in (home / "folder").glob("*.onnx*"):
      shutil.copy(path, folder)

  with monkeypatch.context() as patch:
    patch.setattr(onnx_files, "write", copy)
    run(*export(home / "run", tmp_path / "again"))
    run(*export(home / "run", tmp_path / "again", "--overwrite"))
    patch.setattr(onnx_export, "TOLERANCE", -1.0)
    message = refused(capsys, *export(home / "run", tmp_path / "out"))
  assert "nothing is written: onnxruntime's images differ from ours by " in message
  monkeypatch.setattr(onnx_files, "_PACKAGES", ("torch", "onnx_of_tomorrow"))
  message = refused(capsys, *export(home / "run", tmp_path / "out"))
  assert "--format onnx needs onnx_of_tomorrow: pip install 'aurora_jax[onnx]'" in message
  assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize("kind", ["stylegan_t", "stylegan_t with a tower"])
def test_prompts(tmp_path, monkeypatch, capsys, kind):
  """Text encoder and generator, and the tokenizer of the example."""
  clip = random_run.make_clip(tmp_path / "clip")
  text = [f"--config.text.clip={clip}", *(tower_of(clip) if "tower" in kind else [])]
  widths = [f"--config.{network}.text_dim=16" for network in ("generator", "discriminator")]
  folder = make_run(tmp_path / "run", "stylegan_t_64.py:test", *text, *widths)
  run(*export(folder, tmp_path / "out", "--prompt", "red circle"))
  assert "ONNX opset 20, moving averages of step 3" in capsys.readouterr().out
  assert {"text_encoder.onnx", "tokenizer"} <= {path.name for path in (tmp_path / "out").iterdir()}
  assert len({image.tobytes() for image in draw(tmp_path / "out", monkeypatch)}) == 4
  assert main.main(["inspect", str(tmp_path / "out")]) == 2
