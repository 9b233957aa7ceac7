"""Turns prompts into pictures: one PNG grid, a row per prompt, a column per latent.

Example:
  python -m aurora_jax sample --workdir runs/openmoji_32 --prompt "red heart" --prompt "cat face" --out grid.png

The generator's averaged (EMA) weights are used. --psi pulls every picture toward the typical one for its prompt: 1 not at
all (most variety), 0 entirely. The same seed gives the same pictures.
"""

import pathlib

from aurora_jax.errors import UserError


def add_arguments(parser):
  parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder, as of `train`")
  parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
  parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line")
  parser.add_argument("--out", required=True, metavar="PNG", help="the grid to write")
  parser.add_argument("--singles", metavar="DIR", help="also write every picture by itself into this folder")
  parser.add_argument("--latents", type=int, default=4, metavar="N", help="pictures per prompt (default 4)")
  parser.add_argument("--psi", type=float, default=1.0, help="truncation, 0 to 1 (default 1: none)")
  parser.add_argument("--seed", type=int, default=0, help="of the latents (default 0)")
  parser.add_argument("--step", type=int, metavar="S", help="of the checkpoint (default: the newest)")
  parser.add_argument("--columns", type=int, default=0, metavar="N", help="prompts side by side in the grid")


def run(args):
  prompts = list(args.prompt)
  if args.prompts:
    try:
      lines = pathlib.Path(args.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"prompt file {args.prompts} cannot be read: {error}") from error
    prompts += [line.strip() for line in lines if line.strip()]
  if not prompts:
    raise UserError("no prompt: --prompt TEXT or --prompts FILE")
  if pathlib.Path(args.out).suffix.lower() != ".png":
    raise UserError(f"--out must end in .png, got {args.out}")

  from aurora_jax.cli.progress import progress  # pylint: disable=g-import-not-at-top
  from aurora_jax.evaluation import pictures, trained  # pylint: disable=g-import-not-at-top

  trained.check_prompts(prompts)
  model = trained.load(args.workdir, args.step, batch_size=min(32, max(1, len(prompts) * args.latents)))
  with progress(f"sampling at step {model.step:,}") as update:
    samples = model.sample(prompts, latents=args.latents, seed=args.seed, psi=args.psi, on_batch=update)
  columns = args.columns or (2 if len(prompts) > 6 else 1)
  path = pictures.save_png(pictures.captioned_rows(samples.images, prompts, columns=columns), args.out)
  if args.singles:
    for p, row in enumerate(samples.images):
      for latent, image in enumerate(row):
        pictures.save_png(pictures.to_picture(image), pathlib.Path(args.singles) / f"{p:04d}-{latent:02d}.png")
  print(f"{path}: {len(prompts)} prompts, {args.latents} pictures each, step {model.step:,}")
