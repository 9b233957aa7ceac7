"""Runs of any system to folders in the Hub's layout and back (`interop/hub` writes and reads the files).

A system takes part with two files of its own: `modeling_NAME.py`, its PyTorch twin, and `torch_names.py`, which
  translates
weights and configuration.
"""

import dataclasses
import importlib
import importlib.util
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from aurora_jax import config_files
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.interop.clip_hf import ClipBundle
from aurora_jax.interop.hub import folder as hub_folder
from aurora_jax.interop.hub import model_card
from aurora_jax.runs import checkpoint_reader
from aurora_jax.runs.workdir import RunFolder
from aurora_jax.systems import registry, stages, text_encoder

WEIGHTS = ("ema", "generator")


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was written.

  Attributes:
    path: the folder.
    pipeline: name of the class in its `pipeline.py`.
    step: of the checkpoint.
    parameters: numbers in the weights, buffers included.
  """

  path: pathlib.Path
  pipeline: str
  step: int
  parameters: int


def torch_names(system: str) -> types.ModuleType:
  """The module that translates a system's weights and configuration for its PyTorch twin.

  Raises:
    UserError: there is no such system, or it has no twin.
  """
  registry.experiment_class(system)  # refuses unknown names
  name = f"{registry.SYSTEMS[system]}.torch_names"
  if importlib.util.find_spec(name) is None:
    raise UserError(f"system {system!r} has no PyTorch form yet")
  return importlib.import_module(name)


def export_run(
  workdir: str | os.PathLike,
  out: str | os.PathLike,
  *,
  step: int | None = None,
  weights: str = "ema",
  clip: str | None = None,
  card: Mapping[str, Any] | None = None,
  extra: Mapping[str, bytes] | None = None,
  overwrite: bool = False,
) -> Exported:
  """Writes a run's generator as a folder that PyTorch users sample from. All of it appears, or nothing.

  Args:
    workdir: the run's folder.
    out: the folder to make.
    step: of the checkpoint; None takes the newest.
    weights: "ema", the moving averages, where a network has them; or "generator", the parameters themselves.
    clip: a CLIP folder in place of the one that the run's configuration names.
    card: fields of `model_card.Card` that the run itself does not say: license, dataset, metrics, cost, summary, image.
    extra: further files {name: content}, such as the card's image.
    overwrite: replace an earlier export.

  Returns:
    `Exported`.

  Raises:
    UserError: no such run, no checkpoint, no CLIP or one of another width, or a folder in use.
  """
  if weights not in WEIGHTS:
    raise UserError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
  hub_folder.check_target(out, overwrite=overwrite)
  run = RunFolder(pathlib.Path(workdir))
  whole = run.experiment()
  trained = stages.at_checkpoint(whole, run.checkpoints, step)
  names = torch_names(whole.system)
  cfg = names.for_sampling(names.generator_config(whole, trained))
  text, tokenizer = _text(names, cfg, clip or whole.text.clip)  # small and doubtful: before gigabytes of weights
  step, networks, kind = _read_networks(whole, run.checkpoints, step, weights)
  model = names.hub_model(names.joined(networks), cfg)
  described = model_card.Card(
    name=whole.name,
    pipeline=model.pipeline,
    resolution=trained.resolution,
    parameters=model.parameters,
    weights=f"{kind} of step {step:,}",
    conditional=trained.conditional,
    psi=0.7 if registry.system_class(whole.system).truncates else None,
    tags=(whole.system,),
  )
  hub_folder.write(
    out,
    model,
    card=model_card.render(dataclasses.replace(described, **dict(card or {}))),
    text=text,
    tokenizer=tokenizer,
    experiment=hub_folder.public_mapping(whole),
    extra=extra,
    overwrite=overwrite,
  )
  return Exported(pathlib.Path(out), model.pipeline, step, model.parameters)


def _text(names: types.ModuleType, cfg: Any, clip: str) -> tuple[ClipBundle | None, Any]:
  """(the CLIP whose text tower goes along or None, the tokenizer or None)."""
  kind = names.text_input(cfg)
  if kind is None:
    return None, None
  if kind == "ids":
    return None, text_encoder.tokenizer(clip)
  bundle = text_encoder.load(clip, text_only=True)
  tokens = kind == "tokens"
  wanted = cfg.text_feature_dim if tokens else cfg.text_dim
  width = bundle.config.text.width if tokens else bundle.config.embedding_width
  if wanted != width:
    what = "text features" if tokens else "embeddings"
    raise UserError(f"{clip}: its {what} are {width} wide, the generator takes {wanted}")
  if not tokens and not bundle.projects:
    raise UserError(f"{clip} has no text projection, so that it gives no text feature")
  return bundle, None


def _read_networks(experiment, checkpoints, step, weights):
  """(step, {network: variables} of what is sampled from, what they are called)."""
  system = registry.system_class(experiment.system)(experiment)
  averaged = {name: weights == "ema" and system.networks[name].ema is not None for name in system.sampled}
  prefixes = {name: f"networks/{name}/{'ema' if averaged[name] else 'params'}" for name in averaged}
  others = {name: f"networks/{name}/variables" for name in averaged}
  step, found = checkpoint_reader.read_parts(checkpoints, [*prefixes.values(), *others.values()], step)
  missing = [prefix for prefix in prefixes.values() if prefix not in found]
  if missing:
    raise UserError(f"checkpoint {checkpoints / str(step)} has no {' and no '.join(missing)}")
  networks = {name: {"params": found[prefix], **found.get(others[name], {})} for name, prefix in prefixes.items()}
  return step, networks, "moving averages" if any(averaged.values()) else "parameters"


@dataclasses.dataclass(frozen=True)
class Imported:
  """An exported folder as a system of ours takes it.

  Attributes:
    system: its name.
    experiment: the configuration of the run that it is from, with the folder's text encoder in `text.clip`; None if the
      folder has no `experiment.json`.
    generator: the folder's architecture, `config.Generator` of the system. What `config.json` does not say, which is
      how training computes, is the experiment's.
    networks: {network: variables}, as they are sampled from.
  """

  system: str
  experiment: Experiment | None
  generator: Any
  networks: dict[str, Any]


def read_folder(path: str | os.PathLike, system: str | None = None) -> Imported:
  """Reads an exported folder, fine-tuned in PyTorch or not. Weights are the folder's, bit for bit.

  Args:
    path: the folder.
    system: the system that it must be of; None takes any.

  Returns:
    `Imported`.

  Raises:
    UserError: no such folder, another system's, an unknown field, missing shards, or weights that do not fit.
  """
  found = hub_folder.read(path, system)
  kind = found.config["model_type"]
  names = torch_names(kind)
  try:
    cfg = names.config_from_torch(found.config)
    variables = names.from_torch(found.weights, cfg)
    experiment = None
    if found.experiment is not None:
      experiment = config_files.from_stored(found.experiment)
      ours: Any = experiment  # the configuration of a system has its generator's
      said = {field.name for field in dataclasses.fields(cfg)} & found.config.keys()
      cfg = dataclasses.replace(ours.generator, **{name: getattr(cfg, name) for name in said})
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  return Imported(kind, experiment, cfg, names.split(variables))
