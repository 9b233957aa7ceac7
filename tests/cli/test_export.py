"""`export` as a user runs it, and exported folders in place of runs: `sample`, `evaluate`, `inspect`, `train`."""

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal

import jax
import local_hub
import numpy as np
import pytest
import random_run
from PIL import Image

from aurora_jax import config, config_files
from aurora_jax.cli import main
from aurora_jax.errors import UserError
from aurora_jax.evaluation import caption_retrieval, judge, trained_generator
from aurora_jax.interop import clip_hf, tensor_files
from aurora_jax.interop.hub import remote
from aurora_jax.interop.hub import weights as hub_weights
from aurora_jax.runs import checkpoint_manager, checkpoint_reader
from aurora_jax.systems import hub_card, registry
from aurora_jax.systems.aurora import released
from aurora_jax.systems.stylegan_t import config as stylegan_t_config
from aurora_jax.training import initialize, optimizers, schedule
from aurora_jax.training import step as step_lib

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
ROWS = (
  {"step": 0, "seconds": 0.0, "kind": "start", "devices": "1 cpu"},
  {"step": 3, "seconds": 150.0, "kind": "train", "images": 12},
  {"step": 2, "seconds": 100.0, "kind": "judge", "judge/top1_of_32": 0.1},
  {
    "step": 3,
    "seconds": 150.0,
    "kind": "judge",
    "judge/top1_of_32": 0.75,
    "judge/real_top1_of_32": 0.9,
    "judge/images": 40.0,
    "judge/frechet": 2.5,
  },
  {"step": 9, "seconds": 900.0, "kind": "train", "images": 36},
)


SCHEDULE = {"resolutions": [4, 8, 16], "max_images": {"4": 8, "8": 8}}


def run(*arguments):
  assert main.main([*map(str, arguments)]) == 0


def refused(capsys, *arguments):
  """The one line of a command that is refused."""
  capsys.readouterr()
  assert main.main([*map(str, arguments)]) == 2
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aurora_jax ")]
  assert len(lines) == 1
  return lines[0]


def make_run(folder, name, *overrides):
  """A run of any config with random weights and one checkpoint, of step 3."""
  experiment = config_files.load([f"--config={ROOT / 'configs' / name}", *overrides])
  system = registry.system_class(experiment.system)(experiment)
  abstract = jax.eval_shape(optimizers.init_state(system), jax.random.key(0))
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(config_files.to_json(experiment))
  with checkpoint_manager.Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(3, jax.device_put(random_run._random(abstract, 0.5)), config_files.to_mapping(experiment))
  return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A run with a history, exported with samples into `folder`."""
  home = random_run.make_home(tmp_path_factory.mktemp("export"))
  (home / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  run("export", "--workdir", home / "run", "--out", home / "folder", "--license", "cc0-1.0", "--prompt", "red circle")
  return home


def weights(place):
  return trained_generator.load(place).weights.networks


def assert_same(first, second):
  assert jax.tree.structure(first) == jax.tree.structure(second)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_folder_and_its_card(home):
  folder = home / "folder"
  for path in (path for path in folder.rglob("*") if path.is_file()):
    assert path.suffix in (".json", ".safetensors", ".py", ".md", ".png", ".txt"), path  # no pickle
    assert path.suffix != ".safetensors" or path.read_bytes()[8:9] == b"{"
  assert not list(home.glob(".folder*"))
  with Image.open(io.BytesIO((folder / "samples.png").read_bytes())) as sheet:
    assert sheet.format == "PNG" and sheet.width > 4 * 96
  card = (folder / "README.md").read_text()
  for line in (
    'license: "cc0-1.0"',
    "![samples](samples.png)",
    'images = pipe("red circle", num_images=4, seed=0, psi=0.7)',
    "| caption ranked first among 32, training captions | 0.75 | caption-retrieval by a second CLIP, psi 1, 40 images, "
    "real images 0.9 |",
    "| Frechet distance | 2.5 | embeddings of a second CLIP, psi 1 |",
    "- 3 steps, 12 images seen (4 a step)",
    "- wall time 2.5 minutes on 1 cpu",
  ):
    assert line in card.splitlines(), line
  assert "Not selected: seed 0, psi 1" in card


def test_sampling_from_the_folder_is_sampling_from_the_run(home, tmp_path):
  """The samples on the card are the run's."""
  run("sample", "--workdir", home / "folder", "--prompt", "red circle", "--latents", 4, "--out", tmp_path / "sheet.png")
  assert (tmp_path / "sheet.png").read_bytes() == (home / "folder" / "samples.png").read_bytes()
  assert_same(weights(home / "folder"), weights(home / "run"))


