"""Walks from prompt to prompt: an animated GIF that goes forth and back, and a strip of all steps.

Linear steps on what the text head makes of the prompts, as the released script takes them. By default only the local
text tokens move, which the generator's cross-attention looks at; the global text stays the first prompt's. --global
moves that too, and with it w: the walk then ends at what the last prompt itself gives. (A small generator tells its
prompts apart by the global text most of all; there, use --global --psi 1.)
With --latent-walk the prompts stay and the latents move: from each of --latents to the next, along great circles of z.
Truncation is toward the global mean of w; --mean-latents 16 adds the pull toward the prompt's own mean that `sample`
has.

Examples:
  python -m aurora_jax interpolate --workdir runs/openmoji_32 --prompt "red heart" --prompt "green circle" --global \\
      --psi 1 --out walk.gif --strip walk.png
  python -m aurora_jax interpolate --workdir runs/aurora --prompt "a cat" --prompt "a dog" --out walk.gif
  python -m aurora_jax interpolate --workdir runs/aurora --prompt "a cat" --latent-walk --latents 4 --out walk.gif
"""

import argparse

from aurora_jax import text
from aurora_jax.cli import flag_types, sampling_flags
from aurora_jax.errors import UserError
from aurora_jax.evaluation import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument(
    "--prompt", action="append", default=[], metavar="TEXT", help="twice or more; with --latent-walk once or more"
  )
  parser.add_argument(
    "--out", type=flag_types.path, required=True, metavar="GIF", help="the animation to write, all rows side by side"
  )
  parser.add_argument(
    "--strip",
    type=flag_types.path,
    metavar="PNG",
    help="also write all steps side by side, a row per latent (with --latent-walk, per prompt)",
  )
  parser.add_argument(
    "--steps",
    type=int,
    default=9,
    metavar="N",
    help="images from a prompt (or latent) to the next, both ends counted (default 9)",
  )
  parser.add_argument("--global", dest="move_all", action="store_true", help="the global text moves too")
  parser.add_argument(
    "--latent-walk", action="store_true", help="the latents move instead; one --prompt or more, each with the same walk"
  )
  parser.add_argument("--psi", help="truncation, 0 to 1 for none (default 0.2; with --latent-walk 1)")
  parser.add_argument(
    "--milliseconds", type=int, default=120, metavar="MS", help="a step is shown so long (default 120)"
  )
  sampling_flags.add_arguments(parser, latents=3, mean_latents=0, most_latents=12)


def run(args: argparse.Namespace) -> None:
  """Interpolates and writes the animation."""
  if not args.latent_walk and len(args.prompt) < 2:
    raise UserError(f"an interpolation needs at least two --prompt TEXT, got {len(args.prompt)}")
  if args.latent_walk and args.move_all:
    raise UserError("--global is for a walk between prompts: with --latent-walk the text stays")
  for flag, value, least, most in (("steps", args.steps, 2, 1000), ("milliseconds", args.milliseconds, 20, 10_000)):
    if not least <= value <= most:
      raise UserError(f"--{flag} must lie between {least} and {most}, got {value}")
  if args.latent_walk and args.latents == 1:
    raise UserError("--latent-walk needs --latents of 2 or more, got 1")
  if args.psi is None:
    args.psi = "1" if args.latent_walk else "0.2"
  sweep = sampling_flags.read_psi(args.psi)
  if len(sweep) > 1:
    raise UserError(f"--psi {args.psi}: an interpolation has one truncation")
  if args.latent_walk:
    prompts = sampling_flags.fitting_prompts(args.prompt, args.workdir, "--prompt TEXT")
  else:
    prompts = args.prompt
    arguments.check_prompts(prompts)

  from aurora_jax.reporting import animation, image_sheets

  image_sheets.check_place(args.out, ".gif")
  if args.strip:
    image_sheets.check_place(args.strip, ".png")
  arrays = sampling_flags.check(args)

  from aurora_jax.runs.progress import progress

  texts = len(prompts) if args.latent_walk else (len(prompts) - 1) * (args.steps - 1) + 1
  model, latents = sampling_flags.prepare(args, arrays, 1, texts)
  with progress(f"interpolating at step {model.step:,}") as update:
    options = {"steps": args.steps, "psi": sweep[0], "on_batch": update}
    if args.latent_walk:
      images, rows, stops = model.between_latents(prompts, latents, **options), "prompts", latents.latents
      said = "; ".join(prompt for prompt in prompts if prompt)
      headers = [f"{said}, latent {number}" if said else f"latent {number}" for number in range(stops)]
    else:
      images, rows = model.interpolate(prompts, latents, move_all=args.move_all, **options), "latents"
      headers = prompts
  path = animation.save_gif(animation.frames(images, headers), len(headers), args.out, args.milliseconds)
  sampling_flags.save_latents(args, latents)
  written = [path, image_sheets.save_png(animation.strip(images, headers), args.strip)] if args.strip else [path]
  print(
    f"{', '.join(text.printable(text.path_text(path)) for path in written)}: {images.shape[1]} steps, "
    f"{images.shape[0]} {rows}, psi {args.psi}, step {model.step:,}"
  )
