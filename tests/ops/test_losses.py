"""The losses against hand calculations and torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aurora_jax.config import PerResolution
from aurora_jax.ops import augment, losses
from aurora_jax.systems.aurora import config
from aurora_jax.systems.aurora.discriminator import Logit

CFG = config.Loss(
  level_weights=PerResolution({8: 0.5}),
  level_weight_default=0.25,
  early_exit_adversarial=0.1,
  early_exit_matching=0.2,
)


def logits(*values):
  return [
    Logit(jnp.full((2, 4, 4), values[0]), level=8, exit=4),
    Logit(jnp.full((2, 1, 1), values[1]), level=8, exit=1),
    Logit(jnp.full((2, 1, 1), values[2]), level=4, exit=1),
  ]


def softplus(x):
  return float(np.log1p(np.exp(x)))


def test_adversarial_losses_weigh_levels_and_exits():
  real, fake = logits(1.0, 2.0, 3.0), logits(-1.0, 0.5, 0.0)
  expected = (
    0.5 * 0.1 * (softplus(-1) + softplus(-1))
    + 0.5 * (softplus(-2) + softplus(0.5))
    + 0.25 * (softplus(-3) + softplus(0))
  )
  assert losses.discriminator_adversarial(real, fake, CFG) == pytest.approx(expected, rel=1e-6)
  expected = 0.05 * softplus(1) + 0.5 * softplus(-0.5) + 0.25 * softplus(0)
  assert losses.generator_adversarial(fake, CFG) == pytest.approx(expected, rel=1e-6)


def test_matching_loss_treats_mismatched_pairs_as_fakes():
  real, fake = logits(1.0, 2.0, 3.0), logits(-1.0, 0.5, 0.0)
  expected = (
    0.1 * (softplus(1) + softplus(-1)) + 0.5 * (softplus(2) + softplus(0.5)) + 0.25 * (softplus(3) + softplus(0))
  )
  assert losses.discriminator_matching(real, fake, CFG) == pytest.approx(expected, rel=1e-6)


def test_matching_on_real_and_on_generated_pictures_weighs_by_itself():
  real, fake = logits(1.0, 2.0, 3.0), logits(-1.0, 0.5, 0.0)
  both, only_real, only_fake = (
    float(losses.discriminator_matching(real, fake, dataclasses.replace(CFG, matching_real=a, matching_fake=b)))
    for a, b in ((1, 1), (1, 0), (0, 0.5))
  )
  assert only_real == pytest.approx(0.1 * softplus(1) + 0.5 * softplus(2) + 0.25 * softplus(3), rel=1e-6)
  assert only_real + 2 * only_fake == pytest.approx(both, rel=1e-6)


def test_contrastive_loss_is_torchs_symmetric_cross_entropy():
  rng = np.random.default_rng(0)
  images, texts = (rng.normal(size=(5, 7)).astype(np.float32) for _ in range(2))
  loss, accuracy = losses.contrastive_loss(images, texts, 20.0)
  unit = lambda x: torch.nn.functional.normalize(torch.tensor(x), dim=1)
  theirs = 20.0 * unit(images) @ unit(texts).T
  target = torch.arange(5)
  cross_entropy = torch.nn.functional.cross_entropy
  expected = (cross_entropy(theirs, target) + cross_entropy(theirs.T, target)) / 2
  assert loss == pytest.approx(expected.item(), rel=1e-5)
  assert accuracy == pytest.approx((theirs.argmax(1) == target).float().mean().item())


def test_bank_adds_negatives_but_never_the_own_caption():
  rng = np.random.default_rng(1)
  images, texts = (rng.normal(size=(3, 6)).astype(np.float32) for _ in range(2))
  bank = np.asarray(losses.normalize(jnp.asarray(texts)))
  plain, _ = losses.contrastive_loss(images, texts, 5.0)
  own = jnp.eye(3, dtype=bool)
  with_all_masked, _ = losses.contrastive_loss(images, texts, 5.0, None, bank, jnp.ones((3, 3), bool))
  assert with_all_masked == pytest.approx(float(plain), rel=1e-6)
  doubled, _ = losses.contrastive_loss(images, texts, 5.0, None, bank, own)
  assert doubled > plain


def test_duplicate_captions_are_no_negatives_of_each_other():
  images = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  same = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
  apart, _ = losses.contrastive_loss(images, images, 50.0, same)
  mixed, _ = losses.contrastive_loss(images, images, 50.0)
  assert apart < 1e-4 < mixed


def test_r1_of_a_quadratic():
  # score = sum a x^2 / 2 per sample: gradient a x, penalty a^2 mean |x|^2 per level.
  pyramid = {8: jnp.full((2, 8, 8, 3), 0.5), 4: jnp.full((2, 4, 4, 3), 2.0)}
  score = lambda p: jnp.sum(p[8] ** 2, (1, 2, 3)) / 2 + 3 * jnp.sum(p[4] ** 2, (1, 2, 3)) / 2
  assert losses.r1_penalty(score, pyramid) == pytest.approx(0.25 * 192 + 9 * 4 * 48, rel=1e-5)
  assert losses.r1_penalty(score, pyramid, (8,)) == pytest.approx(0.25 * 192, rel=1e-5)
  assert losses.r1_penalty(score, pyramid, (4,)) == pytest.approx(9 * 4 * 48, rel=1e-5)


def test_roughen_keeps_white_nearly_white_and_has_gradients():
  white = jnp.ones((4, 16, 16, 3))
  out = augment.roughen(jax.random.key(0), white)
  assert np.abs(out - 1).mean() < 0.12
  gradient = jax.grad(lambda x: jnp.sum(augment.roughen(jax.random.key(0), x)))(white)
  assert 0.5 < float(gradient.mean()) < 1.3
