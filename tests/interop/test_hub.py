"""Runs to folders in the Hub's layout, those in PyTorch without this package, and the way back."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import random_run

from aurora_jax import config_files
from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.evaluation import trained_generator
from aurora_jax.interop import clip_hf
from aurora_jax.interop.hub import folder as hub_folder
from aurora_jax.interop.hub import model_card, twin_map, weights
from aurora_jax.ops.losses import normalize
from aurora_jax.runs import checkpoint_reader
from aurora_jax.systems import hub
from aurora_jax.systems.megan import config as megan_config
from aurora_jax.systems.megan import generator as megan_generator
from aurora_jax.systems.megan import torch_names as megan_names
from aurora_jax.systems.stylegan_t import config as stylegan_t_config
from aurora_jax.systems.stylegan_t import generator as stylegan_t_generator
from aurora_jax.systems.stylegan_t import torch_names as stylegan_t_names

pytest.importorskip("torch")
PROMPTS = ["a red circle", "very blue"]
STYLEGAN_T = stylegan_t_config.Generator(
  resolution=8, z_dim=4, text_dim=16, channels_base=64, channels_max=8, residual_blocks=1, norm_groups=2
)
MEGAN = megan_config.Generator(resolution=16, z_dim=4, channels=2, generators=3, bn_at_eval="running")

# Runs where neither jax nor this package can be imported.
SCRIPT = """
import sys, time
for name in ("jax", "jaxlib", "flax", "aurora_jax"):
  sys.modules[name] = None
import importlib.util, numpy as np, torch
torch.set_num_threads(1)

def pipeline(name):
  spec = importlib.util.spec_from_file_location(f"pipeline_{name}", f"{name}/pipeline.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module

given = dict(np.load("latents.npz"))
prompts = ["a red circle", "very blue"]
AuroraPipeline = pipeline("aurora").AuroraPipeline
pipe = AuroraPipeline.from_pretrained("aurora")
start = time.perf_counter()
found = {"aurora": pipe(prompts, psi=0.7, latents=given, output="np", batch_size=3)}
seconds = time.perf_counter() - start
print(f"{len(found['aurora'])} images in {seconds:.2f} s")
found["same_z"] = pipe(prompts, psi=0.7, latents=given["z"], mean_latents=0, output="np")
drawn = pipe(prompts, num_images=3, seed=5, psi=0.5, output="np")
found["drawn"], found["one"] = drawn, pipe(prompts[0], seed=6, psi=0.5, output="np")
images = pipe("a red heart", num_images=2, seed=0, psi=0.7)
assert [image.size for image in images] == [(16, 16)] * 2 and images[0].mode == "RGB"
assert pipe("a red heart", num_images=2, output="pt").shape == (2, 3, 16, 16)
found["ids"] = pipe.tokenize([*prompts, "red " * 40, ""], 10).numpy()
for arguments, words in (
  (dict(prompt=None), "prompt must be a text"), (dict(prompt="a", psi=2), "psi must be from 0 to 1"),
  (dict(prompt="a", latents=np.zeros((2, 5))), "latents must be of these widths"), (dict(prompt="a", output="x"), "output"),
):
  try:
    pipe(**arguments)
  except ValueError as error:
    assert words in str(error), error
  else:
    raise AssertionError(words)

pipe = pipeline("stylegan_t").StyleganTPipeline.from_pretrained("stylegan_t")
found["embedding"] = pipe.encode(prompts).numpy()
found["stylegan_t"] = pipe(prompts, psi=0.7, latents=np.ones((1, 4)), output="np")

pipe = pipeline("megan").MeganPipeline.from_pretrained("megan")
found["megan"] = pipe(num_images=4, seed=3, output="np", batch_size=2)
found["megan_one"] = pipe(num_images=1, seed=5, output="np")
try:
  pipe(num_images=4, psi=0.5)
except ValueError as error:
  assert "no truncation" in str(error), error
else:
  raise AssertionError("psi")
np.savez("found.npz", **found)
"""  # noqa: E501


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A run of Aurora with its CLIP, three exported folders, and what PyTorch makes of them."""
  home = random_run.make_home(tmp_path_factory.mktemp("hub"))
  card = {
    "license": "cc-by-sa-4.0",
    "dataset": "OpenMoji",
    "metrics": (model_card.Metric("fid", "FID-1k", 12.5, "1,000 images, psi 1"),),
    "cost": ("3 steps: no time at all",),
    "image": "samples.png",
  }
  hub.export_run(home / "run", home / "aurora", card=card, extra={"samples.png": b"\x89PNG"})
  text = clip_hf.load(home / "clip")
  for names, generator, cfg, with_text in (
    (stylegan_t_names, stylegan_t_generator, STYLEGAN_T, text),
    (megan_names, megan_generator, MEGAN, None),
  ):
    variables = random_run._random(generator.abstract_variables(cfg), 0.5)
    if cfg is MEGAN:
      variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    model = names.hub_model(variables, cfg)
    hub_folder.write(home / model.config["model_type"], model, card="", text=with_text)
  rng = np.random.default_rng(0)
  arrays = {"z": rng.standard_normal((2, 2, 8), np.float32), "mean_z": rng.standard_normal((2, 3, 8), np.float32)}
  np.savez(home / "latents.npz", **arrays)
  environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT], cwd=home, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert "4 images in " in done.stdout
  with np.load(home / "found.npz") as found:
    return home, arrays, dict(found)


