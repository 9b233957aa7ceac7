"""The first state of a run: fresh, or with the networks of another checkpoint (`train.init_from`).

Taken over: parameters, averages and other collections of the networks that sampling needs, and of the others (the
discriminator) where the source has one that fits. Optimizers and the step begin anew.
"""

import json
import pathlib
from typing import Any

import jax

from aurora_jax import config_files, xla_flags
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_reader, config_check
from aurora_jax.systems import base
from aurora_jax.training import optimizers


def source(init_from: str) -> tuple[pathlib.Path, int]:
  """Where the checkpoint of `train.init_from` is.

  Args:
    init_from: a run's folder (its newest checkpoint), or one checkpoint in it, `RUN/checkpoints/STEP`.

  Returns:
    (path of `checkpoints/`, step).

  Raises:
    UserError: there is none.
  """
  path = pathlib.Path(init_from)
  if path.name.isdigit() and (path / "state").is_dir():
    return path.parent, int(path.name)
  folder = path if path.name == "checkpoints" else path / "checkpoints"
  step = checkpoint_reader.newest(folder)
  if step is None:
    raise UserError(f"train.init_from={init_from}: no checkpoint there (give a run's folder, or RUN/checkpoints/STEP)")
  return folder, step


def check(experiment: Experiment, allowed: tuple[str, ...] = ()) -> None:
  """Refuses a `train.init_from` whose generator computes something else than the experiment's. Reads no weights.

  Args:
    experiment: the configuration.
    allowed: names of fields or groups that may differ all the same, as of `config_check.refuse_changes`.

  Raises:
    UserError: no checkpoint there, or one line with every field that differs.
  """
  init_from = experiment.train.init_from
  stored = _stored_experiment(*source(init_from))
  if stored is None:
    return  # the shapes will tell
  if stored.system != experiment.system:
    raise UserError(f"train.init_from={init_from} is a run of system '{stored.system}', not '{experiment.system}'")
  differing = _differences(stored, experiment, "generator")
  differing = {
    name: pair for name, pair in differing.items() if not config_check.is_allowed(f"generator.{name}", allowed)
  }
  if differing:
    show = lambda value: json.dumps(value, default=list)
    words = "; ".join(f"generator.{name} {show(old)} -> {show(new)}" for name, (old, new) in differing.items())
    raise UserError(f"train.init_from={init_from}: its generator is another one than the config's: {words}")


def first_state(system: base.System, abstract_state: base.TrainState) -> tuple[base.TrainState, str]:
  """The state at step 0.

  Args:
    system: the whole system.
    abstract_state: its state as shapes with shardings.

  Returns:
    (state, a line that says where it comes from, "" for a fresh one).

  Raises:
    UserError: the checkpoint of `train.init_from` is missing, does not fit or cannot be read.
  """
  train = system.experiment.train
  platform = system.layout.mesh.devices.flat[0].platform
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
  compiler_options = xla_flags.compiler_options(platform, runs_once=True)
  key = jax.random.key(train.seed)
  init = optimizers.init_state(system)
  if not train.init_from:
    return jax.jit(init, out_shardings=shardings, compiler_options=compiler_options)(key), ""
  folder, step = source(train.init_from)
  taken, words = _take_over(system, abstract_state, folder, step)

  def rest(key):
    """What is not taken over; XLA computes nothing else."""
    fresh = init(key)
    drop = lambda name, network: network.replace(params=None, variables=None, ema=None) if name in taken else network
    return fresh.replace(networks={name: drop(name, network) for name, network in fresh.networks.items()})

  wanted = jax.eval_shape(rest, key)
  placed = shardings.replace(
    networks={
      name: jax.tree.map(lambda _, sharding: sharding, network, _like(network, shardings.networks[name]))
      for name, network in wanted.networks.items()
    }
  )
  fresh = jax.jit(rest, out_shardings=placed, compiler_options=compiler_options)(key)
  networks = {
    name: network.replace(**taken[name]) if name in taken else network for name, network in fresh.networks.items()
  }
  return fresh.replace(networks=networks), words


def _like(network, shardings):
  """The shardings of those parts of a network that are there."""
  parts = {part: None for part in ("params", "variables", "ema") if getattr(network, part) is None}
  return shardings.replace(**parts)


def _take_over(system, abstract_state, folder, step):
  """({network: {part: tree}}, words)."""
  init_from = system.experiment.train.init_from
  parts = lambda network: {
    name: tree
    for name, tree in (("params", network.params), ("variables", network.variables), ("ema", network.ema))
    if tree is not None
  }
  needed = {name: parts(abstract_state.networks[name]) for name in system.sampled}
  try:
    _, found = checkpoint_reader.read(folder, {"networks": needed}, step)
  except UserError as error:
    raise UserError(f"train.init_from={init_from}: {error}") from error
  taken = found["networks"]
  words = f"{' and '.join(system.sampled)} with averages from {folder / str(step)}"
  for name in system.networks:
    if name in taken:
      continue
    wanted = {"networks": {name: parts(abstract_state.networks[name])}}
    why_not = _why_not(system.experiment, folder, step, name, wanted)
    if why_not is None:
      taken |= checkpoint_reader.read(folder, wanted, step)[1]["networks"]
      words += f"; {name} from there too"
    else:
      words += f"; {name} fresh ({why_not})"
  return taken, words


def _why_not(experiment, folder, step, name, wanted):
  """Why a network of the source cannot be taken over; None if it can."""
  if f"{name}/params" not in checkpoint_reader.describe(folder, step):
    return "the checkpoint has none"
  stored = _stored_experiment(folder, step)
  differing = stored and _differences(stored, experiment, name)
  if differing:
    return f"that one differs in {', '.join(f'{name}.{field}' for field in differing)}"
  misfit = checkpoint_reader.misfit(folder, step, wanted)
  return misfit and f"that one does not fit: {misfit}"


def _stored_experiment(folder, step):
  values = checkpoint_reader.stored_config(folder, step)
  return None if values is None else config_files.from_stored(values)


def _differences(stored: Experiment, now: Experiment, network: str) -> dict[str, tuple[Any, Any]]:
  """{field: (stored value, value now)} of a network's configuration, where its weights mean something else."""
  before, after = stored.identity(network), now.identity(network)
  return {name: (before.get(name), after[name]) for name in after if before.get(name) != after[name]}
