"""How the phases of any system are run: order, batches, repeats, keys; on a system of two numbers."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from aurora_jax import config, config_files
from aurora_jax.ops import random_keys
from aurora_jax.parallel.mesh import ParamLabel
from aurora_jax.systems import base
from aurora_jax.systems.aurora.config import Experiment
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import step as step_lib

TINY_POD = pathlib.Path(__file__).parents[1] / "parallel" / "tiny_pod.py"
RATE = 0.5
CRITIC = ("critic/0", "critic/1", "critic/2")  # its repeats, in metrics


class Pair(base.System):
  """A critic that is trained three times a step, a maker that is trained once, and a check every second step.

  Adam without moments moves a parameter by the learning rate in the direction of its gradient's sign, here the batch's.
  """

  def __init__(self, experiment, layout=None):
    super().__init__(experiment, layout)
    optimizer = config.Optimizer(learning_rate=RATE, final_lr_fraction=0.5)
    label = lambda path: ParamLabel(module="all", group="all")
    self.networks = {name: base.Network(name[0], optimizer, label) for name in ("critic", "maker")}

  def init(self, key):
    return {name: {"params": {"value": jnp.float32(0)}, "memory": {"sum": jnp.float32(0)}} for name in self.networks}

  def batch_spec(self, batch_size):
    return {"sign": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}

  def phases(self, update):
    def train(name):
      def run(state, frozen, batch, key):
        noise, sign = jax.random.normal(key), batch["sign"][0] * frozen["scale"]
        memory = {"sum": state.networks[name].variables["memory"]["sum"] + sign}
        metrics = {f"loss/{name[0]}": jnp.float32(0), "noise": noise, "sign": sign}
        return update(state, name, {"value": sign}, metrics, variables={"memory": memory})[::2]

      return run

    def check(state, frozen, batch, key):
      return state, {"noise": jax.random.normal(key), "sum": state.networks["maker"].variables["memory"]["sum"]}

    return [
      base.Phase("critic", train("critic"), repeats=3),
      base.Phase("maker", train("maker")),
      base.Phase("check", check, every=2),
    ]


def pair(seed=0, total_steps=100, batch_size=2):
  train = config.Train(seed=seed, total_steps=total_steps, batch_size=batch_size)
  return Pair(dataclasses.replace(Experiment(), train=train))


FROZEN = {"scale": jnp.float32(1.0)}


@pytest.fixture(scope="module")
def step():
  return step_lib.build(pair())


@pytest.fixture(scope="module")
def compiled(step):
  return step.compile(FROZEN)()


def first(step):
  return jax.tree.map(lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), step.state)


def batches(step, *signs):
  fields = [{"sign": jnp.full(2, sign, jnp.float32), "unread": jnp.zeros(3)} for sign in signs]
  return jax.device_put(fields, step.system.layout.replicated)


def value(state, name):
  return float(state.networks[name].params["value"])


def test_phases_run_in_order_each_repeat_on_a_batch_of_its_own(step, compiled):
  assert step.batches_per_step == 3
  assert [(program.name, program.runs_per_step) for program in step.programs] == [
    ("critic", 3),
    ("maker", 1),
    ("check", 0.5),
  ]
  state, metrics = compiled(0, first(step), batches(step, 1.0, 10.0, 100.0))
  assert list(metrics) == [*CRITIC, "maker", "check"] and int(state.step) == 1
  memory = {name: float(network.variables["memory"]["sum"]) for name, network in state.networks.items()}
  assert memory == {"critic": 111.0, "maker": 1.0}  # a phase without repeats sees the first batch
  assert [float(metrics[repeat]["sign"]) for repeat in CRITIC] == [1.0, 10.0, 100.0]
  assert float(metrics["check"]["sum"]) == 1.0  # after the maker's update
  assert value(state, "maker") == pytest.approx(-RATE, rel=1e-5) and value(state, "critic") < -RATE
  state, metrics = compiled(1, state, batches(step, 1.0, 1.0, 1.0))
  assert list(metrics) == [*CRITIC, "maker"] and int(state.step) == 2


def test_every_repeat_phase_and_step_draws_numbers_of_its_own_and_a_seed_others(step, compiled):
  found = {}
  for number in (0, 1, 2):
    state = first(step).replace(step=jax.device_put(jnp.int32(number), step.system.layout.replicated))
    state, metrics = compiled(number, state, batches(step, 1.0, 1.0, 1.0))
    for name, values in metrics.items():
      found[name, number] = float(values["noise"])
      phase, _, repeat = name.partition("/")
      key = random_keys.fold(jax.random.key(0), f"phase/{phase}", number, int(repeat or 0))
      assert found[name, number] == float(jax.random.normal(key))
  assert len(found) == 3 * 3 + 3 + 2 and len(set(found.values())) == len(found)
  other = step_lib.CompiledStep(step_lib.build(pair(seed=1)), FROZEN, compiled._executables)  # the very same programs
  _, metrics = other(0, first(step), batches(step, 1.0, 1.0, 1.0))
  assert not set(found.values()) & {float(values["noise"]) for values in metrics.values()}


def test_the_length_of_a_run_is_an_argument_too(step, compiled):
  """Half of a cosine to one half, by programs that were compiled for another length."""
  longer = step_lib.CompiledStep(step_lib.build(pair(total_steps=4)), FROZEN, compiled._executables)
  state = first(step).replace(step=jax.device_put(jnp.int32(2), step.system.layout.replicated))
  moved = value(longer(2, state, batches(step, 1.0, 1.0, 1.0))[0], "maker")
  assert moved == pytest.approx(-0.75 * RATE, rel=1e-5)
  assert value(compiled(2, state, batches(step, 1.0, 1.0, 1.0))[0], "maker") == pytest.approx(-RATE, rel=1e-2)


def lowered(system):
  step, frozen = step_lib.build(system), system.abstract_frozen() or FROZEN
  return [step.trace(index, frozen).lower().as_text() for index in range(len(step.programs))]


def test_seed_and_length_are_no_part_of_a_program():
  assert lowered(pair()) == lowered(pair(seed=7, total_steps=5)) != lowered(pair(batch_size=4))


@pytest.mark.slow
def test_seed_and_length_are_no_part_of_auroras_programs():
  """Nor does anything else that is drawn or planned: latents, noise on what CLIP sees, a learning rate that decays."""
  flags = [f"--config={TINY_POD}", "--config.mesh.expert=1", "--config.loss.clip_augment=True"]
  flags += [f"--config.optimizer.{network}.final_lr_fraction=0.1" for network in ("generator", "discriminator")]
  flags += ["--config.generator.text_layers=0"]

  def system(*more):
    experiment = config_files.load([*flags, *more])
    without_attention = dataclasses.replace(experiment.generator, attention_depth=config.PerResolution())  # for speed
    return System(dataclasses.replace(experiment, generator=without_attention))

  one = lowered(system())
  assert len(one) == 2
  assert one == lowered(system("--config.train.seed=4000000000", "--config.train.total_steps=123456"))
