"""The PyTorch twin of the generator against the JAX one, on random weights."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.config import PerResolution
from aurora_jax.errors import UserError
from aurora_jax.systems.aurora import generator, torch_names
from aurora_jax.systems.aurora.config import Generator

torch = pytest.importorskip("torch")
from aurora_jax.systems.aurora import modeling_aurora as modeling  # noqa: E402

pytestmark = pytest.mark.slow

FIRST = Generator(
  resolution=16,
  z_dim=8,
  w_dim=16,
  mapping_layers=3,
  mapping_width=12,
  mapping_lr_multiplier=0.5,
  text_feature_dim=20,
  text_dim=16,
  text_layers=1,
  text_heads=2,
  text_lr_multiplier=0.3,
  text_residual_gain=0.9,
  text_attention="scaled",
  channels_base=512,
  channels_max=64,
  blocks=PerResolution({4: 2, 8: 1, 16: 1}),
  adaptive_kernels=PerResolution({4: 1, 8: 2, 16: 3}),
  attention_depth=PerResolution({8: 2}),
  experts=PerResolution({8: 3}),
  heads=2,
  head_dim=8,
  conv_residual_gain=0.5,
  attention_residual_gain=0.6,
  w_token=True,
  deformable_max_resolution=4,
  output_resolutions=(4, 8, 16),
  moe_backend="dense",  # the least to compile
)
# Every field of the architecture has another value than in FIRST.
SECOND = Generator(
  resolution=8,
  z_dim=4,
  w_dim=8,
  mapping_layers=1,
  mapping_width=20,
  mapping_lr_multiplier=0.25,
  text_feature_dim=12,
  text_dim=12,
  text_layers=2,
  text_heads=3,
  text_lr_multiplier=1.0,
  text_residual_gain=0.5,
  text_attention="uniform",
  channels_base=256,
  channels_max=32,
  blocks=PerResolution({4: 1, 8: 2}),
  adaptive_kernels=PerResolution({4: 3, 8: 1}),
  attention_depth=PerResolution({4: 1, 8: 0}),
  experts=PerResolution({4: 1, 8: 2}),
  heads=1,
  head_dim=16,
  feed_forward_ratio=2,
  conv_residual_gain=0.3,
  attention_residual_gain=0.9,
  fourier_input=False,
  tied_attention=True,
  deformable_max_resolution=8,
  output_resolutions=(4, 8),
  moe_backend="dense",
)
# What a run that grows has trained of SECOND so far; and the last kind of text attention.
GROWING = dataclasses.replace(SECOND, output_resolutions=(4,), text_attention="independent")


# Mean and standard deviation of leaves that are not N(0, 1): tokens differ, and no phase or offset amplifies rounding
# errors.
DISTRIBUTIONS = {
  "scale": (1.0, 0.3),
  "bias": (0.0, 0.3),
  "w_avg": (0.0, 0.3),
  "mtm_scale": (0.0, 0.3),
  "transform": (0.0, 0.3),
}


def random_variables(cfg, seed=0):
  """Nothing is zero, so nothing is without effect."""
  rng = np.random.default_rng(seed)

  def draw(keys, leaf):
    mean, std = DISTRIBUTIONS.get(keys[-1].key, (0.0, 1.0))
    return np.float32(mean) + np.float32(std) * rng.standard_normal(leaf.shape, np.float32)

  return jax.tree_util.tree_map_with_path(draw, generator.abstract_variables(cfg))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """The arrays are too small for more."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


def twin_of(variables, cfg):
  """The PyTorch generator with the same weights, read the way that an export is."""
  values = json.loads(json.dumps(torch_names.config_to_torch(cfg)))
  model = modeling.AuroraGenerator(modeling.AuroraConfig.from_dict(values))
  model.load_state_dict({name: torch.from_numpy(array) for name, array in torch_names.to_torch(variables, cfg)})
  return model.eval()


def inputs(cfg, batch=3, tokens=6, seed=1):
  rng = np.random.default_rng(seed)
  z = rng.standard_normal((batch, cfg.z_dim), np.float32)
  text = rng.standard_normal((batch, tokens, cfg.text_feature_dim), np.float32)
  return z, text, np.array([1, tokens - 1, 3], np.int32)[:batch]


