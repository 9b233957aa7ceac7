"""The first state of a run: fresh, or with the networks of another checkpoint (`train.init_from`).

A run takes over parameters, averages and other collections: of the networks that sampling needs, and of the others (the
discriminator) where the source has one that fits. Optimizers and the step start anew. A system may let parts of a
network start fresh (`base.System.begins_fresh`), such as the blocks above the source's resolution. The source may also
be an exported folder (systems/hub.py), fine-tuned in PyTorch or not: it has the sampled networks, and their weights
become both parameters and averages.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax import config_files, storage, xla_flags
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_reader, config_check
from aurora_jax.systems import base, hub
from aurora_jax.systems.model_folder import ModelFolder
from aurora_jax.systems.stages import Progress
from aurora_jax.training import optimizers


def source(init_from: str) -> tuple[checkpoint_reader.Path, int]:
  """The checkpoint of `train.init_from`.

  Args:
    init_from: path or URL of a run (its newest checkpoint), or of one checkpoint in it, `RUN/checkpoints/STEP`.

  Returns:
    (path or URL of `checkpoints/`, step).

  Raises:
    UserError: there is none.
  """
  path = storage.path(init_from)
  if path.name.isdigit():
    remote = storage.is_url(init_from)
    if int(path.name) in checkpoint_reader.steps(path.parent) if remote else (path / "state").is_dir():
      return path.parent, int(path.name)
  folder = path if path.name == "checkpoints" else path / "checkpoints"
  step = checkpoint_reader.newest(folder)
  if step is None:
    raise UserError(
      f"train.init_from={init_from}: no checkpoint there (give a run's folder, RUN/checkpoints/STEP, or an exported "
      "folder)"
    )
  return folder, step


def stage_of(init_from: str) -> int | None:
  """The resolution of progressive growing that the source had reached; None if it records none.

  Raises:
    UserError: there is no such source.
  """
  place = _exported(init_from)
  if place is not None:
    return _opened(init_from, place).stage
  stored = checkpoint_reader.stored_progress(*source(init_from)).get("schedule")
  return Progress.from_json(stored).stages[-1].resolution if stored else None


def _exported(init_from):
  """The exported folder of `train.init_from`; None for a run."""
  place = ModelFolder.open(init_from)
  return place if place.exported else None


def _opened(init_from, place, system=None):
  try:
    return hub.read_folder(place.path, system)
  except UserError as error:
    raise UserError(f"train.init_from={init_from}: {error}") from error


def check(experiment: Experiment, allowed: tuple[str, ...] = ()) -> None:
  """Refuses a `train.init_from` whose generator differs from the experiment's. Reads no weights.

  Args:
    experiment: the configuration.
    allowed: names of fields or groups that may differ, as of `config_check.refuse_changes`.

  Raises:
    UserError: no checkpoint there, or one line with every field that differs.
  """
  init_from = experiment.train.init_from
  place = _exported(init_from)
  if place is not None:
    stored = _experiment_of(_opened(init_from, place, experiment.system))
  else:
    stored = _stored_experiment(*source(init_from))
  if stored is None:
    return  # a difference shows in the shapes
  if stored.system != experiment.system:
    raise UserError(f"train.init_from={init_from} is a run of system '{stored.system}', not '{experiment.system}'")
  differing = _differences(stored, experiment, "generator")
  differing = {
    name: pair for name, pair in differing.items() if not config_check.is_allowed(f"generator.{name}", allowed)
  }
  if differing:
    show = lambda value: json.dumps(value, default=list)
    changes = "; ".join(f"generator.{name} {show(old)} -> {show(new)}" for name, (old, new) in differing.items())
    raise UserError(f"train.init_from={init_from}: its generator is another one than the config's: {changes}")


def first_state(system: base.System, abstract_state: base.TrainState) -> tuple[base.TrainState, str]:
  """The state at step 0.

  Args:
    system: the whole system.
    abstract_state: its state as shapes with shardings.

  Returns:
    (state, a line that says where it comes from; "" for a fresh one).

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
    state = jax.jit(init, out_shardings=shardings, compiler_options=compiler_options)(key)
    return _with_initial_weights(system, state, {}), ""
  place = _exported(train.init_from)
  if place is not None:
    taken, origin = _take_over_exported(system, abstract_state, place)
  else:
    taken, origin = _take_over(system, abstract_state, *source(train.init_from))

  def rest(key):
    """The state without the leaves that are taken over, which XLA does not compute."""
    fresh = init(key)
    drop = lambda name, network: (
      dataclasses.replace(network, **_without(_parts(network), taken[name])) if name in taken else network
    )
    return dataclasses.replace(fresh, networks={name: drop(name, network) for name, network in fresh.networks.items()})

  wanted = jax.eval_shape(rest, key)
  placed = dataclasses.replace(
    shardings,
    networks={
      name: dataclasses.replace(
        network, **{part: _like(tree, getattr(wanted.networks[name], part)) for part, tree in _parts(network).items()}
      )
      for name, network in shardings.networks.items()
    },
  )
  fresh = jax.jit(rest, out_shardings=placed, compiler_options=compiler_options)(key)
  join = lambda name, network: dataclasses.replace(
    network, **{part: _joined(tree, getattr(network, part)) for part, tree in taken[name].items()}
  )
  networks = {name: join(name, network) if name in taken else network for name, network in fresh.networks.items()}
  return _with_initial_weights(system, dataclasses.replace(fresh, networks=networks), taken), origin


