"""What `sample` and `interpolate` have in common: which run, which prompts, which latents."""

import argparse
import pathlib
from typing import TYPE_CHECKING

from aurora_jax import storage, text, xla_flags
from aurora_jax.cli import flag_types
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.evaluation import arguments
from aurora_jax.runs import references, workdir
from aurora_jax.systems.model_folder import ModelFolder

if TYPE_CHECKING:
  import numpy as np

  from aurora_jax.evaluation.latents import Latents
  from aurora_jax.evaluation.trained_generator import TrainedGenerator

_MOST_MEAN_LATENTS = 10_000
_MOST_AT_ONCE = 4096
_MOST_TEXTS = 32


def add_arguments(parser: argparse.ArgumentParser, *, latents: int, mean_latents: int, most_latents: int) -> None:
  """Adds the flags; `latents` and `mean_latents` are the command's defaults, `most_latents` what it can show."""
  parser.add_argument(
    "--workdir",
    type=flag_types.path,
    required=True,
    metavar="DIR",
    help="the run's folder, as of `train` or `convert`; or a folder of `export`, or hf:OWNER/NAME on the Hub",
  )
  parser.add_argument("--step", type=int, metavar="S", help="of the checkpoint (default: the newest)")
  parser.add_argument(
    "--clip",
    type=flag_types.path,
    metavar="DIR",
    help="the CLIP folder that reads the prompts (default: the one in the run's config)",
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the weights and the arithmetic; bfloat16 takes half the memory (default float32)",
  )
  parser.add_argument("--batch-size", type=int, metavar="N", help="images at once (default: by the generator's size)")
  parser.add_argument("--latents", type=int, metavar="N", help=f"images per prompt (default {latents})")
  parser.add_argument(
    "--mean-latents",
    type=int,
    metavar="N",
    help=f"latents of a prompt's mean, 0 for no pull toward it (default {mean_latents})",
  )
  parser.add_argument("--seed", type=flag_types.seed, default=0, help="of the latents (default 0)")
  parser.add_argument(
    "--latents-file",
    type=flag_types.path,
    metavar="FILE",
    help=".npz or .safetensors with the latents: z [L, Z] for every prompt or [P, L, Z], and, if you "
    "like, mean_z [M, Z] or [P, M, Z], those of the prompt's mean",
  )
  add_change_flag(parser)
  parser.add_argument(
    "--save-latents", type=flag_types.path, metavar="FILE", help="write the latents that were used, in the same form"
  )
  parser.set_defaults(default_latents=latents, default_mean_latents=mean_latents, most_latents=most_latents)


def add_change_flag(parser: argparse.ArgumentParser) -> None:
  """Adds the flag of `check_references`."""
  parser.add_argument(
    references.FLAG,
    action="append",
    default=[],
    metavar="FIELD",
    help="go on although what this field names (text.clip) is no longer what the run was trained with; may be given "
    "several times",
  )


def read_prompts(args: argparse.Namespace) -> list[str]:
  """The prompts of --prompt and then of --prompts FILE; [""] for a run of an unconditional system.

  Raises:
    UserError: none where the run needs some, some where it takes none, or one that is no prompt.
  """
  prompts = list(args.prompt)
  if args.prompts:
    prompts += [line.strip() for line in text.lines(text.read_text(args.prompts)) if line.strip()]
  return fitting_prompts(prompts, args.workdir, "--prompt TEXT or --prompts FILE")


def fitting_prompts(prompts: list[str], workdir: str, flags: str) -> list[str]:
  """The prompts if the run takes them; [""] for a run of an unconditional system.

  Args:
    prompts: what the user gave.
    workdir: the run's folder.
    flags: that give prompts, for the message.

  Raises:
    UserError: as of `read_prompts`.
  """
  arguments.check_prompts(prompts)
  experiment = ModelFolder.open(workdir).experiment
  if experiment.conditional and not prompts:
    raise UserError(f"no prompt: {flags}")
  if not experiment.conditional and prompts:
    raise UserError(f"{workdir} is a run of '{experiment.system}', which takes no prompts")
  return prompts or [""]