@torch.inference_mode()
def run(model, arrays, psi=1.0):
  return model(*map(torch.from_numpy, arrays), psi=psi)


def relative(ours, theirs):
  """Largest difference over the largest entry; `ours` may have channels last."""
  ours, theirs = np.asarray(ours), theirs.float().numpy()
  ours = ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(
  scope="module", params=[(FIRST, 0.6), (SECOND, None), (GROWING, 0.9)], ids=["first", "second", "growing"]
)
def case(request):
  """Both generators on the same weights and inputs."""
  cfg, psi = request.param
  variables, arrays = random_variables(cfg), inputs(cfg)
  ours = jax.jit(generator.Generator(cfg).apply)(variables, *arrays, psi)
  model = twin_of(variables, cfg)
  return dict(cfg=cfg, psi=psi, variables=variables, arrays=arrays, ours=ours, model=model)


def test_the_cases_differ_in_every_field_and_the_twin_has_them_all():
  fields = {field.name for field in dataclasses.fields(Generator)} - torch_names.TRAINING_FIELDS
  assert fields == {field.name for field in dataclasses.fields(modeling.AuroraConfig)}
  values = [{getattr(cfg, name) for cfg in (FIRST, SECOND, GROWING)} for name in sorted(fields)]
  assert all(len(different) > 1 for different in values)
  assert {cfg.text_attention for cfg in (FIRST, SECOND, GROWING)} == {"scaled", "uniform", "independent"}
  theirs = json.loads(json.dumps(modeling.AuroraConfig().to_dict()))
  assert theirs == torch_names.config_to_torch(Generator())
  assert torch_names.config_from_torch(theirs) == Generator()


def test_images_and_routing_are_those_of_jax(case):
  ours, theirs = case["ours"], run(case["model"], case["arrays"], 1.0 if case["psi"] is None else case["psi"])
  assert relative(ours.w, theirs.w) < 1e-5
  assert sorted(ours.pyramid) == sorted(theirs.pyramid) == sorted(case["cfg"].output_resolutions)
  for resolution, image in ours.pyramid.items():
    assert relative(image, theirs.pyramid[resolution]) < 1e-4
  assert relative(ours.image, theirs.image) < 1e-4
  assert list(ours.routing) == list(theirs.routing)
  for name, layer in theirs.routing.items():
    np.testing.assert_array_equal(ours.routing[name].expert, layer.expert)
    assert relative(ours.routing[name].logits, layer.logits) < 1e-4
    assert len(layer.expert.unique()) > 1  # else the test would show little


def test_a_round_trip_is_exact_and_every_tensor_is_the_twins(case):
  cfg, variables = case["cfg"], case["variables"]
  state = case["model"].state_dict()
  assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
    entry.name: entry.shape for entry in torch_names.entries(cfg)
  }
  back = torch_names.from_torch({name: tensor.numpy() for name, tensor in state.items()}, cfg)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(back)):
    assert theirs.dtype == np.float32 and ours.tobytes() == theirs.tobytes()


@pytest.fixture(scope="module")
def model():
  return twin_of(random_variables(FIRST), FIRST)


@pytest.fixture(scope="module")
def out(model):
  return run(model, inputs(FIRST))


def test_samples_are_truncated_as_in_jax(model, out):
  from aurora_jax.systems.aurora.system import truncate

  rng = np.random.default_rng(3)
  w, mean = rng.standard_normal((2, 3, FIRST.w_dim)).astype(np.float32)
  average = model.average.w.numpy()
  for psi in (0.0, 0.3, 0.7, 1.0):
    ours = truncate(jnp.asarray(w), jnp.asarray(mean), jnp.asarray(average), jnp.full((1, 1), psi))
    assert relative(ours, model.truncate(torch.from_numpy(w), psi, torch.from_numpy(mean))) < 1e-6
  z, text, eot = map(torch.from_numpy, inputs(FIRST))
  means = torch.from_numpy(rng.standard_normal((3, 5, FIRST.z_dim)).astype(np.float32))
  same = model.sample({"z": z}, (text, eot), psi=0.0, means={"z": means})
  other = model.sample({"z": z + 1}, (text, eot), psi=0.0, means={"z": means})
  assert torch.equal(same, other) and not torch.equal(same, out.image)


