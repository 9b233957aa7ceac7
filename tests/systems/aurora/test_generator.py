"""The generator against the released PyTorch generator's numbers (tests/goldens) and against itself."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from aurora_jax import config_files
from aurora_jax.config import PerResolution
from aurora_jax.systems.aurora import config, generator, released

pytestmark = pytest.mark.slow

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"


def nhwc(array):
  return array.transpose(0, 2, 3, 1)


def relative(ours, theirs):
  """Largest difference over the largest entry."""
  scale = np.abs(theirs).max()
  return np.abs(np.asarray(ours) - theirs).max() / (scale if scale > 0 else 1.0)


@pytest.fixture(scope="module")
def golden():
  """The golden and our outputs and gradients for it, from one compiled program."""
  cfg = released.config_from_released(json.loads((GOLDENS / "tiny16.config.json").read_text()))
  state_dict = load_file(GOLDENS / "tiny16.state_dict.safetensors")
  io = load_file(GOLDENS / "tiny16.io.safetensors")
  variables = released.import_generator(state_dict, cfg)
  inputs = io["in.z"], io["in.text"], io["in.eot"].astype(np.int32)
  cotangent = nhwc(io["grad.cotangent_image"])
  model = generator.Generator(cfg)

  def loss(params):
    out = model.apply({**variables, "params": params}, *inputs)
    return (out.image * cotangent).sum() + out.moe_loss, out

  (value, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
  return dict(cfg=cfg, io=io, variables=variables, inputs=inputs, model=model, value=value, out=out, gradient=gradient)


def test_outputs_match_the_released_generator(golden):
  io, out = golden["io"], golden["out"]
  assert relative(out.image, nhwc(io["out.image"])) < 1e-5
  assert sorted(out.pyramid) == [4, 8, 16]
  for r, image in out.pyramid.items():
    assert relative(image, nhwc(io[f"out.img_res_{r}x{r}"])) < 1e-5
  assert relative(out.w, io["out.w"]) < 1e-5
  assert relative(out.moe_loss, io["out.moe_loss"]) < 1e-5
  assert relative(golden["value"], io["grad.loss"]) < 1e-4


def test_routing_matches_the_released_generator(golden):
  io, routing = golden["io"], golden["out"].routing
  names = released.layer_names(golden["cfg"])
  assert set(names) == set(routing) and len(names) == 5
  for ours, theirs in names.items():
    np.testing.assert_array_equal(routing[ours].expert, io[f"route.{theirs}.expert"])
    assert relative(routing[ours].logits, io[f"route.{theirs}.logits"]) < 1e-4


def test_every_gradient_matches_the_released_generator(golden):
  io, prefix = golden["io"], "grad.param."
  ours = released.export_generator({**golden["variables"], "params": golden["gradient"]}, golden["cfg"])
  names = [name.removeprefix(prefix) for name in io if name.startswith(prefix)]
  assert len(names) == 284
  worst = max(names, key=lambda name: relative(ours[name], io[prefix + name]))
  assert relative(ours[worst], io[prefix + worst]) < 1e-3, worst


def test_rematerialized_blocks_and_their_loops_over_layers_change_nothing(golden):
  """With the golden's weights, up to 8 pixels: a block of convolutions and one of several attention layers."""
  blocks = PerResolution({4: 1, 8: 1, 16: 1})
  plain = dataclasses.replace(golden["cfg"], blocks=blocks, output_resolutions=(4, 8))
  assert plain.attention_depth[8] > 1 and plain.experts[8] > 1
  variables, io = golden["variables"], golden["io"]

  def outputs_and_gradients(cfg):
    model = generator.Generator(cfg)

    @jax.jit
    def run(params, w, text, cotangent):
      def loss(params, w, text):
        out = model.apply({**variables, "params": params}, w, text, method="synthesize")
        return (out.image * cotangent).sum() + out.moe_loss, out

      return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, w, text)

    cotangent = nhwc(io["grad.cotangent_image"])[:, ::2, ::2]
    (_, out), gradients = run(variables["params"], io["out.w"], io["out.local_context"], cotangent)
    return out, gradients

  expected, expected_gradients = outputs_and_gradients(plain)
  assert set(expected.routing) == {"r8_block0_layer0", "r8_block0_layer1"}
  out, gradients = outputs_and_gradients(dataclasses.replace(plain, remat=True, loop_layers=True))
  assert relative(out.image, expected.image) < 1e-5 and relative(out.moe_loss, expected.moe_loss) < 1e-5
  for name, layer in expected.routing.items():
    np.testing.assert_array_equal(out.routing[name].expert, layer.expert)
  for theirs, ours in zip(jax.tree.leaves(expected_gradients), jax.tree.leaves(gradients), strict=True):
    assert relative(ours, theirs) < 1e-4


