"""Converts a checkpoint of the released PyTorch code to a run's folder, or a run's generator back to that code.

Released to ours (.pth, .pt, .bin or .safetensors; the folder can be sampled from, inspected and trained on):
  python -m aurora_jax convert aurora_v1.pth runs/aurora_v1 --config configs/aurora_64.py --config.text.clip=CLIP
  python -m aurora_jax convert model.pth runs/model --released-config model.json --clip CLIP
  python -m aurora_jax train --workdir runs/tuned --config configs/aurora_64.py \\
      --config.train.init_from=runs/aurora_v1 --config.generator.text_attention=independent \\
      --config.data.path=DATA --config.text.clip=CLIP

Ours to released (averaged weights; next to it model.json, the released constructor's keyword arguments):
  python -m aurora_jax convert runs/tuned model.pth
  python -m aurora_jax convert runs/tuned model.safetensors --step 4000

A .pth file holds generator_smooth (the averaged weights) and / or generator, as the released scripts load it; a
.safetensors file is a bare state dict. Both load with strict=True there. Nothing in a file is ever run: a pickle with
anything but tensors and plain values in it is refused. Writing .pth needs PyTorch, nothing else does.
"""

import argparse
import dataclasses
import json
import pathlib

from aurora_jax import config as config_lib
from aurora_jax import config_files, text
from aurora_jax.cli import flag_types
from aurora_jax.errors import UserError
from aurora_jax.runs import references, workdir
from aurora_jax.systems import registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument(
    "source", type=flag_types.path, metavar="SOURCE", help="a released weight file, or a run's folder"
  )
  parser.add_argument(
    "target", type=flag_types.path, metavar="TARGET", help="the run's folder to make, or the weight file to write"
  )
  parser.add_argument(
    "--config",
    metavar="FILE[:VARIANT]",
    help="to ours: the experiment that the weights belong to, "
    "e.g. configs/aurora_64.py; --config.GROUP.NAME=VALUE sets single values",
  )
  parser.add_argument(
    "--released-config",
    type=flag_types.path,
    metavar="JSON",
    help="to ours, in place of --config: the released "
    "constructor's keyword arguments (default: the .json next to the weight file, if there is one)",
  )
  parser.add_argument(
    "--clip", type=flag_types.path, metavar="DIR", help="to ours: the CLIP folder, the same as --config.text.clip=DIR"
  )
  parser.add_argument(
    "--weights",
    choices=("ema", "generator", "both"),
    help="to ours: which of the file's sets "
    "(default both, each to its own part); to released: which to write (default ema)",
  )
  parser.add_argument("--step", type=int, metavar="S", help="to released: of the checkpoint (default: the newest)")
  parser.add_argument("--overwrite", action="store_true", help="replace the file, or an earlier conversion")


def run(args: argparse.Namespace) -> None:
  """Converts, in the direction that the source decides."""
  source = pathlib.Path(args.source)
  if not source.exists():
    raise UserError(f"nothing to convert at {source}: it does not exist")
  if source.is_dir():
    _to_released(args)
  else:
    _to_ours(args)


def _to_released(args):
  others = {"--config": args.config_argv, "--released-config": args.released_config, "--clip": args.clip}
  for name, value in others.items():
    if value:
      raise UserError(f"{name} is for the other way: {args.source} is a run's folder and has its own config")

  to_released(args.source, args.target, args.weights or "ema", args.step, overwrite=args.overwrite)


def to_released(source: str, target: str, weights: str, step: int | None, *, overwrite: bool) -> None:
  """Writes a run's generator as a weight file of the released code and says what was written; `export` does it too.

  Args:
    source: the run's folder.
    target: the weight file.
    weights: "ema", "generator" or "both".
    step: of the checkpoint; None takes the newest.
    overwrite: replace the file.

  Raises:
    UserError: no such run, or one that the released code cannot express.
  """
  from aurora_jax.runs.progress import progress

  done = registry.converter(workdir.RunFolder(source).experiment().system).export_released(
    source, target, weights, step, overwrite=overwrite, progress=progress
  )
  for note in done.notes:
    print(f"note: {note}")
  sets = " and ".join(f"{part} as {name}" if name else part for part, name in done.weights.items())
  print(
    f"{done.path}: {sets} of step {done.step:,}, {done.values / 1e6:,.2f} M parameters; the constructor's "
    f"arguments in {done.path.with_suffix('.json')}"
  )


