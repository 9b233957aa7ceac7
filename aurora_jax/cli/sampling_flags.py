"""What `sample` and `interpolate` have in common: which run, which prompts, which latents."""

import pathlib

from aurora_jax import xla_flags
from aurora_jax.errors import UserError

_MOST_MEAN_LATENTS = 10_000
_MOST_AT_ONCE = 4096
_MOST_TEXTS = 32


def add_arguments(parser, *, latents, mean_latents, most_latents):
  """Adds the flags; `latents` and `mean_latents` are the command's defaults, `most_latents` what it can show."""
  parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder, as of `train` or `convert`")
  parser.add_argument("--step", type=int, metavar="S", help="of the checkpoint (default: the newest)")
  parser.add_argument(
    "--clip", metavar="DIR", help="the CLIP folder that reads the prompts (default: the one in the run's config)"
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the weights and the arithmetic; bfloat16 takes half the memory (default float32)",
  )
  parser.add_argument("--batch-size", type=int, metavar="N", help="pictures at once (default: by the generator's size)")
  parser.add_argument("--latents", type=int, metavar="N", help=f"pictures per prompt (default {latents})")
  parser.add_argument(
    "--mean-latents",
    type=int,
    metavar="N",
    help=f"latents of a prompt's mean, 0 for no pull toward it (default {mean_latents})",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the latents (default 0)")
  parser.add_argument(
    "--latents-file",
    metavar="FILE",
    help=".npz or .safetensors with the latents: z [L, Z] for every prompt or [P, L, Z], and, if you "
    "like, mean_z [M, Z] or [P, M, Z], those of the prompt's mean",
  )
  parser.add_argument("--save-latents", metavar="FILE", help="write the latents that were used, in the same form")
  parser.set_defaults(default_latents=latents, default_mean_latents=mean_latents, most_latents=most_latents)


def read_prompts(args):
  """The prompts of --prompt and then of --prompts FILE; UserError if there are none or one is no prompt."""
  prompts = list(args.prompt)
  if args.prompts:
    try:
      lines = pathlib.Path(args.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"prompt file {args.prompts} cannot be read: {error}") from error
    prompts += [line.strip() for line in lines if line.strip()]
  if not prompts:
    raise UserError("no prompt: --prompt TEXT or --prompts FILE")
  check_prompts(prompts)
  return prompts


def check_prompts(prompts):
  from aurora_jax.evaluation import trained_generator

  trained_generator.check_prompts(prompts)


def read_psi(text, flag="--psi"):
  """One truncation or several, "0.5" or "0,0.1,0.2", as a list of different floats in [0, 1]."""
  from aurora_jax.evaluation import sampling

  values = []
  for part in text.split(","):
    try:
      value = float(part)
    except ValueError as error:
      raise UserError(f"{flag} {text}: '{part}' is no number") from error
    sampling.check_psi(value)
    if value in values:
      raise UserError(f"{flag} {text}: {part} stands there twice")
    values.append(value)
  return values


def prepare(args, prompts, texts, truncations=1):
  """Reads latents and model.

  Args:
    args: parsed flags.
    prompts: number of prompts that need latents of their own.
    texts: number of texts, interpolated ones among them, that are drawn with every latent.
    truncations: values of psi that each of them is drawn with.

  Returns:
    (`trained.Trained`, `latents.Latents` of the prompts).

  Raises:
    UserError: wrong input.
  """
  xla_flags.run_in_order()  # for the memory of large generators
  from aurora_jax.evaluation import latents, trained_generator
  from aurora_jax.reporting import image_sheets
  from aurora_jax.runs import workdir

  for flag, least, most in (
    ("latents", 1, args.most_latents),
    ("batch_size", 1, _MOST_AT_ONCE),
    ("mean_latents", 0, _MOST_MEAN_LATENTS),
  ):
    value = getattr(args, flag)
    if value is not None and not least <= value <= most:
      raise UserError(f"--{flag.replace('_', '-')} must lie between {least} and {most:,}, got {value}")
  if args.save_latents:
    latents.check_name(args.save_latents)
    image_sheets.check_place(args.save_latents, pathlib.Path(args.save_latents).suffix.lower())
  arrays = latents.load(args.latents_file) if args.latents_file else None
  width = workdir.RunFolder(args.workdir).experiment().generator.z_dim
  if arrays is not None:
    given = latents.fit(
      arrays,
      args.latents_file,
      prompts,
      width,
      mean_latents=args.mean_latents,
      otherwise=args.default_mean_latents,
      seed=args.seed,
    )
    found = given.z.shape[1]
    if args.latents not in (None, found) or found > args.most_latents:
      raise UserError(
        f"{args.latents_file}: it has {found} latents per prompt, not {args.latents or f'at most {args.most_latents}'}"
      )
  else:
    count = args.default_latents if args.latents is None else args.latents
    means = args.default_mean_latents if args.mean_latents is None else args.mean_latents
    given = latents.draw(args.seed, range(prompts), count, means, width)
  # No more pictures and texts at once than there are: the rest would be idle work.
  model = trained_generator.load(
    args.workdir,
    args.step,
    args.batch_size,
    pictures=texts * given.z.shape[1] * truncations,
    prompts_at_once=min(_MOST_TEXTS, texts),
    clip=args.clip,
    dtype=args.dtype,
  )
  return model, given


def save_latents(args, given):
  """Writes --save-latents, if it was asked for."""
  if args.save_latents:
    from aurora_jax.evaluation import latents

    latents.save(given, args.save_latents)
