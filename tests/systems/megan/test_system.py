"""MEGAN in the generic trainer: its phases on the released numbers, and what they move and leave."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aurora_jax.systems import base
from aurora_jax.systems.megan import generator, losses, released, system
from aurora_jax.training import guard, optimizers
from aurora_jax.training import step as step_lib

PHASES = ("discriminator", "generator", "balance")


def variables_of(state):
  """Generator and gate joined, in the released networks' structure."""
  return generator.join_gate(state.variables("generator"), state.variables("gate"))


def released_weights(state, golden):
  """A state's networks by the names of the released files, statistics among them."""
  files = released.export_generator(variables_of(state), golden.cfg)
  return files | {"D": released.export_discriminator(state.variables("discriminator"), golden.d_cfg)}


def moved(before, after):
  """{"network part": names of its leaves that are no longer the same, bit by bit}, parts without any left out."""
  found = {}
  for name, network in before.networks.items():
    for part in ("params", "variables", "opt_state"):
      old, new = getattr(network, part), getattr(after.networks[name], part)
      leaves = zip(jax.tree_util.tree_flatten_with_path(old)[0], jax.tree.leaves(new), strict=True)
      changed = {jax.tree_util.keystr(path) for (path, a), b in leaves if not np.array_equal(a, b, equal_nan=True)}
      if changed:
        found[f"{name} {part}"] = changed
  return found


def counters(state):
  """How many batches each batch norm has counted, as one set."""
  trees = [state.networks[name].variables for name in ("generator", "gate")]
  leaves = [leaf for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0] if "count" in str(path[-1])]
  assert len(leaves) == 5  # three of the generators, two of the gate
  return {int(count) for leaf in leaves for count in np.ravel(leaf)}


# ---- the released iteration
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def iteration(golden, phases):
  """[(phase, state after it, metrics)] of the stored iteration, in order."""
  after = [("start", phases.first_state(), {})]
  for i in range(2):
    draws = golden.draws(f"in.iter.z{i}", f"in.iter.u{i}", f"in.iter.alpha{i}")
    real = golden.images(f"in.iter.real{i}")
    after.append(("discriminator", *phases.run("discriminator", after[-1][1], draws, real)))
  for name, letter in (("generator", "G"), ("balance", "B")):
    draws = golden.draws(f"in.iter.z{letter}", f"in.iter.u{letter}")
    after.append((name, *phases.run(name, after[-1][1], draws, golden.images("in.real"))))
  return after


def test_the_phases_of_a_step_are_the_released_iteration_s(phases):
  found = [(phase.name, phase.every, phase.repeats) for phase in phases.phases(phases.update)]
  assert found == [("discriminator", 1, 2), ("generator", 1, 1), ("balance", 1, 1)]


@pytest.mark.slow
def test_losses_of_the_iteration_match_the_release(golden, iteration):
  ours = {
    "iter.D0.wasserstein": iteration[1][2]["loss/d_wasserstein"],
    "iter.D0.gp": iteration[1][2]["loss/gp"],
    "iter.D1.wasserstein": iteration[2][2]["loss/d_wasserstein"],
    "iter.D1.gp": iteration[2][2]["loss/gp"],
    "iter.G.loss": iteration[3][2]["loss/g_wasserstein"],
    "iter.balance.loss": iteration[4][2]["loss/balance"],
  }
  for name, value in ours.items():
    np.testing.assert_allclose(value, golden.io[name], rtol=1e-5, atol=1e-6, err_msg=name)
  assert all(metrics[name] == 0 for _, _, metrics in iteration for name in metrics if name.startswith("guard/"))


@pytest.mark.slow
def test_weights_and_statistics_match_the_release_as_soon_as_their_phase_is_done(golden, iteration):
  """After the rounds the discriminator's, after the generator's phase its weights, after all the gate's and the
  statistics.
  """
  rounds, generators, whole = (released_weights(iteration[i][1], golden) for i in (2, 3, 4))
  compared = 0
  for name, theirs in golden.io.items():
    if not name.startswith("iter.after."):
      continue
    file, tensor = name.removeprefix("iter.after.").split(".", 1)
    statistic = "running" in tensor or "num_batches" in tensor
    ours = rounds if file == "D" else generators if file == "G" and not statistic else whole
    bound = 1e-4 if tensor.endswith("running_mean") else 1e-5  # biases in front of a norm wander by rounding
    assert golden.relative(ours[file][tensor], theirs) < bound, name
    assert golden.relative(golden.state_dicts[file][tensor], theirs) > 1e-4, name
    compared += 1
  assert compared == 24