@pytest.mark.slow
def test_the_pipeline_draws_what_sampling_a_run_draws(home):
  home, arrays, found = home
  run = trained_generator.load(home / "run", batch_size=4)
  given = latents_lib.Latents({"z": arrays["z"]}, {"z": arrays["mean_z"]})
  ours = run.sample(PROMPTS, latents=given, psi=0.7).images.reshape(-1, 16, 16, 3)
  assert np.abs(ours - found["aurora"]).max() / np.abs(ours).max() < 1e-4
  assert not np.allclose(found["aurora"], found["same_z"])  # there truncation moves toward the mean of all
  tokens = run.system.inputs([*PROMPTS, "red " * 40, ""])
  np.testing.assert_array_equal(found["ids"], tokens)


@pytest.mark.slow
def test_drawn_images_depend_on_their_own_seed(home):
  _, _, found = home
  assert found["drawn"].shape == (6, 16, 16, 3)
  assert len({image.tobytes() for image in found["drawn"]}) == 6
  np.testing.assert_allclose(found["drawn"][1], found["one"][0], atol=1e-5)
  np.testing.assert_allclose(found["megan"][2], found["megan_one"][0], atol=1e-5)


@pytest.mark.slow
def test_embeddings_are_those_of_our_clip(home):
  home, _, found = home
  written, original = clip_hf.load(home / "stylegan_t" / "text_encoder", text_only=True), clip_hf.load(home / "clip")
  for name in ("text", "text_projection"):
    leaves = zip(*(jax.tree.leaves(bundle.variables["params"][name]) for bundle in (written, original)))
    assert all(np.array_equal(a, b) for a, b in leaves)
  embed = jax.jit(lambda variables, tokens: normalize(written.module().apply(variables, tokens, method="embed_text")))
  np.testing.assert_allclose(embed(written.variables, written.tokenizer(PROMPTS)), found["embedding"], atol=1e-5)
  assert found["stylegan_t"].shape == (2, 8, 8, 3) and np.isfinite(found["stylegan_t"]).all()


@pytest.mark.slow
def test_the_way_back_is_exact(home):
  home = home[0]
  back = hub.read_folder(home / "aurora", "aurora")
  _, stored = checkpoint_reader.read_parts(
    home / "run" / "checkpoints", ["networks/generator/ema", "networks/generator/variables"]
  )
  wanted = {"params": stored["networks/generator/ema"], **stored["networks/generator/variables"]}
  found = back.networks["generator"]
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  assert all(np.asarray(a).tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found)))
  run = config_files.from_stored(json.loads((home / "run" / "config.json").read_text()))
  assert back.generator == run.generator and back.system == "aurora"
  text = dataclasses.replace(run.text, clip=str(home / "aurora" / "text_encoder"))
  assert back.experiment == dataclasses.replace(run, text=text)
  megan = hub.read_folder(home / "megan")
  assert megan.experiment is None and megan.generator == MEGAN and set(megan.networks) == {"generator", "gate"}
  assert megan.networks["generator"]["batch_stats"]["generators"]["r4"]["norm"]["count"].dtype == np.int32


