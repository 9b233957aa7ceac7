"""Checkpoints to and from the released code, file to folder to file, bit by bit."""

import functools
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.errors import UserError
from aurora_jax.interop import tensor_files
from aurora_jax.runs import checkpoint_manager, checkpoint_reader, fingerprint, workdir
from aurora_jax.systems.aurora import convert as convert_lib
from aurora_jax.systems.aurora import generator as generator_lib
from aurora_jax.systems.aurora import released

pytestmark = pytest.mark.slow

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
WEIGHTS = GOLDENS / "tiny16.state_dict.safetensors"
KWARGS = GOLDENS / "tiny16.config.json"


@pytest.fixture(scope="module")
def state_dict():
  return load_file(WEIGHTS)


@pytest.fixture(scope="module", autouse=True)
def _shapes_once():
  """Every conversion traces the generator for its shapes, most often the same one."""
  traced = functools.cache(generator_lib.abstract_variables)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(generator_lib, "abstract_variables", lambda cfg: jax.tree.map(lambda leaf: leaf, traced(cfg)))
    yield


def convert(*args):
  """The command; returns its status."""
  return main.main(["convert", *map(str, args)])


def refused(capsys, *args):
  """The one line with which the command refuses."""
  capsys.readouterr()
  assert convert(*args) == 2
  out, error = capsys.readouterr()
  assert error.count("\n") == 1 and not out, (error, out)
  return error


def parts_of(folder, *parts):
  """Parts of the generator in a converted folder's checkpoint."""
  experiment = workdir.RunFolder(folder).experiment()
  variables = generator_lib.abstract_variables(experiment.generator)
  params, others = variables["params"], {"buffers": variables["buffers"]}
  abstract = {"params": params, "ema": params, "variables": others}
  wanted = {"networks": {"generator": {part: abstract[part] for part in parts}}}
  return checkpoint_reader.read(pathlib.Path(folder) / "checkpoints", wanted)[1]["networks"]["generator"]


def assert_same(first, second):
  assert set(first) == set(second)
  for name, array in first.items():
    one, two = np.asarray(array), np.asarray(second[name])
    assert (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes()), name


def test_safetensors_to_ours_and_back(tmp_path, state_dict, capsys):
  run, back = tmp_path / "a" / "run", tmp_path / "back.safetensors"
  assert convert(WEIGHTS, run, "--released-config", KWARGS, "--clip", "some/clip") == 0
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["run"]
  experiment = config_files.from_json((run / "config.json").read_text())
  assert (experiment.text.clip, experiment.generator.text_attention) == ("some/clip", "independent")
  assert checkpoint_reader.only_parts(run / "checkpoints") == [
    "generator/ema",
    "generator/params",
    "generator/variables",
  ]
  variables = released.import_generator(state_dict, experiment.generator)
  parts = parts_of(run, "ema", "params", "variables")
  for part in ("ema", "params"):
    jax.tree.map(np.testing.assert_array_equal, parts[part], variables["params"])
  jax.tree.map(np.testing.assert_array_equal, parts["variables"]["buffers"], variables["buffers"])

  assert convert(run, back) == 0
  assert_same(load_file(back), state_dict)  # both names of doubled entries among them
  assert (
    released.config_from_released(json.loads((tmp_path / "back.json").read_text())).experts
    == experiment.generator.experts
  )
  # And once more, by the .json that lies beside; the folder's state is the same in every bit.
  assert convert(back, tmp_path / "again") == 0
  assert "back.json" in capsys.readouterr().out
  assert fingerprint.of_checkpoint(tmp_path / "again" / "checkpoints") == fingerprint.of_checkpoint(run / "checkpoints")

  assert main.main(["inspect", str(run)]) == 0
  assert f"--config.train.init_from={run}" in capsys.readouterr().out