def _parts(network):
  """The parts of a network that can be taken over, {field of `NetworkState`: tree}."""
  parts = {"params": network.params, "variables": network.variables, "ema": network.ema}
  return {name: tree for name, tree in parts.items() if tree is not None}


_is_none = lambda leaf: leaf is None


def _without(parts, taken):
  """The parts with None in place of every leaf that was taken over."""
  fresh = lambda taken, leaf: leaf if taken is None else None
  return {part: jax.tree.map(fresh, taken[part], tree, is_leaf=_is_none) for part, tree in parts.items()}


def _like(tree, wanted):
  """A tree with None wherever `wanted` has None."""
  return jax.tree.map(lambda wanted, leaf: leaf if wanted is not None else None, wanted, tree, is_leaf=_is_none)


def _joined(taken, fresh):
  """Leaves that were taken over, and fresh ones for the others."""
  return jax.tree.map(lambda taken, fresh: fresh if taken is None else taken, taken, fresh, is_leaf=_is_none)


def _with_initial_weights(system, state, taken):
  """The state with the weights of `System.initial_weights`, except parameters that were taken over."""
  for name, weights in system.initial_weights().items():
    network = state.networks[name]
    new = {
      part: _overlaid(tree, weights, taken.get(name, {}).get(part))
      for part, tree in _parts(network).items()
      if part != "variables"
    }
    state = state.with_network(name, dataclasses.replace(network, **new))
  return state


def _overlaid(tree, weights, taken):
  """A tree of parameters with the leaves of `weights`, a part of it. Leaves in `taken` stay."""
  if not isinstance(weights, Mapping):
    return tree if taken is not None else jax.device_put(np.asarray(weights, tree.dtype), tree.sharding)
  inner = lambda name: None if taken is None else taken[name]
  return {**tree, **{name: _overlaid(tree[name], value, inner(name)) for name, value in weights.items()}}


