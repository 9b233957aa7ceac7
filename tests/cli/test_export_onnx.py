"""`export --format onnx` as a user runs it: onnxruntime draws our images."""

import re
import shutil

import jax
import numpy as np
import pytest
import random_run
from PIL import Image
from test_export import make_run, refused, run, tower_of

from aurora_jax.cli import main
from aurora_jax.interop.hub import onnx_files

for package in ("torch", "onnx", "onnxruntime"):
  pytest.importorskip(package)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Runs of aurora and megan, and the CLIP of the first."""
  home = tmp_path_factory.mktemp("onnx")
  random_run.make_clip(home / "clip")
  random_run.make_run(home / "aurora", home / "clip")
  make_run(home / "megan", "megan_cifar10.py:test")  # batch norm on the batch's statistics
  return home


def export(workdir, out, *more):
  return ("export", "--workdir", workdir, "--out", out, "--format", "onnx", *more)


def draw(folder, monkeypatch):
  """Runs the example of the card. Returns its 4 images."""
  monkeypatch.chdir(folder)
  code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
  exec(compile(code, "README.md", "exec"), {})
  return [np.asarray(Image.open(folder / f"{i}.png")) for i in range(4)]


def names(folder):
  return {path.name for path in folder.iterdir()}


def random_inputs(session, count, means=3):
  """Inputs of the generator by name, without text and psi."""
  rng = np.random.default_rng(1)
  inputs = {name: rng.random((count, *shape), np.float32) for name, shape in session.latents.items()}
  return inputs | {"mean_z": rng.standard_normal((count, means, inputs["z"].shape[1]), np.float32)}


def assert_rows_are_independent(folder, *prompts):
  """Images of one batch are those of batches of one, for several psi, which change the images."""
  session = onnx_files.Session(folder)
  inputs = random_inputs(session, len(prompts)) | session.encode(token_ids(folder, session.context_length, prompts))
  images = []
  for psi in (0.0, 0.5, 1.0):
    inputs["psi"] = np.array(psi, np.float32)
    whole = session.sample(inputs)
    one = lambda i: session.sample({name: v[i : i + 1] if v.ndim else v for name, v in inputs.items()})
    alone = np.concatenate([one(i) for i in range(len(prompts))])
    assert np.abs(whole - alone).max() < 1e-4 * np.abs(whole).max()
    images.append(whole)
  assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(images, images[1:]))


def token_ids(folder, length, prompts):
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
  ids = np.zeros((len(prompts), length), np.int64)
  for row, prompt in zip(ids, prompts):
    tokens = tokenizer.encode(prompt).ids
    row[: len(tokens)] = tokens
  return ids


def test_aurora(home, tmp_path, monkeypatch, capsys):
  """Experts, deformable convolutions, adaptive kernels."""
  out = tmp_path / "out"
  run(*export(home / "aurora", out, "--prompt", "red circle", "--license", "mit", "--no-samples"))
  said = capsys.readouterr().out
  assert "ONNX opset 18, moving averages of step 3" in said
  assert float(re.search(r"images within (\S+) of ours", said)[1]) <= 1e-3
  assert names(out) == {"README.md", "generator.onnx", "text_encoder.onnx", "tokenizer", "training.json"}
  assert names(tmp_path) == {"out"}
  card = (out / "README.md").read_text()
  assert "library_name: onnx" in card and "opset 18" in card and 'license: "mit"' in card
  assert "Sampling needs onnxruntime, not JAX." in card and card.count("## Use\n") == 1
  assert "PyTorch" not in card and "pipeline.py" not in card
  images = draw(out, monkeypatch)
  assert images[0].shape == (16, 16, 3) and len({image.tobytes() for image in images}) == 4
  assert_rows_are_independent(out, "red circle", "blue square", "green bar", "circle", "a very blue")
  assert main.main(["inspect", str(out)]) == 2  # there is no way back


@pytest.mark.parametrize("kind", ["clip", "tower"])
def test_stylegan_t(home, tmp_path, monkeypatch, kind):
  """A CLIP's text feature, and the generator's own text tower."""
  text = [f"--config.text.clip={home / 'clip'}", *(tower_of(home / "clip") if kind == "tower" else [])]
  widths = [f"--config.{network}.text_dim=16" for network in ("generator", "discriminator")]
  folder = make_run(tmp_path / "run", "stylegan_t_64.py:test", *text, *widths)
  out = tmp_path / "out"
  run(*export(folder, out, "--prompt", "red circle", "--no-samples"))
  assert {"text_encoder.onnx", "tokenizer"} <= names(out)
  assert draw(out, monkeypatch)[0].shape == (16, 16, 3)
  assert_rows_are_independent(out, "red circle", "blue square")


def test_megan(home, tmp_path, monkeypatch, capsys):
  """On the batch's statistics, with samples on the card. Wrong images leave nothing behind."""
  out = tmp_path / "out"
  run(*export(home / "megan", out))
  assert names(out) == {"README.md", "generator.onnx", "samples.png", "training.json"}
  card = (out / "README.md").read_text()
  assert "depends on its batch, of 2 or more" in card and "![samples](samples.png)" in card
  assert len({image.tobytes() for image in draw(out, monkeypatch)}) == 4
  session = onnx_files.Session(out)
  for count in (2, 5):
    assert np.isfinite(session.sample(random_inputs(session, count))).all()

  def copy(source, pipeline, folder):
    shutil.copy(out / "generator.onnx", folder)
    return 2

  another = tmp_path / "another"
  monkeypatch.setattr(onnx_files, "write", copy)
  assert "is not empty" in refused(capsys, *export(home / "megan", out, "--no-samples"))
  run(*export(home / "megan", out, "--no-samples", "--overwrite"))
  sample = onnx_files.Session.sample
  for wrong, shown in ((0.01, "0.01"), (np.nan, "nan")):
    monkeypatch.setattr(onnx_files.Session, "sample", lambda self, inputs: sample(self, inputs) + wrong)
    message = refused(capsys, *export(home / "megan", another, "--no-samples"))
    assert f"nothing is written: onnxruntime's images differ from ours by {shown}" in message
  assert names(tmp_path) == {"out"}


