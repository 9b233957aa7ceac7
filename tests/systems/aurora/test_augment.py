"""DiffAugment in Aurora's discriminator: what it sees, in each of its uses."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax import config_files
from aurora_jax.errors import UserError
from aurora_jax.models import layers
from aurora_jax.models.clip import TextOutput
from aurora_jax.ops import diff_augment, losses, random_keys
from aurora_jax.systems import base
from aurora_jax.systems.aurora.objective import Objective
from aurora_jax.systems.aurora.system import System

CONFIG = f"--config={pathlib.Path(__file__).parents[3] / 'configs/openmoji_32.py'}"
POLICY = ("brightness", "contrast", "translation")
KEY = jax.random.key(5)
BATCH = 4


class Seen(Exception):
  """Carries what the discriminator was about to see."""


def intercept(call, args, kwargs, context):
  if context.method_name == "features":
    raise Seen(args[0])
  return jnp.zeros((BATCH, 128)) if context.method_name == "encode_text" else call(*args, **kwargs)


def seen(run):
  """The pyramid that `run` gives to the discriminator, as arrays."""
  with pytest.raises(Seen) as raised, nn.intercept_methods(intercept):
    run()
  return {r: np.asarray(images) for r, images in raised.value.args[0].items()}


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(0)
  image = lambda side: jnp.asarray(rng.uniform(-1, 1, (BATCH, side, side, 3)), jnp.float32)
  text = TextOutput(jnp.zeros((BATCH, 2, 128)), jnp.zeros(BATCH, jnp.int32), jnp.zeros((BATCH, 128)))
  batch = {"image": image(32), "caption_id": jnp.array([0, 1, 2, 0]), "tokens": None}
  return {32: image(32), 16: image(16), 8: image(8)}, text, batch


def objective(policy):
  experiment = config_files.load([f"{CONFIG}:test", f"--config.discriminator.augment={policy!r}"])
  return Objective(System(experiment), None)


def state():
  network = base.NetworkState({}, {}, {})
  return base.TrainState(jnp.int32(0), {"discriminator": network, "generator": network})


def expected(pyramid, purpose):
  key = random_keys.fold(KEY, f"discriminator_augment/{purpose}")
  return {r: diff_augment.augment(jax.random.fold_in(key, r), images, POLICY) for r, images in pyramid.items()}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [(), POLICY])
def test_real_and_generated_images_in_the_update(inputs, policy):
  generated, text, batch = inputs
  both = seen(lambda: objective(policy)._update_discriminator(state(), generated, text, batch, KEY))
  plain = seen(lambda: objective(())._update_discriminator(state(), generated, text, batch, KEY))
  assert set(both) == {32, 8}
  halves = lambda pyramid, i: {r: layers.unjoin(images, 2)[i] for r, images in pyramid.items()}
  np.testing.assert_array_equal(halves(plain, 0)[32], batch["image"])
  for i, purpose in enumerate(("real", "fake")):
    before = halves(plain, i)
    wanted = expected(before, purpose) if policy else before
    for r, images in halves(both, i).items():
      np.testing.assert_allclose(images, wanted[r], atol=1e-6)
      changed = np.abs(images - before[r]).reshape(BATCH, -1).max(axis=1)
      assert (changed > 0.01).all() if policy else (changed == 0).all(), (purpose, r)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [(), POLICY])
def test_generated_images_in_the_generators_loss(inputs, policy):
  generated, text, batch = inputs
  found = seen(lambda: objective(policy)._generator_loss(generated, {}, text, batch["caption_id"], KEY))
  plain = {r: generated[r] for r in (32, 8)}
  wanted = expected(plain, "generator") if policy else plain
  for r in plain:
    np.testing.assert_allclose(found[r], wanted[r], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [(), POLICY])
def test_real_images_in_r1(inputs, policy, monkeypatch):
  """The gradient passes through DiffAugment: the score takes the images before it."""
  _, text, batch = inputs
  monkeypatch.setattr(losses, "r1_penalty", lambda score, real, levels: score(real))
  trained = objective(policy)
  monkeypatch.setattr(trained, "_encode_captions", lambda frozen, batch: text)
  found = seen(lambda: trained.regularize(state(), {}, batch, KEY))
  if not policy:
    np.testing.assert_array_equal(found[32], batch["image"])
  else:
    wanted = expected({32: batch["image"]}, "r1")
    np.testing.assert_allclose(found[32], wanted[32], atol=1e-6)


def test_partners_are_augmented_independently(inputs):
  """Two slots with the same image, as `data.pairs` makes them."""
  generated, text, batch = inputs
  same = {r: jnp.broadcast_to(images[:1], images.shape) for r, images in generated.items()}
  found = seen(lambda: objective(POLICY)._generator_loss(same, {}, text, batch["caption_id"], KEY))
  assert np.abs(found[32][0] - found[32][3]).max() > 0.01


def test_it_is_off_by_default_and_names_are_checked():
  assert config_files.load([CONFIG]).discriminator.augment == ()
  with pytest.raises(UserError, match=r"config: discriminator.augment has \['hue'\], there are brightness, saturation"):
    config_files.load([CONFIG, "--config.discriminator.augment=('brightness', 'hue')"])


def test_variants_of_the_trial():
  plain, *others = (config_files.load([f"{CONFIG}{name}"]) for name in ("", ":augment", ":both", ":feature_critic"))
  augment, both, critic = others
  assert augment.discriminator.augment == both.discriminator.augment
  assert augment.discriminator.augment == ("brightness", "saturation", "contrast", "translation")
  assert (augment.data.shift, augment.data.scale, augment.data.rotate, augment.data.pairs) == (0, 0, 0, 2)
  assert both.data == critic.data == plain.data
  assert critic.feature_critic.weight == 1 and critic.discriminator == plain.discriminator
  assert critic.feature_critic.tokens == 64 and plain.feature_critic.weight == 0
