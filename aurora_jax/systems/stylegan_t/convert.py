"""Converts weight files of the published PyTorch code to run folders, and back.

A file has the state dicts `G_ema` (the moving average), `G` and `D`, or some of them, or is one bare state dict of a
generator. It becomes a run folder with one checkpoint, of step 0. DINO's weights, which the published discriminator's
state dict contains, are not stored there: `dino.path` names them, and may name such a file.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from aurora_jax import files
from aurora_jax.config import Text
from aurora_jax.errors import UserError
from aurora_jax.interop import tensor_files
from aurora_jax.runs import checkpoint_reader
from aurora_jax.runs import workdir as workdir_lib
from aurora_jax.systems import stages
from aurora_jax.systems.conversion import (
  Converted,
  Progress,
  check_target_folder,
  check_weight_file,
  counted,
  differing,
  no_progress,
  write_run,
)
from aurora_jax.systems.stylegan_t import released
from aurora_jax.systems.stylegan_t.config import Dino, Discriminator, Experiment
from aurora_jax.systems.stylegan_t.system import System

# Our parts of the generator and their names in a file.
_NAMES = {"ema": "G_ema", "generator": "G"}
_FIELDS = {"ema": "ema", "generator": "params"}


def import_released(
  path: str | os.PathLike,
  workdir: str | os.PathLike,
  experiment: Experiment,
  weights: str = "both",
  *,
  overwrite: bool = False,
  progress: Progress = no_progress,
) -> Converted:
  """Writes a run folder from a file of state dicts. The folder appears whole or not at all.

  Args:
    path: .pth, .pt, .bin or .safetensors.
    workdir: the folder to make.
    experiment: an experiment with these networks; it becomes the folder's config.json. A text encoder in the file
      becomes `generator.text_tower`.
    weights: "ema" or "generator": this set becomes parameters and average. "both": each set becomes its own part; the
      only set of a file becomes both.
    overwrite: replace an earlier conversion in `workdir`.
    progress: shows the progress.

  Raises:
    UserError: a file that cannot be read or holds no generator, weights that do not fit the config, a folder in use.
  """
  check_target_folder(workdir, overwrite)
  found = released.load_state_dicts(path)
  sets, notes = _chosen_sets(path, found, weights), []
  experiment, tower_notes = _with_text_tower(experiment, sets["ema"][1])
  notes += tower_notes
  variables: dict[str, Any] = {}
  for part, (name, state_dict) in sets.items():
    if part == "generator" and sets["ema"][0] == name:
      variables[part] = variables["ema"]  # the same arrays, not a copy
      continue
    with progress(f"reading {name or path}"):
      variables[part] = _imported(path, name, released.import_generator, state_dict, experiment.generator)
  buffers = variables["ema"]["buffers"]
  for name in differing(buffers, variables["generator"]["buffers"]):
    notes.append(f"{name} of G_ema and of G differ; the former is used")
  networks = {
    "generator": {
      "params": variables["generator"]["params"],
      "ema": variables["ema"]["params"],
      "variables": {"buffers": buffers},
    }
  }
  origin = {part: name for part, (name, _) in sets.items()}
  if "D" in found:
    with progress("reading D"):
      ours = _imported(path, "D", released.import_discriminator, found["D"], experiment.discriminator)
    networks["discriminator"] = {"params": ours["params"], "variables": {"spectral": ours["spectral"]}}
    origin["discriminator"] = "D"
    if not experiment.dino.path:
      experiment = dataclasses.replace(experiment, dino=Dino(path=os.path.abspath(path)))
      notes.append(f"the discriminator's transformer stays in {path}: dino.path names this file")
  write_run(workdir, experiment, networks, {"converted_from": str(path), "weights": origin}, progress)
  values = sum(leaf.size for leaf in jax.tree.leaves(networks["generator"]["ema"]))
  return Converted(pathlib.Path(workdir), 0, origin, values, tuple(notes))


def experiment_of_released(kwargs: Mapping[str, Any], name: str, clip: str = "") -> Experiment:
  """The experiment for released weights that come without a config file of this project.

  Args:
    kwargs: the released generator's keywords (`released.config_from_released`); those of the discriminator under
      "discriminator", if it is not the published one.
    name: name of the experiment.
    clip: the CLIP folder.

  Returns:
    An experiment with a discriminator for texts of the same width.
  """
  generator = released.config_from_released(kwargs)
  discriminator = Discriminator(text_dim=generator.text_dim)
  if "discriminator" in kwargs:
    discriminator = released.discriminator_config_from_released(kwargs)
  return Experiment(name=name, generator=generator, discriminator=discriminator, text=Text(clip=clip))


def _imported(path, name, to_ours, state_dict, cfg):
  try:
    return to_ours(state_dict, cfg)
  except UserError as error:
    raise UserError(f"{path}{f', {name}' if name else ''}: {error}") from error


def _chosen_sets(path, found, weights):
  """{"ema": (released name, state dict), "generator": ...}."""
  sets = {part: (name, found[name]) for part, name in _NAMES.items() if name in found}
  if "" in found:
    sets = {"ema": ("", found[""])}
  if not sets:
    raise UserError(f"{path} holds no generator: no G_ema, no G, but {', '.join(found)}")
  if weights != "both" and "" not in found:
    if weights not in sets:
      raise UserError(f"{path} has no {_NAMES[weights]}, only {', '.join(name for name, _ in sets.values())}")
    sets = {weights: sets[weights]}
  only = next(iter(sets.values()))
  return {part: sets.get(part, only) for part in _NAMES}


def _with_text_tower(experiment, state_dict):
  """(the experiment with the file's text encoder where its config leaves it out, notes)."""
  generator = experiment.generator
  tower = released.text_tower_from_released(state_dict)
  if not tower.layers or generator.text_tower.layers:
    return experiment, []
  experiment = dataclasses.replace(experiment, generator=dataclasses.replace(generator, text_tower=tower))
  return experiment, [f"the file's text encoder of {tower.layers} layers, {tower.heads} heads is generator.text_tower"]


# ----------------------------------------------------------------------------------------------------------------------
# Ours to released


def export_released(
  workdir: str | os.PathLike,
  path: str | os.PathLike,
  weights: str = "ema",
  step: int | None = None,
  *,
  overwrite: bool = False,
  progress: Progress = no_progress,
) -> Converted:
  """Writes a run's networks under the released names, and the released constructor's arguments as .json next to it.

  Args:
    workdir: the run's folder.
    path: .safetensors (a bare state dict of the generator), or .pth, .pt, .bin (with `G_ema` and / or `G`; with "both"
      also `D`, with the transformer of the run's `dino.path`).
    weights: "ema", "generator" or "both"; a .safetensors file holds one of them.
    step: step of the checkpoint; None takes the newest.
    overwrite: replace existing files.
    progress: shows the progress.

  Raises:
    UserError: no such run, PyTorch missing, a file in the way.
  """
  path = pathlib.Path(path)
  bare = check_weight_file(path, weights)
  folder = workdir_lib.RunFolder(pathlib.Path(workdir))
  experiment = folder.experiment()
  if not isinstance(experiment, Experiment):
    raise UserError(f"{workdir} is a run of system '{experiment.system}', not 'stylegan_t'")
  experiment = stages.at_checkpoint(experiment, folder.checkpoints, step)
  cfg = experiment.generator
  chosen = tuple(_NAMES) if weights == "both" else (weights,)
  text, arguments = json.dumps(released.config_to_released(cfg), indent=2) + "\n", path.with_suffix(".json")
  if arguments.is_file() and arguments.read_text(encoding="utf-8", errors="replace") != text and not overwrite:
    raise UserError(f"{arguments} exists and says something else; choose another name or say --overwrite")
  tensor_files.check_target(path, overwrite)
  with files.atomic_file(arguments) as tmp_arguments, files.atomic_file(path) as tmp_path:
    step, sets, judge = _read(folder, chosen, step, with_discriminator=weights == "both", progress=progress)
    origin, notes = {part: "" if bare else _NAMES[part] for part in chosen}, []
    with progress(f"writing {path}") as update:
      if bare:
        shapes = released.generator_shapes(cfg)
        arrays = released.exported_generator(sets[weights], cfg)
        tensor_files.write_safetensors(tmp_path, shapes, counted(arrays, len(shapes), update))
      else:
        state_dicts = {_NAMES[part]: released.export_generator(variables, cfg) for part, variables in sets.items()}
        if judge:
          try:
            frozen = {"dino": System(experiment).load_frozen()["dino"]}
            state_dicts["D"] = released.export_discriminator({**judge, **frozen}, experiment.discriminator)
            origin["discriminator"] = "D"
          except UserError as error:
            notes.append(f"D is left out, since its transformer cannot be read: {error}")
        tensor_files.write_torch(tmp_path, state_dicts)
    tmp_arguments.write_text(text, encoding="utf-8")
  values = sum(leaf.size for leaf in jax.tree.leaves(sets[chosen[0]]["params"]))
  return Converted(path, step, origin, values, tuple(notes))


def _read(folder, chosen, step, with_discriminator, progress):
  """(step, {part: generator's variables}, the discriminator's variables or None) of a checkpoint."""
  buffers = "networks/generator/variables/buffers"
  prefixes = {part: f"networks/generator/{_FIELDS[part]}" for part in chosen}
  judge = {"params": "networks/discriminator/params", "spectral": "networks/discriminator/variables/spectral"}
  wanted = [*prefixes.values(), buffers, *(judge.values() if with_discriminator else ())]
  with progress(f"reading {folder.checkpoints}"):
    step, found = checkpoint_reader.read_parts(folder.checkpoints, wanted, step)
  missing = [prefix for prefix in (*prefixes.values(), buffers) if prefix not in found]
  if missing:
    raise UserError(f"checkpoint {folder.checkpoints / str(step)} has no {' and no '.join(missing)}")
  sets = {part: {"params": found[prefix], "buffers": found[buffers]} for part, prefix in prefixes.items()}
  complete = with_discriminator and all(prefix in found for prefix in judge.values())
  return step, sets, {name: found[prefix] for name, prefix in judge.items()} if complete else None
