"""Optimiser, schedule and averages against torch and by hand."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aurora_jax import config
from aurora_jax.training import state


def test_adam_without_first_moment_is_torchs_adam_with_beta1_zero():
  cfg = config.Optimizer(attention_weight_decay=0.0)
  params = {"a": {"weight": jnp.array([1.0, -2.0, 3.0])}}
  optimizer = state.optimizer(cfg, 0.99)
  opt_state = optimizer.init(params)
  assert len([leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape == (3,)]) == 1  # no first moment is stored
  theirs = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
  adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.0, 0.99), eps=1e-8)
  rng = np.random.default_rng(0)
  for _ in range(5):
    gradient = rng.normal(size=3).astype(np.float32)
    params, opt_state = state.update(cfg, optimizer, {"a": {"weight": jnp.asarray(gradient)}}, opt_state, params, 0.01)
    theirs.grad = torch.tensor(gradient)
    adam.step()
  np.testing.assert_allclose(params["a"]["weight"], theirs.detach().numpy(), rtol=1e-5)


def test_an_update_that_may_be_left_out_is_bitwise_nothing_then_and_needs_no_memory():
  cfg = config.Optimizer()
  optimizer = state.optimizer(cfg, 0.99)
  params = {name: {"weight": jnp.full(4096, value)} for name, value in (("a", 0.3), ("r8_block0_attention", -0.7))}

  def step(params, opt_state, gradients, ok):
    return state.update(cfg, optimizer, gradients, opt_state, params, 0.01, functools.partial(jnp.where, ok))

  begin = params, optimizer.init(params)
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*begin, params, jnp.array(True)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096  # not one array of second moments
  first = jax.jit(step)(*begin, params, jnp.array(True))
  expected = state.update(cfg, optimizer, params, begin[1], params, 0.01)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, expected)
  spoilt = jax.tree.map(lambda leaf: leaf.at[5].set(jnp.nan), params)
  jax.tree.map(np.testing.assert_array_equal, jax.jit(step)(*first, spoilt, jnp.array(False)), first)


def test_weight_decay_reaches_attention_matrices_only():
  cfg = config.Optimizer(attention_weight_decay=0.1)
  params = {
    "r8_block0_attention": {"in": {"weight": jnp.ones(2)}, "norm": {"norm": {"bias": jnp.ones(2)}}},
    "r8_block0_conv": {"weight": jnp.ones(2)},
  }
  optimizer = state.optimizer(cfg, 0.99)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updated, _ = state.update(cfg, optimizer, zeros, optimizer.init(params), params, 0.5)
  assert updated["r8_block0_attention"]["in"]["weight"].tolist() == pytest.approx([0.95, 0.95])
  assert updated["r8_block0_attention"]["norm"]["norm"]["bias"].tolist() == [1.0, 1.0]
  assert updated["r8_block0_conv"]["weight"].tolist() == [1.0, 1.0]


def test_weight_decay_leaves_feed_forward_layers_alone():
  cfg = config.Optimizer(attention_weight_decay=0.1)
  names = [
    ("r8_block0_attention", "layer_0", part, "weight") for part in ("self_attention", "cross_attention", "feed_forward")
  ]
  names += [("r8_attention0", part, "weight") for part in ("qk", "out", "mlp_in", "mlp_out")]
  params = flax.traverse_util.unflatten_dict({name: jnp.ones(1) for name in names})
  optimizer = state.optimizer(cfg, 0.99)
  updated, _ = state.update(cfg, optimizer, jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params, 0.5)
  decayed = {name for name, value in flax.traverse_util.flatten_dict(updated).items() if value[0] != 1}
  assert decayed == {name for name in names if name[-2] not in ("feed_forward", "mlp_in", "mlp_out")}


SCHEDULE = config.Schedule(resolutions=(4, 8, 16), max_images=config.PerResolution({4: 1, 8: 1}))


def test_adam_leaves_alone_what_a_stage_does_not_use_and_begins_it_as_if_new():
  cfg = config.Optimizer(attention_weight_decay=0.1)
  rng = np.random.default_rng(0)
  names = ["mapping_0", "r4_block0_conv", "r8_block0_attention", "r16_block0_conv", "r4_conditional", "r1_conditional"]
  from_stage = {"r8_block0_attention": 1, "r16_block0_conv": 2, "r4_conditional": 1}
  first = {name: {"weight": jnp.asarray(rng.normal(size=3), jnp.float32)} for name in names}
  params, steps = first, {0: 5, 1: 3, 2: 4}
  opt_state = state.optimizer(cfg, 0.9, SCHEDULE, 4).init(params)
  alone = {name: {name: value} for name, value in first.items()}  # each in a training of its own, from its own stage on
  plain = state.optimizer(cfg, 0.9)
  alone_states = {name: plain.init(tree) for name, tree in alone.items()}
  for stage, count in steps.items():
    optimizer = state.optimizer(cfg, 0.9, SCHEDULE, SCHEDULE.resolutions[stage])
    for _ in range(count):
      gradients = {name: {"weight": jnp.asarray(rng.normal(size=3), jnp.float32)} for name in names}
      if stage == 0:  # whatever the gradient of an unused layer is
        gradients["r16_block0_conv"]["weight"] = jnp.full(3, jnp.nan)
      params, opt_state = state.update(cfg, optimizer, gradients, opt_state, params, 0.01)
      for name in names:
        if from_stage.get(name, 0) <= stage:
          alone[name], alone_states[name] = state.update(
            cfg, plain, {name: gradients[name]}, alone_states[name], alone[name], 0.01
          )
        else:
          np.testing.assert_array_equal(params[name]["weight"], first[name]["weight"])
          assert not opt_state[0].nu[name]["weight"].any()
  assert opt_state[0].count.tolist() == [12, 7, 4]
  for name in names:
    np.testing.assert_allclose(params[name]["weight"], alone[name][name]["weight"], rtol=1e-6)


def test_learning_rate_factor():
  cfg = config.Optimizer(warmup_steps=10, final_lr_fraction=0.1)
  assert state.learning_rate_factor(cfg, 0, 1000) == pytest.approx(0.1, rel=1e-3)
  assert state.learning_rate_factor(cfg, 500, 1000) == pytest.approx(0.55, rel=1e-3)
  assert state.learning_rate_factor(cfg, 1000, 1000) == pytest.approx(0.1, rel=1e-5)
  assert state.learning_rate_factor(config.Optimizer(), 123, 1000) == 1.0


def test_ema_decay_has_its_half_life_and_ramps_up():
  cfg = config.Optimizer(ema_half_life_images=1000.0, ema_ramp_up=0.0)
  assert state.ema_decay(cfg, jnp.int32(0), 100) ** 10 == pytest.approx(0.5, rel=1e-4)
  ramped = config.Optimizer(ema_half_life_images=1000.0, ema_ramp_up=0.5)
  assert state.ema_decay(ramped, jnp.int32(1), 100) == pytest.approx(0.5, rel=1e-4)  # half-life 100 of 200 images
  assert state.ema_decay(ramped, jnp.int32(10**6), 100) == pytest.approx(float(state.ema_decay(cfg, jnp.int32(0), 100)))


def test_biases_move_at_their_own_rate():
  cfg = config.Optimizer(bias_lr_factor=0.1, attention_weight_decay=0.0)
  params = {"a": {"weight": jnp.zeros(1), "bias": jnp.zeros(1)}}
  optimizer = state.optimizer(cfg, 0.99)
  moved, _ = state.update(cfg, optimizer, jax.tree.map(jnp.ones_like, params), optimizer.init(params), params, 0.5)
  assert float(moved["a"]["weight"][0]) == pytest.approx(-0.5, rel=1e-4)
  assert float(moved["a"]["bias"][0]) == pytest.approx(-0.05, rel=1e-4)
