"""CLIP folders against PyTorch's transformers, both ways, and what happens to damaged ones."""

import dataclasses
import json
import os
import pickle
import sys
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors.numpy

from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop import clip_hf, clip_names
from aurora_jax.models import clip

pytestmark = pytest.mark.slow

os.environ["HF_HUB_OFFLINE"] = "1"  # or transformers asks the hub about local folders

CAPTIONS = ["red heart", "blue heart", "a cat with a hat", "", "blue blue blue blue blue blue blue blue blue blue"]


def random_bundle(activation="quick_gelu", eot_id=None, **image):
  """Small towers of unlike sizes with random weights."""
  tokenizer = Tokenizer.train(CAPTIONS * 2, 530, 10)
  config = clip.ClipConfig(
    text=clip.TextConfig(
      width=24,
      layers=2,
      heads=3,
      mlp_width=40,
      activation=activation,
      vocabulary_size=tokenizer.vocabulary_size,
      context_length=10,
      eot_id=tokenizer.end_id if eot_id is None else eot_id,
      layer_norm_epsilon=1e-3,
    ),
    image=clip.ImageConfig(
      **(dict(width=32, layers=3, heads=4, mlp_width=48, activation=activation, size=24, patch=8) | image)
    ),
    embedding_width=16,
  )
  generator = np.random.default_rng(0)
  draw = lambda leaf: generator.normal(size=leaf.shape, scale=0.3).astype(np.float32)
  return clip_hf.ClipBundle(config, jax.tree.map(draw, clip.abstract_variables(config)), tokenizer)


@pytest.fixture(scope="module")
def bundle():
  return random_bundle(mean=(0.9, 0.8, 0.7), std=(0.2, 0.3, 0.4))


@pytest.fixture
def folder(bundle, tmp_path):
  clip_hf.save(tmp_path / "clip", bundle)
  return tmp_path / "clip"


def assert_same(first, second):
  assert first.config == second.config
  jax.tree.map(np.testing.assert_array_equal, first.variables, second.variables)
  assert (first.tokenizer(CAPTIONS) == second.tokenizer(CAPTIONS)).all()


def test_the_name_map_has_the_shapes_of_the_networks(bundle):
  shapes = lambda tree: jax.tree.map(np.shape, tree)
  expected = shapes(clip.abstract_variables(bundle.config)["params"])
  assert shapes(clip_names.empty(clip_names.entries(bundle.config))) == expected


def rewrite(folder, change):
  """Applies `change` to the state dict of a folder, in place or as its result."""
  path = folder / "model.safetensors"
  state = safetensors.numpy.load_file(path)
  state = change(state) or state
  safetensors.numpy.save_file(state, path, metadata={"format": "pt"})


def edit_config(folder, change):
  values = json.loads((folder / "config.json").read_text())
  change(values)
  (folder / "config.json").write_text(json.dumps(values))


# ----------------------------------------------------------------------------------------------------------------------
# Against transformers


def their_outputs(model, tokens, images, config):
  torch = pytest.importorskip("torch")
  mean, std = np.asarray(config.image.mean), np.asarray(config.image.std)
  pixels = ((images + 1) / 2 - mean) / std
  pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
  with torch.no_grad():
    text = model.text_model(input_ids=torch.tensor(tokens).long())
    image = model.vision_model(pixel_values=pixels)
    return {
      "features": text.last_hidden_state.numpy(),
      "pooled": text.pooler_output.numpy(),
      "text": model.text_projection(text.pooler_output).numpy(),
      "image": model.visual_projection(image.pooler_output).numpy(),
      "scale": model.logit_scale.exp().item(),
    }


