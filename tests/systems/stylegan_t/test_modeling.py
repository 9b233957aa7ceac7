"""The PyTorch twin of the generator against the JAX one, on random weights."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.systems.stylegan_t import generator, synthesis, torch_names
from aurora_jax.systems.stylegan_t.config import Generator, TextTower

torch = pytest.importorskip("torch")
from aurora_jax.systems.stylegan_t import modeling_stylegan_t as modeling  # noqa: E402

pytestmark = pytest.mark.slow

# Every field of the architecture has another value in the second.
FIRST = Generator(
  resolution=16,
  z_dim=6,
  text_dim=10,
  channels_base=128,
  channels_max=12,
  residual_blocks=2,
  norm_groups=2,
  text_tower=TextTower(
    layers=2, width=8, heads=2, mlp_width=12, vocabulary_size=20, context_length=7, activation="gelu_pytorch_tanh"
  ),
  noise_at_eval="random",
  low_precision_blocks=1,
)
SECOND = Generator(
  resolution=8,
  z_dim=9,
  text_dim=0,
  channels_base=64,
  channels_max=16,
  residual_blocks=1,
  norm_groups=4,
  noise_at_eval="const",
  low_precision_blocks=0,
)
BATCH = 3


def random_variables(cfg, seed=0):
  """Nothing is zero, so nothing is without effect."""
  rng = np.random.default_rng(seed)
  small = {"transform", "noise_strength", "x_avg", "kernel"}  # no phase amplifies rounding errors

  def draw(keys, leaf):
    name = keys[-1].key
    values = rng.standard_normal(leaf.shape, np.float32)
    return 1 + np.float32(0.3) * values if name == "scale" else np.float32(0.3 if name in small else 1) * values

  return jax.tree_util.tree_map_with_path(draw, generator.abstract_variables(cfg))


def twin_of(variables, cfg):
  values = json.loads(json.dumps(torch_names.config_to_torch(cfg)))
  model = modeling.StyleganTGenerator(modeling.StyleganTConfig.from_dict(values))
  model.load_state_dict({name: torch.from_numpy(array) for name, array in torch_names.to_torch(variables, cfg)})
  return model.eval()


def inputs(cfg, seed=1):
  """(z, token ids or None, noise of every layer, channels last)."""
  rng = np.random.default_rng(seed)
  tower = cfg.text_tower
  ids = rng.integers(1, tower.vocabulary_size, (BATCH, tower.context_length - 1)) if cfg.text_dim else None
  noise = {n: rng.standard_normal((BATCH, r, r, 1), np.float32) for n, r in synthesis.noise_sizes(cfg).items()}
  return rng.standard_normal((BATCH, cfg.z_dim), np.float32), ids, noise


def relative(ours, theirs):
  ours, theirs = np.asarray(ours), theirs.numpy()
  ours = ours.transpose(0, 3, 1, 2) if ours.ndim == 4 else ours
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """The arrays are too small for more."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[FIRST, SECOND], ids=["first", "second"])
def case(request):
  """The twin, and what JAX makes of the same weights and inputs."""
  cfg = request.param
  variables, (z, ids, noise) = random_variables(cfg), inputs(cfg)

  def images(variables, z, ids, noise):
    """With given noise and truncation, and with every layer's constant."""
    model = generator.Generator(cfg)
    w = model.apply(variables, z, ids, 0.6, method="map_latents")
    full = model.apply(variables, z, ids, 1.0, method="map_latents")
    make = lambda w, noise: model.apply(variables, w, noise, method="synthesize")
    return w, make(w, noise), make(full, "const")

  return cfg, variables, jax.jit(images)(variables, z, ids, noise), twin_of(variables, cfg)


def test_the_cases_differ_in_every_field_and_the_twin_has_them_all():
  fields = {field.name for field in dataclasses.fields(Generator)} - torch_names.TRAINING_FIELDS
  assert fields == {field.name for field in dataclasses.fields(modeling.StyleganTConfig)}
  assert all(getattr(FIRST, name) != getattr(SECOND, name) for name in fields)
  names = [field.name for field in dataclasses.fields(TextTower)]
  assert names == [field.name for field in dataclasses.fields(modeling.TextTower)]
  theirs = json.loads(json.dumps(modeling.StyleganTConfig().to_dict()))
  assert theirs == torch_names.config_to_torch(Generator()) and torch_names.config_from_torch(theirs) == Generator()