@pytest.mark.slow
def test_a_folder_holds_what_the_hub_expects_and_nothing_of_this_machine(home):
  home = home[0]
  names = {str(path.relative_to(home / "aurora")) for path in (home / "aurora").rglob("*") if path.is_file()}
  names = {name for name in names if "__pycache__" not in name}
  assert names == {
    "README.md",
    "config.json",
    "experiment.json",
    "model.safetensors",
    "modeling_aurora.py",
    "pipeline.py",
    "samples.png",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "training.json",
  }
  for name in names:
    assert str(home).encode() not in (home / "aurora" / name).read_bytes()
  source = (home / "aurora" / "modeling_aurora.py").read_text()
  assert "import jax" not in source and "from aurora_jax" not in source
  assert not any("text_projection" in name for name in hub_folder.read(home / "aurora").weights)


@pytest.mark.slow
def test_the_model_card(home):
  yaml = pytest.importorskip("yaml")
  text = (home[0] / "aurora" / "README.md").read_text()
  _, front, body = text.split("---\n", 2)
  front = yaml.safe_load(front)
  assert front["license"] == "cc-by-sa-4.0" and front["pipeline_tag"] == "text-to-image"
  assert front["datasets"] == ["OpenMoji"] and front["tags"] == ["gan", "aurora_jax", "aurora"]
  (result,) = front["model-index"][0]["results"]
  assert result["metrics"] == [{"type": "fid", "name": "FID-1k (1,000 images, psi 1)", "value": 12.5}]
  assert "| FID-1k | 12.5 | 1,000 images, psi 1 |" in body and "3 steps: no time at all" in body
  assert 'pipe("a red heart", num_images=4, seed=0, psi=0.7)' in body and "moving averages of step 3" in body
  code = body.split("```python\n")[1].split("```")[0]
  compile(code, "README.md", "exec")
  bare = model_card.render(
    model_card.Card("x", "MeganPipeline", 32, 10, "parameters", conditional=False, psi=None, summary="Short.")
  )
  assert "unconditional-image-generation" in bare and "pipe(num_images=4, seed=0)" in bare and "model-index" not in bare


@pytest.mark.slow
def test_large_weights_come_in_shards(home, tmp_path):
  home = home[0]
  whole = hub_folder.read(home / "aurora")
  names = hub.torch_names("aurora")
  cfg = names.config_from_torch(whole.config)
  variables = names.from_torch(whole.weights, cfg)
  hub_folder.write(tmp_path / "shards", names.hub_model(variables, cfg), card="", shard_bytes=100_000)
  files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
  assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
  again = hub.read_folder(tmp_path / "shards").networks["generator"]
  assert all(a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(again)))

  from aurora_jax.systems.aurora.modeling_aurora import AuroraGenerator

  state = AuroraGenerator.from_pretrained(tmp_path / "shards").state_dict()
  assert all(np.array_equal(state[name].numpy(), array) for name, array in names.to_torch(variables, cfg))
  (tmp_path / "shards" / files[1]).unlink()
  with pytest.raises(UserError, match=f"shards of the weights are missing: {files[1]}"):
    hub.read_folder(tmp_path / "shards")


