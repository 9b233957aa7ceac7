"""Generators, projection and gate against the released PyTorch code's numbers, and their options."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.systems.megan import config, gate, generator, released


@pytest.fixture(scope="module")
def passes(golden):
  """Per mode: output with soft gate, output with hard gate, statistics afterwards."""

  def run(train):
    def both(variables, z, uniform):
      model = generator.Generator(golden.cfg)
      apply = lambda hard: model.apply(
        variables, z, uniform, golden.temperature, hard=hard, train=train, mutable=["batch_stats"]
      )
      (soft, _), (hard, moved) = apply(False), apply(True)
      return soft, hard, moved["batch_stats"]

    return jax.jit(both)(golden.variables, golden.io["in.z"], golden.io["in.gumbel_u"])

  return {"train": run(True), "eval": run(False)}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_output_matches_the_release(golden, passes, mode):
  io, relative = golden.io, golden.relative
  soft, hard, _ = passes[mode]
  assert relative(soft.features, golden.images(f"{mode}.feature8")) < 1e-5
  assert relative(soft.images, golden.images(f"{mode}.images")) < 1e-5
  assert relative(soft.projected.reshape(5, -1), io[f"{mode}.projected"]) < 1e-5
  assert relative(soft.logits, io[f"{mode}.logits"]) < 1e-5
  assert relative(jax.nn.softmax(soft.logits[:1]), io[f"{mode}.probs_first"]) < 1e-5
  for out, kind in ((soft, "soft"), (hard, "hard")):
    assert relative(out.gate, io[f"{mode}.gate_{kind}"]) < 1e-5
    assert relative(out.image, golden.images(f"{mode}.image_{kind}")) < 1e-5
  assert relative(gate.gumbel_noise(io["in.gumbel_u"]), io["gumbel_noise"]) < 1e-6


def test_running_statistics_move_in_training_mode_alone(golden, passes):
  moved = released.export_generator({**golden.variables, "batch_stats": passes["train"][2]}, golden.cfg)
  names = [name for name in golden.io if name.startswith("train.bn_after.")]
  assert len(names) == 3 * (3 * 3 + 2)  # three arrays per norm; three norms per generator, two in the gate
  for name in names:
    file, tensor = name.removeprefix("train.bn_after.").split(".", 1)
    assert golden.relative(moved[file][tensor], golden.io[name]) < 1e-6, name
    assert not np.array_equal(moved[file][tensor], golden.state_dicts[file][tensor]), name
  jax.tree.map(np.testing.assert_array_equal, passes["eval"][2], golden.variables["batch_stats"])


def test_sampling_follows_the_configuration(golden, passes):
  """Released: the batch's statistics, without moving the running ones, and a draw of the gate."""
  z, uniform = golden.io["in.z"], golden.io["in.gumbel_u"]

  @jax.jit
  def sample(variables):
    def one(uniform, **changes):
      model = generator.Generator(dataclasses.replace(golden.cfg, **changes))
      return model.apply(variables, z, uniform, golden.temperature, method="sample")

    return one(uniform), one(uniform, bn_at_eval="running"), one(None, bn_at_eval="running", gate_at_eval="argmax")

  as_released, running, likeliest = sample(golden.variables)
  assert golden.relative(as_released.image, golden.images("train.image_hard")) < 1e-5
  assert golden.relative(running.image, golden.images("eval.image_hard")) < 1e-5
  best = golden.io["eval.logits"].argmax(axis=1)
  np.testing.assert_array_equal(likeliest.gate, np.eye(3)[best])
  assert not np.array_equal(best, golden.io["eval.gate_hard"].argmax(axis=1))  # the noise decided otherwise
  np.testing.assert_allclose(likeliest.image, running.images[np.arange(5), best], rtol=1e-6, atol=1e-7)


def test_training_mode_without_mutable_statistics_is_an_error(golden):
  with pytest.raises(Exception, match="batch_stats"):
    apply(golden, train=True)


def apply(golden, z=None, uniform=None, **options):
  z = golden.io["in.z"] if z is None else z
  uniform = golden.io["in.gumbel_u"] if uniform is None else uniform
  model = generator.Generator(golden.cfg)
  return jax.eval_shape(lambda *inputs: model.apply(golden.variables, *inputs, 1.0, **options), z, uniform)


