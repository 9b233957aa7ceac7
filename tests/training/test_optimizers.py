"""Optimizers, learning rates and averages against torch, against optax, and by hand."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from one_network import OneNetwork, opt_state, params

from aurora_jax import config
from aurora_jax.training import guard, optimizers

PLAIN = config.Optimizer(learning_rate=0.01)


def test_adam_without_first_moment_is_torchs_adam_with_beta1_zero():
  system = OneNetwork(PLAIN)
  state = system.begin({"a": {"weight": jnp.array([1.0, -2.0, 3.0])}})
  assert (
    len([leaf for leaf in jax.tree.leaves(opt_state(state)) if leaf.shape == (3,)]) == 1
  )  # no first moment is stored
  theirs = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
  adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.0, 0.99), eps=1e-8)
  rng = np.random.default_rng(0)
  for _ in range(5):
    gradient = rng.normal(size=3).astype(np.float32)
    state = system.step(state, {"a": {"weight": jnp.asarray(gradient)}})
    theirs.grad = torch.tensor(gradient)
    adam.step()
  np.testing.assert_allclose(params(state)["a"]["weight"], theirs.detach().numpy(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "fields,before_adam",
  [
    ({}, ()),
    ({"l2": 0.3}, (optax.add_decayed_weights(0.3),)),
    ({"clip_norm": 1.5}, (optax.clip_by_global_norm(1.5),)),
    ({"l2": 0.3, "clip_norm": 1.5}, (optax.clip_by_global_norm(1.5), optax.add_decayed_weights(0.3))),
  ],
  ids=["plain", "l2", "clip", "l2 and clip"],
)
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9])
def test_adam_l2_and_clipping_are_those_of_optax(fields, before_adam, beta1):
  """Gradients of norms below and above the limit; both moments, all parameters, names that weight decay would look
  for.
  """
  system = OneNetwork(dataclasses.replace(PLAIN, beta1=beta1, beta2=0.95, eps=1e-3, **fields))
  rng = np.random.default_rng(0)
  draw = lambda size: {
    "r8_attention0": {"qk": {"weight": jnp.asarray(size * rng.normal(size=(3, 4)), jnp.float32)}},
    "mapping_0": {"bias": jnp.asarray(size * rng.normal(size=5), jnp.float32)},
  }
  first = draw(1.0)
  state, expected = system.begin(first), first
  theirs = optax.chain(*before_adam, optax.adam(0.01, beta1, 0.95, 1e-3))
  their_state = theirs.init(expected)
  norms = []
  for size in (0.1, 1.0, 3.0, 0.2, 2.0):
    gradients = draw(size)
    norms.append(float(optax.global_norm(gradients)))
    state = system.step(state, gradients)
    updates, their_state = theirs.update(gradients, their_state, expected)
    expected = optax.apply_updates(expected, updates)
  assert min(norms) < 1.5 < max(norms)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), params(state), expected)
  assert hasattr(opt_state(state)[0], "mu") == (beta1 > 0)


def test_an_update_that_may_be_left_out_is_bitwise_nothing_then_and_needs_no_memory(monkeypatch):
  cfg = dataclasses.replace(PLAIN, weight_decay=0.01)
  system = OneNetwork(cfg, ema=config.Ema())
  values = {name: {"weight": jnp.full(4096, value)} for name, value in (("a", 0.3), ("r8_block0_attention", -0.7))}
  begin = system.begin(values)

  def step(state, gradients, ok):
    return system.step(state, gradients, ok)

  with monkeypatch.context() as without_norms:  # on a CPU, squares that are summed are arrays for a while
    without_norms.setattr(guard.Guard, "norms", lambda *args: {})
    without_norms.setattr(guard.Guard, "all_finite", lambda *args: True)
    compiled = jax.jit(lambda *args: step(*args), donate_argnums=0).lower(begin, values, jnp.array(True)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096  # not one array of second moments
  first = jax.jit(step)(begin, values, jnp.array(True))
  expected = OneNetwork(cfg, ema=config.Ema(), guard=False).step(begin, values)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, expected)
  assert not np.array_equal(params(first)["a"]["weight"], values["a"]["weight"])
  # Left out because of what it depends on, or because of its own gradient.
  spoilt = jax.tree.map(lambda leaf: leaf.at[5].set(jnp.nan), values)
  for gradients, ok in ((values, False), (spoilt, True), (spoilt, False)):
    jax.tree.map(np.testing.assert_array_equal, jax.jit(step)(first, gradients, jnp.array(ok)), first)


def decayed(names):
  """Which of these parameters, named by their paths, weight decay moves; all begin at 1 and have no gradient."""
  values = flax.traverse_util.unflatten_dict({name: jnp.ones(2) for name in names})
  system = OneNetwork(config.Optimizer(learning_rate=0.5, weight_decay=0.1))
  updated = params(system.step(system.begin(values), jax.tree.map(jnp.zeros_like, values)))
  found = {name: value.tolist() for name, value in flax.traverse_util.flatten_dict(updated).items()}
  assert all(value in ([1.0, 1.0], pytest.approx([0.95, 0.95])) for value in found.values())
  return {name for name, value in found.items() if value[0] != 1.0}


def test_weight_decay_reaches_attention_matrices_only():
  attention = ("r8_block0_attention", "in", "weight")
  assert decayed(
    [attention, ("r8_block0_attention", "norm", "norm", "bias"), ("r8_block0_conv", "weight"), ("mapping_0", "weight")]
  ) == {attention}


def test_weight_decay_leaves_feed_forward_layers_alone():
  names = [
    ("r8_block0_attention", "layer_0", part, "weight") for part in ("self_attention", "cross_attention", "feed_forward")
  ]
  names += [("r8_attention0", part, "weight") for part in ("qk", "out", "mlp_in", "mlp_out")]
  assert decayed(names) == {name for name in names if name[-2] not in ("feed_forward", "mlp_in", "mlp_out")}


SCHEDULE = config.Schedule(resolutions=(4, 8, 16), max_images=config.PerResolution({4: 1, 8: 1}))


@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_adam_leaves_alone_what_a_stage_does_not_use_and_begins_it_as_if_new(beta1):
  cfg = dataclasses.replace(PLAIN, beta1=beta1, beta2=0.9, weight_decay=0.1)
  rng = np.random.default_rng(0)
  names = ["mapping_0", "r4_block0_conv", "r8_block0_attention", "r16_block0_conv", "r4_conditional", "r1_conditional"]
  from_stage = {"r8_block0_attention": 1, "r16_block0_conv": 2, "r4_conditional": 1}
  first = {name: {"weight": jnp.asarray(rng.normal(size=3), jnp.float32)} for name in names}
  state, steps = OneNetwork(cfg, SCHEDULE, 4).begin(first), {0: 5, 1: 3, 2: 4}
  plain = OneNetwork(cfg)
  alone = {  # each in a training of its own, from its own stage on
    name: plain.begin({name: value}) for name, value in first.items()
  }
  for stage, count in steps.items():
    system = OneNetwork(cfg, SCHEDULE, SCHEDULE.resolutions[stage])
    for _ in range(count):
      gradients = {name: {"weight": jnp.asarray(rng.normal(size=3), jnp.float32)} for name in names}
      if stage == 0:  # whatever the gradient of an unused layer is
        gradients["r16_block0_conv"]["weight"] = jnp.full(3, 1e9)
      state = system.step(state, gradients)
      for name in names:
        if from_stage.get(name, 0) <= stage:
          alone[name] = plain.step(alone[name], {name: gradients[name]})
        else:
          np.testing.assert_array_equal(params(state)[name]["weight"], first[name]["weight"])
          moments = opt_state(state)[0]
          assert not moments.nu[name]["weight"].any()
          assert not beta1 or not moments.mu[name]["weight"].any()
  assert opt_state(state)[0].count.tolist() == [12, 7, 4]
  for name in names:
    np.testing.assert_allclose(params(state)[name]["weight"], params(alone[name])[name]["weight"], rtol=1e-6)


def test_what_a_stage_does_not_use_may_even_have_no_finite_gradient():
  """Without a guard, which would skip the step."""
  values = {name: {"weight": jnp.ones(3)} for name in ("mapping_0", "r16_block0_conv")}
  system = OneNetwork(PLAIN, SCHEDULE, 4, guard=False)
  gradients = {"mapping_0": {"weight": jnp.ones(3)}, "r16_block0_conv": {"weight": jnp.full(3, jnp.nan)}}
  state = system.step(system.begin(values), gradients)
  assert params(state)["r16_block0_conv"]["weight"].tolist() == [1.0] * 3
  assert not opt_state(state)[0].nu["r16_block0_conv"]["weight"].any()
  np.testing.assert_allclose(params(state)["mapping_0"]["weight"], 0.99, rtol=1e-6)


def test_learning_rate_factor():
  cfg = config.Optimizer(warmup_steps=10, final_lr_fraction=0.1)
  assert optimizers.learning_rate_factor(cfg, 0, 1000) == pytest.approx(0.1, rel=1e-3)
  assert optimizers.learning_rate_factor(cfg, 500, 1000) == pytest.approx(0.55, rel=1e-3)
  assert optimizers.learning_rate_factor(cfg, 1000, 1000) == pytest.approx(0.1, rel=1e-5)
  assert optimizers.learning_rate_factor(config.Optimizer(), 123, 1000) == 1.0


def test_the_learning_rate_follows_its_schedule_and_is_logged():
  """Adam's first update is the learning rate itself, here of step 500 of 1000."""
  cfg = config.Optimizer(learning_rate=0.2, warmup_steps=10, final_lr_fraction=0.1)
  system = OneNetwork(cfg)
  state = system.begin({"a": {"weight": jnp.zeros(2)}}).replace(step=jnp.int32(500))
  state, _, metrics = system.update(state, "generator", {"a": {"weight": jnp.array([3.0, -5.0])}}, {})
  np.testing.assert_allclose(params(state)["a"]["weight"], [-0.11, 0.11], rtol=1e-3)
  assert metrics["learning_rate/g"] == pytest.approx(0.11, rel=1e-3)


