"""The feature critic beside the discriminator: its gradients, what it asks of the generator, a step of all three."""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax import config_files
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop import clip_hf
from aurora_jax.models import clip as clip_lib
from aurora_jax.models import dino, dino_config
from aurora_jax.models import feature_critic as critic_lib
from aurora_jax.ops import random_keys
from aurora_jax.ops.losses import normalize
from aurora_jax.parallel.mesh import names_of
from aurora_jax.runs import checkpoint_manager
from aurora_jax.systems import base
from aurora_jax.systems.aurora import config, feature_critic
from aurora_jax.systems.aurora.objective import Objective
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[3]
TINY = f"--config={ROOT / 'tests/parallel/tiny_pod.py'}"
KEY = jax.random.key(3)
DINO = dict(image_size=8, patch=4, width=8, depth=2, heads=2, mlp_width=8)
CRITIC = config.FeatureCritic(
  weight=0.5,
  dino=dino_config.DinoConfig(**DINO),
  image_size=8,
  taps=(0,),
  text_dim=16,
  text_map_dim=4,
  kernel_size=3,
  virtual_batch=2,
  augment=("brightness",),
)
TOWER = dict(width=32, layers=1, heads=2, mlp_width=32)
CLIP = clip_lib.ClipConfig(
  text=clip_lib.TextConfig(**TOWER, vocabulary_size=50, context_length=8, eot_id=49),
  image=clip_lib.ImageConfig(**TOWER, size=8, patch=4),
  embedding_width=16,
)


def experiment(critic=CRITIC):
  flags = ("mesh.expert=1", "train.batch_size=4", "generator.remat=False", "generator.loop_layers=False")
  flags += ("generator.attention_depth={}", "loss.clip_weight=0.0", "loss.r1_gamma=0.0", "generator.text_layers=0")
  whole = config_files.load([TINY, *(f"--config.{flag}" for flag in flags)])
  return dataclasses.replace(whole, feature_critic=critic)


@pytest.fixture(scope="module")
def tiny():
  """A system with a CLIP smaller than any that has a folder, its first state, frozen networks and a batch."""
  system = System(experiment())
  system.clip = clip_lib.Clip(CLIP)
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
  frozen = {
    "clip": jax.tree.map(draw, clip_lib.abstract_variables(CLIP)),
    "dino": {"vit": jax.tree.map(draw, dino.abstract_variables(CRITIC.dino)["params"])},
    "bank": jnp.zeros((0, 16)),
    "bank_id": jnp.zeros(0, jnp.int32),
  }

  place = lambda leaf, value: jax.device_put(value, leaf.sharding)
  drawn = lambda tree: jax.tree.map(lambda leaf: place(leaf, draw(leaf)), tree)
  zeros = lambda tree: jax.tree.map(lambda leaf: place(leaf, jnp.zeros(leaf.shape, leaf.dtype)), tree)

  def network(abstract):
    """Nothing that is drawn is zero, so that nothing is without effect."""
    params, variables = drawn(abstract.params), drawn(abstract.variables)
    ema = None if abstract.ema is None else drawn(abstract.ema)
    return base.NetworkState(params, variables, zeros(abstract.opt_state), ema)

  abstract = step_lib.abstract_state(system)
  networks = {name: network(part) for name, part in abstract.networks.items()}
  # Logits on both sides of the hinge.
  critic = networks["feature_critic"]
  networks["feature_critic"] = dataclasses.replace(critic, params=jax.tree.map(lambda x: 10 * x, critic.params))
  image = lambda: jnp.asarray(rng.uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)
  tokens = jnp.array([[48, 3 + i, 5, 49, 0, 0, 0, 0] for i in range(4)])
  batch = {"image": image(), "tokens": tokens, "caption_id": jnp.arange(4)}
  return types.SimpleNamespace(
    system=system,
    state=base.TrainState(zeros(abstract.step), networks),
    frozen=jax.device_put(frozen, system.layout.replicated),
    batch=jax.device_put(batch, system.layout.batch),
    fake=image(),
    embedding=jnp.asarray(rng.standard_normal((4, 16)), jnp.float32),
  )


def returns_gradients(state, network, gradients, metrics, *, variables=None, **_):
  """An `Update` that changes nothing."""
  return state, jnp.bool_(True), metrics | {"network": network, "gradients": gradients, "variables": variables}


def logits(tiny, variables, image, kind):
  """The critic's judgement, written out: (logits, moved spectral vectors)."""
  key = random_keys.fold(KEY, f"feature_critic/{kind}")
  rngs = {name: random_keys.fold(key, name) for name in ("augment", "crop")}
  out, moved = critic_lib.FeatureCritic(CRITIC).apply(
    variables, image, normalize(tiny.embedding), train=True, mutable=["spectral"], rngs=rngs
  )
  return out, moved["spectral"]