def test_every_pass_moves_the_statistics_by_one_batch(iteration):
  assert [counters(state) for _, state, _ in iteration] == [{4}, {5}, {6}, {7}, {8}]


def test_two_optimizer_steps_of_the_discriminator_per_round_share_their_moments(iteration):
  count = lambda state, name: int(state.networks[name].opt_state[0].count)
  steps = [tuple(count(state, name) for name in ("discriminator", "generator", "gate")) for _, state, _ in iteration]
  assert steps == [(0, 0, 0), (2, 0, 0), (4, 0, 0), (4, 1, 1), (4, 1, 2)]


# ---- gradients of the phases, from the stored weights
# -------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(golden, phases):
  """{phase: (state, metrics)} of each phase by itself, from the stored weights on the stored batch."""
  first, real = phases.first_state(), golden.images("in.real")
  return {"first": first} | {name: phases.run(name, first, golden.draws(), real) for name in PHASES}


def gradients(state, name):
  """Sizes of the gradients of a network's first Adam step, from its second moments: {"params": tree}."""
  return {"params": jax.tree.map(lambda nu: np.sqrt(np.asarray(nu) / 0.1), state.networks[name].opt_state[0].nu)}


def test_statistics_after_one_pass_match_the_release_in_every_phase(golden, once):
  for phase in PHASES:
    files, compared = released_weights(once[phase][0], golden), 0
    for name, theirs in golden.io.items():
      if name.startswith("train.bn_after."):
        file, tensor = name.removeprefix("train.bn_after.").split(".", 1)
        assert golden.relative(files[file][tensor], theirs) < 1e-5, (phase, name)
        compared += 1
    assert compared == 33


def test_the_generator_s_phase_gives_the_released_gradients_to_generators_and_gate(golden, once):
  state, metrics = once["generator"]
  np.testing.assert_allclose(metrics["loss/g_wasserstein"], golden.io["G.hard.loss"], rtol=1e-5)
  ours = generator.join_gate(gradients(state, "generator"), gradients(state, "gate"))
  ours = released.export_generator(ours | {"batch_stats": variables_of(state)["batch_stats"]}, golden.cfg)
  compared = 0
  for name, theirs in golden.io.items():
    if not name.startswith("G.hard.grad."):
      continue
    file, tensor = name.removeprefix("G.hard.grad.").split(".", 1)
    if file == "Gum":
      theirs = theirs + 0.1 * golden.state_dicts[file][tensor]  # the gate's L2 alone
    compared += 1
    if not theirs.any():
      assert not ours[file][tensor].any(), name
    else:
      # Of a bias in front of a norm, what is stored is rounding.
      np.testing.assert_allclose(ours[file][tensor], abs(theirs), rtol=0, atol=max(1e-5, 1e-4 * abs(theirs).max()))
  assert compared == 54


def test_the_balance_phase_gives_the_released_gradients_to_the_gate(golden, once):
  state, metrics = once["balance"]
  np.testing.assert_allclose(metrics["loss/balance"], golden.io["balance.loss"], rtol=1e-5, atol=1e-7)
  ours = generator.join_gate(
    once["first"].variables("generator"),
    gradients(state, "gate") | {"batch_stats": state.variables("gate")["batch_stats"]},
  )
  ours = released.export_generator(ours, golden.cfg)["Gum"]
  for tensor, array in ours.items():
    if "running" in tensor or "num_batches" in tensor:
      continue
    theirs = golden.io[f"balance.grad.Gum.{tensor}"] + 0.1 * golden.state_dicts["Gum"][tensor]
    np.testing.assert_allclose(array, abs(theirs), rtol=0, atol=max(1e-6, 1e-4 * abs(theirs).max()), err_msg=tensor)


