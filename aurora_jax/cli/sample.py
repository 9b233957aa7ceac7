"""Turns prompts into images: one PNG sheet, a row per prompt, a column per latent.

The generator's averaged (EMA) weights are used. --psi is the truncation, as the released script has it: w is drawn
toward the global mean of w and then, by the same factor, toward the prompt's own mean over 16 latents. 1 is not at all
(most variety), 0 entirely: the typical image of its prompt. Several values make a sheet with a row per prompt and
latent and a column per value; the released sweep is 0,0.05,0.1,0.15,0.2.

The same seed gives the same images. --save-latents writes the latents into a file, and --latents-file reads one: the
released PyTorch scripts give the same image for the same latents.

Examples:
  python -m aurora_jax sample --workdir runs/openmoji_32 --prompt "red heart" --prompt "cat face" --out sheet.png
  python -m aurora_jax sample --workdir runs/openmoji_32 --prompts prompts.txt --psi 0.2,0.5,1 --out sweep.png
"""

import argparse
import itertools
import pathlib

from aurora_jax import files, text
from aurora_jax.cli import flag_types, sampling_flags
from aurora_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
  parser.add_argument("--prompts", type=flag_types.path, metavar="FILE", help="a text file with one prompt per line")
  parser.add_argument("--out", type=flag_types.path, required=True, metavar="PNG", help="the sheet to write")
  parser.add_argument(
    "--singles",
    type=flag_types.path,
    metavar="DIR",
    help="also write every image by itself into this folder: PROMPT-LATENT-psiPSI.png",
  )
  parser.add_argument("--psi", default="1", metavar="PSI[,PSI...]", help="truncation, 0 to 1 (default 1: none)")
  parser.add_argument("--columns", type=int, default=0, metavar="N", help="prompts side by side in a sheet of one psi")
  sampling_flags.add_arguments(parser, latents=4, mean_latents=16, most_latents=1000)


def run(args: argparse.Namespace) -> None:
  """Samples and writes the sheet."""
  sweep = sampling_flags.read_psi(args.psi)
  prompts = sampling_flags.read_prompts(args)
  if args.columns < 0:
    raise UserError(f"--columns must not be negative, got {args.columns}")

  from aurora_jax.reporting import image_sheets

  image_sheets.check_place(args.out, ".png")
  if args.singles:
    files.check_folder(args.singles)
  arrays = sampling_flags.check(args)

  from aurora_jax.evaluation import sampling
  from aurora_jax.runs.progress import progress

  model, latents = sampling_flags.prepare(args, arrays, len(prompts), len(prompts), len(sweep))
  side = model.experiment.resolution
  with progress(f"sampling at step {model.step:,}") as update:
    samples = model.sample(prompts, latents=latents, psi=sweep, choices=True, on_batch=update)
  images = samples.images
  if len(sweep) == 1:
    makers, count = sampling.makers(model.system, samples)
    sheet = image_sheets.sample_sheet(images[:, :, 0], prompts, makers, count, columns=args.columns)
  else:
    sheet = image_sheets.captioned_table(images, prompts, [f"psi {psi:.10g}" for psi in sweep])
  path = image_sheets.save_png(sheet, args.out)
  if args.singles:
    for p, latent, k in itertools.product(*map(range, images.shape[:3])):
      name = f"{p:04d}-{latent:02d}-psi{sweep[k]:.10g}.png"
      image_sheets.save_png(image_sheets.to_pil(images[p, latent, k]), pathlib.Path(args.singles) / name)
  sampling_flags.save_latents(args, latents)
  what = f"{len(prompts)} prompts, {images.shape[1]} latents each" if any(prompts) else f"{images.shape[1]} images"
  print(f"{text.printable(text.path_text(path))}: {what}, {side}x{side} pixels, psi {args.psi}, step {model.step:,}")
