"""Muon for the networks' weights: against torch's, on stacks, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from one_network import OneNetwork, params

from aurora_jax import config
from aurora_jax.training import muon

CFG = config.Optimizer(method="muon", learning_rate=1.0, iterations=5)


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def steps(cfg, values, gradients):
  system = OneNetwork(cfg)
  state = system.begin(values)
  for gradient in gradients:
    state = system.step(state, gradient)
  return params(state)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(48, 32), (16, 64), (3, 3, 8, 24)])
def test_a_step_is_that_of_torch(shape):
  gradient = draw(*shape)
  moved = steps(CFG, {"weight": jnp.zeros(shape)}, [{"weight": gradient}])["weight"]
  matrix = torch.tensor(np.asarray(gradient)).reshape(-1, shape[-1])
  theirs = torch.nn.Parameter(torch.zeros_like(matrix))
  muon = torch.optim.Muon(
    [theirs], lr=1.0, weight_decay=0.0, momentum=CFG.momentum, ns_steps=5, adjust_lr_fn="match_rms_adamw"
  )
  theirs.grad = matrix
  muon.step()
  expected = theirs.detach().numpy() / 0.2  # theirs is of a fifth of the size; it iterates in bfloat16
  difference = np.asarray(moved).reshape(expected.shape) - expected
  assert np.linalg.norm(difference) < 0.02 * np.linalg.norm(expected)
  assert np.sqrt(np.mean(np.square(expected))) == pytest.approx(0.85, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 3, 8, 16), (4, 8, 16)])
def test_each_kernel_and_each_expert_is_a_matrix_of_its_own(shape):
  gradients = [{"weight": draw(*shape, seed=seed)} for seed in range(3)]
  stacked = steps(CFG, {"weight": jnp.zeros(shape)}, gradients)["weight"]
  for i in range(shape[0]):
    alone = steps(
      CFG,
      {"weight": jnp.zeros(shape[1:]).reshape(-1, shape[-1])},
      [{"weight": g["weight"][i].reshape(-1, shape[-1])} for g in gradients],
    )["weight"]
    np.testing.assert_allclose(stacked[i].reshape(alone.shape), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-36, 1e-28, 1e-22, 1e-16, 1e-4, 1e15, 1e30])
def test_an_update_is_finite_whatever_the_size_of_the_gradient(size):
  """Squares of less than 1e-38 are zero in float32, those of more than 3e38 infinite."""
  update = muon.orthogonalize({"weight": draw(4, 16, 32) * jnp.float32(size)}, 5)["weight"]
  rms = jnp.sqrt(jnp.mean(jnp.square(update)))
  assert rms == (pytest.approx(0.85, abs=0.2) if 1e-7 < size < 1e19 else pytest.approx(0, abs=1e-2))


def test_the_momentum_of_an_expert_without_tokens_fades_away():
  """Its gradient is zero from then on; its weights must come to rest, not walk on."""
  gradient = draw(2, 16, 16)
  system = OneNetwork(dataclasses.replace(CFG, learning_rate=0.01))
  begun = system.begin({"weight": jnp.zeros((2, 16, 16))})

  @jax.jit
  def run(state, gradients):
    step = lambda state, g: (system.step(state, {"weight": g}), params(state)["weight"])
    return jax.lax.scan(step, state, gradients)[1]

  silent = jnp.concatenate([jnp.broadcast_to(gradient, (3, 2, 16, 16)), jnp.zeros((1000, 2, 16, 16))])
  weights = np.asarray(run(begun, silent))
  assert np.isfinite(weights).all()
  np.testing.assert_allclose(weights[-1], weights[400], atol=1e-6)
  assert np.abs(weights[3]).max() > 0.01


@pytest.mark.slow
def test_biases_and_norms_are_adams():
  values = {"a": {"weight": draw(8, 8), "bias": draw(8)}, "norm": {"scale": draw(8)}}
  gradients = [jax.tree.map(lambda x: draw(*x.shape, seed=seed), values) for seed in range(4)]
  ours = steps(dataclasses.replace(CFG, learning_rate=0.01), values, gradients)
  adam = steps(config.Optimizer(learning_rate=0.01), values, gradients)
  np.testing.assert_array_equal(ours["a"]["bias"], adam["a"]["bias"])
  np.testing.assert_array_equal(ours["norm"]["scale"], adam["norm"]["scale"])
  assert np.abs(ours["a"]["weight"] - adam["a"]["weight"]).max() > 1e-3


@pytest.mark.slow
def test_what_a_stage_does_not_use_and_what_is_left_out_stay_as_they_are():
  schedule = config.Schedule(resolutions=(4, 8), max_images=config.PerResolution({4: 1}))
  cfg = dataclasses.replace(CFG, learning_rate=0.1)
  values = {name: {"weight": draw(4, 4), "bias": draw(4)} for name in ("mapping_0", "r4_block0_conv", "r8_block0_conv")}
  gradient = jax.tree.map(jnp.ones_like, values)
  gradient["r8_block0_conv"] = jax.tree.map(lambda x: x * jnp.nan, gradient["r8_block0_conv"])
  unguarded, guarded = (OneNetwork(cfg, schedule, 4, guard=guard) for guard in (False, True))
  first = unguarded.step(unguarded.begin(values), gradient)
  jax.tree.map(np.testing.assert_array_equal, params(first)["r8_block0_conv"], values["r8_block0_conv"])
  assert (params(first)["r4_block0_conv"]["weight"] != values["r4_block0_conv"]["weight"]).all()
  spoilt = jax.tree.map(lambda x: x * jnp.nan, gradient)
  jax.tree.map(np.testing.assert_array_equal, guarded.step(first, spoilt), first)