@pytest.mark.slow
def test_the_update_is_the_hinge_of_both_kinds_and_leaves_the_transformer(tiny):
  critic = feature_critic.FeatureCritic(tiny.system, returns_gradients)
  network, real, fake = tiny.state.networks["feature_critic"], tiny.batch["image"], tiny.fake
  assert set(network.variables) == {"spectral"} and network.ema is None and set(network.params) == {"heads"}

  def ours(state):
    metrics = dict(critic.train(state, tiny.frozen, real, fake, tiny.embedding, KEY)[2])
    assert metrics.pop("network") == "feature_critic"
    return metrics

  def direct(params, vit):
    variables = {"params": params, "dino": {"vit": vit}}
    of_fake, spectral = logits(tiny, {**variables, "spectral": network.variables["spectral"]}, fake, "fake")
    of_real, spectral = logits(tiny, {**variables, "spectral": spectral}, real, "real")
    return jnp.mean(jax.nn.relu(1 + of_fake)) + jnp.mean(jax.nn.relu(1 - of_real)), spectral

  @jax.jit
  def both(state, vit):
    return ours(state), jax.value_and_grad(direct, (0, 1), has_aux=True)(state.networks["feature_critic"].params, vit)

  metrics, ((loss, spectral), (of_heads, of_transformer)) = both(tiny.state, tiny.frozen["dino"]["vit"])
  assert metrics["loss/c_adversarial"] == pytest.approx(float(loss), rel=1e-5)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, metrics["gradients"], of_heads)
  jax.tree.map(close, metrics["variables"], {"spectral": spectral})
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_transformer))
  # Every array but the biases before a batch norm.
  for path, leaf in jax.tree_util.tree_flatten_with_path(metrics["gradients"])[0]:
    names = names_of(path)
    before_norm = names[-1] == "bias" and names[-2] in ("conv_in", "conv_mix")
    assert before_norm or np.abs(leaf).max() > 1e-5, names
  moved = metrics["variables"]["spectral"]["heads"]["conv_in"]["u"]
  assert not np.allclose(moved, network.variables["spectral"]["heads"]["conv_in"]["u"])


@pytest.mark.slow
def test_the_generators_gradient_is_that_of_the_loss(tiny):
  critic = feature_critic.FeatureCritic(tiny.system, returns_gradients)
  network = tiny.state.networks["feature_critic"]
  variables = {"params": network.params, "dino": tiny.frozen["dino"], **network.variables}

  def loss(image):
    out, spectral = logits(tiny, variables, image, "generator")
    return -0.5 * jnp.mean(out), spectral

  @jax.jit
  def both(image):
    ours = critic.guide(tiny.state, tiny.frozen, image, tiny.embedding, KEY)
    return ours, jax.value_and_grad(loss, has_aux=True)(image)

  (gradient, spectral, metrics), ((value, expected), direct) = both(tiny.fake)
  assert 0.5 * metrics["loss/g_critic"] == pytest.approx(float(value), rel=1e-5)
  np.testing.assert_allclose(gradient, direct, rtol=1e-4, atol=1e-6 * np.abs(direct).max())
  assert np.abs(gradient).reshape(4, -1).max(axis=1).min() > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spectral, expected)


