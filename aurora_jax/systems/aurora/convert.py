"""Converts weight files of the released PyTorch code to run folders, and back.

A released file holds `generator_smooth` (the moving average) and `generator`, or one of them, or a bare state dict. It
becomes a run folder with one checkpoint, of step 0, that has the generator only. Such a folder serves for sampling, and
as the start of a training run (`train.init_from`).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping

import jax

from aurora_jax import files
from aurora_jax.config import PerResolution, Text
from aurora_jax.errors import UserError
from aurora_jax.interop import tensor_files
from aurora_jax.runs import checkpoint_reader
from aurora_jax.runs import workdir as workdir_lib
from aurora_jax.systems import stages
from aurora_jax.systems.aurora import released
from aurora_jax.systems.aurora.config import Discriminator, Experiment, Generator
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

# Our parts and their names in a released file.
_NAMES = {"ema": "generator_smooth", "generator": "generator"}
# Our parts and where they are in a checkpoint's generator.
_PARTS = {"ema": "ema", "generator": "params", "buffers": "variables/buffers"}
WEIGHTS = ("ema", "generator", "both")


# ----------------------------------------------------------------------------------------------------------------------
# Released to ours


def import_released(
  path: str | os.PathLike,
  workdir: str | os.PathLike,
  experiment: Experiment,
  weights: str = "both",
  *,
  overwrite: bool = False,
  progress: Progress = no_progress,
) -> Converted:
  """Writes a run folder from a released weight file. The folder appears whole or not at all.

  Args:
    path: .pth, .pt, .bin or .safetensors.
    workdir: the folder to make.
    experiment: an experiment with this generator; it becomes the folder's config.json.
    weights: "ema" or "generator": this set becomes parameters and average. "both": each set becomes its own part; the
      only set of a file becomes both.
    overwrite: replace an earlier conversion in `workdir`.
    progress: shows the progress.

  Returns:
    `Converted`.

  Raises:
    UserError: a file that cannot be read or holds no generator, weights that do not fit the config, a folder in use.
  """
  workdir = pathlib.Path(workdir)
  check_target_folder(workdir, overwrite)
  sets, notes = _chosen_sets(path, weights)
  variables = {}
  for part, (name, state_dict) in sets.items():
    if part == "generator" and sets.get("ema", (None,))[0] == name:
      variables[part] = variables["ema"]  # the same arrays, not a copy
      continue
    with progress(f"reading {name or path}") as update:
      try:
        variables[part] = released.import_generator(state_dict, experiment.generator, update)
      except UserError as error:
        raise UserError(f"{path}: {error}") from error
  buffers = variables["ema"]["buffers"]
  for name in differing(buffers, variables["generator"]["buffers"]):
    if name != "w_avg":
      raise UserError(f"{path}: {name} of generator_smooth and generator differ, where one network has one")
    notes.append("w_avg of generator_smooth and of generator differ; the former is used")
  network = {
    "params": variables["generator"]["params"],
    "ema": variables["ema"]["params"],
    "variables": {"buffers": buffers},
  }
  origin = {part: name for part, (name, _) in sets.items()}
  write_run(workdir, experiment, {"generator": network}, {"converted_from": str(path), "weights": origin}, progress)
  values = sum(leaf.size for leaf in jax.tree.leaves(network["ema"]))
  return Converted(workdir, 0, origin, values, tuple(notes))


def experiment_of(generator: Generator, name: str, clip: str = "") -> Experiment:
  """The experiment for released weights that come without a config file of this project.

  Args:
    generator: configuration of the generator.
    name: name of the experiment.
    clip: the CLIP folder.

  Returns:
    An experiment with a discriminator of the same resolution.
  """
  resolutions, default = generator.resolutions, Discriminator()
  discriminator = Discriminator(
    resolution=generator.resolution,
    blocks=PerResolution({r: 1 if r == 4 else 2 for r in resolutions}),
    attention_depth=PerResolution({r: depth for r, depth in default.attention_depth.items() if r in resolutions}),
    input_resolutions=tuple(sorted(generator.output_resolutions, reverse=True)),
    exit_resolutions=tuple(r for r in reversed(resolutions) if r < generator.resolution) + (1,),
    text_feature_dim=generator.text_feature_dim,
  )
  return Experiment(name=name, generator=generator, discriminator=discriminator, text=Text(clip=clip))


def _chosen_sets(path, weights):
  """({"ema": (released name, state dict), "generator": ...} of a file, notes on how it was read)."""
  content = tensor_files.read(path)
  arrays = lambda mapping: {name: value for name, value in mapping.items() if tensor_files.is_array(value)}
  sets = {
    part: (name, arrays(content[name])) for part, name in _NAMES.items() if isinstance(content.get(name), Mapping)
  }
  bare = arrays(content)
  if not sets and not bare:
    raise UserError(
      f"{path} holds no generator: no generator_smooth, no generator, no arrays, but "
      f"{', '.join(map(str, content)) or 'nothing'}"
    )
  if not sets:
    sets = {"ema": ("", bare)}
  elif weights != "both":
    if weights not in sets:
      raise UserError(f"{path} has no {_NAMES[weights]}, only {', '.join(name for name, _ in sets.values())}")
    sets = {weights: sets[weights]}
  only = next(iter(sets.values()))
  return {part: sets.get(part, only) for part in _NAMES}, list(content.notes)


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
  """Writes a run's generator under the released names, and the released constructor's arguments as .json next to it.

  Args:
    workdir: the run's folder.
    path: .safetensors (a bare state dict), or .pth, .pt, .bin (with `generator_smooth` and / or `generator`, as the
      released scripts load it).
    weights: "ema", "generator" or "both"; a .safetensors file holds one of them.
    step: step of the checkpoint; None takes the newest.
    overwrite: replace existing files.
    progress: shows the progress.

  Returns:
    `Converted`.

  Raises:
    UserError: no such run, a config that the released code cannot express, PyTorch missing, a file in the way.
  """
  path = pathlib.Path(path)
  bare = check_weight_file(path, weights)
  folder = workdir_lib.RunFolder(pathlib.Path(workdir))
  experiment = folder.experiment()
  if not isinstance(experiment, Experiment):
    raise UserError(f"{workdir} is a run of system '{experiment.system}', not 'aurora'")
  outputs = stages.at_checkpoint(experiment, folder.checkpoints, step).generator.output_resolutions
  cfg = dataclasses.replace(experiment.generator, output_resolutions=outputs)  # with stages: what is trained so far
  kwargs = released.config_to_released(cfg)
  chosen = tuple(_NAMES) if weights == "both" else (weights,)
  text, arguments = json.dumps(kwargs, indent=2) + "\n", path.with_suffix(".json")
  if arguments.is_file() and arguments.read_text(encoding="utf-8", errors="replace") != text and not overwrite:
    raise UserError(f"{arguments} exists and says something else; choose another name or say --overwrite")
  tensor_files.check_target(path, overwrite)
  with files.atomic_file(arguments) as tmp_arguments, files.atomic_file(path) as tmp_path:
    prefixes = {part: f"networks/generator/{_PARTS[part]}" for part in (*chosen, "buffers")}
    with progress(f"reading {folder.checkpoints}"):
      step, found = checkpoint_reader.read_parts(folder.checkpoints, list(prefixes.values()), step)
    missing = [prefix for prefix in prefixes.values() if prefix not in found]
    if missing:
      raise UserError(f"checkpoint {folder.checkpoints / str(step)} has no {' and no '.join(missing)}")
    parts = {part: found[prefix] for part, prefix in prefixes.items()}
    with progress(f"writing {path}") as update:
      sets = {part: {"params": parts[part], "buffers": parts["buffers"]} for part in chosen}
      if bare:
        shapes = released.released_shapes(cfg)
        arrays = released.exported(sets[weights], cfg)
        tensor_files.write_safetensors(tmp_path, shapes, counted(arrays, len(shapes), update))
      else:
        tensor_files.write_torch(
          tmp_path, {_NAMES[part]: released.export_generator(variables, cfg) for part, variables in sets.items()}
        )
    tmp_arguments.write_text(text, encoding="utf-8")
  values = sum(leaf.size for leaf in jax.tree.leaves(parts[chosen[0]]))
  return Converted(path, step, {part: "" if bare else _NAMES[part] for part in chosen}, values)
