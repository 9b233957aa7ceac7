"""Runs of any system to folders in the Hub's layout and back (`interop/hub` writes and reads the files).

A system takes part with two files of its own: `modeling_NAME.py`, its PyTorch twin, and `torch_names.py`, which
translates weights and configuration.
"""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from aurora_jax import config_files
from aurora_jax.config import Experiment
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop import clip_hf
from aurora_jax.interop.clip_hf import ClipBundle
from aurora_jax.interop.hub import folder as hub_folder
from aurora_jax.interop.hub import layout, model_card, twin_map
from aurora_jax.interop.hub import text_encoder as hub_text_encoder
from aurora_jax.runs import checkpoint_reader
from aurora_jax.runs.workdir import RunFolder
from aurora_jax.systems import hub_card, registry, stages, text_encoder

WEIGHTS = ("ema", "generator")


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was written.

  Attributes:
    path: the folder.
    pipeline: name of the class in its `pipeline.py`.
    step: of the checkpoint.
    parameters: numbers in the weights, buffers included.
    weights: "moving averages" or "parameters".
  """

  path: pathlib.Path
  pipeline: str
  step: int
  parameters: int
  weights: str


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
    card: fields of `model_card.Card`, in place of what the run itself says (`hub_card.fields`).
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
  # Small and doubtful: before gigabytes of weights.
  text, tokenizer, files_of_text = _text(names, cfg, clip or whole.text.clip)
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
    **{**hub_card.fields(run.path, step), **dict(card or {})},
  )
  origin = {"run": whole.name, "step": step, "weights": kind, "resolution": trained.resolution}
  hub_folder.write(
    out,
    model,
    card=model_card.render(described),
    text=text,
    tokenizer=tokenizer,
    experiment=hub_folder.public_mapping(whole),
    extra={layout.ORIGIN: json.dumps(origin, indent=2).encode() + b"\n", **files_of_text, **(extra or {})},
    overwrite=overwrite,
  )
  return Exported(pathlib.Path(out), model.pipeline, step, model.parameters, kind)


def _text(names: types.ModuleType, cfg: Any, clip: str) -> tuple[ClipBundle | None, Tokenizer | None, dict[str, bytes]]:
  """(the CLIP whose text tower goes along or None, the tokenizer or None, further files {name: content})."""
  kind = names.text_input(cfg)
  if kind is None:
    return None, None, {}
  if kind == "ids":  # the weights have the text tower; on the way back its sizes are read here
    tokenizer = text_encoder.tokenizer(clip)
    config = hub_text_encoder.config_json(clip_hf.read_config(pathlib.Path(clip)), tokenizer)
    return None, tokenizer, {f"{layout.TOKENIZER}/{layout.CONFIG}": config.encode()}
  bundle = text_encoder.load(clip, text_only=True)
  tokens = kind == "tokens"
  wanted = cfg.text_feature_dim if tokens else cfg.text_dim
  width = bundle.config.text.width if tokens else bundle.config.embedding_width
  if wanted != width:
    what = "text features" if tokens else "embeddings"
    raise UserError(f"{clip}: its {what} are {width} wide, the generator takes {wanted}")
  if not tokens and not bundle.projects:
    raise UserError(f"{clip} has no text projection, so that it gives no text feature")
  return bundle, None, {}


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
    path: the folder.
    system: its name.
    experiment: the configuration of the run that it is from, with the folder's text encoder in `text.clip`; None if the
      folder has no `experiment.json`.
    trained: the same as the folder is sampled from: with its generator, at the stage of progressive growing in which it
      was exported.
    stage: resolution of that stage; None if the folder does not say.
    step: of the checkpoint that it is from; 0 if the folder does not say.
    generator: the folder's architecture, `config.Generator` of the system. What `config.json` does not say, which is
      how training computes, is the experiment's.
  """

  path: pathlib.Path
  system: str
  experiment: Experiment | None
  trained: Experiment | None
  stage: int | None
  step: int
  generator: Any
  _cfg: Any
  _weights: Mapping[str, Any]

  @functools.cached_property
  def networks(self) -> dict[str, Any]:
    """{network: variables}, numpy arrays, as they are sampled from. Bit for bit those of the folder.

    Raises:
      UserError: the weights cannot be read.
    """
    names = torch_names(self.system)
    return names.split(names.from_torch(self._weights, self._cfg))


def read_folder(path: str | os.PathLike, system: str | None = None) -> Imported:
  """Opens an exported folder, fine-tuned in PyTorch or not. All is checked; arrays are read when they are asked for.

  Args:
    path: the folder.
    system: the system that it must be of; None takes any.

  Raises:
    UserError: no such folder, another system's, an unknown field, missing shards, or weights that do not fit.
  """
  found = hub_folder.read(path, system)
  kind = found.config["model_type"]
  names, origin = torch_names(kind), layout.read_origin(path)
  experiment = trained = stage = None
  try:
    cfg = generator = names.config_from_torch(found.config)
    twin_map.check(found.weights, names.entries(cfg))
    if found.experiment is not None:
      experiment = config_files.from_stored(found.experiment)
      if experiment.system != kind:
        raise UserError(f"{layout.EXPERIMENT} is of system {experiment.system!r}, {layout.CONFIG} of {kind!r}")
      ours: Any = experiment  # the configuration of a system has its generator's
      said = [field.name for field in dataclasses.fields(cfg) if field.name in found.config]
      generator = dataclasses.replace(ours.generator, **{name: getattr(cfg, name) for name in said})
      if experiment.schedule.resolutions and origin.get("resolution") in experiment.schedule.resolutions:
        stage = origin["resolution"]
      trained = _trained(names, ours, cfg, said, stage)
  except UserError as error:
    raise UserError(f"{path}: {error}") from error
  step = origin.get("step")
  step = step if isinstance(step, int) else 0
  return Imported(pathlib.Path(path), kind, experiment, trained, stage, step, generator, cfg, found.weights)


def _trained(names, whole, cfg, said, stage):
  """The experiment of a folder at its stage, with the folder's values where they are not those of the run."""
  trained = whole.at_stage(stage) if stage else whole
  exported = names.generator_config(whole, trained)
  changed = {name: getattr(cfg, name) for name in said if getattr(cfg, name) != getattr(exported, name)}
  return dataclasses.replace(trained, generator=dataclasses.replace(trained.generator, **changed))