def our_outputs(bundle, tokens, images):
  module = bundle.module()
  text = jax.jit(lambda v, t: module.apply(v, t, method="encode_text"))(bundle.variables, tokens)
  return {
    "features": text.features,
    "pooled": np.stack([row[end] for row, end in zip(text.features, text.eot)]),
    "text": text.embedding,
    "image": jax.jit(lambda v, x: module.apply(v, x, method="encode_image"))(bundle.variables, images),
    "scale": module.apply(bundle.variables, method="logit_scale").item(),
  }


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("legacy", [False, True])
def test_ours_in_transformers(tmp_path, activation, legacy):
  transformers = pytest.importorskip("transformers")
  bundle = random_bundle(activation, clip.LEGACY_EOT_ID if legacy else None)
  clip_hf.save(tmp_path / "clip", bundle)
  model, report = transformers.CLIPModel.from_pretrained(tmp_path / "clip", output_loading_info=True)
  assert not any(report.values()), report
  tokens, images = bundle.tokenizer(CAPTIONS), np.random.default_rng(1).uniform(-1, 1, (3, 24, 24, 3)).astype("f")
  if not legacy:  # the first end counts, not the last
    tokens[1, 5:] = bundle.tokenizer.end_id
  theirs = their_outputs(model.eval(), tokens, images, bundle.config)
  ours = our_outputs(bundle, tokens, images)
  for name in theirs:
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-4, err_msg=name)
  # Back again, written by them.
  model.save_pretrained(tmp_path / "again")
  bundle.tokenizer.save(tmp_path / "again")
  again = clip_hf.load(tmp_path / "again")
  assert again.config == bundle.config
  jax.tree.map(np.testing.assert_array_equal, bundle.variables, again.variables)