def test_both_sets_of_a_pth_file_and_back(tmp_path, state_dict, monkeypatch, capsys):
  torch = pytest.importorskip("torch")
  tensors = {name: torch.from_numpy(array.copy()) for name, array in state_dict.items()}
  for name in list(tensors):  # one tensor under two names, as the released module saves it
    if ".mlp." in name:
      tensors[name] = tensors[name.replace(".mlp.", ".")]
  buffers = set(released.fir_buffers(released.config_from_released(json.loads(KWARGS.read_text())))[0])
  buffers |= {"w_avg"} | {name for name in tensors if name.endswith((".freqs", ".phases", ".transform"))}
  raw = {}
  for name, tensor in tensors.items():
    twin = raw.get(name.replace(".mlp.", ".")) if ".mlp." in name else None
    raw[name] = tensor if name in buffers else tensor + 1 if twin is None else twin
  path = tmp_path / "released.pth"
  torch.save(
    {
      "generator_smooth": tensors,
      "generator": raw,
      "discriminator": {"w": torch.zeros(3)},
      "running_metadata": {"iter": 3},
    },
    path,
  )
  run, back = tmp_path / "run", tmp_path / "back.pth"
  args = (path, run, "--released-config", KWARGS)
  with monkeypatch.context() as without:
    without.setitem(sys.modules, "torch", None)
    assert convert(*args) == 0
    assert "needs PyTorch" in refused(capsys, run, back)
    assert not back.exists() and not back.with_suffix(".json").exists()
  assert convert(run, back, "--weights", "both") == 0
  content = torch.load(back, weights_only=True)
  assert list(content) == ["generator_smooth", "generator"]
  assert_same(content["generator_smooth"], tensors)
  assert_same(content["generator"], raw)
  name = "text_head.transformer.res_blocks.0.c_fc.weight"
  smooth = content["generator_smooth"]
  assert smooth[name].data_ptr() == smooth[name.replace("c_fc", "mlp.c_fc")].data_ptr()
  # One set only: for both parts.
  assert convert(path, tmp_path / "raw", "--released-config", KWARGS, "--weights", "generator") == 0
  assert convert(tmp_path / "raw", tmp_path / "raw.safetensors") == 0
  assert_same(load_file(tmp_path / "raw.safetensors"), {name: tensor.numpy() for name, tensor in raw.items()})
  # Overwriting: asked for, and only what was converted.
  assert "is not empty" in refused(capsys, *args)
  assert "exists" in refused(capsys, run, back)
  assert convert(*args, "--overwrite") == 0 and convert(run, back, "--overwrite") == 0
  assert list(torch.load(back, weights_only=True)) == ["generator_smooth"]
  # Fourier frequencies of two networks cannot be in one checkpoint.
  raw["synthesis.net.0.0.freqs"] = raw["synthesis.net.0.0.freqs"] + 1
  torch.save({"generator_smooth": tensors, "generator": raw}, path)
  assert "synthesis/input/freqs" in refused(capsys, path, tmp_path / "x", "--released-config", KWARGS)
  assert sorted(entry.name for entry in tmp_path.iterdir()) == [
    "back.json",
    "back.pth",
    "raw",
    "raw.json",
    "raw.safetensors",
    "released.pth",
    "run",
  ]


def test_half_precision_files(tmp_path, state_dict):
  torch = pytest.importorskip("torch")
  torch.save(
    {"generator_smooth": {name: torch.from_numpy(array.copy()).half() for name, array in state_dict.items()}},
    tmp_path / "half.pth",
  )
  assert convert(tmp_path / "half.pth", tmp_path / "run", "--released-config", KWARGS) == 0
  variables = released.import_generator(
    {name: array.astype(np.float16) for name, array in state_dict.items()},
    released.config_from_released(json.loads(KWARGS.read_text())),
  )
  jax.tree.map(np.testing.assert_array_equal, parts_of(tmp_path / "run", "ema")["ema"], variables["params"])


