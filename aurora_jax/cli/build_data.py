"""Makes a data set: images with captions, from a source to sharded tfrecords with index and manifest.

Sources:
  openmoji   about 1,900 emoji images with their English names ("red heart", "grinning face"), from Python
             packages that are installed with this program: nothing is downloaded.
  folder     your own images: NAME.png (or .jpg, .webp, .tif, .avif ...) next to NAME.txt (or NAME.png.txt), which
             holds one caption per line in UTF-8, the first one being the main caption. Subfolders are searched too,
             also linked ones. Images are cut to their centre square, colors converted to sRGB. What cannot be
             read, or has no caption, is left out; every file is counted, and manifest.json says why.

About 8 % of the images are held out (split "heldout"), chosen by main caption: every word of a held-out caption
occurs in training, the combination of words does not. Captions of one word always stay in training. In scripts without
spaces (Chinese, Japanese, Thai ...) each character counts as a word.

Build at twice the resolution that you train at if you want smooth augmentation (shifts, rotations): the loader reduces.

Examples:
  python -m aurora_jax build-data --source openmoji --out datasets/openmoji --resolution 64 --shards 8
  python -m aurora_jax build-data --source folder --path my_images --out datasets/mine --resolution 64
"""

import argparse
import time

from aurora_jax import text
from aurora_jax.cli import flag_types
from aurora_jax.errors import UserError

_REJECTED_SHOWN, _LEFT_OUT_SHOWN = 10, 3
_NAME_SHOWN, _REASON_SHOWN = 100, 200
SKIN_TONES = ("named", "unnamed")  # those of data/sources.py, which takes a while to import


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--source", required=True, choices=("openmoji", "folder"), help="where the pairs come from")
  parser.add_argument("--out", type=flag_types.path, required=True, metavar="DIR", help="the data set folder to make")
  parser.add_argument(
    "--resolution", type=int, default=64, metavar="R", help="side of the stored images in pixels (default 64)"
  )
  parser.add_argument("--shards", type=int, default=8, metavar="N", help="number of training files (default 8)")
  parser.add_argument("--path", type=flag_types.path, metavar="DIR", help="source folder: the folder with your images")
  parser.add_argument(
    "--skin-tones",
    choices=SKIN_TONES,
    help="source openmoji: also the variants in skin tones, named (thumbs up dark skin tone; about 3,950 "
    "images in all) or as further images of the same caption (thumbs up; about 3,570)",
  )
  parser.add_argument(
    "--no-aliases",
    dest="aliases",
    action="store_false",
    help="source openmoji: only the main caption of each image, no alias names",
  )
  parser.add_argument(
    "--heldout",
    type=float,
    default=0.08,
    metavar="FRACTION",
    help="share of the images to hold out, 0 for none (default 0.08)",
  )
  parser.add_argument(
    "--seed", type=flag_types.long_seed, default=0, help="of the held-out choice and the order (default 0)"
  )
  parser.add_argument("--name", help="the data set's name, as in its file names (default: the source's)")
  parser.add_argument("--overwrite", action="store_true", help="replace a data set that stands at --out")


def run(args: argparse.Namespace) -> None:
  """Builds the data set and prints what became of the source's files."""
  from aurora_jax.data import build
  from aurora_jax.runs.progress import progress

  started = time.monotonic()
  build.check_out(args.out, args.overwrite)
  source = _source(args)
  with progress(f"{args.source}: images") as on_progress:
    manifest = build.build(
      source,
      args.out,
      resolution=args.resolution,
      shards=args.shards,
      heldout_fraction=args.heldout,
      seed=args.seed,
      name=args.name,
      overwrite=args.overwrite,
      on_progress=on_progress,
    )
  for line in _summary(manifest):
    print(line)
  print(f"{text.printable(text.path_text(args.out))}: written in {time.monotonic() - started:.1f} s")


def _source(args):
  """The source that the flags name; UserError for flags of another one."""
  from aurora_jax.data import sources

  if args.source == "openmoji":
    if args.path is not None:
      raise UserError(f"--path {args.path} is for --source folder; openmoji comes from installed packages")
    return sources.openmoji(skin_tones=args.skin_tones, aliases=args.aliases)
  if args.path is None:
    raise UserError("--source folder needs --path DIR, the folder with your images")
  if args.skin_tones or not args.aliases:
    raise UserError(
      f"{f'--skin-tones {args.skin_tones}' if args.skin_tones else '--no-aliases'} is for --source openmoji"
    )
  return sources.folder(args.path)


def _summary(manifest):
  """Lines that say what was written and what was not."""
  splits = manifest["splits"]
  for split, entry in splits.items():
    files = len(entry["shards"])
    yield (
      f"{split}: {entry['examples']} images, {entry['captions']} image-text pairs, "
      f"{files} file{'' if files == 1 else 's'}"
    )
  yield from _warnings(manifest)
  rejected = manifest["rejected"]
  if rejected["count"]:
    yield f"rejected: {rejected['count']} (listed in manifest.json)"
    yield from _listed(rejected, _REJECTED_SHOWN)
  else:
    yield "rejected: none"
  if "files" in manifest:
    yield from _files(manifest["files"])


def _warnings(manifest):
  """What is written and may surprise."""
  splits = manifest["splits"]
  held = splits.get("heldout", {"examples": 0})["examples"]
  examples = held + splits["train"]["examples"]
  wanted = round(manifest["heldout_fraction"] * examples)
  if manifest["distinct_captions"] == 1 < examples:
    yield f"all {examples} images have the same main caption: a prompt will have nothing to choose"
  elif held < wanted:
    yield f"held out {held} of the {wanted} images asked for: the captions share too few words for more"
  if "enlarged" in manifest:
    count, (width, height) = manifest["enlarged"]["count"], manifest["enlarged"]["smallest"]
    yield (
      f"enlarged: {count} image{'' if count == 1 else 's'} of less than {manifest['resolution']} pixels, the smallest "
      f"{width}x{height} ({text.printable(manifest['enlarged']['key'], _NAME_SHOWN)})"
    )


def _files(files):
  """What became of the files that the source saw."""
  yield f"files seen: {files['seen']}"
  for what, count in files["counts"].items():
    yield f"  {what}: {count}"
  left_out = files["captions_left_out"]
  if left_out["count"]:
    yield f"captions left out: {left_out['count']} (listed in manifest.json)"
    yield from _listed(left_out, _LEFT_OUT_SHOWN)
  if files["passed_over"]["count"]:
    yield f"passed over: {files['passed_over']['count']} (listed in manifest.json)"
    yield from _listed(files["passed_over"], _LEFT_OUT_SHOWN)


def _listed(group, shown):
  for entry in group["listed"][:shown]:
    yield f"  {text.printable(entry['key'], _NAME_SHOWN)}: {text.printable(entry['reason'], _REASON_SHOWN)}"
  if group["count"] > shown:
    yield f"  ... and {group['count'] - shown} more"
