"""A training step: the phases of a system as jitted programs, each with one sharding per pytree, run in order.

The seed and the number of steps are arguments of the programs: two seeds, or a longer run, compile nothing anew.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aurora_jax import memory, xla_flags
from aurora_jax.ops import random_keys
from aurora_jax.systems import base
from aurora_jax.training import optimizers


def state_shardings(system: base.System, state: base.TrainState) -> base.TrainState:
  """The sharding of every leaf of a training state (arrays or shapes), as a tree of the same structure."""
  layout = system.layout

  def network(name, tree):
    label = system.networks[name].label
    of = lambda part: layout.shardings(part, label)
    return base.NetworkState(
      of(tree.params),
      {k: of(v) for k, v in tree.variables.items()},
      of(tree.opt_state),
      None if tree.ema is None else of(tree.ema),
    )

  step = jax.tree.map(lambda _: layout.replicated, state.step)
  return base.TrainState(step, {name: network(name, tree) for name, tree in state.networks.items()})


def with_shardings(tree: Any, shardings: Any) -> Any:
  """A tree of arrays or shapes as shapes with shardings; `shardings` may be one for all."""
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def abstract_state(system: base.System) -> base.TrainState:
  """The training state as shapes with shardings; allocates nothing."""
  shapes = jax.eval_shape(optimizers.init_state(system), jax.random.key(0))
  return with_shardings(shapes, state_shardings(system, shapes))


@dataclasses.dataclass(frozen=True)
class Constants:
  """Values that are equal in all steps of a run, but arguments of the programs.

  Attributes:
    seed: uint32 [2], data of the run's PRNG key.
    total_steps: int32 scalar.
  """

  seed: Any
  total_steps: Any


jax.tree_util.register_dataclass(Constants, data_fields=("seed", "total_steps"), meta_fields=())


def constants(system: base.System) -> Constants:
  """The constants of a run, replicated on all devices."""
  train = system.experiment.train
  values = Constants(jax.random.key_data(jax.random.key(train.seed)), jnp.int32(train.total_steps))
  return jax.device_put(values, system.layout.replicated)


class Program:
  """One phase, jitted: (state, frozen, batch, constants, repeat) -> (state, metrics).

  The state is donated, but not on a CPU: there XLA copies what it updates in place, which costs a quarter of a
  small step (benchmarks/README.md).
  """

  def __init__(self, system: base.System, index: int, state: base.TrainState, platform: str):
    phase = system.phases(optimizers.Updates(system, 1))[index]
    self.name, self.every, self.repeats = phase.name, phase.every, phase.repeats

    def run(state, frozen, batch, constants, repeat):
      run_phase = system.phases(optimizers.Updates(system, constants.total_steps))[index].run
      key = random_keys.fold(jax.random.wrap_key_data(constants.seed), f"phase/{phase.name}", state.step, repeat)
      return run_phase(state, frozen, batch, key)

    run.__name__ = phase.name  # of the compiled program, in profiles and in JAX's compilation cache
    layout = system.layout
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    whole, batch = layout.replicated, layout.batch
    self.jitted = jax.jit(
      run,
      in_shardings=(shardings, whole, batch, whole, whole),
      out_shardings=(shardings, whole),
      donate_argnums=() if platform == "cpu" else 0,
      compiler_options=xla_flags.compiler_options(platform),
    )

  @property
  def runs_per_step(self) -> float:
    """Average number of runs per step."""
    return self.repeats / self.every


@dataclasses.dataclass(frozen=True)
class Step:
  """The programs of a step and their arguments.

  Attributes:
    system: at the present stage.
    whole: the system whose state is trained and whose batches are read.
    state: its abstract training state.
    programs: in order.
  """

  system: base.System
  whole: base.System
  state: base.TrainState
  programs: tuple[Program, ...]

  @property
  def batches_per_step(self) -> int:
    """Batches that a step reads: repeats of a phase have one each."""
    return max(program.repeats for program in self.programs)

  def abstract_arguments(self, frozen: Any) -> tuple[Any, ...]:
    """Arguments of every program, as shapes with shardings. `frozen`: arrays or shapes."""
    layout, train = self.system.layout, self.system.experiment.train
    whole = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.replicated)
    return (
      self.state,
      with_shardings(frozen, layout.replicated),
      with_shardings(self.whole.batch_spec(train.batch_size), layout.batch),
      Constants(whole((2,), jnp.uint32), whole((), jnp.int32)),
      whole((), jnp.int32),
    )

  def trace(self, index: int, frozen: Any) -> jax.stages.Traced:
    """A program, traced."""
    return self.programs[index].jitted.trace(*self.abstract_arguments(frozen))

  def compile(self, frozen: Any) -> Callable[[], "CompiledStep"]:
    """Begins to compile all programs, in threads. Returns a function that waits for the result."""
    pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
    build = lambda index: self.trace(index, frozen).lower().compile()
    futures = [pool.submit(build, index) for index in range(len(self.programs))]
    pool.shutdown(wait=False)

    def wait():
      executables = [future.result() for future in futures]
      memory.return_freed()
      return CompiledStep(self, frozen, executables)

    return wait


def build(system: base.System, whole: base.System | None = None) -> Step:
  """The step of a system. Nothing is compiled or allocated yet.

  Args:
    system: at its present stage.
    whole: the system whose state is trained and whose batches are read, where that is a stage; None: the same.
  """
  whole = whole or system
  state = abstract_state(whole)
  platform = system.layout.mesh.devices.flat[0].platform  # the mesh may be that of another machine
  count = len(system.phases(optimizers.Updates(system, 1)))
  return Step(system, whole, state, tuple(Program(system, index, state, platform) for index in range(count)))


class CompiledStep:
  """Runs the phases that are due at a step."""

  def __init__(self, step: Step, frozen: Any, executables: Sequence[Callable]):
    self._step, self._frozen, self._executables = step, frozen, executables
    layout = step.system.layout
    with jax.transfer_guard("allow"):  # once: in the loop, nothing may reach the devices unasked
      self._constants = constants(step.system)
      self._repeats = jax.device_put([jnp.int32(i) for i in range(step.batches_per_step)], layout.replicated)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated)
    self._advance = jax.jit(lambda step: step + 1, out_shardings=layout.replicated).lower(number).compile()
    self._inputs = tuple(step.system.batch_spec(1))

  def __call__(
    self, number: int, state: base.TrainState, batches: Sequence[Mapping[str, jax.Array]]
  ) -> tuple[base.TrainState, dict[str, base.Metrics]]:
    """One step.

    Args:
      number: steps done so far.
      state: donated.
      batches: `batches_per_step` of them, on the devices.

    Returns:
      (state, {phase, or phase/repeat: metrics}).
    """
    metrics = {}
    for program, run in zip(self._step.programs, self._executables):
      if number % program.every == 0:
        for repeat in range(program.repeats):
          batch = {name: batches[repeat][name] for name in self._inputs}
          name = program.name if program.repeats == 1 else f"{program.name}/{repeat}"
          state, metrics[name] = run(state, self._frozen, batch, self._constants, self._repeats[repeat])
    return dataclasses.replace(state, step=self._advance(state.step)), metrics