@torch.inference_mode()
def test_images_are_those_of_jax(case):
  cfg, _, (w, given, const), model = case
  z, ids, noise = inputs(cfg)
  z, noise = torch.from_numpy(z), {name: torch.from_numpy(n.transpose(0, 3, 1, 2)) for name, n in noise.items()}
  text = None if ids is None else model.encode_text(torch.from_numpy(ids))
  assert relative(w, model.map_latents(z, text, 0.6)) < 1e-5
  assert relative(given, model(z, text, psi=0.6, noise=noise)) < 1e-4
  assert relative(const, model(z, text)) < 1e-4
  silent = {name: torch.zeros_like(values) for name, values in noise.items()}
  assert torch.equal(model(z, text, noise="none"), model(z, text, noise=silent))
  assert not torch.allclose(model(z, text), model(z, text, noise="none"), rtol=1e-2)
  latents = {"z": z, "noise": torch.cat([n.flatten(1) for n in noise.values()], 1)}
  wanted = model(z, text, 0.6, noise if cfg.noise_at_eval == "random" else cfg.noise_at_eval)
  assert torch.equal(model.sample(latents, text, psi=0.6), wanted)
  drawn = model.draw_latents(2, torch.Generator().manual_seed(0))
  assert {name: values.shape[1] for name, values in drawn.items()} == {
    name: latents[name].shape[1] for name in (("z", "noise") if cfg.noise_at_eval == "random" else ("z",))
  }
  assert model(z, text, noise="random").shape == wanted.shape


def test_every_activation_of_the_text_tower():
  from aurora_jax.models import clip

  x = np.linspace(-4, 4, 33, dtype=np.float32)
  assert modeling.ACTIVATIONS.keys() == clip.ACTIVATIONS.keys()
  for name, function in modeling.ACTIVATIONS.items():
    assert np.abs(clip.ACTIVATIONS[name](x) - function(torch.from_numpy(x)).numpy()).max() < 1e-6


def test_a_round_trip_is_exact_and_every_tensor_is_the_twins(case):
  cfg, variables, _, model = case
  state = model.state_dict()
  assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
    entry.name: entry.shape for entry in torch_names.entries(cfg)
  }
  back = torch_names.from_torch({name: tensor.numpy() for name, tensor in state.items()}, cfg)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(back)):
    assert theirs.dtype == np.float32 and ours.tobytes() == theirs.tobytes()


@torch.inference_mode()
def test_in_bfloat16_only_the_convolutions_of_the_highest_blocks_change():
  model = twin_of(random_variables(FIRST), FIRST)
  half = copy.deepcopy(model).to(torch.bfloat16)
  changed = {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.bfloat16}
  assert changed == {
    f"blocks.b16.{name}.weight" for name in ("conv0", *(f"convs1.{i}" for i in range(4)), "torgb")
  }  # low_precision_blocks is 1
  z, ids, _ = inputs(FIRST)
  text = model.encode_text(torch.from_numpy(ids))
  exact, rough = model(torch.from_numpy(z), text), half(torch.from_numpy(z), text)
  assert rough.dtype == torch.float32 and 0 < (exact - rough).norm() / exact.norm() < 0.05


@torch.inference_mode()
def test_it_compiles_as_one_graph():
  model = twin_of(random_variables(SECOND), SECOND)
  z = torch.from_numpy(inputs(SECOND)[0])
  compiled = torch.compile(model, backend="eager", fullgraph=True)
  assert torch.equal(compiled(z, None, 0.5), model(z, None, 0.5))


def test_bad_input_is_named(tmp_path):
  model = twin_of(random_variables(SECOND), SECOND)
  z = torch.from_numpy(inputs(SECOND)[0])
  for arguments, message in (
    ((z[:, 1:],), r"z must be \[batch, 9\], got \[3, 8\]"),
    ((z, torch.zeros(3, 4)), r"text must be None, got \[3, 4\]"),
    ((z, None, 1.0, "loud"), "noise must be 'const', 'none', 'random' or tensors by layer, got 'loud'"),
    ((z, None, 1.0, {}), "noise must have one tensor for each of b8.convs1.0"),
  ):
    with pytest.raises(ValueError, match=message):
      model(*arguments)
  with pytest.raises(ValueError, match="no text tower"):
    model.encode_text(torch.zeros(1, 3, dtype=torch.long))
  values = torch_names.config_to_torch(SECOND)
  for change, message in (
    ({"model_type": "aurora"}, "of type 'aurora', not 'stylegan_t'"),
    ({"colour": 1}, "no field 'colour'"),
    ({"text_tower": {"depth": 1}}, "no field 'text_tower.depth'"),
    ({"z_dim": "9"}, "z_dim is '9'"),
    ({"norm_groups": 5}, "does not divide"),
  ):
    with pytest.raises(UserError, match=message):
      torch_names.config_from_torch({**values, **change})
  with pytest.raises(ValueError, match="unknown fields in the configuration: colour, text_tower.depth"):
    modeling.StyleganTConfig.from_dict({**values, "colour": 1, "text_tower": {"depth": 1}})
  model.save_pretrained(tmp_path)
  assert torch.equal(model(z), modeling.StyleganTGenerator.from_pretrained(tmp_path)(z))
