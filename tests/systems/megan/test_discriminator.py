"""The discriminator against the released PyTorch code's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.systems.megan import config, discriminator, losses, released


@pytest.fixture(scope="module")
def score(golden):
  return jax.jit(lambda image: discriminator.Discriminator(golden.d_cfg).apply(golden.d_variables, image))


@pytest.mark.parametrize(
  ("image", "logit"),
  [
    ("in.real", "D.real"),
    ("train.image_hard", "D.fake"),
    ("D.interpolated", "D.interp_out"),
    ("train.image_soft", "train.D_fake_soft"),
    ("train.image_hard", "train.D_fake_hard"),
    ("eval.image_soft", "eval.D_fake_soft"),
    ("eval.image_hard", "eval.D_fake_hard"),
  ],
)
def test_judgements_match_the_release(golden, score, image, logit):
  assert golden.relative(score(golden.images(image)), golden.io[logit]) < 1e-5


def test_losses_and_gradients_match_the_release(golden):
  io, model = golden.io, discriminator.Discriminator(golden.d_cfg)
  real, fake = golden.images("in.real"), golden.images("train.image_hard")
  mixed = losses.interpolate(real, fake, io["in.alpha"])
  assert golden.relative(mixed, golden.images("D.interpolated")) < 1e-6

  def wasserstein(params):
    return losses.discriminator_wasserstein(model.apply(params, real), model.apply(params, fake))

  def penalty(params):
    score = lambda image: model.apply(params, image)
    return 10 * losses.gradient_penalty(score, mixed), losses.gradient_norm(score, mixed)

  @jax.jit
  def run(params):
    return jax.value_and_grad(wasserstein)(params), jax.value_and_grad(penalty, has_aux=True)(params)

  (loss, gradient), ((weighted, norms), penalty_gradient) = run(golden.d_variables)
  assert loss == pytest.approx(float(io["D.loss_real"] + io["D.loss_fake"]), abs=1e-6)
  assert golden.relative(norms, io["D.grad_norm"]) < 1e-5
  assert weighted / 10 == pytest.approx(float(io["D.gp"]), rel=1e-5)
  for ours, prefix in ((gradient, "D.grad_wasserstein."), (penalty_gradient, "D.grad_10gp.")):
    exported = released.export_discriminator(ours, golden.d_cfg)
    assert len(exported) == 8
    for name, array in exported.items():
      if name == "last.bias":  # moves all judgements alike: no gradient
        np.testing.assert_allclose(array, io[prefix + name], rtol=0, atol=1e-6)
      else:
        assert golden.relative(array, io[prefix + name]) < 1e-4, prefix + name


def test_a_batch_of_one_keeps_its_axis(golden, score):
  out = score(golden.images("in.real")[:1])
  assert out.shape == (1,)
  assert golden.relative(out, golden.io["D.real"][:1]) < 1e-5


@pytest.mark.parametrize(("resolution", "count"), [(32, 662_977), (64, 2_764_737)])
def test_parameter_counts(resolution, count):
  shapes = discriminator.abstract_variables(config.Discriminator(resolution=resolution))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_images_of_another_size_are_named(golden):
  with pytest.raises(UserError, match=r"image must be \[batch, 32, 32, 3\], got \(2, 16, 16, 3\)"):
    discriminator.Discriminator(golden.d_cfg).apply(golden.d_variables, jnp.zeros((2, 16, 16, 3)))