def _to_ours(args):
  if args.step is not None:
    raise UserError(f"--step is for a run's folder, {args.source} is a file")
  if pathlib.Path(args.target).suffix in (".pth", ".pt", ".bin", ".safetensors"):
    raise UserError(f"{args.source} is a weight file, so the target must be a run's folder, not {args.target}")

  from aurora_jax.runs.progress import progress

  experiment, notes = _experiment(args)
  done = registry.converter(experiment.system).import_released(
    args.source, args.target, experiment, args.weights or "both", overwrite=args.overwrite, progress=progress
  )
  for note in (*notes, *done.notes):
    print(f"note: {note}")
  sets = ", ".join(f"{part} from {name or 'the state dict'}" for part, name in done.weights.items())
  folder = workdir.RunFolder(args.target)
  references.record(folder, references.of_experiment(folder.experiment()))
  print(f"{done.path}: {sets}, {done.values / 1e6:,.2f} M parameters")


def _experiment(args):
  """The experiment of the imported weights, and what was decided on the way."""
  default_json = pathlib.Path(args.source).with_suffix(".json")
  released = args.released_config
  if args.config_argv and released:
    raise UserError("--config and --released-config say the same: give one of them")
  if not args.config_argv and not released and not default_json.is_file():
    raise UserError(
      "which generator is it? --config configs/NAME.py, or --released-config FILE.json with the released "
      "constructor's keyword arguments"
    )
  notes = []
  if args.config_argv:
    experiment = config_files.load(args.config_argv)
    if args.clip:
      experiment = dataclasses.replace(experiment, text=config_lib.Text(clip=args.clip))
  else:
    path = pathlib.Path(released or default_json)
    experiment = _released_experiment(path, pathlib.Path(args.target).name, args.clip or "")
    if not released:
      notes.append(f"the generator is that of {path}")
  field = "generator.text_attention"  # of Aurora
  asked_for = any(flag.startswith(f"--config.{field}=") for flag in args.config_argv)
  if getattr(experiment.generator, "text_attention", "") == "scaled" and not asked_for:
    generator = dataclasses.replace(experiment.generator, text_attention="independent")
    experiment = dataclasses.replace(experiment, generator=generator)
    notes.append(
      f"{field} is 'independent', what the weights were trained for, instead of the config's 'scaled' "
      f"(--config.{field}=scaled keeps it)"
    )
  if experiment.conditional and not experiment.text.clip:
    notes.append("no CLIP is named, so nothing can be sampled yet: give --clip DIR, or set text.clip in config.json")
  return experiment, notes


def _released_experiment(path, name, clip):
  """The experiment of a released constructor's keyword arguments; which code's they are says their names."""
  try:
    kwargs = json.loads(text.read_text(path))
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f"{path} cannot be read as JSON: {error}") from error
  if not isinstance(kwargs, dict):
    raise UserError(f"{path} must hold an object of keyword arguments, not a {type(kwargs).__name__}")
  try:
    if "img_resolution" in kwargs.get("generator", kwargs):
      return registry.converter("stylegan_t").experiment_of_released(kwargs, name, clip)
    cfg = registry.released("aurora").config_from_released(kwargs)
  except (UserError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f"{path}: {error}") from error
  # The same for a batch of one, as the released scripts run it, and keeps the samples of a batch apart.
  cfg = dataclasses.replace(cfg, text_attention="independent")
  return registry.converter("aurora").experiment_of(cfg, name, clip)
