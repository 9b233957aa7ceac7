"""DINO checkpoints under all their names: Hugging Face folders as transformers writes them, original and timm files."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from aurora_jax.errors import UserError
from aurora_jax.interop import clip_hf
from aurora_jax.interop import dino as dino_interop
from aurora_jax.models import clip as clip_lib
from aurora_jax.models import dino
from aurora_jax.models.dino import DinoConfig

SIZES = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4)
PLAIN = DinoConfig(image_size=16, patch=4, width=128, depth=2, heads=2, mlp_width=96, position_resize="bicubic")


def random_variables(cfg):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), dino.abstract_variables(cfg))


def same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("module", "expected"),
  [
    (
      lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, intermediate_size=20)),
      dict(mlp_width=20, layer_norm_epsilon=1e-12, position_resize="bicubic"),
    ),
    (
      lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2)),
      dict(mlp_width=24, layer_scale=True, position_resize="bicubic"),
    ),
    (
      lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True, qkv_bias=False)),
      dict(mlp_width=32, layer_scale=True, swiglu=True, qkv_bias=False, position_resize="bicubic"),
    ),
    (
      lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SIZES)),
      dict(mlp_width=48, layer_scale=True, registers=4, position_resize="bicubic_antialiased"),
    ),
  ],
  ids=["dino", "dinov2", "swiglu", "registers"],
)
def test_hugging_face_folders(module, expected, tmp_path):
  module = module()
  module.save_pretrained(tmp_path)
  bundle = dino_interop.load(tmp_path)
  assert bundle.config == DinoConfig(image_size=16, patch=4, width=12, depth=2, heads=3, **expected)
  # The names that transformers uses in memory are others than those in its files.
  tensors = {name: value.numpy() for name, value in module.state_dict().items()}
  same(dino_interop.import_dino(tensors, bundle.config), bundle.variables)
  assert bundle.module().cfg == bundle.config
  layers = tensors[
    next(
      name
      for name in tensors
      if name.endswith("layer.1.attention.k_proj.weight") or name.endswith("layers.1.attention.k_proj.weight")
    )
  ]
  np.testing.assert_array_equal(bundle.variables["params"]["blocks"]["qkv_kernel"][1][:, 12:24], layers.T)


def test_original_names_round_trip_bitwise_and_sizes_come_from_shapes(tmp_path):
  variables = random_variables(PLAIN)
  state_dict = dino_interop.export_dino(variables, PLAIN)
  assert state_dict["blocks.1.attn.qkv.weight"].shape == (384, 128) and state_dict["cls_token"].shape == (1, 1, 128)
  save_file(state_dict, tmp_path / "dino.safetensors")
  bundle = dino_interop.load(tmp_path / "dino.safetensors")
  assert bundle.config == PLAIN
  same(bundle.variables, variables)
  assert dino_interop.load(tmp_path / "dino.safetensors", heads=4).config.heads == 4


def test_the_teacher_of_a_training_checkpoint(tmp_path):
  variables = random_variables(PLAIN)
  tensors = {
    f"module.backbone.{name}": torch.tensor(value) for name, value in dino_interop.export_dino(variables, PLAIN).items()
  }
  head = {"module.head.mlp.0.weight": torch.zeros(2, 2)}
  torch.save({"student": {"odd": torch.zeros(1)}, "teacher": tensors | head, "epoch": 3}, tmp_path / "full.pth")
  bundle = dino_interop.load(tmp_path / "full.pth")
  assert bundle.config == PLAIN
  same(bundle.variables, variables)


def test_timms_registers_have_the_class_position_in_the_class_token(tmp_path):
  cfg = DinoConfig(
    image_size=16, patch=4, width=64, depth=1, heads=1, mlp_width=32, registers=3, layer_scale=True, swiglu=True,
    position_resize="bicubic_antialiased",
  )  # fmt: skip
  variables = random_variables(cfg)
  state_dict = dino_interop.export_dino(variables, cfg)
  original = state_dict | {"mask_token": np.zeros((1, 64), np.float32)}
  for new, old in (("w12", "fc1"), ("w3", "fc2")):
    for kind in ("weight", "bias"):
      original[f"blocks.0.mlp.{new}.{kind}"] = original.pop(f"blocks.0.mlp.{old}.{kind}")
  save_file(original, tmp_path / "original.safetensors")
  bundle = dino_interop.load(tmp_path / "original.safetensors")
  assert bundle.config == cfg
  same(bundle.variables, variables)

  timm = dict(state_dict)
  timm["reg_token"] = timm.pop("register_tokens")
  timm["cls_token"] = timm["cls_token"] + timm["pos_embed"][:, :1]
  timm["pos_embed"] = np.ascontiguousarray(timm["pos_embed"][:, 1:])
  (tmp_path / "timm").mkdir()
  save_file(timm, tmp_path / "timm" / "model.safetensors")
  (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "vit_small_patch14_reg4_dinov2"}))
  bundle = dino_interop.load(tmp_path / "timm")
  assert bundle.config == cfg
  image = np.random.default_rng(1).normal(size=(1, 16, 16, 3)).astype(np.float32)
  run = jax.jit(lambda values: bundle.module().apply(values, image).final)
  np.testing.assert_allclose(run(bundle.variables), run(variables), rtol=1e-4, atol=1e-5)


def test_misfits_are_one_error():
  state_dict = dino_interop.export_dino(random_variables(PLAIN), PLAIN)
  del state_dict["norm.bias"]
  state_dict["blocks.7.odd"] = np.zeros(3, np.float32)
  state_dict["blocks.0.norm1.weight"] = np.zeros(3, np.float32)
  with pytest.raises(UserError) as error:
    dino_interop.import_dino(state_dict, PLAIN, "here")
  assert str(error.value) == (
    "the weights in here are not those of this DINO; 1 missing: norm.bias; 1 left over: blocks.7.odd; "
    "1 misshapen: blocks.0.norm1.weight is (3,), expected (128,)"
  )


def test_a_part_of_query_key_and_value_is_missed():
  module = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES))
  tensors = {name: value.numpy() for name, value in module.state_dict().items()}
  del tensors["encoder.layer.0.attention.k_proj.weight"]
  cfg = DinoConfig(image_size=16, patch=4, width=12, depth=2, heads=3, mlp_width=48, layer_scale=True)
  with pytest.raises(UserError, match=r"blocks.0.attn.qkv.weight is \(24, 12\), expected \(36, 12\)"):
    dino_interop.import_dino(tensors, cfg)


def test_other_files_and_folders_are_refused(tmp_path):
  with pytest.raises(UserError, match="no weights in"):
    dino_interop.load(tmp_path)
  save_file({"conv1.weight": np.zeros((2, 3, 7, 7), np.float32)}, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match="holds no DINO: no patch_embed.proj.weight"):
    dino_interop.load(tmp_path / "model.safetensors")
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
  with pytest.raises(UserError, match="a model of type 'resnet', not a DINO"):
    dino_interop.load(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "hidden_act": "relu"}))
  with pytest.raises(UserError, match="hidden_act is 'relu', only 'gelu'"):
    dino_interop.load(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="cannot read"):
    dino_interop.load(tmp_path)
  state_dict = dino_interop.export_dino(random_variables(PLAIN), PLAIN)
  save_file(state_dict, tmp_path / "odd.safetensors")
  with pytest.raises(UserError, match="width 128 is not a multiple of dino.heads 3"):
    dino_interop.load(tmp_path / "odd.safetensors", heads=3)


@pytest.mark.slow
def test_the_image_tower_of_a_clip_stands_in(tmp_path):
  """As a DINO, with its color statistics in the patch embedding, it computes what CLIP does; a round trip is exact."""
  tower = dict(width=12, layers=2, heads=3, mlp_width=20)
  sizes = clip_lib.ClipConfig(
    text=clip_lib.TextConfig(**tower, vocabulary_size=50),
    image=clip_lib.ImageConfig(**tower, size=16, patch=4, mean=(0.5, 0.8, 0.3), std=(0.3, 0.2, 0.1)),
    embedding_width=7,
  )
  rng = np.random.default_rng(0)
  draw = lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
  variables = jax.tree.map(draw, clip_lib.abstract_variables(sizes))
  bundle = dino_interop.from_clip(clip_hf.ClipBundle(sizes, variables, None))
  assert jax.tree.map(np.shape, bundle.variables) == jax.tree.map(np.shape, dino.abstract_variables(bundle.config))
  images = rng.uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)

  @jax.jit
  def both(images):
    out = bundle.module().apply(bundle.variables, dino.normalize_colors(images), taps=(0,))
    projected = out.final[:, 0] @ variables["params"]["image_projection"]["kernel"]
    return projected, clip_lib.Clip(sizes).apply(variables, images, method="encode_image")

  ours, expected = both(images)
  assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()
  state_dict = dino_interop.export_dino(bundle.variables, bundle.config)
  assert state_dict["norm_pre.weight"].shape == (12,)
  again = dino_interop.import_dino(state_dict, bundle.config)
  jax.tree.map(np.testing.assert_array_equal, again, bundle.variables)
  assert not dino_interop.is_clip(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
  assert dino_interop.is_clip(tmp_path)


def test_a_released_discriminator_holds_a_dino(tmp_path):
  """StyleGAN-T's discriminator has it under a prefix, beside its heads."""
  tensors = {
    f"dino.model.model.{name}": torch.tensor(value)
    for name, value in dino_interop.export_dino(random_variables(PLAIN), PLAIN).items()
  }
  torch.save({"G": {"x": torch.zeros(1)}, "D": tensors | {"heads.0.cls.bias": torch.zeros(3)}}, tmp_path / "all.pth")
  read = dino_interop.load(tmp_path / "all.pth", heads=PLAIN.heads)
  expected = dino_interop.import_dino({name: value.numpy() for name, value in tensors.items()}, PLAIN)
  jax.tree.map(np.testing.assert_array_equal, read.variables, expected)