def _take_over(system, abstract_state, folder, step):
  """Reads the source: ({network: {part: tree, None where a leaf starts fresh}}, description)."""
  train = system.experiment.train
  stored = _stored_experiment(folder, step)
  try:
    begins_fresh = system.begins_fresh(stored) if stored else lambda name, path: False
    needed = {name: _wanted(name, abstract_state.networks[name], begins_fresh) for name in system.sampled}
    _, found = checkpoint_reader.read(folder, {"networks": needed}, step)
  except UserError as error:
    raise UserError(f"train.init_from={train.init_from}: {error}") from error
  taken = found["networks"]
  origin = f"{' and '.join(system.sampled)} with averages from {folder / str(step)}"
  if train.init_from_ema:
    for name in taken:
      if "ema" in taken[name]:
        taken[name]["params"] = jax.tree.map(jnp.copy, taken[name]["ema"])
    origin += " (the averages for the parameters too)"
  fresh = sum(
    leaf is None for parts in taken.values() for leaf in jax.tree.leaves(parts.get("params"), is_leaf=_is_none)
  )
  if fresh:
    origin += f", {fresh} parameter arrays of it fresh"
  for name in system.networks:
    if name in taken:
      continue
    wanted = {"networks": {name: _parts(abstract_state.networks[name])}}
    why_not = _why_not(system.experiment, folder, step, name, wanted)
    if why_not is None:
      taken |= checkpoint_reader.read(folder, wanted, step)[1]["networks"]
      origin += f"; {name} from there too"
    else:
      origin += f"; {name} fresh ({why_not})"
  return taken, origin


def _take_over_exported(system, abstract_state, place):
  """`_take_over` for an exported folder."""
  init_from = system.experiment.train.init_from
  imported = _opened(init_from, place, system.experiment.system)
  stored = _experiment_of(imported)
  try:
    begins_fresh = system.begins_fresh(stored) if stored else lambda name, path: False
  except UserError as error:
    raise UserError(f"train.init_from={init_from}: {error}") from error
  taken: dict[str, Any] = {}
  problems: list[str] = []
  for name in system.sampled:
    wanted = _wanted(name, abstract_state.networks[name], begins_fresh)
    variables = imported.networks.pop(name)
    params = variables.pop("params")
    found = {"params": params, "ema": params, "variables": variables}
    taken[name] = {part: _placed(tree, found[part], name, problems) for part, tree in wanted.items()}
  if problems:
    more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
    raise UserError(f"train.init_from={init_from}: it does not fit: {'; '.join(problems[:3])}{more}")
  origin = f"{' and '.join(system.sampled)} with averages from the exported folder {place.path}"
  others = [name for name in system.networks if name not in taken]
  return taken, origin + "".join(f"; {name} fresh (the folder has none)" for name in others)


def _experiment_of(imported):
  """The experiment of an exported folder with the folder's generator; None where it has none."""
  if imported.experiment is None:
    return None
  try:
    return dataclasses.replace(imported.experiment, generator=imported.generator)
  except UserError:  # outputs of fewer stages than the discriminator reads
    return imported.trained


def _placed(wanted, found, prefix, problems):
  """Numpy arrays as `wanted` says: with its shardings, None where it has None. Misfits go into `problems`."""
  if isinstance(wanted, Mapping):
    inner = found if isinstance(found, Mapping) else {}
    return {name: _placed(tree, inner.get(name), f"{prefix}/{name}", problems) for name, tree in wanted.items()}
  if wanted is None:
    return None
  if np.shape(found) != wanted.shape or found is None:
    what = "it has no" if found is None else f"shape {np.shape(found)}, wanted {wanted.shape}:"
    problems.append(f"{what} {prefix}")
    return None
  # Copies: parameters and averages must not share memory.
  return jax.make_array_from_callback(wanted.shape, wanted.sharding, lambda index: np.array(found[index], wanted.dtype))


def _wanted(name, network, begins_fresh):
  """The parts to read of a network, with None in place of leaves that start fresh."""
  keep = lambda path, leaf: None if begins_fresh(name, path) else leaf
  return {part: jax.tree_util.tree_map_with_path(keep, tree) for part, tree in _parts(network).items()}


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
  """{field: (stored value, present value)} of a network's configuration, where they change what its weights mean."""
  before, after = stored.identity(network), now.identity(network)
  return {name: (before.get(name), after[name]) for name in after if before.get(name) != after[name]}