def test_separate_towers_of_transformers(folder, bundle):
  """What diffusers and the released Aurora use: text and vision models of their own class."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  tokens, pixels = bundle.tokenizer(CAPTIONS), np.random.default_rng(2).integers(0, 256, (24, 24, 3), np.uint8)
  ours = our_outputs(bundle, tokens, pixels[None] / np.float32(127.5) - 1)
  text = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
  vision = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
  processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
  pixels = processor(pixels, return_tensors="pt").pixel_values
  with torch.no_grad():
    output = text(torch.tensor(tokens).long())
    np.testing.assert_allclose(ours["text"], output.text_embeds, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours["features"], output.last_hidden_state, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(ours["image"], vision(pixels).image_embeds, atol=1e-4, rtol=1e-4)


def test_defaults_are_those_of_transformers(tmp_path, bundle):
  """A config.json that says nothing is ViT-B/32, as it is there."""
  transformers = pytest.importorskip("transformers")
  theirs = transformers.CLIPConfig()
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
  ours = clip_hf.read_config(tmp_path)
  assert ours.embedding_width == theirs.projection_dim
  for tower, their_tower in ((ours.text, theirs.text_config), (ours.image, theirs.vision_config)):
    assert clip_hf._their_tower(tower).items() <= their_tower.to_dict().items()
  assert (ours.text.vocabulary_size, ours.text.context_length, ours.text.eot_id) == (
    theirs.text_config.vocab_size,
    theirs.text_config.max_position_embeddings,
    theirs.text_config.eos_token_id,
  )
  assert (ours.image.size, ours.image.patch) == (theirs.vision_config.image_size, theirs.vision_config.patch_size)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_round_trip(folder, bundle):
  loaded = clip_hf.load(folder)
  assert_same(loaded, bundle)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.variables))
  assert loaded.module().config == bundle.config


def test_the_text_tower_alone_encodes_the_same(folder, bundle):
  text_only = clip_hf.load(folder, text_only=True)
  assert "image" not in text_only.variables["params"] and "text" in text_only.variables["params"]
  encode = lambda b: b.module().apply(b.variables, b.tokenizer(CAPTIONS), method="encode_text")
  jax.tree.map(np.testing.assert_array_equal, encode(text_only), encode(bundle))


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_becomes_float32(folder, bundle, kind):
  rewrite(folder, lambda state: {name: array.astype(jax.numpy.dtype(kind)) for name, array in state.items()})
  rounded = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.dtype(kind)).astype(np.float32), bundle.variables)
  loaded = clip_hf.load(folder)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables, rounded)


def split(folder, name, write):
  """Replaces model.safetensors by two shards and their index."""
  state = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  stem, suffix = os.path.splitext(name)
  weight_map = {}
  for number in range(2):
    shard = f"{stem}-0000{number + 1}-of-00002{suffix}"
    part = {key: state[key] for key in sorted(state)[number::2]}
    write(part, folder / shard)
    weight_map |= dict.fromkeys(part, shard)
  (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(folder, bundle):
  split(folder, "model.safetensors", safetensors.numpy.save_file)
  assert_same(clip_hf.load(folder), bundle)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(UserError, match="shards of the weights are missing: model-00002-of-00002.safetensors"):
    clip_hf.load(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_files(folder, bundle, sharded):
  torch = pytest.importorskip("torch")
  write = lambda state, path: torch.save({name: torch.tensor(array) for name, array in state.items()}, path)
  if sharded:
    split(folder, "pytorch_model.bin", write)
  else:
    write(safetensors.numpy.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
  assert_same(clip_hf.load(folder), bundle)


class Evil:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_code_in_a_torch_file_does_not_run(folder, tmp_path):
  torch = pytest.importorskip("torch")
  (folder / "model.safetensors").unlink()
  for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
    write({"logit_scale": Evil(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin holds code or objects besides tensors .posix.mkdir"):
      clip_hf.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_torch_files_without_torch(folder, bundle, monkeypatch, kind):
  torch = pytest.importorskip("torch")
  state = safetensors.numpy.load_file(folder / "model.safetensors")
  dtype = getattr(torch, kind)
  torch.save({name: torch.tensor(array).to(dtype) for name, array in state.items()}, folder / "pytorch_model.bin")
  (folder / "model.safetensors").unlink()
  monkeypatch.setitem(sys.modules, "torch", None)
  rounded = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.dtype(kind)).astype(np.float32), bundle.variables)
  jax.tree.map(np.testing.assert_array_equal, clip_hf.load(folder).variables, rounded)


def test_position_numbers_of_old_files(folder, bundle):
  buffers = {
    "text_model.embeddings.position_ids": np.arange(10)[None],
    "vision_model.embeddings.position_ids": np.arange(10),
  }
  rewrite(folder, lambda state: state | buffers)
  assert_same(clip_hf.load(folder), bundle)


@pytest.mark.parametrize(
  "change",
  [
    lambda text: {"text_config": text | {"num_hidden_layers": 12}, "text_config_dict": text},
    lambda text: {"text_config": None, "text_config_dict": text},
    lambda text: {"text_config": text | {"hidden_act": "gelu"}, "text_config_dict": without(text, "hidden_act")},
    lambda text: {"text_config": text, "text_config_dict": None},
    lambda text: {"text_config_dict": {}},
    lambda text: {"text_config_dict": {"num_hidden_layers": 7}},
    lambda text: {"vision_config_dict": {"image_size": [32, 32], "patch_size": 16}},
  ],
)
def test_configs_that_repeat_a_tower(folder, change):
  """Old ones do: read as `transformers` 5 reads them, where a repeated tower is completed by defaults alone."""
  transformers = pytest.importorskip("transformers")
  edit_config(folder, lambda values: values.update(change(values["text_config"])))
  theirs, ours = transformers.CLIPConfig.from_pretrained(folder), clip_hf.read_config(folder)
  for tower, their_tower in ((ours.text, theirs.text_config), (ours.image, theirs.vision_config)):
    assert clip_hf._their_tower(tower).items() <= their_tower.to_dict().items()
  assert ours.text.eot_id == theirs.text_config.eos_token_id
  assert ours.image.patch == theirs.vision_config.patch_size
  assert theirs.vision_config.image_size in (ours.image.size, [ours.image.size] * 2)


def without(mapping, name):
  return {key: value for key, value in mapping.items() if key != name}


def test_a_repeated_tower_is_loaded(folder, bundle):
  def change(values):
    values["text_config_dict"] = dict(values["text_config"])
    values["text_config"]["num_hidden_layers"] = 12
    values["vision_config_dict"] = None

  edit_config(folder, change)
  assert_same(clip_hf.load(folder), bundle)


def test_a_temperature_of_one_element(folder, bundle):
  rewrite(folder, lambda state: state | {"logit_scale": state["logit_scale"].reshape(1)})
  assert_same(clip_hf.load(folder), bundle)
  rewrite(folder, lambda state: state | {"logit_scale": np.zeros(2, np.float32)})
  with pytest.raises(UserError, match=r"misshapen: logit_scale is \(2,\), expected \(\)"):
    clip_hf.load(folder)


@pytest.mark.parametrize(
  "name", ["model.fp16.safetensors", "model.safetensors.index.fp16.json", "pytorch_model.fp16.bin"]
)
def test_only_a_variant_of_one_precision(folder, bundle, name):
  torch = pytest.importorskip("torch")
  state = {
    key: array.astype(np.float16) for key, array in safetensors.numpy.load_file(folder / "model.safetensors").items()
  }
  (folder / "model.safetensors").unlink()
  if name.endswith(".json"):
    half = sorted(state)[::2]
    files = {
      "model.fp16-00001-of-00002.safetensors": half,
      "model.fp16-00002-of-00002.safetensors": state.keys() - half,
    }
    for file, keys in files.items():
      safetensors.numpy.save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in files.items() for key in keys}
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))
  elif name.endswith(".bin"):
    torch.save({key: torch.tensor(array) for key, array in state.items()}, folder / name)
  else:
    safetensors.numpy.save_file(state, folder / name)
  rounded = jax.tree.map(lambda leaf: leaf.astype(np.float16).astype(np.float32), bundle.variables)
  jax.tree.map(np.testing.assert_array_equal, clip_hf.load(folder).variables, rounded)


def test_the_most_precise_variant_counts(folder, bundle):
  state = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").rename(folder / "model.fp32.safetensors")
  (folder / "model.other.safetensors").write_bytes(b"")
  safetensors.numpy.save_file(
    {key: array.astype(np.float16) for key, array in state.items()}, folder / "model.fp16.safetensors"
  )
  assert_same(clip_hf.load(folder), bundle)


@pytest.mark.parametrize("weight_map", [None, [], {"logit_scale": 1}, {}])
def test_an_index_that_names_no_files(folder, weight_map):
  (folder / "model.safetensors").unlink()
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(
    UserError, match="does not say which tensor is in which file|shards of the weights are missing: all"
  ):
    clip_hf.load(folder)


def text_tower(folder, target, projects, nested=True):
  """A text tower's folder, as Stable Diffusion has it: its own config, the weights of text, the tokenizer beside it."""
  (target / "text_encoder").mkdir(parents=True)
  values = json.loads((folder / "config.json").read_text())["text_config"]
  (target / "text_encoder" / "config.json").write_text(json.dumps(values | {"architectures": ["CLIPTextModel"]}))
  state = safetensors.numpy.load_file(folder / "model.safetensors")
  kept = ("text_model.", "text_projection") if projects else "text_model."
  state = {
    name if nested else name.removeprefix("text_model."): x for name, x in state.items() if name.startswith(kept)
  }
  safetensors.numpy.save_file(state, target / "text_encoder" / "model.safetensors")
  (target / "tokenizer").mkdir()
  for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
    (folder / name).rename(target / "tokenizer" / name)
  return target / "text_encoder"


