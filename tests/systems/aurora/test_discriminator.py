"""The discriminator: its size, its fifteen predictions, independence of levels and samples, second derivatives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_on_host import drawn_on_host

from aurora_jax import config
from aurora_jax.ops import losses, resample
from aurora_jax.systems.aurora import config as aurora_config
from aurora_jax.systems.aurora import discriminator

pytestmark = pytest.mark.slow

CFG = aurora_config.Discriminator(
  resolution=16,
  channels_base=256,
  channels_max=32,
  blocks=config.PerResolution({16: 1, 8: 2, 4: 1}),
  attention_depth=config.PerResolution({8: 1}),
  heads=2,
  head_dim=4,
  input_resolutions=(16, 8, 4),
  exit_resolutions=(8, 4, 1),
  head_layers=1,
  text_feature_dim=6,
  text_dim=8,
  text_layers=1,
  text_heads=2,
  text_lr_multiplier=1.0,
)


@pytest.fixture(scope="module")
def setting():
  """(model, parameters, compiled `apply`, images of all levels, text, position of the caption's last token)."""
  keys = jax.random.split(jax.random.key(0), 4)
  image = jax.random.normal(keys[0], (4, 16, 16, 3))
  pyramid = resample.image_pyramid(image, CFG.input_resolutions)
  text, eot = jax.random.normal(keys[1], (4, 5, 6)), jnp.array([1, 2, 3, 4])
  model = discriminator.Discriminator(CFG)
  with drawn_on_host():
    params = jax.jit(model.init)(keys[2], pyramid, text, eot)
  # Zero-initialized output layers get values, so that every path carries signal.
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), params)
  return model, params, jax.jit(model.apply), pyramid, text, eot


def test_full_size_is_gigagans():
  count = sum(
    int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(discriminator.abstract_params(aurora_config.Discriminator()))
  )
  assert abs(count / 381.4e6 - 1) < 0.01  # GigaGAN, Table A2: 381.4 M


def test_full_model_makes_fifteen_predictions():
  cfg = aurora_config.Discriminator()
  pairs = [
    (level, exit_resolution)
    for level in cfg.input_resolutions
    for exit_resolution in cfg.exit_resolutions
    if exit_resolution < level
  ]
  assert len(pairs) == 15


def test_every_level_is_judged_at_every_exit_below_it(setting):
  _, params, apply, pyramid, text, eot = setting
  logits = apply(params, pyramid, text, eot)
  found = {(logit.level, logit.exit): logit.value.shape for logit in logits}
  assert found == {
    (16, 8): (4, 8, 8),
    (16, 4): (4, 4, 4),
    (8, 4): (4, 4, 4),
    (16, 1): (4, 1, 1),
    (8, 1): (4, 1, 1),
    (4, 1): (4, 1, 1),
  }


def test_levels_and_samples_do_not_mix(setting):
  _, params, apply, pyramid, text, eot = setting
  before = {(l.level, l.exit): l.value for l in apply(params, pyramid, text, eot)}
  changed = {**pyramid, 8: pyramid[8].at[2].add(1.0)}
  after = {(l.level, l.exit): l.value for l in apply(params, changed, text, eot)}
  for key, value in before.items():
    same = np.isclose(value, after[key], rtol=1e-4, atol=1e-4).all(axis=(1, 2))
    assert same.tolist() == [True, True, key[0] != 8, True], key


def test_text_reaches_every_prediction(setting):
  _, params, apply, pyramid, text, eot = setting
  before, after = apply(params, pyramid, text, eot), apply(params, pyramid, text.at[0].add(1.0), eot)
  for a, b in zip(before, after):
    assert np.abs(a.value[0] - b.value[0]).max() > 1e-4
    np.testing.assert_allclose(a.value[1:], b.value[1:], rtol=1e-4, atol=1e-4)


def test_r1_penalty_is_the_slope_of_the_score_and_differentiates_again(setting):
  """Through everything, attention at zero distance (tied queries and keys) included."""
  model, params, _, pyramid, text, eot = setting

  def score(params, images):
    return losses.real_score(model.apply(params, images, text, eot))

  penalty, second = jax.jit(
    jax.value_and_grad(lambda params: losses.r1_penalty(lambda images: score(params, images), pyramid))
  )(params)
  assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(second))
  assert sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(second)) > 0
  # Along its own gradient the score climbs by the squared norm. (The penalty itself jumps at the kinks of leaky ReLU,
  # so a difference quotient says nothing about its derivative.)
  climb = jax.jit(jax.grad(lambda images: jnp.sum(score(params, images))))(pyramid)
  norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in climb.values())))
  step = 0.02 / norm
  along = jax.jit(lambda t: jnp.sum(score(params, {r: pyramid[r] + t * climb[r] for r in pyramid})))
  slope = float(along(step) - along(-step)) / (2 * step)
  assert slope == pytest.approx(norm**2, rel=3e-2)
  assert float(penalty) == pytest.approx(norm**2 / 4, rel=1e-4)  # the mean over four samples


def test_minibatch_std_sees_only_its_own_group():
  x = jnp.concatenate([jnp.zeros((2, 4, 4, 3)), jax.random.normal(jax.random.key(0), (2, 4, 4, 3))])
  out = discriminator.minibatch_std(x, 2)
  assert out.shape == (4, 4, 4, 4)
  assert np.abs(out[:2, ..., 3]).max() < 1e-3
  assert out[2:, ..., 3].min() > 0.1


def test_partners_are_of_one_caption_and_kind():
  x = jax.random.normal(jax.random.key(0), (4 * 2, 2, 2, 3))  # a real and a generated image of four samples
  out = np.asarray(discriminator.compare_pairs(x, jnp.array([5, 9, 5, 7]), kinds=2)).reshape(4, 2, 2, 2, 7)
  images = np.asarray(x).reshape(4, 2, 2, 2, 3)
  np.testing.assert_array_equal(out[..., :3], images)
  np.testing.assert_allclose(out[0, ..., 3:6], np.hypot(images[0] - images[2], 0.1), rtol=1e-6)
  np.testing.assert_array_equal(out[2, ..., 3:6], out[0, ..., 3:6])
  np.testing.assert_array_equal(out[[1, 3], ..., 3:], 0)
  np.testing.assert_array_equal(out[..., 6].min((1, 2, 3)), [1, 0, 1, 0])


def test_a_discriminator_that_compares_pairs_judges_a_picture_by_its_partner(setting):
  model, _, _, pyramid, text, eot = setting
  model = discriminator.Discriminator(dataclasses.replace(model.cfg, compare_pairs=True))
  with drawn_on_host():
    variables = jax.jit(model.init)(jax.random.key(1), pyramid, text, eot)
  ids = jnp.arange(len(eot)).at[-1].set(0)

  @jax.jit
  def last(pyramid, ids):
    run = lambda module: module.judge(module.features(pyramid, caption_id=ids), module.encode_text(text, eot))
    return next(logit.value for logit in model.apply(variables, method=run) if logit.exit == 1)

  changed = {r: images.at[-1].add(0.3) for r, images in pyramid.items()}
  before, after = last(pyramid, ids), last(changed, ids)
  assert np.abs(before - after)[0].max() > 1e-4
  np.testing.assert_allclose(before[1:-1], after[1:-1], rtol=1e-5, atol=1e-6)
  apart = jnp.arange(len(eot))
  np.testing.assert_allclose(last(pyramid, apart)[:-1], last(changed, apart)[:-1], rtol=1e-5, atol=1e-6)