def test_in_bfloat16_what_needs_precision_stays_float32(model, out):
  half = copy.deepcopy(model).to(torch.bfloat16)
  small = {name.rpartition(".")[0] for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
  assert {"text_head.align", "mapping.0", "synthesis.convs.r8_block0.conv1.style", "average"} <= small
  assert "synthesis.attentions.r8_block0.layers.0.feed_forward.router" in small
  assert half.synthesis.convs["r8_block0"].conv1.weight.dtype == torch.bfloat16
  assert torch.equal(half.average.w, model.average.w)
  exact, rough = out, run(half, inputs(FIRST))
  assert rough.image.dtype == torch.float32 and torch.equal(exact.w, rough.w)
  for resolution, image in exact.pyramid.items():
    assert 0 < (rough.pyramid[resolution] - image).norm() / image.norm() < 0.1
  for name, layer in exact.routing.items():
    assert (rough.routing[name].expert == layer.expert).float().mean() > 0.97


def test_chunks_of_attention_change_nothing(model, out, monkeypatch):
  monkeypatch.setitem(modeling._LOGITS_AT_ONCE, "cpu", 64 * 24)  # 64 tokens: rows in chunks of 24, one head at a time
  image = run(model, inputs(FIRST)).image
  assert float((image - out.image).abs().max() / out.image.abs().max()) < 1e-5


def test_larger_maps_of_adaptive_kernels_are_convolved_sample_by_sample():
  # Above 8x8 pixels a convolution takes the place of the matrix product.
  conv = modeling.ModulatedConv(6, 4, w_dim=5, kernels=2)
  rng = torch.Generator().manual_seed(0)
  x, w = torch.randn(3, 6, 12, 12, generator=rng), torch.randn(3, 5, generator=rng)
  whole = conv(x, w)
  alone = torch.cat([conv(x[i : i + 1], w[i : i + 1]) for i in range(3)])
  corner = conv(x[:, :, :8, :8], w)[:, :, :7, :7]  # by a matrix product; the last row sees the border
  assert torch.allclose(whole, alone, atol=1e-5) and torch.allclose(whole[:, :, :7, :7], corner, atol=1e-5)


def test_gradients_are_finite_where_a_query_equals_a_key():
  x = torch.zeros(1, 4, 6, requires_grad=True)
  modeling.l2_attention(x, x, x, heads=2).sum().backward()
  assert x.grad.isfinite().all()


def test_bad_input_is_named(model):
  state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
  state["extra"] = state.pop("average.w")
  state["mapping.0.bias"] = state["mapping.0.bias"][1:]
  with pytest.raises(
    UserError, match=r"1 missing: average.w; 1 left over: extra; 1 misshapen: mapping.0.bias is \(11,\)"
  ):
    torch_names.from_torch(state, FIRST)
  values = torch_names.config_to_torch(FIRST)
  for change, message in (
    ({"model_type": "megan"}, "of type 'megan', not 'aurora'"),
    ({"colour": 1}, "no field 'colour'"),
    ({"blocks": 3}, "blocks is 3"),
    ({"text_heads": 3}, "text_heads 3 does not divide"),
  ):
    with pytest.raises(UserError, match=message):
      torch_names.config_from_torch({**values, **change})
  with pytest.raises(ValueError, match="unknown fields in the configuration: colour"):
    modeling.AuroraConfig.from_dict({**values, "colour": 1})
  with pytest.raises(ValueError, match=r"z must be \[batch, 8\]"):
    model(torch.zeros(3, 7), *map(torch.from_numpy, inputs(FIRST)[1:]))


def test_folders_are_read_and_written(model, out, tmp_path):
  model.save_pretrained(tmp_path)
  again = modeling.AuroraGenerator.from_pretrained(tmp_path)
  assert not again.training and torch.equal(run(again, inputs(FIRST)).image, out.image)
  half = modeling.AuroraGenerator.from_pretrained(tmp_path, dtype=torch.bfloat16)
  assert half.synthesis.rgb["r4"].weight.dtype == torch.bfloat16 and torch.equal(half.average.w, model.average.w)
