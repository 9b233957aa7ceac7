"""One whole released iteration replayed: discriminator rounds of two steps each, the generator's step, the balance
step.
"""

import jax
import numpy as np
import optax
import pytest

from aurora_jax.systems.megan import config, discriminator, generator, losses, released


@pytest.fixture(scope="module")
def replayed(golden):
  """Losses by name, and the released state dicts afterwards."""
  io, temperature, cfg = golden.io, golden.temperature, config.Loss()
  model, judge = generator.Generator(golden.cfg), discriminator.Discriminator(golden.d_cfg)
  adam = optax.adam(2e-4, b1=0.0, b2=0.9, eps=1e-8)
  gate_adam = optax.chain(optax.add_decayed_weights(0.1), adam)

  def forward(params, stats, z, uniform):
    out, moved = model.apply(
      {"params": params, "batch_stats": stats}, z, uniform, temperature, train=True, mutable=["batch_stats"]
    )
    return out, moved["batch_stats"]

  def step(optimizer, loss, params, state):
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return value, optax.apply_updates(params, updates), state

  @jax.jit
  def discriminator_round(d_params, d_state, params, stats, real, z, uniform, alpha):
    out, stats = forward(params, stats, z, uniform)
    wasserstein = lambda p: losses.discriminator_wasserstein(judge.apply(p, real), judge.apply(p, out.image))
    loss, d_params, d_state = step(adam, wasserstein, d_params, d_state)
    mixed = losses.interpolate(real, out.image, alpha)
    penalty = lambda p: cfg.gradient_penalty_weight * losses.gradient_penalty(lambda x: judge.apply(p, x), mixed)
    weighted, d_params, d_state = step(adam, penalty, d_params, d_state)
    return loss, weighted / cfg.gradient_penalty_weight, d_params, d_state, stats

  @jax.jit
  def generator_step(params, state, gate_state, stats, d_params, z, uniform):
    def loss(params):
      out, moved = forward(params, stats, z, uniform)
      return losses.generator_wasserstein(judge.apply(d_params, out.image)), moved

    (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    (rest, gate), (gradient, gate_gradient) = (generator.split_gate({"params": x}) for x in (params, gradient))
    updates, state = adam.update(gradient, state, rest)
    gate_updates, gate_state = gate_adam.update(gate_gradient, gate_state, gate)
    params = generator.join_gate(optax.apply_updates(rest, updates), optax.apply_updates(gate, gate_updates))
    return value, params["params"], state, gate_state, moved

  @jax.jit
  def balance_step(params, gate_state, stats, z, uniform):
    rest, gate = generator.split_gate({"params": params})

    def loss(gate):
      out, moved = forward(generator.join_gate(rest, gate)["params"], stats, z, uniform)
      return cfg.balance_weight * losses.balance(out.gate), (moved, losses.load(out.gate))

    (value, (moved, load)), gradient = jax.value_and_grad(loss, has_aux=True)(gate)
    updates, gate_state = gate_adam.update(gradient, gate_state, gate)
    gate = optax.apply_updates(gate, updates)
    return value, load, generator.join_gate(rest, gate)["params"], moved

  results = {}
  params, stats, d_params = golden.variables["params"], golden.variables["batch_stats"], golden.d_variables
  rest, gate = generator.split_gate({"params": params})
  state, gate_state, d_state = adam.init(rest), gate_adam.init(gate), adam.init(d_params)
  for i in range(2):
    drawn = golden.images(f"in.iter.real{i}"), *(io[f"in.iter.{name}{i}"] for name in ("z", "u", "alpha"))
    loss, penalty, d_params, d_state, stats = discriminator_round(d_params, d_state, params, stats, *drawn)
    results |= {f"iter.D{i}.wasserstein": loss, f"iter.D{i}.gp": penalty}
  results["iter.G.loss"], params, state, gate_state, stats = generator_step(
    params, state, gate_state, stats, d_params, io["in.iter.zG"], io["in.iter.uG"]
  )
  results["iter.balance.loss"], results["iter.balance.load"], params, stats = balance_step(
    params, gate_state, stats, io["in.iter.zB"], io["in.iter.uB"]
  )
  after = released.export_generator({"params": params, "batch_stats": stats}, golden.cfg)
  after["D"] = released.export_discriminator(d_params, golden.d_cfg)
  return results, after


@pytest.mark.slow
def test_losses_match_the_release(golden, replayed):
  results, _ = replayed
  stored = [name for name in golden.io if name.startswith("iter.") and not name.startswith("iter.after.")]
  assert sorted(results) == sorted(stored) and len(stored) == 7
  for name, ours in results.items():
    np.testing.assert_allclose(ours, golden.io[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_weights_and_statistics_afterwards_match_the_release(golden, replayed):
  _, after = replayed
  stored = [name for name in golden.io if name.startswith("iter.after.")]
  assert len(stored) == 24
  for name in stored:
    file, tensor = name.removeprefix("iter.after.").split(".", 1)
    # Biases in front of a norm wander by rounding, and the running means with them.
    bound = 1e-4 if tensor.endswith("running_mean") else 1e-5
    ours, theirs, before = after[file][tensor], golden.io[name], golden.state_dicts[file][tensor]
    assert golden.relative(ours, theirs) < bound, name
    assert golden.relative(before, theirs) > 1e-4, name  # it has moved by more than the comparison allows


@pytest.mark.slow
def test_batches_were_counted_in_all_four_passes(golden, replayed):
  _, after = replayed
  for file in ("G", "Gum"):
    counters = {name for name in after[file] if name.endswith("num_batches_tracked")}
    assert len(counters) == {"G": 3 * 3 + 3, "Gum": 2}[file]  # of three generators, one of which has two names
    assert {int(after[file][name] - golden.state_dicts[file][name]) for name in counters} == {4}