@pytest.mark.slow
def test_without_a_separate_step_the_discriminator_has_one_on_the_sum(golden, make_phases, once):
  joint = make_phases(gp_separate_step=False)
  state, metrics = joint.run("discriminator", joint.first_state(), golden.draws(), golden.images("in.real"))
  network = state.networks["discriminator"]
  assert int(network.opt_state[0].count) == 1
  np.testing.assert_allclose(metrics["loss/gp"], golden.io["D.gp"], rtol=1e-5)
  np.testing.assert_allclose(
    metrics["loss/d_wasserstein"], golden.io["D.loss_real"] + golden.io["D.loss_fake"], rtol=1e-5, atol=1e-6
  )
  ours = released.export_discriminator(gradients(state, "discriminator"), golden.d_cfg)
  weights = released.export_discriminator({"params": network.params}, golden.d_cfg)
  norms = []
  for tensor, before in golden.state_dicts["D"].items():
    gradient = golden.io[f"D.grad_wasserstein.{tensor}"] + golden.io[f"D.grad_10gp.{tensor}"]
    assert golden.relative(ours[tensor], abs(gradient)) < 1e-4, tensor
    clear = abs(gradient) > 1e-3 * abs(gradient).max()  # Adam's first step is 2e-4 whatever the gradient's size
    np.testing.assert_allclose((weights[tensor] - before)[clear], -2e-4 * np.sign(gradient[clear]), rtol=2e-3)
    norms.append(np.linalg.norm(gradient))
  np.testing.assert_allclose(metrics["grad_norm/d"], np.linalg.norm(norms), rtol=1e-4)
  # The statistics do not depend on how the discriminator steps; its weights do.
  apart = once["discriminator"][0]
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, state.networks["gate"].variables, apart.networks["gate"].variables)
  assert "discriminator params" in moved(state, apart)


def test_the_gate_s_l2_is_added_to_its_gradient_before_adam(phases):
  """Over two steps, so that the moments hold it too. The other networks have none."""
  assert {name: network.optimizer.l2 for name, network in phases.networks.items()} == {
    "generator": 0.0,
    "gate": 0.1,
    "discriminator": 0.0,
  }
  adam = optax.chain(optax.add_decayed_weights(0.1), optax.adam(2e-4, b1=0.0, b2=0.9, eps=1e-8))
  update = jax.jit(lambda state, gradient: phases.update(state, "gate", gradient, {})[0])
  state, update_expected, rng = phases.first_state(), jax.jit(adam.update), np.random.default_rng(0)
  params = state.networks["gate"].params
  expected = adam.init(params)
  for _ in range(2):
    gradient = jax.tree.map(lambda p: 0.1 * rng.standard_normal(p.shape).astype(np.float32), params)
    state = update(state, gradient)
    updates, expected = update_expected(gradient, expected, params)
    params = jax.tree.map(np.add, params, updates)
  compare = lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)
  jax.tree.map(compare, state.networks["gate"].params, params)


# ---- what moves and what stays
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_moves_its_networks_and_all_statistics_and_nothing_else(phases, once, phase):
  networks = {"discriminator": ["discriminator"], "generator": ["generator", "gate"], "balance": ["gate"]}[phase]
  state = once[phase][0]
  parts = {f"{name} {part}" for name in networks for part in ("params", "opt_state")}
  found = moved(once["first"], state)
  assert found.keys() == parts | {"generator variables", "gate variables"}
  assert int(state.step) == 0  # the step counts itself
  # Not one leaf of them stays behind, but for the bias of the discriminator's score: it is in both means of the
  # Wasserstein loss and in no gradient of an image.
  everything = moved(once["first"], jax.tree.map(lambda leaf: np.asarray(leaf) + 1, once["first"]))
  still = {part: everything[part] - leaves for part, leaves in found.items()}
  assert {name for leaves in still.values() for name in leaves} == (
    {"['logit']['bias']", "[0].nu['logit']['bias']"} if phase == "discriminator" else set()
  )


def test_without_load_balance_there_are_two_phases(golden):
  plain = system.System(golden.experiment(load_balance=False, d_steps=5))
  found = plain.phases(optimizers.Updates(plain, 1))
  assert [(phase.name, phase.repeats) for phase in found] == [("discriminator", 5), ("generator", 1)]


def diagnosed(phases, name, metrics):
  """What the host makes of the metrics of a skipped update: (the logged metrics, `Skip`)."""
  return guard.Skips(3, phases.log_names).look(7, {name: metrics}, detail=True)


