"""DINO and DINOv2 against transformers' modules with random weights: blocks, final norm, gradient to the image."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from aurora_jax.interop import dino as dino_interop
from aurora_jax.models import dino
from aurora_jax.models.dino import Dino, DinoConfig

SIZES = dict(
  hidden_size=12, num_hidden_layers=3, num_attention_heads=3, image_size=20, patch_size=4, layer_norm_eps=1e-5
)
CONFIG = DinoConfig(
  image_size=20, patch=4, width=12, depth=3, heads=3, mlp_width=48, layer_norm_epsilon=1e-5, position_resize="bicubic"
)
V2 = dataclasses.replace(CONFIG, layer_scale=True)
# Builder of the module, our configuration, arguments of its call.
CASES = {
  "dino": (
    lambda: transformers.ViTModel(
      transformers.ViTConfig(**SIZES, intermediate_size=48, qkv_bias=False), add_pooling_layer=False
    ),
    dataclasses.replace(CONFIG, qkv_bias=False),
    {"interpolate_pos_encoding": True},
  ),
  "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)), V2, {}),
  "swiglu": (
    lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
    dataclasses.replace(V2, swiglu=True, mlp_width=32),
    {},
  ),
  "registers": (
    lambda: transformers.Dinov2WithRegistersModel(
      transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2)
    ),
    dataclasses.replace(V2, registers=2, position_resize="bicubic_antialiased"),
    {},
  ),
}


def randomize(module):
  """Gives every parameter values of its own: fresh norms, gains and biases are ones and zeros."""
  generator = torch.Generator().manual_seed(0)
  for name, value in module.named_parameters():
    scale = 0.3 if value.ndim > 1 else 0.5
    offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    value.data = offset + scale * torch.randn(value.shape, generator=generator)
  return module.eval()


def close(ours, theirs, tolerance=1e-5):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("case", "size"), [(case, (28, 16)) for case in CASES] + [("registers", (20, 20))], ids=[*CASES, "size of the table"]
)
def test_outputs_and_gradient(case, size):
  build, cfg, options = CASES[case]
  module = randomize(build())
  variables = dino_interop.import_dino({name: value.numpy() for name, value in module.state_dict().items()}, cfg)
  rng = np.random.default_rng(1)
  image = rng.normal(size=(2, *size, 3)).astype(np.float32)
  tokens = 1 + cfg.registers + size[0] * size[1] // 16
  cotangent = rng.normal(size=(2, 2, tokens, 12)).astype(np.float32)

  def loss(image):
    out = Dino(cfg).apply(variables, image, taps=(0, 1, 2))
    return jnp.sum(out.taps[1] * cotangent[0]) + jnp.sum(out.final * cotangent[1]), out

  gradient, out = jax.jit(jax.grad(loss, has_aux=True))(image)
  pixels = torch.tensor(image.transpose(0, 3, 1, 2), requires_grad=True)
  theirs = module(pixels, output_hidden_states=True, **options)
  hidden = [states.detach().numpy() for states in theirs.hidden_states]
  close(out.embedded, hidden[0])
  for tap, expected in zip(out.taps[:2], hidden[1:3]):
    close(tap, expected)
  close(out.final, theirs.last_hidden_state.detach())
  loss = (theirs.hidden_states[2] * torch.tensor(cotangent[0])).sum()
  (loss + (theirs.last_hidden_state * torch.tensor(cotangent[1])).sum()).backward()
  close(gradient, pixels.grad.permute(0, 2, 3, 1), 1e-4)


@pytest.fixture(scope="module")
def small():
  rng = np.random.default_rng(2)
  cfg = dataclasses.replace(V2, registers=2)
  variables = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32), dino.abstract_variables(cfg)
  )
  image = rng.normal(size=(2, 20, 20, 3)).astype(np.float32)
  out = jax.jit(lambda image: Dino(cfg).apply(variables, image, taps=(2, 0)))(image)
  return types.SimpleNamespace(**locals())


def test_taps_come_in_the_order_asked_for_and_stop_early(small):
  run = lambda **options: jax.jit(lambda image: Dino(small.cfg).apply(small.variables, image, **options))(small.image)
  early = run(taps=(0,), final=False)
  assert early.final is None
  close(early.taps[0], small.out.taps[1], 1e-6)
  close(run(taps=(), final=False).embedded, small.out.embedded, 1e-6)
  assert dino.patch_tokens(early.taps[0], small.cfg).shape == (2, 25, 12)


@pytest.mark.slow
def test_rematerialisation_and_bfloat16(small):
  gradient = lambda **options: jax.jit(
    jax.grad(lambda image: jnp.sum(jnp.sin(Dino(small.cfg, **options).apply(small.variables, image).final)))
  )(small.image)
  plain = gradient()
  close(gradient(remat=True), plain)
  low = jax.jit(lambda image: Dino(small.cfg, jnp.bfloat16).apply(small.variables, image).final)(small.image)
  assert low.dtype == jnp.float32
  difference = np.abs(low - small.out.final).max() / np.abs(small.out.final).max()
  assert 1e-4 < difference < 0.05


def test_bilinear_positions_are_pytorchs():
  """StyleGAN-T's way. With no patches and no class token, what is left of the embedding is the table."""
  cfg = dataclasses.replace(CONFIG, position_resize="bilinear")
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), dino.abstract_variables(cfg))
  table = np.random.default_rng(0).normal(size=(26, 12)).astype(np.float32)
  variables["params"]["positions"] = table
  out = jax.jit(lambda image: Dino(cfg).apply(variables, image, final=False))(np.zeros((1, 32, 12, 3), np.float32))
  grid = torch.tensor(table[1:].T.reshape(1, 12, 5, 5))
  expected = torch.nn.functional.interpolate(grid, size=(8, 3), mode="bilinear", align_corners=False)
  close(out.embedded[0, 1:], expected.reshape(12, -1).T)
  np.testing.assert_array_equal(out.embedded[0, 0], table[0])


def test_colors():
  image = np.array([[[[-1.0, 0.0, 1.0]]]], np.float32)
  expected = [(0 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (1 - 0.406) / 0.225]
  np.testing.assert_allclose(dino.normalize_colors(image)[0, 0, 0], expected, rtol=1e-5)


def test_published_sizes():
  count = lambda cfg: sum(leaf.size for leaf in jax.tree.leaves(dino.abstract_variables(cfg)))
  assert count(dino.dino_vit_s16()) == 21_665_664
  # transformers' Dinov2Model of facebook/dinov2-base without its mask token.
  assert count(dino.dinov2_vit_b14()) == 86_580_480 - 768
  assert count(dino.dinov2_vit_b14(4)) == 86_580_480 - 768 + 4 * 768


def test_bad_inputs_are_named(small):
  call = lambda *inputs, **options: jax.eval_shape(lambda: Dino(small.cfg).apply(small.variables, *inputs, **options))
  with pytest.raises(ValueError, match="22x20 pixels is not made of patches of 4"):
    call(jnp.zeros((1, 22, 20, 3)))
  with pytest.raises(ValueError, match=r"taps \(3,\), the blocks are 0 to 2"):
    call(small.image, taps=(3,))