def read_psi(values_text: str, flag: str = "--psi") -> list[float]:
  """One truncation or several, "0.5" or "0,0.1,0.2", as a list of different floats in [0, 1]."""
  values = []
  for part in values_text.split(","):
    try:
      value = float(part)
    except ValueError as error:
      raise UserError(f"{flag} {values_text}: '{part}' is no number") from error
    arguments.check_psi(value)
    if value in values:
      raise UserError(f"{flag} {values_text}: {part} stands there twice")
    values.append(value)
  return values


def check(args: argparse.Namespace) -> "dict[str, np.ndarray] | None":
  """Checks flags and the run's folder before JAX is imported.

  Returns:
    The arrays of --latents-file, None without it.

  Raises:
    UserError: wrong input.
  """
  for flag, least, most in (
    ("latents", 1, args.most_latents),
    ("batch_size", 1, _MOST_AT_ONCE),
    ("mean_latents", 0, _MOST_MEAN_LATENTS),
  ):
    value = getattr(args, flag)
    if value is not None and not least <= value <= most:
      raise UserError(f"--{flag.replace('_', '-')} must lie between {least} and {most:,}, got {value}")
  folder = ModelFolder.open(args.workdir)
  experiment = folder.experiment
  folder.check_step(args.step)
  if args.clip is None:
    check_references(folder.run, experiment, args.allow_config_change)
  elif not storage.is_url(args.clip) and not pathlib.Path(args.clip).is_dir():
    raise UserError(f"no CLIP folder at {args.clip}")

  from aurora_jax.evaluation import latents_files
  from aurora_jax.reporting import image_sheets

  if args.save_latents:
    latents_files.check_name(args.save_latents)
    image_sheets.check_place(args.save_latents, pathlib.Path(args.save_latents).suffix.lower())
  return latents_files.load(args.latents_file) if args.latents_file else None


def check_references(
  folder: workdir.RunFolder, experiment: Experiment, allowed: list[str], groups: tuple[str, ...] | None = None
) -> None:
  """Refuses weights that are not those that the run was trained with, unless they are allowed.

  Args:
    folder: the run's.
    experiment: its configuration.
    allowed: names of fields or groups.
    groups: groups of fields to check; None: all that images depend on.
  """
  if groups is None:  # data set and schedule matter to training alone
    groups = tuple(name for name in vars(experiment) if name not in ("data", "schedule", "train"))
  references.refuse_changes(folder, references.of_experiment(experiment, groups), allowed)


def prepare(
  args: argparse.Namespace, arrays: "dict[str, np.ndarray] | None", prompts: int, texts: int, truncations: int = 1
) -> "tuple[TrainedGenerator, Latents]":
  """Reads the model and draws latents, or takes those of a file.

  Args:
    args: parsed flags.
    arrays: of `check`.
    prompts: number of prompts that need latents of their own.
    texts: number of texts, interpolated ones among them, that are drawn with every latent.
    truncations: number of values of psi.

  Returns:
    (the generator, latents of the prompts).

  Raises:
    UserError: wrong input.
  """
  xla_flags.run_in_order()  # for the memory of large generators
  from aurora_jax.evaluation import latents, trained_generator
  from aurora_jax.systems import registry

  experiment = ModelFolder.open(args.workdir).experiment
  draw_one = registry.system_class(experiment.system)(experiment).draw_latents
  if arrays is not None:
    values = latents.fit(
      arrays,
      args.latents_file,
      prompts,
      draw_one,
      mean_latents=args.mean_latents,
      otherwise=args.default_mean_latents,
      seed=args.seed,
    )
    if args.latents not in (None, values.latents) or values.latents > args.most_latents:
      wanted = args.latents or f"at most {args.most_latents}"
      raise UserError(f"{args.latents_file}: it has {values.latents} latents per prompt, not {wanted}")
  else:
    count = args.default_latents if args.latents is None else args.latents
    means = args.default_mean_latents if args.mean_latents is None else args.mean_latents
    values = latents.draw(draw_one, args.seed, range(prompts), count, means)
  # No more images and texts at once than there are: the rest would be idle work.
  model = trained_generator.load(
    args.workdir,
    args.step,
    args.batch_size,
    images=texts * values.latents * truncations,
    prompts_at_once=min(_MOST_TEXTS, texts),
    clip=args.clip,
    dtype=args.dtype,
  )
  return model, values


def save_latents(args: argparse.Namespace, values: "Latents") -> None:
  """Writes --save-latents, if it was asked for."""
  if args.save_latents:
    from aurora_jax.evaluation import latents

    latents.save(values, args.save_latents)
