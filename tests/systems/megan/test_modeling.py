"""The PyTorch twin of generators and gate against the JAX ones, on random weights."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.systems.megan import generator, torch_names
from aurora_jax.systems.megan.config import Generator

torch = pytest.importorskip("torch")
from aurora_jax.systems.megan import modeling_megan as modeling  # noqa: E402

# Every field has another value in each of them.
DRAWN = Generator(resolution=32, z_dim=6, channels=4, generators=3, bn_at_eval="batch", gate_at_eval="sample")
LIKELIEST = Generator(resolution=16, z_dim=10, channels=3, generators=4, bn_at_eval="running", gate_at_eval="argmax")
ALONE = Generator(resolution=16, z_dim=4, channels=2, generators=1, bn_at_eval="running", gate_at_eval="sample")
BATCH = 5


def random_variables(cfg, seed=0):
  rng = np.random.default_rng(seed)

  def draw(keys, leaf):
    name = keys[-1].key
    values = rng.standard_normal(leaf.shape, np.float32)
    if name == "count":
      return rng.integers(1, 1 << 30, leaf.shape, np.int32)
    return {"var": 0.5 + np.abs(values), "scale": 1 + 0.3 * values}.get(name, 0.4 * values).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, generator.abstract_variables(cfg))


def twin_of(variables, cfg):
  model = modeling.MeganGenerator(
    modeling.MeganConfig.from_dict(json.loads(json.dumps(torch_names.config_to_torch(cfg))))
  )
  model.load_state_dict({name: torch.from_numpy(array) for name, array in torch_names.to_torch(variables, cfg)})
  return model.eval()


def inputs(cfg, seed=1):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((BATCH, cfg.z_dim), np.float32), rng.random((BATCH, cfg.generators), np.float32)


@torch.inference_mode()
def run(model, arrays):
  return model(*map(torch.from_numpy, arrays))


def relative(ours, theirs):
  return np.abs(np.asarray(ours) - theirs.numpy()).max() / np.abs(theirs.numpy()).max()


@pytest.fixture(scope="module", params=[DRAWN, LIKELIEST, ALONE], ids=["drawn", "likeliest", "alone"])
def case(request):
  """Both on the same weights and latents."""
  cfg = request.param
  variables, arrays = random_variables(cfg), inputs(cfg)
  sample = lambda variables, z, uniform: generator.Generator(cfg).apply(variables, z, uniform, 1.0, method="sample")
  return cfg, variables, arrays, jax.jit(sample)(variables, *arrays), twin_of(variables, cfg)


def test_the_twin_has_every_field():
  fields = {field.name for field in dataclasses.fields(Generator)} - torch_names.TRAINING_FIELDS
  assert fields == {field.name for field in dataclasses.fields(modeling.MeganConfig)}
  assert all(len({getattr(cfg, name) for cfg in (DRAWN, LIKELIEST)}) == 2 for name in fields)
  assert modeling.MeganConfig().to_dict() == torch_names.config_to_torch(Generator())
  assert torch_names.config_from_torch(modeling.MeganConfig().to_dict()) == Generator()


@pytest.mark.slow
def test_images_and_choices_are_those_of_jax(case):
  cfg, _, arrays, ours, model = case
  theirs = run(model, arrays)
  np.testing.assert_array_equal(np.argmax(ours.gate, -1), theirs.generator)
  assert cfg.generators == 1 or len(theirs.generator.unique()) > 1
  assert relative(ours.logits, theirs.logits) < 1e-4
  assert relative(ours.image.transpose(0, 3, 1, 2), theirs.image) < 1e-4


def test_a_round_trip_is_exact_and_every_tensor_is_the_twins(case):
  cfg, variables, _, _, model = case
  state = model.state_dict()
  assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
    entry.name: entry.shape for entry in torch_names.entries(cfg)
  }
  back = torch_names.from_torch({name: tensor.numpy() for name, tensor in state.items()}, cfg)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(back)):
    assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()


def test_in_bfloat16_norms_and_gate_stay_float32():
  model = twin_of(random_variables(LIKELIEST), LIKELIEST)
  half = copy.deepcopy(model).to(torch.bfloat16)
  small = {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
  assert {"generators.r4.norm.running_var", "projection.weight", "gate.dense_1.bias"} <= small
  assert half.generators["r4"].weight.dtype == torch.bfloat16
  exact, rough = run(model, inputs(LIKELIEST)), run(half, inputs(LIKELIEST))
  same = exact.generator == rough.generator
  assert same.any() and rough.image.dtype == torch.float32
  assert 0 < (exact.image - rough.image)[same].norm() / exact.image[same].norm() < 0.1


def test_bad_input_is_named(tmp_path):
  model = twin_of(random_variables(DRAWN), DRAWN)
  z, uniform = map(torch.from_numpy, inputs(DRAWN))
  with pytest.raises(ValueError, match=r"z must be \[batch, 6\], got \[5, 5\]"):
    model(z[:, 1:], uniform)
  with pytest.raises(ValueError, match=r"uniform must be \[5, 3\], got None"):
    model(z)
  with pytest.raises(ValueError, match="needs 2 samples or more"):
    model(z[:1], uniform[:1])
  values = torch_names.config_to_torch(DRAWN)
  for change, message in (
    ({"model_type": "aurora"}, "of type 'aurora', not 'megan'"),
    ({"colour": 1}, "no field 'colour'"),
    ({"channels": "4"}, "channels is '4'"),
    ({"resolution": 24}, "must be a power of two"),
  ):
    with pytest.raises(UserError, match=message):
      torch_names.config_from_torch({**values, **change})
  with pytest.raises(ValueError, match="unknown fields in the configuration: colour"):
    modeling.MeganConfig.from_dict({**values, "colour": 1})
  model.save_pretrained(tmp_path)
  assert torch.equal(model(z, uniform).image, modeling.MeganGenerator.from_pretrained(tmp_path)(z, uniform).image)
