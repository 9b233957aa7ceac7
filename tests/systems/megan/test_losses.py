"""The generator's loss and the balance loss: gradients against the released PyTorch code's, and hand calculations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.systems.megan import discriminator, gate, generator, losses, released


@pytest.fixture(scope="module")
def gradients(golden):
  """{"hard", "soft", "balance": (loss, gradient of the parameters, gradient of the logits)} in training mode; the
  load.
  """
  io, model = golden.io, generator.Generator(golden.cfg)
  z, uniform = io["in.z"], io["in.gumbel_u"]

  def run(params):
    out = model.apply({**golden.variables, "params": params}, z, uniform, golden.temperature, statistics="batch")
    return out.images, out.logits

  def losses_of(images, logits):
    hard, soft = (gate.gumbel_softmax(logits, uniform, golden.temperature, kind) for kind in (True, False))
    both = jnp.concatenate([jnp.einsum("bn,bnhwc->bhwc", weights, images) for weights in (hard, soft)])
    judgement = discriminator.Discriminator(golden.d_cfg).apply(golden.d_variables, both)
    adversarial = [losses.generator_wasserstein(part) for part in jnp.split(judgement, 2)]
    return jnp.stack([*adversarial, losses.balance(hard)]), losses.load(hard)

  @jax.jit
  def everything(params):
    (images, logits), to_params = jax.vjp(run, params)
    values, to_outputs, load = jax.vjp(losses_of, images, logits, has_aux=True)
    at_images, at_logits = jax.vmap(to_outputs)(jnp.eye(3))
    (at_params,) = jax.vmap(to_params)((at_images, at_logits))
    return values, at_params, at_logits, load

  values, at_params, at_logits, load = everything(golden.variables["params"])
  names = ("hard", "soft", "balance")
  by_loss = [(values[i], jax.tree.map(lambda leaf: np.asarray(leaf)[i], at_params), at_logits[i]) for i in range(3)]
  return dict(zip(names, by_loss)), load


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_generator_s_loss_and_gradients_match_the_release(golden, gradients, kind):
  loss, gradient, at_logits = gradients[0][kind]
  assert loss == pytest.approx(float(golden.io[f"G.{kind}.loss"]), rel=1e-5)
  assert golden.relative(at_logits, golden.io[f"G.{kind}.grad_logits"]) < 1e-4
  ours = released.export_generator({**golden.variables, "params": gradient}, golden.cfg)
  assert golden.check_gradients(ours, f"G.{kind}.grad.") == 3 * 14 + 2 + 10


@pytest.mark.slow
def test_the_balance_loss_and_its_gradients_match_the_release(golden, gradients):
  results, load = gradients
  loss, gradient, at_logits = results["balance"]
  assert golden.relative(load, golden.io["balance.load"]) < 1e-6
  assert loss == pytest.approx(float(golden.io["balance.loss"]), rel=1e-5)
  assert golden.relative(at_logits, golden.io["balance.grad_logits"]) < 1e-4
  ours = released.export_generator({**golden.variables, "params": gradient}, golden.cfg)
  assert golden.check_gradients(ours, "balance.grad.") == 8 + 2 + 10


def test_a_generator_that_no_sample_chose_learns_in_its_first_half_alone(golden, gradients):
  assert not golden.io["train.gate_hard"][:, 0].any()
  layers = gradients[0]["hard"][1]["generators"]
  largest = {name: max(np.abs(leaf[0]).max() for leaf in jax.tree.leaves(layer)) for name, layer in layers.items()}
  assert largest["r16"] == largest["r32"] == 0 < min(largest["r4"], largest["r8"])


def test_balance_of_one_hot_and_uniform_gates():
  one_hot = np.eye(10)[np.zeros(10, int)]
  balance = jax.jit(losses.balance)
  assert balance(one_hot) == pytest.approx(0.09)  # (0.9^2 + 9 * 0.1^2) / 10
  assert balance(np.eye(10)) == pytest.approx(0, abs=1e-12)
  np.testing.assert_allclose(losses.load(jnp.array([[1.0, 1.0], [1.0, 0.0]])), [2 / 3, 1 / 3], rtol=1e-6)


def test_penalty_of_a_linear_and_of_a_constant_score():
  images = np.zeros((2, 4, 4, 3))
  penalty = lambda slope: losses.gradient_penalty(lambda x: slope * x.sum((1, 2, 3)), images)
  of = jax.jit(jax.value_and_grad(penalty))
  assert of(0.5)[0] == pytest.approx((0.5 * 48**0.5 - 1) ** 2)
  assert of(0.0) == (1, 0)  # not NaN


def test_wasserstein_signs():
  real, fake = jnp.array([1.0, 2.0]), jnp.array([-1.0, 4.0])
  assert losses.discriminator_wasserstein(real, fake) == 0
  assert losses.discriminator_wasserstein(real + 1, fake) == -1
  assert losses.generator_wasserstein(fake) == -1.5