def test_ema_decay_has_its_half_life_and_ramps_up():
  cfg = config.Ema(half_life_images=1000.0, ramp_up=0.0)
  assert optimizers.ema_decay(cfg, jnp.int32(0), 100) ** 10 == pytest.approx(0.5, rel=1e-4)
  ramped = config.Ema(half_life_images=1000.0, ramp_up=0.5)
  assert optimizers.ema_decay(ramped, jnp.int32(1), 100) == pytest.approx(0.5, rel=1e-4)  # half-life 100 of 200 images
  assert optimizers.ema_decay(ramped, jnp.int32(10**6), 100) == pytest.approx(
    float(optimizers.ema_decay(cfg, jnp.int32(0), 100))
  )


def test_an_update_of_another_kind_leaves_the_average_alone():
  """R1 is no step of the generator's, of which the average is one over images."""
  system = OneNetwork(PLAIN, ema=config.Ema(half_life_images=100.0, ramp_up=0.0))
  begin, gradients = system.begin({"a": {"weight": jnp.ones(2)}}), {"a": {"weight": jnp.ones(2)}}
  main, _, metrics = system.update(begin, "generator", gradients, {})
  other, _, other_metrics = system.update(begin, "generator", gradients, {}, log_name="r1")
  np.testing.assert_array_equal(params(main)["a"]["weight"], params(other)["a"]["weight"])
  halfway = 0.5 * (1 + np.asarray(params(main)["a"]["weight"]))  # a batch of 100 images: half a life
  np.testing.assert_allclose(main.networks["generator"].ema["a"]["weight"], halfway, rtol=1e-6)
  np.testing.assert_array_equal(other.networks["generator"].ema["a"]["weight"], 1.0)
  assert {name.replace("/r1", "/g") for name in other_metrics} == set(metrics) and "grad_norm/r1" in other_metrics


def test_biases_move_at_their_own_rate():
  system = OneNetwork(config.Optimizer(learning_rate=0.5, bias_lr_factor=0.1))
  values = {"a": {"weight": jnp.zeros(1), "bias": jnp.zeros(1)}}
  moved = params(system.step(system.begin(values), jax.tree.map(jnp.ones_like, values)))
  assert float(moved["a"]["weight"][0]) == pytest.approx(-0.5, rel=1e-4)
  assert float(moved["a"]["bias"][0]) == pytest.approx(-0.05, rel=1e-4)