def test_truncated_image_and_sampling_methods(golden):
  io, model, variables = golden["io"], golden["model"], golden["variables"]
  z, text, eot = golden["inputs"]
  encode_text = jax.jit(lambda text, eot: model.apply(variables, text, eot, method="encode_text"))
  global_text, local_text = encode_text(text, eot)
  assert relative(local_text, io["out.local_context"]) < 1e-5
  w = jax.jit(lambda z, text: model.apply(variables, z, text, method="map_latents"))(z, global_text)
  assert relative(w, io["out.w"]) < 1e-5
  synthesize = jax.jit(lambda w: model.apply(variables, w, local_text, method="synthesize"))
  assert relative(synthesize(w).image, nhwc(io["out.image"])) < 1e-5
  average = variables["buffers"]["w_avg"]
  truncated = nhwc(io["out.image_trunc0.7"])
  assert relative(synthesize(average + 0.7 * (w - average)).image, truncated) < 1e-5
  assert relative(synthesize(w).image, truncated) > 1e-3  # truncation does something


def test_released_size_without_allocating_it():
  shapes = generator.abstract_variables(config.Generator())
  assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"])) == 1_166_329_387


def test_gigagans_base_is_650_9_million():
  """The count of the facts, section 1.9; GigaGAN's Table A2 has 652.5 M, 0.24 % more."""
  cfg = config_files.load(["--config=configs/gigagan_64.py"]).generator
  shapes = generator.abstract_variables(cfg)
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes["params"]))
  assert count == 650_935_705
  assert not any("router" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0])


def test_tied_attention_w_token_and_constant_input(golden):
  """What GigaGAN has otherwise."""
  cfg = dataclasses.replace(golden["cfg"], fourier_input=False, tied_attention=True, w_token=True)
  variables = generator.abstract_variables(cfg)
  layer = variables["params"]["synthesis"]["r8_block0_attention"]["layer_0"]
  inner = cfg.heads * cfg.head_dim
  assert layer["self_attention"]["qk"]["weight"].shape == (inner, inner)
  assert layer["w_token"]["weight"].shape == (cfg.w_dim, cfg.text_dim)
  assert set(variables["buffers"]) == {"w_avg"} and variables["params"]["synthesis"]["input"]["constant"].shape[:2] == (
    4,
    4,
  )
  attend = generator.SelfAttention(heads=2, head_dim=4, chunk=64, tied=True)
  x, w = jax.random.normal(jax.random.key(1), (2, 4, 4, 8)), jnp.ones((2, 3))
  params = jax.jit(attend.init)(jax.random.key(2), x, w)
  doubled = jax.tree.map(lambda p: p, params)
  weight = params["params"]["qk"]["weight"].reshape(8, 2, 1, 4)
  doubled["params"]["qk"]["weight"] = jnp.concatenate([weight, weight], axis=2).reshape(
    8, 16
  )  # queries and keys the same
  one, other = jax.jit(attend.apply)(params, x, w), jax.jit(attend.clone(tied=False).apply)(doubled, x, w)
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_independent_text_head_is_uniform_at_batch_one(golden):
  cfg, variables = golden["cfg"], golden["variables"]
  _, text, eot = golden["inputs"]
  independent = generator.Generator(dataclasses.replace(cfg, text_attention="independent"))
  encode = lambda model: jax.jit(lambda text, eot: model.apply(variables, text, eot, method="encode_text"))
  both, alone = encode(independent)(text, eot), encode(golden["model"])
  for b in range(2):
    one = alone(text[b : b + 1], eot[b : b + 1])
    np.testing.assert_allclose(both[0][b], one[0][0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both[1][b], one[1][0], rtol=1e-5, atol=1e-6)


def test_wrong_latent_width_is_named(golden):
  with pytest.raises(ValueError, match=r"\[batch, 8\].*\(2, 5\)"):
    golden["model"].apply(golden["variables"], jnp.zeros((2, 5)), jnp.zeros((2, 16)), method="map_latents")