@pytest.mark.slow
def test_what_pytorch_saves_comes_back_bitwise(home, tmp_path):
  import torch

  source = home[0] / "aurora"
  spec = importlib.util.spec_from_file_location("exported_pipeline", source / "pipeline.py")
  pipeline = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(pipeline)
  modeling = pipeline._module(source / "modeling_aurora.py")
  pipe = pipeline.AuroraPipeline(modeling.AuroraGenerator.from_pretrained(source))  # no text: it takes seconds
  pipe.folder = source
  with torch.no_grad():
    for parameter in pipe.model.parameters():
      parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
  pipe.save_pretrained(tmp_path / "tuned")
  with pytest.raises(ValueError, match="another folder"):
    pipe.save_pretrained(source)
  kept = {path.name for path in (tmp_path / "tuned").iterdir()}
  assert kept == {path.name for path in source.iterdir()} - {"README.md", "samples.png", "__pycache__"}
  tuned, state = hub.read_folder(tmp_path / "tuned", "aurora"), pipe.model.state_dict()
  back = dict(hub.torch_names("aurora").to_torch(tuned.networks["generator"], tuned.generator))
  assert back.keys() == state.keys() and all(back[name].tobytes() == state[name].numpy().tobytes() for name in state)
  sampled = trained_generator.load(tmp_path / "tuned").weights.networks["generator"]
  assert all(
    np.array_equal(a, b) for a, b in zip(jax.tree.leaves(tuned.networks["generator"]), jax.tree.leaves(sampled))
  )
  before = hub.read_folder(source).networks["generator"]
  assert not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(sampled)))


def edit_config(folder, **changes):
  values = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.mark.slow
def test_bad_folders_are_named(home, tmp_path):
  home, folder = home[0], tmp_path / "megan"
  shutil.copytree(home / "megan", folder)
  for path, system, message in (
    (tmp_path / "none", None, "no exported model at"),
    (folder, "aurora", "model of type 'megan', not 'aurora'"),
    (tmp_path, None, "config.json is missing"),
  ):
    with pytest.raises(UserError, match=message):
      hub.read_folder(path, system)
  for changes, message in (
    ({"colour": 1}, f"{folder}: config.json: no field 'colour'"),
    ({"z_dim": 5}, "the weights do not fit the configuration; .* misshapen: "),
    ({"model_type": "biggan"}, "no system 'biggan'"),
    ({"model_type": 3}, "model of type 3"),
  ):
    shutil.copy(home / "megan" / "config.json", folder)
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
      hub.read_folder(folder)
  shutil.copy(home / "megan" / "config.json", folder)
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
  with pytest.raises(UserError, match="only safetensors files are read here"):
    hub.read_folder(folder)