@pytest.mark.parametrize("projects", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_text_tower_is_enough_for_prompts(folder, bundle, tmp_path, projects, nested):
  tower = text_tower(folder, tmp_path / "sd", projects, nested)
  loaded = clip_hf.load(tower, text_only=True)
  assert loaded.projects is projects and loaded.config.text == bundle.config.text
  tokens = loaded.tokenizer(CAPTIONS)
  assert (tokens == bundle.tokenizer(CAPTIONS)).all()
  ours, whole = (b.module().apply(b.variables, tokens, method="encode_text") for b in (loaded, bundle))
  np.testing.assert_array_equal(ours.features, whole.features)
  np.testing.assert_array_equal(ours.eot, whole.eot)
  if projects:
    np.testing.assert_array_equal(ours.embedding, whole.embedding)
  else:
    assert np.isnan(ours.embedding).all()
  with pytest.raises(UserError, match="has only the text tower of a CLIP: enough to sample"):
    clip_hf.load(tower)


def test_a_text_tower_of_transformers(folder, bundle, tmp_path):
  transformers = pytest.importorskip("transformers")
  for cls, projects in ((transformers.CLIPTextModel, False), (transformers.CLIPTextModelWithProjection, True)):
    cls.from_pretrained(folder).save_pretrained(tmp_path / cls.__name__)
    bundle.tokenizer.save(tmp_path / cls.__name__)
    loaded = clip_hf.load(tmp_path / cls.__name__, text_only=True)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"]["text"], bundle.variables["params"]["text"])
    assert loaded.projects is projects


def test_a_whole_config_with_the_text_tower_s_weights(folder, bundle):
  rewrite(folder, lambda state: {name: x for name, x in state.items() if name.startswith("text_model.")})
  loaded = clip_hf.load(folder, text_only=True)
  jax.tree.map(np.testing.assert_array_equal, loaded.variables["params"]["text"], bundle.variables["params"]["text"])
  with pytest.raises(UserError, match="has only the text tower of a CLIP"):
    clip_hf.load(folder)
  rewrite(folder, lambda state: without(state, "text_model.final_layer_norm.bias"))
  with pytest.raises(UserError, match="missing: text_model.final_layer_norm.bias$"):
    clip_hf.load(folder, text_only=True)


def test_names_of_a_wrapper(folder, bundle):
  rewrite(folder, lambda state: {f"module.{name}": array for name, array in state.items()})
  assert_same(clip_hf.load(folder), bundle)


def test_a_folder_whose_name_is_not_utf8(bundle, tmp_path):
  folder = tmp_path / os.fsdecode(b"caf\xe9")
  clip_hf.save(folder, bundle)
  assert_same(clip_hf.load(folder), bundle)
  (folder / "tokenizer.json").unlink()
  assert_same(clip_hf.load(folder), bundle)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_files_are_as_readable_as_others(bundle, tmp_path, umask):
  before = os.umask(umask)
  try:
    clip_hf.save(tmp_path / "clip", bundle)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
  finally:
    os.umask(before)
  assert {path.stat().st_mode for path in (tmp_path / "clip").iterdir()} == {(tmp_path / "file").stat().st_mode}
  assert (tmp_path / "clip").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_a_full_disk_is_said_in_one_line(bundle, tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

  monkeypatch.setattr(safetensors.numpy, "save_file", refuse)
  with pytest.raises(UserError, match="clip cannot be written: model.safetensors: .*No space left on device"):
    clip_hf.save(tmp_path / "clip", bundle)
  assert not list(tmp_path.iterdir())


def test_files_with_a_byte_order_mark(folder, bundle):
  for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"):
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
  assert_same(clip_hf.load(folder), bundle)


def test_colours_without_a_processor_are_openai_s(folder):
  (folder / "preprocessor_config.json").unlink()
  assert clip_hf.load(folder).config.image.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


def test_load_holds_the_model_once(tmp_path):
  bundle = random_bundle(width=256, layers=8, mlp_width=1024)
  clip_hf.save(tmp_path / "clip", bundle)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(bundle.variables))
  clip_hf.load(tmp_path / "clip")
  tracemalloc.start()
  try:
    loaded = clip_hf.load(tmp_path / "clip")
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert size < peak < 1.2 * size
  assert_same(loaded, bundle)


def test_save_is_whole_or_not_at_all(bundle, tmp_path, monkeypatch):
  clip_hf.save(tmp_path / "a" / "clip", bundle, notes={"steps": 3})
  assert json.loads((tmp_path / "a" / "clip" / "training.json").read_text()) == {"steps": 3}
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["clip"]
  with pytest.raises(UserError, match="clip is not empty"):
    clip_hf.save(tmp_path / "a" / "clip", bundle)
  other = dataclasses.replace(bundle, variables=jax.tree.map(lambda leaf: leaf + 1, bundle.variables))
  with monkeypatch.context() as patch:
    patch.setattr(safetensors.numpy, "save_file", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    for target in ("clip", "new"):
      with pytest.raises(UserError, match="disk full"):
        clip_hf.save(tmp_path / "a" / target, other, overwrite=True)
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["clip"]
  assert_same(clip_hf.load(tmp_path / "a" / "clip"), bundle)
  clip_hf.save(tmp_path / "a" / "clip", other, overwrite=True)
  assert_same(clip_hf.load(tmp_path / "a" / "clip"), other)
  assert not (tmp_path / "a" / "clip" / "training.json").exists()
  assert [path.name for path in (tmp_path / "a").iterdir()] == ["clip"]
  (tmp_path / "empty").mkdir()
  clip_hf.save(tmp_path / "empty", bundle)
  assert_same(clip_hf.load(tmp_path / "empty"), bundle)


# What train-clip has always written: Hugging Face's names, never those of our configuration, which have changed.
EARLIER_CONFIG = {
  "architectures": ["CLIPModel"],
  "model_type": "clip",
  "dtype": "float32",
  "projection_dim": 16,
  "logit_scale_init_value": 2.659260036932778,
  "text_config": {
    "model_type": "clip_text_model",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "projection_dim": 16,
    "vocab_size": 530,
    "max_position_embeddings": 10,
    "bos_token_id": 528,
    "eos_token_id": 529,
    "pad_token_id": 0,
  },
  "vision_config": {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "projection_dim": 16,
    "num_channels": 3,
    "image_size": 24,
    "patch_size": 8,
  },
}
EARLIER_PROCESSOR = {
  "image_processor_type": "CLIPImageProcessor",
  "do_resize": True,
  "size": {"shortest_edge": 24},
  "resample": 3,
  "do_center_crop": True,
  "crop_size": {"height": 24, "width": 24},
  "do_rescale": True,
  "rescale_factor": 1 / 255,
  "do_normalize": True,
  "image_mean": [0.8, 0.7, 0.6],
  "image_std": [0.3, 0.2, 0.1],
  "do_convert_rgb": True,
}


def test_a_folder_of_an_earlier_version(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(EARLIER_CONFIG))
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(EARLIER_PROCESSOR))
  tower = dict(activation="quick_gelu", layer_norm_epsilon=1e-5)
  config = clip_hf.read_config(tmp_path)
  assert config == clip.ClipConfig(
    text=clip.TextConfig(
      width=24, layers=2, heads=3, mlp_width=40, vocabulary_size=530, context_length=10, eot_id=529, **tower
    ),
    image=clip.ImageConfig(
      width=32, layers=3, heads=4, mlp_width=48, size=24, patch=8, mean=(0.8, 0.7, 0.6), std=(0.3, 0.2, 0.1), **tower
    ),
    embedding_width=16,
  )


def test_the_stored_form_is_that_of_earlier_versions(folder, bundle):
  stored = json.loads((folder / "preprocessor_config.json").read_text())
  assert stored == EARLIER_PROCESSOR | {"image_mean": [0.9, 0.8, 0.7], "image_std": [0.2, 0.3, 0.4]}
  stored = json.loads((folder / "config.json").read_text())
  assert stored.keys() == EARLIER_CONFIG.keys()
  assert all(stored[tower].keys() == EARLIER_CONFIG[tower].keys() for tower in ("text_config", "vision_config"))


# ----------------------------------------------------------------------------------------------------------------------
# Damaged input


def test_misfits_are_named_together(folder):
  def change(state):
    del state["text_model.final_layer_norm.bias"], state["logit_scale"]
    state["visual_projection.weight"] = np.zeros((16, 31), np.float32)
    state["extra.weight"] = np.zeros(2, np.float32)

  rewrite(folder, change)
  with pytest.raises(UserError) as raised:
    clip_hf.load(folder)
  message = str(raised.value)
  assert str(folder) in message and "\n" not in message
  assert "2 missing: text_model.final_layer_norm.bias, logit_scale;" in message
  assert "1 left over: extra.weight;" in message
  assert "1 misshapen: visual_projection.weight is (16, 31), expected (16, 32)" in message


def test_weights_of_another_size(folder):
  edit_config(folder, lambda values: values["vision_config"].update(hidden_size=64))
  with pytest.raises(UserError, match=r"do not fit its config.json; [0-9]+ misshapen: .*, \.\.\.$"):
    clip_hf.load(folder)


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda v: v.update(model_type="bert"), "of type 'bert', not 'clip'"),
    (lambda v: v["text_config"].update(hidden_size=25), "width 25 is not a multiple of 3 heads"),
    (lambda v: v["vision_config"].update(hidden_act="mish"), "unknown activation 'mish'"),
    (lambda v: v["vision_config"].update(num_channels=4), "images of 4 channels"),
    (lambda v: v["text_config"].update(vocab_size=400), "entries, the model only 400"),
    (lambda v: v["text_config"].update(num_hidden_layers="two"), "num_hidden_layers is 'two'"),
  ],
)
def test_bad_configs(folder, change, words):
  edit_config(folder, change)
  with pytest.raises(UserError) as raised:
    clip_hf.load(folder)
  assert words in str(raised.value)


