"""`train.init_from`: which networks are taken over, which differences are refused."""

import dataclasses
import functools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax import config_files
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_manager
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import initialize
from aurora_jax.training import step as step_lib

pytestmark = pytest.mark.slow

PARTS = ("params", "ema", "variables")


@pytest.fixture(scope="module")
def experiment():
  """The smallest there is: a program that makes a state takes seconds to compile for every hundred leaves."""
  tiny = pathlib.Path(__file__).parents[1] / "parallel" / "tiny_pod.py"
  return config_files.load([f"--config={tiny}", "--config.mesh.expert=1", "--config.generator.text_layers=0"])


@functools.cache
def abstract(experiment):
  return step_lib.abstract_state(System(experiment))


def cheap_init(system):
  """Stands for `optimizers.init_state`, of the same tree: that one takes ten times as long to compile."""
  leaves, structure = jax.tree.flatten(abstract(without_origin(system.experiment)))

  def init(key):
    value = jax.random.uniform(key)
    return structure.unflatten(
      [
        jnp.full(leaf.shape, 0 if leaf.dtype == jnp.int32 else value + number, leaf.dtype)
        for number, leaf in enumerate(leaves)
      ]
    )

  return init


def without_origin(experiment):
  return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, init_from="", seed=0))


@pytest.fixture(scope="module")
def start(experiment):
  """A state with values of its own in every leaf."""
  return jax.jit(cheap_init(System(experiment)))(jax.random.key(5))


@pytest.fixture(scope="module")
def run(experiment, start, tmp_path_factory):
  """A run that has a checkpoint at steps 3 and 7; the average of the former is twice that of the latter."""
  folder = tmp_path_factory.mktemp("source") / "run"
  generator = start.networks["generator"]
  double = start.with_network("generator", generator.replace(ema=doubled(generator.ema)))
  with checkpoint_manager.Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(3, double, config_files.to_mapping(experiment))
    checkpoints.save(7, start, config_files.to_mapping(experiment))
  return folder


def doubled(tree):
  return jax.tree.map(lambda leaf: 2 * leaf, tree)


@pytest.fixture
def first_state(monkeypatch):
  """experiment -> (state, origin), with the first state made cheaply."""
  monkeypatch.setattr(initialize, "optimizers", types.SimpleNamespace(init_state=cheap_init))
  return lambda experiment: initialize.first_state(System(experiment), abstract(without_origin(experiment)))


def beginning_with(experiment, path, **groups):
  """The experiment with `train.init_from` and other fields set: generator={"heads": 4}."""
  groups["train"] = groups.get("train", {}) | {"init_from": str(path)}
  return dataclasses.replace(
    experiment, **{name: dataclasses.replace(getattr(experiment, name), **fields) for name, fields in groups.items()}
  )


def same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


def test_networks_are_taken_over_and_optimizers_are_not(experiment, start, run, first_state):
  state, origin = first_state(beginning_with(experiment, run))
  assert origin.endswith("discriminator from there too") and str(run / "checkpoints" / "7") in origin
  fresh, nothing = first_state(experiment)
  assert nothing == "" and int(state.step) == 0
  assert jax.tree.structure(state) == jax.tree.structure(fresh)
  for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract(experiment)), strict=True):
    assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
  for name, network in state.networks.items():
    for part in PARTS:
      same(getattr(network, part), getattr(start.networks[name], part))
    same(network.opt_state, fresh.networks[name].opt_state)
    with pytest.raises(AssertionError):
      same(fresh.networks[name].params, start.networks[name].params)  # another seed
    with pytest.raises(AssertionError):
      same(network.opt_state, start.networks[name].opt_state)
  assert set(state.networks) == {"generator", "discriminator"}
  older, _ = first_state(beginning_with(experiment, run / "checkpoints" / "3"))
  same(older.networks["generator"].ema, doubled(start.networks["generator"].ema))


def test_another_discriminator_is_made_afresh(experiment, start, run, first_state):
  for fields in ({"residual_gain": 0.5}, {"channels_max": 64}):
    other = beginning_with(experiment, run, discriminator=fields)
    state, origin = first_state(other)
    assert f"discriminator fresh (that one differs in discriminator.{next(iter(fields))})" in origin
    same(state.networks["generator"].params, start.networks["generator"].params)
    same(state.networks["discriminator"], first_state(without_origin(other))[0].networks["discriminator"])
  folder = run.parent / "converted" / "checkpoints"
  parts = {part: jax.tree.map(np.asarray, getattr(start.networks["generator"], part)) for part in PARTS}
  checkpoint_manager.write_parts(folder, 0, {"networks": {"generator": parts}}, config_files.to_mapping(experiment))
  state, origin = first_state(beginning_with(experiment, folder.parent))
  assert "discriminator fresh (the checkpoint has none)" in origin
  for part in PARTS:
    same(getattr(state.networks["generator"], part), getattr(start.networks["generator"], part))


def test_a_generator_that_computes_something_else_is_refused(experiment, run, first_state):
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