@pytest.mark.slow
def test_a_step_trains_three_networks_and_goes_on_from_a_checkpoint_bitwise(tiny, tmp_path):
  step = step_lib.build(tiny.system)
  assert [program.name for program in step.programs] == ["networks"]
  compiled = step.compile(tiny.frozen)()
  first, phases = compiled(0, tiny.state, [tiny.batch])
  metrics = phases["networks"]
  names = ("loss/c_adversarial", "loss/g_critic", "c/logit_real", "c/logit_fake", "grad_norm/c", "learning_rate/c")
  assert np.isfinite([metrics[name] for name in names]).all() and metrics["grad_norm/c"] > 0
  for name, network in first.networks.items():
    before = tiny.state.networks[name]
    assert not all(map(np.array_equal, *map(jax.tree.leaves, (before.params, network.params)))), name
  u = lambda state: state.networks["feature_critic"].variables["spectral"]["heads"]["conv_in"]["u"]
  assert not np.array_equal(u(first), u(tiny.state))
  with checkpoint_manager.Checkpoints(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(1, first, config_files.to_mapping(tiny.system.experiment))
  second, _ = compiled(1, first, [tiny.batch])
  with checkpoint_manager.Checkpoints(tmp_path / "checkpoints") as checkpoints:
    restored, _ = checkpoints.restore(step.state)
  again, _ = compiled(1, restored, [tiny.batch])
  jax.tree.map(np.testing.assert_array_equal, again, second)


@pytest.mark.slow
def test_a_skipped_update_leaves_the_critic_too(tiny):
  spectral = {"u": jnp.ones(2)}
  network = dataclasses.replace(tiny.state.networks["feature_critic"], variables={"spectral": {"u": jnp.zeros(2)}})
  state = tiny.state.with_network("feature_critic", network)
  for finite in (True, False):
    found = feature_critic.with_spectral(state, spectral, jnp.bool_(finite))
    np.testing.assert_array_equal(found.networks["feature_critic"].variables["spectral"]["u"], [finite] * 2)


def test_without_a_weight_there_is_no_critic():
  plain = experiment(dataclasses.replace(CRITIC, weight=0.0))
  system = System(plain)
  assert system.feature_critic is None and list(system.networks) == ["generator", "discriminator"]
  assert "dino" not in system.abstract_frozen() and "critic" not in plain.summary
  assert Objective(system, returns_gradients)._critic is None
  assert list(System(experiment()).networks) == ["generator", "discriminator", "feature_critic"]
  assert "2 heads on a frozen transformer of 2 blocks" in experiment().summary


def test_stored_configurations_without_the_fields_are_read():
  now = config_files.load([f"--config={ROOT / 'configs/openmoji_32.py'}"])
  values = config_files.to_mapping(now)
  for field in ("feature_critic", "dino"):
    del values[field]
  del values["discriminator"]["augment"], values["optimizer"]["feature_critic"]
  assert config_files.from_stored(values) == now


def test_weights_keep_their_meaning():
  """What a run may change in a critic that it takes over (train.init_from)."""
  other = dataclasses.replace(CRITIC, weight=2.0, augment=(), virtual_batch=4, remat=True)
  assert experiment().identity("feature_critic") == experiment(other).identity("feature_critic")
  fewer = dataclasses.replace(CRITIC, taps=())
  assert experiment().identity("feature_critic") != experiment(fewer).identity("feature_critic")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(weight=-1.0), "feature_critic.weight must be positive, or 0 for no such critic, got -1.0"),
    (dict(augment=("hue",)), r"feature_critic.augment has \['hue'\], there are brightness"),
    (dict(taps=(0, 2)), r"feature_critic.taps has \[2\], feature_critic.dino has blocks 0 to 1"),
    (dict(image_size=10), "feature_critic.image_size 10 is not a multiple of feature_critic.dino.patch 4"),
    (dict(virtual_batch=3), None),
  ],
)
def test_impossible_values_are_refused(changes, message):
  if message is None:  # four images are two groups of two
    assert experiment(dataclasses.replace(CRITIC, **changes)).feature_critic.virtual_batch == 3
    whole = experiment(dataclasses.replace(CRITIC, **changes))
    message = "train.batch_size 5 cannot be split into equal groups of at most feature_critic.virtual_batch 3"
    with pytest.raises(UserError, match=message):
      dataclasses.replace(whole, train=dataclasses.replace(whole.train, batch_size=5))
    return
  with pytest.raises(UserError, match=message):
    dataclasses.replace(CRITIC, **changes)


def test_the_transformer_is_read_from_a_clip_and_must_fit(tmp_path):
  rng = np.random.default_rng(1)
  draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
  tokenizer = Tokenizer.train(["red circle", "blue square"], 560, 8)
  text = dataclasses.replace(CLIP.text, vocabulary_size=tokenizer.vocabulary_size, eot_id=tokenizer.end_id)
  cfg = dataclasses.replace(CLIP, text=text)
  params = jax.tree.map(draw, clip_lib.abstract_variables(cfg)["params"])
  clip_hf.save(tmp_path / "clip", clip_hf.ClipBundle(cfg, {"params": params}, tokenizer))
  sizes = dict(image_size=8, patch=4, width=32, depth=1, heads=2, mlp_width=32, activation="quick_gelu", pre_norm=True)
  fitting = dataclasses.replace(CRITIC, dino=dino_config.DinoConfig(**sizes))
  wide = dict(text_feature_dim=32)

  def system(critic):
    whole = experiment(critic)
    return System(
      dataclasses.replace(
        whole,
        text=dataclasses.replace(whole.text, clip=str(tmp_path / "clip")),
        generator=dataclasses.replace(whole.generator, **wide),
        discriminator=dataclasses.replace(whole.discriminator, **wide),
      )
    )

  found, abstract = system(fitting).load_frozen(), system(fitting).abstract_frozen()
  shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
  assert shapes(found["dino"]) == shapes(abstract["dino"]) and set(found["dino"]) == {"vit"}
  (note,) = system(fitting).notes()
  assert note.startswith("feature critic: no DINO; the image tower of text.clip=")
  with pytest.raises(UserError, match="width is 32, feature_critic.dino.width is 8"):
    system(CRITIC).load_frozen()
  with pytest.raises(UserError, match="feature_critic.text_dim is 8, the embeddings of the CLIP .* are 16 wide"):
    system(dataclasses.replace(fitting, text_dim=8)).load_frozen()


def test_sizes_without_jax_are_those_of_the_models():
  assert tuple(clip_lib.ACTIVATIONS) == dino_config.ACTIVATIONS and tuple(dino._RESIZES) == dino_config.RESIZES