def test_missing_and_broken_files(folder, tmp_path):
  def message():
    with pytest.raises(UserError) as raised:
      clip_hf.load(folder)
    assert str(folder) in str(raised.value)
    return str(raised.value)

  weights = (folder / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(weights[:-100])
  assert "model.safetensors is no safetensors file, or is cut off" in message()
  (folder / "model.safetensors").write_bytes(b"")
  assert "model.safetensors is empty" in message()
  (folder / "model.safetensors").unlink()
  assert "no weights" in message()
  (folder / "tokenizer.json").unlink(), (folder / "vocab.json").unlink()
  assert "no tokenizer" in message()
  (folder / "config.json").write_text("{")
  assert "cannot read" in message()
  (folder / "config.json").write_text("[]")
  assert "a JSON object was expected" in message()
  (folder / "config.json").unlink()
  assert "config.json is missing" in message()
  with pytest.raises(UserError, match="no CLIP folder at .*nowhere"):
    clip_hf.load(tmp_path / "nowhere")


def test_unwritable(bundle, tmp_path):
  (tmp_path / "file").write_text("")
  for target in (tmp_path / "file", tmp_path / "file" / "clip"):
    with pytest.raises(UserError, match=str(target)):
      clip_hf.save(target, bundle, overwrite=True)