def tower_of(clip):
  """Overrides by which a generator has a text encoder of a CLIP's sizes."""
  text = clip_hf.read_config(clip).text
  names = [field.name for field in dataclasses.fields(stylegan_t_config.TextTower)]
  return [f"--config.generator.text_tower.{name}={getattr(text, name)}" for name in names]


@pytest.mark.parametrize("kind", ["megan", "stylegan_t", "stylegan_t with a tower", "aurora that grows"])
def test_runs_of_every_system_go_there_and_back(home, tmp_path, kind):
  text = [f"--config.text.clip={home / 'clip'}"]
  if kind == "megan":
    folder = make_run(tmp_path / "run", "megan_cifar10.py:test")
  elif kind == "aurora that grows":
    folder = pathlib.Path(shutil.copytree(home / "run", tmp_path / "run"))
    edit(folder / "config.json", schedule=json.loads((folder / "config.json").read_text())["schedule"] | SCHEDULE)
    stage = {"resolution": 8, "step": 0, "reason": "start", "reference": 1.0}
    progress = folder / "checkpoints" / "3" / "progress"
    progress.mkdir(exist_ok=True)
    (progress / "metadata").write_text(json.dumps({"schedule": {"stages": [stage], "measurements": []}}))
  else:
    tower = tower_of(home / "clip") if "tower" in kind else []
    widths = [f"--config.{network}.text_dim=16" for network in ("generator", "discriminator")]
    folder = make_run(tmp_path / "run", "stylegan_t_64.py:test", *text, *widths, *tower)
  run("export", "--workdir", folder, "--out", tmp_path / "out", "--no-samples")
  before, after = trained_generator.load(folder), trained_generator.load(tmp_path / "out")
  assert after.experiment.resolution == before.experiment.resolution
  assert after.step == before.step == 3 and after.experiment.generator == before.experiment.generator
  assert_same(before.weights.networks, after.weights.networks)
  towers = [model.weights.frozen["clip"]["params"] for model in (before, after) if "clip" in model.weights.frozen]
  if towers:
    assert_same(*({name: tower[name] for name in ("text", "text_projection")} for tower in towers))
  prompts = ["red circle"] if before.experiment.conditional else [""]
  assert_same(before.system.inputs(prompts), after.system.inputs(prompts))
  if kind == "aurora that grows":
    assert after.experiment.resolution == 8
    grown = dataclasses.replace(before.experiment.train, init_from=str(tmp_path / "out"))
    whole = config_files.from_stored(json.loads((folder / "config.json").read_text()))
    assert schedule.first_resolution(dataclasses.replace(whole, train=grown)) == 8


def beginning_with(home, path, **generator):
  experiment = trained_generator.load(home / "run").experiment
  train = dataclasses.replace(experiment.train, init_from=str(path))
  cfg = dataclasses.replace(experiment.generator, **generator)
  return dataclasses.replace(experiment, train=train, generator=cfg)


def test_training_begins_with_the_folder(home):
  experiment = beginning_with(home, home / "folder")
  initialize.check(experiment)
  system = registry.system_class("aurora")(experiment)
  place = initialize._exported(experiment.train.init_from)
  abstract = step_lib.abstract_state(system)
  taken, origin = initialize._take_over_exported(system, abstract, place)
  wanted = weights(home / "folder")["generator"]
  params, buffers = wanted["params"], {name: value for name, value in wanted.items() if name != "params"}
  assert taken.keys() == {"generator"} and origin.endswith("discriminator fresh (the folder has none)")
  assert_same(taken["generator"], {"params": params, "ema": params, "variables": buffers})
  with pytest.raises(UserError, match="another one than the config's: generator.heads 2 -> 4"):
    initialize.check(beginning_with(home, home / "folder", heads=4))
  with pytest.raises(UserError, match="no checkpoint there"):
    initialize.check(beginning_with(home, home / "clip"))
  other = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3,), leaf.dtype, sharding=leaf.sharding), abstract)
  with pytest.raises(UserError, match=f"init_from={home / 'folder'}: it does not fit: shape .* more differences"):
    initialize._take_over_exported(system, other, place)