@pytest.mark.slow
def test_exports_that_fail_leave_nothing(home, tmp_path, monkeypatch):
  home, out = home[0], tmp_path / "out"
  for arguments, message in (
    (dict(workdir=home / "none"), "run folder not found"),
    (dict(workdir=home / "run", clip=str(home / "wide")), "its text features are 48 wide, the generator takes 32"),
    (dict(workdir=home / "run", clip=str(home / "none")), "no CLIP folder"),
    (dict(workdir=home / "run", step=7), "7"),
    (dict(workdir=home / "run", weights="best"), "weights must be one of ema, generator, got 'best'"),
  ):
    with pytest.raises(UserError, match=message):
      hub.export_run(out=out, **arguments)
    assert not list(tmp_path.iterdir())

  def interrupted(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(hub_folder.text_encoder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
      hub.export_run(home / "run", out)
  assert not list(tmp_path.iterdir())
  out.mkdir()
  (out / "precious.txt").write_text("mine")
  for overwrite, message in ((False, "is not empty"), (True, "is not an earlier export")):
    with pytest.raises(UserError, match=message):
      hub.export_run(home / "run", out, overwrite=overwrite)
  assert [path.name for path in out.iterdir()] == ["precious.txt"]


@pytest.mark.slow
def test_parameters_themselves_and_overwriting(home, tmp_path):
  home, out = home[0], tmp_path / "out"
  first = hub.export_run(home / "run", out)
  assert first.step == 3 and first.pipeline == "AuroraPipeline" and first.path == out
  before = hub.read_folder(out).networks["generator"]["params"]["mapping_0"]["weight"]
  hub.export_run(home / "run", out, weights="generator", overwrite=True)
  after = hub.read_folder(out).networks["generator"]["params"]["mapping_0"]["weight"]
  _, stored = checkpoint_reader.read_parts(home / "run" / "checkpoints", ["networks/generator/params"])
  assert np.array_equal(after, stored["networks/generator/params"]["mapping_0"]["weight"])
  assert not np.array_equal(before, after)
  assert "parameters of step 3" in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_run_that_grows_keeps_what_is_not_trained_yet(home):
  """Its outputs end where training is; the layers above go along, so that the way back loses nothing."""
  values = json.loads((home[0] / "run" / "config.json").read_text())
  values["schedule"] |= {"resolutions": [4, 8, 16], "max_images": {"4": 8, "8": 8}}
  experiment = config_files.from_stored(values)
  names = hub.torch_names("aurora")
  cfg = names.generator_config(experiment, experiment.at_stage(8))
  assert cfg.resolution == 16 and cfg.output_resolutions == (4, 8)
  of = {entry.name for entry in names.entries(cfg)}
  assert of == {entry.name for entry in names.entries(experiment.generator)} and "synthesis.rgb.r16.weight" in of


def test_a_map_refuses_other_trees_and_double_names():
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  abstract = {"params": {"a": leaf(2, 3), "b": {"c": leaf(4, 2, 5)}}}
  place = lambda path, axes: (f"{path[-1]}.{{}}" if axes == 3 else path[-1], twin_map.DENSE)
  table = twin_map.table(abstract, place)
  assert twin_map.shapes(table) == {"a": (3, 2)} | {f"c.{i}": (5, 2) for i in range(4)}
  tree = jax.tree.map(lambda x: np.random.default_rng(0).standard_normal(x.shape, np.float32), abstract)
  state = dict(twin_map.to_torch(tree, table))
  assert jax.tree.all(jax.tree.map(np.array_equal, tree, twin_map.from_torch(state, table)))
  for bad, message in (
    ({"params": {"a": tree["params"]["a"]}}, "params/b/c is missing"),
    ({"params": {"a": np.zeros((3, 3)), "b": tree["params"]["b"]}}, r"params/a is of shape \(3, 3\)"),
    ({"params": {"a": np.zeros(3), "b": tree["params"]["b"]}}, r"params/a is of shape \(3,\)"),
    ({"params": {"a": tree["params"]["a"], "b": {"c": np.zeros((3, 2, 5))}}}, "params/b/c is"),
  ):
    with pytest.raises(UserError, match=message):
      dict(twin_map.to_torch(bad, table))
  with pytest.raises(ValueError, match="the same name"):
    twin_map.table(abstract, lambda path, axes: ("x", twin_map.SAME))


def test_weights_must_come_as_announced(tmp_path):
  entry = lambda name: twin_map.Entry(name, (), twin_map.SAME, (2,), np.dtype(np.float32))
  a, b = (("a", np.zeros(2, np.float32)), ("b", np.ones(2, np.float32)))
  for arrays, message in (
    ([b, a], r"a \(2,\) is announced, b \(2,\) came"),
    ([a], r"b \(2,\) is announced, nothing"),
    ([a, b, ("c", a[1])], "c is not announced"),
  ):
    with pytest.raises(ValueError, match=message):
      weights.write(tmp_path, [entry("a"), entry("b")], arrays)


@pytest.mark.slow
def test_public_mappings_keep_no_paths(home):
  experiment = config_files.from_stored(json.loads((home[0] / "run" / "config.json").read_text()))
  assert pathlib.Path(experiment.text.clip).is_absolute()
  mixture = dataclasses.replace(experiment.data, path="/a/b", mixture=("0.25:/c/d", "0.5:gs://bucket/e"))
  experiment = dataclasses.replace(experiment, data=mixture)
  values = hub_folder.public_mapping(experiment)
  assert values["data"]["path"] == "b" and values["data"]["mixture"] == ("0.25:d", "0.5:e")
  assert values["text"]["clip"] == "clip" and values["generator"]["z_dim"] == experiment.generator.z_dim