def test_wrong_input_is_named(golden):
  with pytest.raises(UserError, match=r"z must be \[batch, 8\], got \(5, 7\)"):
    apply(golden, z=jnp.zeros((5, 7)))
  with pytest.raises(UserError, match=r"uniform must be \(5, 3\), got \(5, 1\)"):
    apply(golden, uniform=jnp.zeros((5, 1)))
  with pytest.raises(UserError, match="statistics must be 'running' or 'batch', got 'moving'"):
    apply(golden, statistics="moving")
  with pytest.raises(UserError, match="choice must be 'sample' or 'argmax', got 'best'"):
    apply(golden, choice="best")
  with pytest.raises(UserError, match="2 samples or more, got 1"):
    apply(golden, z=jnp.zeros((1, 8)), uniform=jnp.zeros((1, 3)), statistics="batch")


def test_tied_maxima_are_all_chosen_by_a_draw_and_the_first_by_argmax():
  logits, uniform = jnp.array([[1.0, 3.0, 3.0], [0.0, -1.0, -1.0]]), jnp.full((2, 3), 0.5)
  expected = [[0, 1, 1], [1, 0, 0]]
  np.testing.assert_allclose(gate.gumbel_softmax(logits, uniform, 0.5), expected, atol=1e-6)
  np.testing.assert_array_equal(gate.argmax_gate(logits), [[0, 1, 0], [1, 0, 0]])


def test_noise_is_finite_at_the_ends_of_its_range():
  noise = np.asarray(gate.gumbel_noise(jnp.array([0.0, 1.0])))
  np.testing.assert_allclose(noise, [-np.log(-np.log(1e-20)), -np.log(1e-20)], rtol=1e-6)


def test_hard_gate_has_the_gradient_of_the_soft_one():
  rng = np.random.default_rng(0)
  logits, uniform, cotangent = rng.normal(size=(4, 3)), rng.uniform(size=(4, 3)), rng.normal(size=(4, 3))
  of = lambda hard: jax.grad(lambda x: jnp.sum(gate.gumbel_softmax(x, uniform, 0.3, hard) * cotangent))
  hard, soft = jax.jit(lambda x: (of(True)(x), of(False)(x)))(logits)
  np.testing.assert_array_equal(hard, soft)
  assert np.abs(hard).max() > 0.01


@pytest.mark.parametrize(
  ("resolution", "one", "all_of_them"), [(32, 1_184_067, 12_889_374), (64, 3_807_043, 40_167_710)]
)
def test_parameter_counts_and_one_axis_for_all_generators(resolution, one, all_of_them):
  cfg = config.Generator(resolution=resolution)
  variables = generator.abstract_variables(cfg)
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  rest, gate_variables = generator.split_gate(variables)
  assert count(rest["params"]["generators"]) == 10 * one
  assert count(rest["params"]) == all_of_them
  assert count(gate_variables["params"]) == 1_085_130
  assert set(rest["params"]) == {"generators", "projection"} and set(rest["batch_stats"]) == {"generators"}
  for collection in rest.values():
    assert all(leaf.shape[0] == 10 for leaf in jax.tree.leaves(collection["generators"]))
  assert generator.join_gate(rest, gate_variables) == variables


def test_the_gates_part_is_its_module_s_own_variables(golden):
  _, variables = generator.split_gate(golden.variables)
  projected = golden.io["eval.projected"].reshape(5, 3, -1)
  run = jax.jit(lambda *inputs: gate.Gate(golden.cfg).apply(*inputs, "running"))
  logits = run(variables, golden.io["in.z"], projected)
  assert golden.relative(logits, golden.io["eval.logits"]) < 1e-5


def test_bfloat16_computes_the_same_image_roughly(golden):
  cfg = dataclasses.replace(golden.cfg, compute_dtype="bfloat16")
  run = jax.jit(generator.Generator(cfg).apply)
  out = run(golden.variables, golden.io["in.z"], golden.io["in.gumbel_u"], 1.0)
  assert out.images.dtype == out.logits.dtype == jnp.float32
  difference = np.abs(out.images - golden.images("eval.images"))
  assert 1e-4 < difference.mean() < 0.02