def test_a_poisoned_batch_is_skipped_whole(golden, phases, once):
  real = golden.images("in.real").copy()
  real[1, 2, 3, 0] = np.nan
  state, metrics = phases.run("discriminator", once["first"], golden.draws(), real)
  assert moved(once["first"], state) == {}
  logged, skip = diagnosed(phases, "discriminator", metrics)
  assert logged == {guard.SKIPPED: 1.0} and skip.step == 7
  assert skip.message.startswith(
    "the batch's images are not finite; discriminator: loss/d_wasserstein is nan, gradient not finite in conv_0"
  )


@pytest.mark.slow
def test_a_nan_in_the_penalty_alone_is_told_from_one_in_the_loss(golden, make_phases, once, monkeypatch):
  penalty = losses.gradient_penalty
  monkeypatch.setattr(losses, "gradient_penalty", lambda score, images: jnp.nan * penalty(score, images))
  phases = make_phases()
  state, metrics = phases.run("discriminator", once["first"], golden.draws(), golden.images("in.real"))
  _, skip = diagnosed(phases, "discriminator", metrics)
  assert skip.updates == ("gp",) and skip.losses == {"loss/gp": "nan"}
  assert skip.message.startswith("gradient penalty of the discriminator: loss/gp is nan, gradient not finite in conv_0")
  # The step on the Wasserstein loss stands: one Adam step, finite, and no second one.
  assert int(state.networks["discriminator"].opt_state[0].count) == 1
  guard.check_state(0, state)
  assert "discriminator params" in moved(once["first"], state)


@pytest.mark.parametrize(("phase", "updates"), [("generator", ("g", "gate")), ("balance", ("balance",))])
def test_a_pass_that_gives_nan_leaves_weights_and_statistics(golden, phases, once, phase, updates):
  draws = golden.draws()
  draws.z[2, 1] = np.nan
  state, metrics = phases.run(phase, once["first"], draws, golden.images("in.real"))
  assert moved(once["first"], state) == {}
  _, skip = diagnosed(phases, phase, metrics)
  assert skip.updates == updates and skip.images == ()


# ---- a step of the trainer
# ----------------------------------------------------------------------------------------------


def test_draws_depend_on_the_key_and_on_nothing_else(golden):
  plain = system.System(golden.experiment())
  draws, again, other = (plain._draws(jax.random.key(seed)) for seed in (0, 0, 1))
  assert (draws.z.shape, draws.uniform.shape, draws.alpha.shape) == ((5, 8), (5, 3), (5,))
  for a, b, c in zip(draws, again, other):
    np.testing.assert_array_equal(a, b)
    assert not np.isin(a, c).any()
  assert not np.isin(draws.alpha, draws.uniform).any()
  assert all(0 <= values.min() and values.max() < 1 for values in (draws.uniform, draws.alpha))


def test_each_round_of_the_discriminator_reads_a_batch_of_its_own(golden):
  """The programs of a step with recorders in the place of what they compile to."""
  step, seen = step_lib.build(system.System(golden.experiment(d_steps=3))), []
  assert step.batches_per_step == 3 and [program.name for program in step.programs] == list(PHASES)

  def recorder(name):
    def run(state, frozen, batch, constants, repeat):
      seen.append((name, batch["image"], int(repeat)))
      return state, {"of": repeat}

    return run

  compiled = step_lib.CompiledStep(step, {}, [recorder(name) for name in PHASES])
  state = base.TrainState(step_lib.constants(step.system).total_steps * 0, {})
  state, metrics = compiled(0, state, [{"image": word, "caption_id": 0} for word in ("first", "second", "third")])
  rounds = [("discriminator", word, i) for i, word in enumerate(("first", "second", "third"))]
  assert seen == [*rounds, ("generator", "first", 0), ("balance", "first", 0)]
  assert int(state.step) == 1
  assert metrics.keys() == {"discriminator/0", "discriminator/1", "discriminator/2", "generator", "balance"}


def test_annealing_follows_the_step(golden, phases, once):
  state = once["first"].replace(step=np.int32(2 * 781))
  draws, real = golden.draws(), golden.images("in.real")
  _, metrics = phases.run("generator", state, draws, real)
  factor = np.exp(-1e-4 * 2 * 781)
  np.testing.assert_allclose(once["generator"][1]["gate/temperature"], 0.7, rtol=1e-6)
  np.testing.assert_allclose(metrics["gate/temperature"], 0.7 * factor, rtol=1e-6)
  _, metrics = phases.run("balance", state, draws, real)
  np.testing.assert_allclose(metrics["loss/balance"], golden.io["balance.loss"], rtol=1e-5)  # without its weight