def edit(path, **changes):
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folders_that_cannot_be_sampled_from(home, tmp_path, capsys):
  """One line each; the folder of samples stays empty."""
  copies = iter(range(100))

  def copy():
    return pathlib.Path(shutil.copytree(home / "folder", tmp_path / f"copy{next(copies)}"))

  unknown, of_another, without, sharded, grown = copy(), copy(), copy(), copy(), copy()
  edit(unknown / "config.json", colour=1)
  edit(of_another / "config.json", model_type="megan")
  (without / "experiment.json").unlink()
  (sharded / "model.safetensors").unlink()
  index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
  (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
  experiment = json.loads((grown / "experiment.json").read_text())
  edit(grown / "experiment.json", generator=experiment["generator"] | {"z_dimension": 3})
  out = tmp_path / "out" / "sheet.png"
  sample = lambda folder, *more: refused(
    capsys, "sample", "--workdir", folder, "--prompt", "red", "--out", out, "--latents", 1, *more
  )
  assert "no field 'colour' in the generator of aurora" in sample(unknown)
  assert "model of type 'megan', not 'aurora'" in sample(of_another)
  assert "has no experiment.json" in sample(without)
  assert "shards of the weights are missing: model-00001" in sample(sharded)
  assert "experiment.json: config: no field 'generator.z_dimension'" in sample(grown)
  assert "text features are 48 wide, generator.text_feature_dim is 32" in sample(
    home / "folder", "--clip", home / "wide"
  )
  assert "--step is for a run" in sample(home / "folder", "--step", 3)
  assert not out.parent.exists()


def test_exports_that_are_refused(home, tmp_path, capsys):
  export = lambda *more: refused(capsys, "export", "--out", tmp_path / "out", *more)
  of_run = ("--workdir", home / "run")
  for arguments, message in (
    (("--workdir", home / "none"), "run folder not found"),
    (("--workdir", home / "folder"), "is an exported folder already"),
    ((*of_run, "--step", 9), "no checkpoint of step 9"),
    ((*of_run, "--clip", home / "wide"), "48 wide"),
    ((*of_run, "--private"), "--private is for --push"),
    ((*of_run, "--push", "me"), "named OWNER/NAME, got 'me'"),
    ((*of_run, "--format", "released", "--license", "mit"), "--license is for --format hub"),
    ((*of_run, "--format", "released"), "out: weights are written to"),
  ):
    assert message in export(*arguments)
  assert "cannot express this configuration: generator.text_attention" in refused(
    capsys, "export", *of_run, "--format", "released", "--out", tmp_path / "out.safetensors"
  )
  assert "is not empty" in refused(capsys, "export", *of_run, "--out", home / "folder")
  assert not list(tmp_path.iterdir())


def test_a_terminated_export_leaves_nothing(home, tmp_path, monkeypatch):
  """SIGTERM in the middle of the weights. After SIGKILL a hidden folder is left, and none of the name asked for."""
  before = signal.getsignal(signal.SIGTERM)

  def write(folder, *_):
    (folder / "model.safetensors").write_bytes(b"half")
    assert [path.name.startswith(".out.") for path in tmp_path.iterdir()] == [True]
    os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(hub_weights, "write", write)
  with pytest.raises(SystemExit) as error:
    main.main(["export", "--workdir", str(home / "run"), "--out", str(tmp_path / "out"), "--no-samples"])
  assert error.value.code == 143 and not list(tmp_path.iterdir())
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_of_the_variant_released_ends_in_the_released_code(home, tmp_path, capsys):
  variant = f"--config={ROOT / 'configs/aurora_64.py'}:released-test"
  folder = random_run.make_run(tmp_path / "run", home / "clip", variant)
  run("export", "--workdir", folder, "--out", tmp_path / "a.safetensors", "--format", "released")
  assert "a.safetensors: ema of step 3" in capsys.readouterr().out
  cfg = released.config_from_released(json.loads((tmp_path / "a.json").read_text()))
  state_dict = tensor_files.read(tmp_path / "a.safetensors")
  shapes = {name: tuple(value.shape) for name, value in state_dict.items() if tensor_files.is_array(value)}
  assert shapes == {name: tuple(shape) for name, shape in released.released_shapes(cfg).items()}  # strict=True
  found = released.import_generator(state_dict, cfg)
  _, stored = checkpoint_reader.read_parts(folder / "checkpoints", ["networks/generator/ema"])
  assert_same(found["params"], stored["networks/generator/ema"])


def test_inspecting_a_folder(home, tmp_path, capsys):
  run("inspect", home / "folder")
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"exported   {home / 'folder'} (a generator of system aurora, for PyTorch)"
  assert "from       moving averages of step 3 of a run of aurora_64" in lines
  assert any(line.startswith("text       its own text encoder: width 32, 1 layers") for line in lines)
  folder = pathlib.Path(shutil.copytree(home / "folder", tmp_path / "folder"))
  edit(folder / "config.json", z_dim=9)
  assert "the weights do not fit the configuration; 1 misshapen" in refused(capsys, "inspect", folder)


def test_evaluating_a_folder_leaves_it_as_it_is(home, tmp_path, capsys, monkeypatch):
  files = lambda: sorted(path.name for path in (home / "folder").rglob("*") if "__pycache__" not in str(path))
  before = files()
  figures = {"judge/top1_of_32": 0.5, "judge/chance_of_32": 1 / 32, "judge/captions": 40.0}
  result = caption_retrieval.Result(figures, (), (), (), ())
  monkeypatch.setattr(judge, "load_judge", lambda path: path)
  monkeypatch.setattr(caption_retrieval, "evaluate", lambda model, *_, **__: result)
  flags = ("--workdir", home / "folder", "--judge", home / "clip", "--figures", tmp_path / "figures.json")
  assert "does not say where the data set is: --data DIR" in refused(capsys, "evaluate", *flags)
  run("evaluate", *flags, "--data", home)
  assert "50.0 %" in capsys.readouterr().out
  assert json.loads((tmp_path / "figures.json").read_text()) == {"step": 3, **figures} and files() == before


@pytest.fixture
def server(tmp_path, monkeypatch):
  """A Hub on the loopback with a cache of its own."""
  constants = pytest.importorskip("huggingface_hub.constants")
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files as Git LFS objects, by plain requests
  monkeypatch.setenv("HF_TOKEN", "hf_local")
  remote.download.cache_clear()
  with local_hub.LocalHub().running() as hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    yield hub
  remote.download.cache_clear()


def test_pushing_and_sampling_from_the_hub(home, tmp_path, server, capsys, monkeypatch):
  flags = ("export", "--workdir", home / "run", "--no-samples", "--out")
  run(*flags, tmp_path / "quiet")
  assert server.requests == []  # nothing leaves without the flag
  run(*flags, tmp_path / "out", "--push", "me/hearts", "--private")
  assert f"pushed to {server.address}/me/hearts" in capsys.readouterr().out
  written = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*")}
  written = {name: path.read_bytes() for name, path in written.items() if path.is_file()}
  assert server.files["me/hearts"] == written and server.private["me/hearts"]
  assert sorted(map(len, server.objects.values())) == sorted(
    len(content) for name, content in written.items() if name.endswith(".safetensors")
  )
  assert_same(weights("hf:me/hearts"), weights(home / "folder"))
  run("inspect", "hf:me/hearts")
  cached = remote.download("hf:me/hearts")
  assert not list(cached.rglob("*.py"))  # no code is downloaded

  server.refusal = "You have no write access here"
  message = refused(capsys, *flags, tmp_path / "kept", "--push", "me/hearts")
  assert f"{tmp_path / 'kept'} is written, but it could not be pushed to me/hearts: " in message
  assert "You have no write access here" in message and (tmp_path / "kept" / "model.safetensors").is_file()
  server.files["me/bert"] = {"config.json": b'{"hidden_size": 1}'}
  sample = lambda name: refused(capsys, "sample", "--workdir", name, "--prompt", "x", "--out", tmp_path / "x.png")
  assert "no such repository" in sample("hf:me/none")
  assert "is named hf:OWNER/NAME" in sample("hf:hearts")
  assert "is no generator that `export` wrote" in sample("hf:me/bert")
  monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
  assert "hf:me/other cannot be downloaded: the Hub cannot be reached" in sample("hf:me/other")
  monkeypatch.setenv("HF_TOKEN", "")
  monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
  assert "without a token of the Hub" in refused(capsys, *flags, tmp_path / "no", "--push", "me/hearts")
  assert not (tmp_path / "no").exists()


def test_the_card_names_all_data(tmp_path):
  for name in ("first", "second"):
    (tmp_path / name).mkdir()
    manifest = {"schema_version": 1, "name": name, "source": "here", "licence": "CC0", "resolution": 8}
    splits = {"splits": {"train": {"examples": 5, "shards": []}}}
    (tmp_path / name / "manifest.json").write_text(json.dumps(manifest | splits))
  data = config.Data(path=str(tmp_path / "first"), mixture=(f"0.25:{tmp_path / 'second'}", "0.5:/gone/third"))
  assert hub_card._dataset(config.Experiment(data=data)) == {
    "dataset": "first",
    "dataset_images": 5,
    "dataset_notes": (
      "source: here",
      "license: CC0",
      "also second, 25 % of the images; source: here; license: CC0",
      "also third, 50 % of the images",
    ),
  }
