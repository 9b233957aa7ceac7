"""The first state of a run: fresh, or with the networks of another checkpoint (`train.init_from`).

Taken over: the generator, its average (EMA) and its buffers, and the discriminator where the source has one that fits.
The optimisers and the step begin anew.
"""

import dataclasses
import json
import pathlib

import jax

from aurora_jax import config_files
from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_reader, workdir
from aurora_jax.systems.aurora.released_config import RUNTIME_FIELDS
from aurora_jax.training import compiling

# Differences that leave the meaning of the weights alone.
_GENERATOR_FREE = RUNTIME_FIELDS | {"zero_init_attention", "output_resolutions"}
_DISCRIMINATOR_FREE = RUNTIME_FIELDS
GENERATOR_PARTS = ("generator", "ema", "buffers")


def source(init_from):
  """Where the checkpoint of `train.init_from` lies.

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


def check(experiment, allowed=()):
  """Refuses a `train.init_from` whose generator computes something else than the experiment's. Reads no weights.

  Args:
    experiment: `config.Experiment`.
    allowed: names of fields or groups that may differ all the same, as of `run_folder.refuse_changes`.

  Raises:
    UserError: no checkpoint there, or one line with every field that differs.
  """
  folder, step = source(experiment.train.init_from)
  stored = _stored_experiment(folder, step)
  if stored is None:
    return  # the shapes will tell
  differing = [
    name
    for name in _differences(stored.generator, experiment.generator, _GENERATOR_FREE)
    if not workdir.is_allowed(f"generator.{name}", allowed)
  ]
  if differing:
    show = lambda cfg, name: json.dumps(getattr(cfg, name))
    words = "; ".join(
      f"generator.{name} {show(stored.generator, name)} -> {show(experiment.generator, name)}" for name in differing
    )
    raise UserError(
      f"train.init_from={experiment.train.init_from}: its generator is another one than the config's: {words}"
    )


def first_state(experiment, init, key, abstract_state):
  """The state at step 0.

  Args:
    experiment: `config.Experiment`.
    init: key -> `TrainState`, pure: the fresh one. Parts that are taken over are not computed.
    key: for it.
    abstract_state: its shapes, dtypes and shardings.

  Returns:
    (`TrainState`, a line that says where it comes from, "" for a fresh one).

  Raises:
    UserError: the checkpoint of `train.init_from` is missing, does not fit or cannot be read.
  """
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
  if not experiment.train.init_from:
    return jax.jit(init, out_shardings=shardings, compiler_options=compiling.options(runs_once=True))(key), ""
  folder, step = source(experiment.train.init_from)
  try:
    _, taken = checkpoint_reader.read(folder, {part: getattr(abstract_state, part) for part in GENERATOR_PARTS}, step)
  except UserError as error:
    raise UserError(f"train.init_from={experiment.train.init_from}: {error}") from error
  words = f"generator, its average and buffers from {folder / str(step)}; "
  why_not = _why_no_discriminator(folder, step, experiment, abstract_state)
  if why_not is None:
    taken |= checkpoint_reader.read(folder, {"discriminator": abstract_state.discriminator}, step)[1]
    words += "discriminator from there too"
  else:
    words += f"discriminator fresh ({why_not})"

  def rest(key):
    fresh = init(key)
    return {field.name: getattr(fresh, field.name) for field in dataclasses.fields(fresh) if field.name not in taken}

  shardings = {name: getattr(shardings, name) for name in jax.eval_shape(rest, key)}
  fresh = jax.jit(rest, out_shardings=shardings, compiler_options=compiling.options(runs_once=True))(key)
  return abstract_state.replace(**fresh, **taken), words


def _why_no_discriminator(folder, step, experiment, abstract_state):
  """Why the source's discriminator cannot be taken over; None if it can."""
  stored = _stored_experiment(folder, step)
  if "discriminator" not in checkpoint_reader.describe(folder, step):
    return "the checkpoint has none"
  differing = stored and _differences(stored.discriminator, experiment.discriminator, _DISCRIMINATOR_FREE)
  if differing:
    return f"that one differs in {', '.join(f'discriminator.{name}' for name in differing)}"
  misfit = checkpoint_reader.misfit(folder, step, {"discriminator": abstract_state.discriminator})
  return misfit and f"that one does not fit: {misfit}"


def _stored_experiment(folder, step):
  values = checkpoint_reader.stored_config(folder, step)
  return None if values is None else config_files.from_mapping(values)


def _differences(stored, now, free):
  """Names of the fields of two configurations whose values mean different networks."""

  def meaning(cfg, name):
    value = getattr(cfg, name)
    # The same for a batch of one; `independent` keeps the samples of a batch apart.
    return "independent" if name == "text_attention" and value == "uniform" else value

  return [
    field.name
    for field in dataclasses.fields(now)
    if field.name not in free and meaning(stored, field.name) != meaning(now, field.name)
  ]