def test_wrong_input_is_one_line(tmp_path, state_dict, capsys):
  torch = pytest.importorskip("torch")
  run, known = tmp_path / "run", ("--released-config", KWARGS)
  clip = {"text_model.embeddings.token_embedding.weight": np.zeros((4, 2), np.float32)}
  save_file(clip, tmp_path / "clip.safetensors")
  error = refused(capsys, tmp_path / "clip.safetensors", run, *known)
  assert "missing: w_avg" in error and "1 left over: text_model.embeddings.token_embedding.weight" in error
  error = refused(capsys, WEIGHTS, run, "--config", "configs/aurora_64.py:test")
  assert str(WEIGHTS) in error and "does not fit the configuration" in error and "misshapen" in error
  assert "which generator is it?" in refused(capsys, WEIGHTS, run)
  assert "same" in refused(capsys, WEIGHTS, run, *known, "--config", "configs/aurora_64.py:test")
  assert "does not exist" in refused(capsys, tmp_path / "nowhere.pth", run, *known)
  torch.save({"optimizer": {"lr": 0.1}}, tmp_path / "odd.pth")
  assert "holds no generator" in refused(capsys, tmp_path / "odd.pth", run, *known)
  torch.save({"generator": {name: torch.from_numpy(array) for name, array in state_dict.items()}}, tmp_path / "raw.pth")
  assert "no generator_smooth" in refused(capsys, tmp_path / "raw.pth", run, *known, "--weights", "ema")
  (tmp_path / "cut.pth").write_bytes((tmp_path / "raw.pth").read_bytes()[:5000])
  assert "cut off" in refused(capsys, tmp_path / "cut.pth", run, *known)
  (tmp_path / "bad.json").write_text('{"resolution": 16, "mask_self": true}')
  assert "mask_self=True" in refused(capsys, WEIGHTS, run, "--released-config", tmp_path / "bad.json")
  assert "must be a run's folder" in refused(capsys, WEIGHTS, tmp_path / "x.pth", *known)
  assert not run.exists()

  run.mkdir()
  (run / "notes.txt").write_text("mine")
  assert "not an earlier conversion" in refused(capsys, WEIGHTS, run, *known, "--overwrite")
  assert "is no run" in refused(capsys, run, tmp_path / "x.safetensors")
  assert convert(WEIGHTS, tmp_path / "good", *known) == 0
  good = tmp_path / "good"
  assert "holds one set" in refused(capsys, good, tmp_path / "x.safetensors", "--weights", "both")
  assert "weights are written to" in refused(capsys, good, tmp_path / "x.txt")
  assert "no checkpoint of step 7" in refused(capsys, good, tmp_path / "x.safetensors", "--step", 7)
  assert "--clip is for the other way" in refused(capsys, good, tmp_path / "x.safetensors", "--clip", "a")
  values = json.loads((good / "config.json").read_text())
  values["generator"] |= {"text_attention": "scaled", "feed_forward_ratio": 3}
  (good / "config.json").write_text(json.dumps(values))
  error = refused(capsys, good, tmp_path / "x.safetensors")
  assert "text_attention is 'scaled'" in error and "feed_forward_ratio is 3" in error
  (tmp_path / "x.json").write_text("mine")
  values["generator"] |= {"text_attention": "uniform", "feed_forward_ratio": 4}
  (good / "config.json").write_text(json.dumps(values))
  assert "x.json exists" in refused(capsys, good, tmp_path / "x.safetensors")
  assert not list(tmp_path.glob("*x.safetensors*"))


def test_the_weights_are_in_memory_once(tmp_path):
  """Peak memory of the import, as numpy allocates it, against the size of the weights."""
  import tracemalloc

  kwargs = json.loads(KWARGS.read_text()) | {"fmaps_max": 128, "fmaps_base": 4096}
  cfg = released.config_from_released(kwargs)
  shapes = released.released_shapes(cfg)
  fir = dict.fromkeys(*released.fir_buffers(cfg))
  path = tmp_path / "x.safetensors"
  arrays = ((name, fir.get(name, np.zeros(shape))) for name, shape in shapes.items())
  tensor_files.write_safetensors(path, shapes, arrays)
  size = path.stat().st_size
  experiment = convert_lib.experiment_of(cfg, "x")
  convert_lib.import_released(path, tmp_path / "first", experiment)
  tracemalloc.start()
  try:
    convert_lib.import_released(path, tmp_path / "run", experiment)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert 0.9 * size < peak < 1.5 * size


def test_a_failed_import_leaves_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(
    checkpoint_manager, "write_parts", lambda *args: (_ for _ in ()).throw(checkpoint_manager.SaveError("disk full"))
  )
  experiment = convert_lib.experiment_of(released.config_from_released(json.loads(KWARGS.read_text())), "x")
  with pytest.raises(UserError, match="disk full"):
    convert_lib.import_released(WEIGHTS, tmp_path / "run", experiment)
  assert not list(tmp_path.iterdir())