def test_megan_on_running_statistics(tmp_path, monkeypatch):
  """One image is enough, and generators that no image chooses run on none."""
  normal = random_run._random
  is_variance = lambda keys: keys[-1] == jax.tree_util.DictKey("var")
  positive = lambda keys, leaf: np.abs(leaf) if is_variance(keys) else leaf
  monkeypatch.setattr(random_run, "_random", lambda *args: jax.tree_util.tree_map_with_path(positive, normal(*args)))
  folder = make_run(tmp_path / "run", "megan_cifar10.py:test", "--config.generator.bn_at_eval=running")
  run(*export(folder, tmp_path / "out", "--no-samples"))
  session = onnx_files.Session(tmp_path / "out")
  inputs = random_inputs(session, 5)
  whole = session.sample(inputs)
  alone = [session.sample({name: v[i : i + 1] for name, v in inputs.items()}) for i in range(5)]
  assert np.abs(whole - np.concatenate(alone)).max() < 1e-5


def test_what_is_refused_leaves_nothing(home, tmp_path, capsys, monkeypatch):
  of_run = export(home / "megan", tmp_path / "out")
  assert "no checkpoint of step 9" in refused(capsys, *of_run, "--step", 9)
  assert "--push is for --format hub" in refused(capsys, *of_run, "--push", "me/hearts")
  assert "--private is for --format hub" in refused(capsys, *of_run, "--private")
  assert "takes no prompts" in refused(capsys, *of_run, "--prompt", "red")
  assert "run folder not found" in refused(capsys, *export(home / "none", tmp_path / "out"))
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "notes.txt").write_text("mine")
  message = refused(capsys, *export(home / "megan", tmp_path / "mine"), "--overwrite")
  assert "is not an earlier export" in message
  with monkeypatch.context() as patch:
    patch.setattr(onnx_files, "LARGEST", 1000)
    assert "--format onnx is for weights below 0.0 GB" in refused(capsys, *of_run, "--no-samples")
  with monkeypatch.context() as patch:
    patch.setattr(onnx_files, "OPSET", 9)
    message = refused(capsys, *export(home / "aurora", tmp_path / "out", "--no-samples"))
    assert re.search(r"PyTorch \S+ cannot export (text_encoder|generator).onnx: ", message)
  monkeypatch.setattr(onnx_files, "_PACKAGES", ("torch", "onnx_of_tomorrow"))
  assert "--format onnx needs onnx_of_tomorrow: pip install 'aurora_jax[onnx]'" in refused(capsys, *of_run)
  assert names(tmp_path) == {"mine"}
