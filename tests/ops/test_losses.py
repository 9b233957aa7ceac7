"""The losses at logits and embeddings whose values follow by hand, and against torch."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aurora_jax.ops import losses
from aurora_jax.ops.losses import Logit


@dataclasses.dataclass(frozen=True)
class Weights:
  """A `losses.LossWeights`."""

  level_weights: Mapping[int, float] = dataclasses.field(default_factory=dict)
  level_weight_default: float = 1.0
  early_exit_adversarial: float = 1.0
  early_exit_matching: float = 1.0
  matching_real: float = 1.0
  matching_fake: float = 1.0


CFG = Weights({8: 0.5}, level_weight_default=0.25, early_exit_adversarial=0.1, early_exit_matching=0.2)
LOG3 = math.log(3)  # softplus(log 3) = log 4, softplus(-log 3) = log 4 / 3


def logits(*values):
  return [
    Logit(jnp.full((2, 4, 4), values[0]), level=8, exit=4),
    Logit(jnp.full((2, 1, 1), values[1]), level=8, exit=1),
    Logit(jnp.full((2, 1, 1), values[2]), level=4, exit=1),
  ]


def logit(*values, level=4, size=1):
  """One prediction [B, size, size], one value per sample."""
  return [Logit(jnp.broadcast_to(jnp.array(values)[:, None, None], (len(values), size, size)), level=level, exit=size)]


def softplus(x):
  return float(np.log1p(np.exp(x)))


# ----------------------------------------------------------------------------------------------------------------------
# Adversarial and matching-aware


def test_an_undecided_critic_costs_two_log_2():
  assert losses.discriminator_adversarial(logit(0.0), logit(0.0), Weights()) == pytest.approx(2 * math.log(2), rel=1e-6)
  assert losses.generator_adversarial(logit(0.0), Weights()) == pytest.approx(math.log(2), rel=1e-6)
  assert losses.discriminator_matching(logit(0.0), logit(0.0), Weights()) == pytest.approx(2 * math.log(2), rel=1e-6)
  assert losses.generator_matching(logit(0.0), Weights()) == pytest.approx(math.log(2), rel=1e-6)


def test_logistic_losses_at_log_3():
  right = losses.discriminator_adversarial(logit(LOG3), logit(-LOG3), Weights())
  wrong = losses.discriminator_adversarial(logit(-LOG3), logit(LOG3), Weights())
  assert right == pytest.approx(2 * math.log(4 / 3), rel=1e-6) and wrong == pytest.approx(2 * math.log(4), rel=1e-6)
  assert losses.generator_adversarial(logit(LOG3), Weights()) == pytest.approx(math.log(4 / 3), rel=1e-6)
  assert losses.generator_adversarial(logit(-LOG3), Weights()) == pytest.approx(math.log(4), rel=1e-6)
  # Of a mismatched pair the discriminator wants a low logit, whether the image is real or not.
  assert losses.discriminator_matching(logit(LOG3), logit(-LOG3), Weights()) == pytest.approx(
    math.log(16 / 3), rel=1e-6
  )
  assert losses.generator_matching(logit(LOG3), Weights()) == pytest.approx(math.log(4 / 3), rel=1e-6)


def test_losses_are_means_over_samples_and_pixels():
  mixed = [Logit(jnp.array([[[LOG3, -LOG3]], [[LOG3, LOG3]]]), level=4, exit=2)]
  expected = (3 * math.log(4 / 3) + math.log(4)) / 4
  assert losses.generator_adversarial(mixed, Weights()) == pytest.approx(expected, rel=1e-6)
  assert losses.generator_adversarial(logit(LOG3, -LOG3), Weights()) == pytest.approx(
    (math.log(4 / 3) + math.log(4)) / 2, rel=1e-6
  )


def test_predictions_are_summed():
  once, twice = logit(LOG3), logit(LOG3) + logit(LOG3)
  assert losses.generator_adversarial(twice, Weights()) == pytest.approx(
    2 * float(losses.generator_adversarial(once, Weights())), rel=1e-6
  )


def test_gradients_at_known_logits():
  # The derivative of softplus(-x) is -sigmoid(-x): -1/4 at log 3, -3/4 at -log 3; that of softplus is sigmoid.
  generator = jax.grad(lambda x: losses.generator_adversarial(logit(x), Weights()))
  real = jax.grad(lambda x: losses.discriminator_adversarial(logit(x), logit(0.0), Weights()))
  fake = jax.grad(lambda x: losses.discriminator_adversarial(logit(0.0), logit(x), Weights()))
  assert generator(LOG3) == pytest.approx(-1 / 4, rel=1e-5) and generator(-LOG3) == pytest.approx(-3 / 4, rel=1e-5)
  assert real(LOG3) == pytest.approx(-1 / 4, rel=1e-5) and fake(LOG3) == pytest.approx(3 / 4, rel=1e-5)


def test_extreme_logits_stay_finite():
  assert losses.generator_adversarial(logit(-1000.0), Weights()) == 1000
  assert losses.generator_adversarial(logit(1000.0), Weights()) == 0
  assert losses.discriminator_adversarial(logit(-1000.0), logit(1000.0), Weights()) == 2000
  gradient = jax.grad(lambda x: losses.generator_adversarial(logit(x), Weights()))
  assert gradient(-1000.0) == -1 and gradient(1000.0) == 0


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


def test_the_matching_loss_has_its_own_weight_of_early_exits():
  fake = logits(-1.0, 0.5, 0.0)
  expected = 0.5 * 0.2 * softplus(1) + 0.5 * softplus(-0.5) + 0.25 * softplus(0)
  assert losses.generator_matching(fake, CFG) == pytest.approx(expected, rel=1e-6)


def test_matching_loss_treats_mismatched_pairs_as_fakes():
  real, fake = logits(1.0, 2.0, 3.0), logits(-1.0, 0.5, 0.0)
  expected = (
    0.1 * (softplus(1) + softplus(-1)) + 0.5 * (softplus(2) + softplus(0.5)) + 0.25 * (softplus(3) + softplus(0))
  )
  assert losses.discriminator_matching(real, fake, CFG) == pytest.approx(expected, rel=1e-6)


def test_matching_on_real_and_on_generated_images_has_weights_of_its_own():
  real, fake = logits(1.0, 2.0, 3.0), logits(-1.0, 0.5, 0.0)
  both, only_real, only_fake = (
    float(losses.discriminator_matching(real, fake, dataclasses.replace(CFG, matching_real=a, matching_fake=b)))
    for a, b in ((1, 1), (1, 0), (0, 0.5))
  )
  assert only_real == pytest.approx(0.1 * softplus(1) + 0.5 * softplus(2) + 0.25 * softplus(3), rel=1e-6)
  assert only_real + 2 * only_fake == pytest.approx(both, rel=1e-6)


def test_weighted_mean_of_any_function():
  total = losses.weighted_mean(logits(2.0, 3.0, 5.0), CFG, 0.1, jnp.square)
  assert total == pytest.approx(0.5 * 0.1 * 4 + 0.5 * 9 + 0.25 * 25, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# R1


def test_the_score_of_r1_sums_means_over_pixels():
  values = jnp.array([[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]])
  predictions = [Logit(values, level=8, exit=2), *logit(10.0, 20.0)]
  assert losses.real_score(predictions).tolist() == [13.0, 21.0]


@pytest.mark.parametrize("batch", [1, 3])
def test_r1_of_a_linear_critic(batch):
  # The gradient is the weight, whatever the images are: the penalty is its squared length.
  weight = jnp.arange(12.0).reshape(2, 2, 3)
  pyramid = {2: jax.random.normal(jax.random.key(batch), (batch, 2, 2, 3))}
  score = lambda p: jnp.sum(p[2] * weight, (1, 2, 3)) + 5
  assert losses.r1_penalty(score, pyramid) == pytest.approx(sum(i * i for i in range(12)), rel=1e-6)


def test_r1_of_a_constant_critic_is_zero():
  assert losses.r1_penalty(lambda p: jnp.full(2, 7.0), {2: jnp.ones((2, 2, 2, 3))}) == 0


def test_r1_is_a_mean_over_samples():
  # score = |x|^2 / 2: the gradient is x, whose squared length is 12 for the first image and 48 for the second.
  images = jnp.stack([jnp.ones((2, 2, 3)), 2 * jnp.ones((2, 2, 3))])
  assert losses.r1_penalty(lambda p: jnp.sum(p[2] ** 2, (1, 2, 3)) / 2, {2: images}) == pytest.approx(30, rel=1e-6)


def test_r1_of_a_quadratic():
  # score = sum a x^2 / 2 per sample: gradient a x, penalty a^2 mean |x|^2 per level.
  pyramid = {8: jnp.full((2, 8, 8, 3), 0.5), 4: jnp.full((2, 4, 4, 3), 2.0)}
  score = lambda p: jnp.sum(p[8] ** 2, (1, 2, 3)) / 2 + 3 * jnp.sum(p[4] ** 2, (1, 2, 3)) / 2
  assert losses.r1_penalty(score, pyramid) == pytest.approx(0.25 * 192 + 9 * 4 * 48, rel=1e-5)
  assert losses.r1_penalty(score, pyramid, (8,)) == pytest.approx(0.25 * 192, rel=1e-5)
  assert losses.r1_penalty(score, pyramid, (4,)) == pytest.approx(9 * 4 * 48, rel=1e-5)


def test_r1_trains_the_critic():
  # score = a * sum of x: the penalty is 12 a^2, its derivative 24 a.
  pyramid = {2: jnp.ones((3, 2, 2, 3))}
  penalty = lambda a: losses.r1_penalty(lambda p: a * jnp.sum(p[2], (1, 2, 3)), pyramid)
  value, gradient = jax.value_and_grad(penalty)(3.0)
  assert value == pytest.approx(108, rel=1e-6) and gradient == pytest.approx(72, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Contrastive


def test_normalize():
  np.testing.assert_allclose(losses.normalize(jnp.array([[3.0, 4.0], [0.0, -2.0]])), [[0.6, 0.8], [0, -1]], rtol=1e-6)
  assert losses.normalize(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32
  zero = jnp.zeros((1, 3))
  assert (losses.normalize(zero) == 0).all()
  assert np.isfinite(jax.grad(lambda x: jnp.sum(losses.normalize(x)))(zero)).all()


AXES = jnp.eye(2)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_contrastive_loss_of_orthogonal_pairs(scale):
  # Each row has the logits (scale, 0), the right one first.
  loss, accuracy = losses.contrastive_loss(7 * AXES, AXES / 3, scale)
  assert loss == pytest.approx(math.log(1 + math.exp(-scale)), rel=1e-5)
  assert accuracy == (1.0 if scale else 0.5)  # of equal logits the first one counts as the highest


def test_contrastive_loss_of_exchanged_pairs():
  loss, accuracy = losses.contrastive_loss(AXES, AXES[::-1], 2.0)
  assert loss == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6) and accuracy == 0


def test_contrastive_loss_of_equal_embeddings():
  loss, accuracy = losses.contrastive_loss(jnp.ones((4, 3)), jnp.ones((4, 3)), 100.0)
  assert loss == pytest.approx(math.log(4), rel=1e-5) and accuracy == 0.25


def test_contrastive_loss_of_one_pair_is_zero():
  loss, accuracy = losses.contrastive_loss(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), 100.0)
  assert loss == 0 and accuracy == 1


def test_a_bank_by_hand():
  # One caption at right angles to the image and text of each pair: another logit of 0 for the images, none for the
  # texts.
  three = jnp.eye(3)
  loss, accuracy = losses.contrastive_loss(three[:2], three[:2], 2.0, None, three[2:], jnp.zeros((2, 1), bool))
  by_image, by_text = math.log(1 + 2 * math.exp(-2)), math.log(1 + math.exp(-2))
  assert loss == pytest.approx((by_image + by_text) / 2, rel=1e-5) and accuracy == 1
  # The bank's caption is the first image itself: it ties with the right one, which comes first.
  loss, accuracy = losses.contrastive_loss(three[:2], three[:2], 2.0, None, three[:1], jnp.zeros((2, 1), bool))
  by_image = (math.log(2 + math.exp(-2)) + math.log(1 + 2 * math.exp(-2))) / 2
  assert loss == pytest.approx((by_image + by_text) / 2, rel=1e-5) and accuracy == 1


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


def test_a_bank_adds_negatives_but_never_the_right_caption():
  rng = np.random.default_rng(1)
  images, texts = (rng.normal(size=(3, 6)).astype(np.float32) for _ in range(2))
  bank = np.asarray(losses.normalize(jnp.asarray(texts)))
  plain, _ = losses.contrastive_loss(images, texts, 5.0)
  right = jnp.eye(3, dtype=bool)
  with_all_masked, _ = losses.contrastive_loss(images, texts, 5.0, None, bank, jnp.ones((3, 3), bool))
  assert with_all_masked == pytest.approx(float(plain), rel=1e-6)
  doubled, _ = losses.contrastive_loss(images, texts, 5.0, None, bank, right)
  assert doubled > plain


def test_duplicate_captions_are_no_negatives_of_each_other():
  images = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
  same = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
  apart, _ = losses.contrastive_loss(images, images, 50.0, same)
  mixed, _ = losses.contrastive_loss(images, images, 50.0)
  assert apart < 1e-4 < mixed


def test_a_batch_of_one_caption_has_no_negatives():
  images, same = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.ones((2, 2), bool)
  loss, gradient = jax.value_and_grad(lambda x: losses.contrastive_loss(x, images, 50.0, same)[0])(images)
  assert loss == 0 and (gradient == 0).all()
