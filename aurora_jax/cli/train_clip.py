"""Trains a small CLIP on a data set: two networks that give a image and its caption the same vector.

The generator reads its prompts through such a CLIP and learns from its judgement; another one, trained with another
seed, measures how well images fit their captions. It takes the place of OpenAI's CLIP where nothing can be
downloaded: about a minute on two CPU cores for the 1,900 images of OpenMoji.

The result is a folder in Hugging Face's format: `--config.text.clip=DIR` of `train` takes it, and so does
`transformers.CLIPModel.from_pretrained(DIR)`.

Examples:
  python -m aurora_jax build-data --source openmoji --out datasets/openmoji --resolution 64
  python -m aurora_jax train-clip --data datasets/openmoji --out clips/conditioner --seconds 60
  python -m aurora_jax train-clip --data datasets/openmoji --out clips/judge --split all --seed 1 --seconds 60
"""

import argparse
import dataclasses
import time

from aurora_jax import text, xla_flags
from aurora_jax.cli import flag_types

# Measured on at most so many images and captions of a split: enough for three digits.
_MEASURED = 4096
_DEFAULT_SECONDS = 60.0
# Those of `training.clip.ClipTraining`, which imports JAX: (flag, type, default, help).
SETTINGS = (
  ("resolution", int, 32, "side of the images in pixels; images of other sizes are resized to it later on"),
  ("patch", int, 8, "side of the patches that the image tower sees"),
  ("image_width", int, 128, "width of the image tower"),
  ("image_layers", int, 2, "its layers"),
  ("text_width", int, 128, "width of the text tower, that of the text features"),
  ("text_layers", int, 2, "its layers"),
  ("heads", int, 4, "attention heads of both"),
  ("embedding_width", int, 128, "width of the common vectors"),
  ("vocabulary_size", int, 3000, "entries of the tokenizer, which is learnt from the captions"),
  ("batch_size", int, 256, "pairs per step"),
  ("learning_rate", float, 6e-3, "at its peak"),
  ("weight_decay", float, 0.1, "of the matrices"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument(
    "--data", type=flag_types.path, required=True, metavar="DIR", help="a data set made by build-data"
  )
  parser.add_argument("--out", type=flag_types.path, required=True, metavar="DIR", help="the folder to write")
  parser.add_argument("--overwrite", action="store_true", help="replace what stands at --out")
  parser.add_argument(
    "--split",
    choices=("train", "all"),
    default="train",
    help="learn from the training images, or from the held-out ones too (for a judge)",
  )
  length = parser.add_mutually_exclusive_group()
  length.add_argument(
    "--seconds",
    type=float,
    metavar="S",
    help=f"how long to train, compilation included (default {_DEFAULT_SECONDS:g}); the number of "
    "steps that fits is measured and printed, and --steps with it gives the same weights again",
  )
  length.add_argument("--steps", type=int, metavar="N", help="how many steps to train, instead of --seconds")
  parser.add_argument("--seed", type=flag_types.seed, default=0, help="of weights, order and augmentation (default 0)")
  recipe = parser.add_argument_group("sizes and recipe (the defaults suit a few thousand images)")
  for name, kind, default, description in SETTINGS:
    recipe.add_argument(
      f"--{name.replace('_', '-')}",
      type=kind,
      default=default,
      metavar="N" if kind is int else "X",
      help=f"{description} (default {default:g})",
    )
  recipe.add_argument(
    "--context-length",
    type=int,
    metavar="N",
    help="tokens per caption, begin and end included (default: what the captions need)",
  )


def run(args: argparse.Namespace) -> None:
  """Trains, measures and writes the CLIP."""
  xla_flags.compile_quickly()
  from aurora_jax.interop import clip_hf

  clip_hf.check_writable(args.out, overwrite=args.overwrite)

  from aurora_jax.training import clip

  splits = _open_splits(args.data)
  dataset = clip.Joined(*splits.values()) if args.split == "all" else splits["train"]
  fields = {field.name for field in dataclasses.fields(clip.ClipTraining)}
  settings = clip.ClipTraining(**{name: value for name, value in vars(args).items() if name in fields})
  seconds = _DEFAULT_SECONDS if args.steps is None and args.seconds is None else args.seconds
  started = time.monotonic()
  bundle, steps = _train(dataset, settings, args.steps, seconds)
  figures = _measure(bundle, splits, settings.resolution)
  notes = {"data": str(dataset.name), "split": args.split, "steps": steps, "seconds": time.monotonic() - started}
  clip_hf.save(
    args.out,
    bundle,
    overwrite=args.overwrite,
    notes=notes | {"settings": dataclasses.asdict(settings), "figures": figures},
  )
  shown = text.printable(text.path_text(args.out))
  print(f"{shown}: {steps} steps in {time.monotonic() - started:.0f} s (--steps {steps} gives the same again)")


def _open_splits(path):
  """{"train": Dataset} and, where there is one, "heldout"."""
  from aurora_jax.data.dataset import Dataset, read_manifest

  splits = {"train": Dataset.open(path, "train")}
  if "heldout" in read_manifest(path)["splits"]:
    splits["heldout"] = Dataset.open(path, "heldout")
  return splits


def _train(dataset, settings, steps, seconds):
  """`clip.train_clip` behind a progress display. Returns what it returns."""
  from aurora_jax.runs import progress
  from aurora_jax.training import clip

  with progress.training(description="train-clip") as display:

    def on_step(step, total, metrics):
      detail = f"loss {metrics['loss']:.3f}, right caption of {settings.batch_size}: {metrics['accuracy']:.1%}"
      if total:
        display.update(step, total, detail)
      else:  # how many steps fit into the time is not known yet
        display.status(f"step {step}: {detail}", brief=True)

    return clip.train_clip(dataset, settings, steps=steps, seconds=seconds, on_step=on_step)


def _measure(bundle, splits, resolution):
  """Prints and returns how often a real image finds its caption, per split, among the captions of all splits."""
  import numpy as np

  from aurora_jax.data import loader
  from aurora_jax.evaluation import judge

  judging = judge.from_clip(bundle)
  numbers = {name: np.unique(np.linspace(0, len(split) - 1, _MEASURED).astype(int)) for name, split in splits.items()}
  captions = [splits[name].captions()[number][0] for name in splits for number in numbers[name]]
  figures, start = {}, 0
  for name, split in splits.items():
    images = loader.to_float(loader.load_images(split, resolution, numbers[name]))
    result = judging.retrieval(images, np.arange(start, start + len(images)), captions)
    start += len(images)
    print(
      f"real images, {name}: the right caption first among {result.few}: {result.top1_of_few:.1%}, "
      f"among all {result.captions}: {result.top1_of_all:.1%}"
    )
    figures[name] = {
      "of_few": result.top1_of_few,
      "few": result.few,
      "of_all": result.top1_of_all,
      "all": result.captions,
    }
  return figures
