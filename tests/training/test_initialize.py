"""`train.init_from`: which networks are taken over, which differences are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax import config_files
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_manager
from aurora_jax.training import initialize
from aurora_jax.training import step as step_lib


@pytest.fixture(scope="module")
def experiment():
  return config_files.load(["--config=configs/aurora_64.py:test"])


def init_of(experiment):
  """Stands for the run's own `init`, of the same tree: that one takes ten times as long to compile."""
  leaves, structure = jax.tree.flatten(jax.eval_shape(step_lib.build(experiment, None).init, jax.random.key(0)))

  def init(key):
    value = jax.random.uniform(key)
    return structure.unflatten(
      [
        jnp.full(leaf.shape, 0 if leaf.dtype == jnp.int32 else value + number, leaf.dtype)
        for number, leaf in enumerate(leaves)
      ]
    )

  return init


@pytest.fixture(scope="module")
def start(experiment):
  """A state with values of its own in every leaf."""
  return jax.jit(init_of(experiment))(jax.random.key(5))


@pytest.fixture(scope="module")
def run(experiment, start, tmp_path_factory):
  """A run that has a checkpoint at steps 3 and 7; the average of the former is twice that of the latter."""
  folder = tmp_path_factory.mktemp("source") / "run"
  double = start.replace(ema=jax.tree.map(lambda leaf: 2 * leaf, start.ema))
  with checkpoint_manager.Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(3, double, config_files.to_mapping(experiment))
    checkpoints.save(7, start, config_files.to_mapping(experiment))
  return folder


def first_state(experiment, seed=0):
  init, key = init_of(experiment), jax.random.key(seed)
  return initialize.first_state(experiment, init, key, jax.eval_shape(init, key))


def beginning_with(experiment, path, **groups):
  """The experiment with `train.init_from` and other fields set: generator={"heads": 4}."""
  groups["train"] = groups.get("train", {}) | {"init_from": str(path)}
  return dataclasses.replace(
    experiment, **{name: dataclasses.replace(getattr(experiment, name), **fields) for name, fields in groups.items()}
  )


def same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_networks_are_taken_over_and_optimisers_are_not(experiment, start, run):
  state, words = first_state(beginning_with(experiment, run))
  assert words.endswith("discriminator from there too") and str(run / "checkpoints" / "7") in words
  for part in ("generator", "ema", "buffers", "discriminator"):
    same(getattr(state, part), getattr(start, part))
  fresh, nothing = first_state(experiment)
  assert nothing == "" and int(state.step) == 0
  same((state.generator_opt, state.discriminator_opt), (fresh.generator_opt, fresh.discriminator_opt))
  assert jax.tree.structure(state) == jax.tree.structure(fresh)
  with pytest.raises(AssertionError):
    same(fresh.discriminator, start.discriminator)  # another seed
  older, _ = first_state(beginning_with(experiment, run / "checkpoints" / "3"))
  same(older.ema, jax.tree.map(lambda leaf: 2 * leaf, start.ema))


def test_another_discriminator_is_made_afresh(experiment, start, run):
  for fields in ({"residual_gain": 0.5}, {"channels_max": 64}):
    state, words = first_state(beginning_with(experiment, run, discriminator=fields))
    assert f"discriminator fresh (that one differs in discriminator.{next(iter(fields))})" in words
    same(state.generator, start.generator)
  folder = run.parent / "converted" / "checkpoints"
  parts = {part: jax.tree.map(np.asarray, getattr(start, part)) for part in initialize.GENERATOR_PARTS}
  checkpoint_manager.write_parts(folder, 0, parts, config_files.to_mapping(experiment))
  state, words = first_state(beginning_with(experiment, folder.parent))
  assert "discriminator fresh (the checkpoint has none)" in words
  same(state.ema, start.ema)


def test_a_generator_that_computes_something_else_is_refused(experiment, run):
  other = beginning_with(experiment, run, generator={"text_attention": "independent", "conv_residual_gain": 0.5})
  with pytest.raises(UserError) as error:
    initialize.check(other)
  differences = 'generator.text_attention "scaled" -> "independent"; generator.conv_residual_gain 0.4 -> 0.5'
  assert differences in str(error.value)
  initialize.check(other, ["generator.text_attention", "generator.conv_residual_gain"])
  with pytest.raises(UserError, match="generator.conv_residual_gain"):
    initialize.check(other, ["generator.text_attention"])
  initialize.check(beginning_with(experiment, run, generator={"moe_backend": "dense"}, loss={"clip_weight": 3.0}))
  wider = beginning_with(experiment, run, generator={"w_dim": 24})
  with pytest.raises(UserError, match="generator.w_dim 16 -> 24"):
    initialize.check(wider)
  with pytest.raises(UserError, match="init_from=.*of another architecture: .* and .* more differences"):
    first_state(wider)  # whoever did not check
  for path in ("nowhere", str(run / "checkpoints" / "4")):
    with pytest.raises(UserError, match=f"init_from={path}: no checkpoint there"):
      initialize.check(beginning_with(experiment, path))
