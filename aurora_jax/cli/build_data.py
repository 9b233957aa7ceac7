"""Makes a data set: pictures with captions, from a source to sharded tfrecords with index and manifest.

Sources:
  openmoji   about 1,900 emoji pictures with their English names ("red heart", "grinning face"), from Python
             packages that are installed with this program: nothing is downloaded.
  folder     your own pictures: NAME.png (or .jpg, .jpeg, .webp, .bmp, .gif) beside NAME.txt, which holds one caption
             per line, the first one being the main caption. Subfolders are searched too. Pictures are cut to their
             centre square. What cannot be read, or has no caption, is left out, counted and listed in manifest.json.

About 8 % of the pictures are held out (split "heldout"), chosen by main caption: every word of a held-out caption
occurs in training, the combination of words does not. Captions of one word always stay in training.

Build at twice the resolution that you train at if you want smooth augmentation (shifts, rotations): the loader reduces.

Examples:
  python -m aurora_jax build-data --source openmoji --out datasets/openmoji --resolution 64 --shards 8
  python -m aurora_jax build-data --source folder --path my_pictures --out datasets/mine --resolution 64
"""

import time

from aurora_jax.cli.progress import progress
from aurora_jax.data import build, sources
from aurora_jax.errors import UserError

_REJECTED_SHOWN = 10


def add_arguments(parser):
  parser.add_argument("--source", required=True, choices=("openmoji", "folder"), help="where the pairs come from")
  parser.add_argument("--out", required=True, metavar="DIR", help="the data set folder to make")
  parser.add_argument(
    "--resolution", type=int, default=64, metavar="R", help="side of the stored pictures in pixels (default 64)"
  )
  parser.add_argument("--shards", type=int, default=8, metavar="N", help="number of training files (default 8)")
  parser.add_argument("--path", metavar="DIR", help="source folder: the folder with your pictures")
  parser.add_argument(
    "--skin-tones",
    choices=(sources.NAMED, sources.UNNAMED),
    help="source openmoji: also the variants in skin tones, named (thumbs up dark skin tone; about 3,950 "
    "pictures in all) or as further pictures of the same caption (thumbs up; about 3,570)",
  )
  parser.add_argument(
    "--no-aliases",
    dest="aliases",
    action="store_false",
    help="source openmoji: only the main caption of each picture, no alias names",
  )
  parser.add_argument(
    "--heldout",
    type=float,
    default=0.08,
    metavar="FRACTION",
    help="share of the pictures to hold out, 0 for none (default 0.08)",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the held-out choice and the order (default 0)")
  parser.add_argument("--name", help="the data set's name, as in its file names (default: the source's)")
  parser.add_argument("--overwrite", action="store_true", help="replace a data set that stands at --out")


def run(args):
  started = time.monotonic()
  build.check_out(args.out, args.overwrite)
  source = _source(args)
  with progress(f"{args.source}: pictures") as on_progress:
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
  print(f"{args.out}: written in {time.monotonic() - started:.1f} s")


def _source(args):
  if args.source == "openmoji":
    if args.path is not None:
      raise UserError(f"--path {args.path} is for --source folder; openmoji comes from installed packages")
    return sources.openmoji(skin_tones=args.skin_tones, aliases=args.aliases)
  if args.path is None:
    raise UserError("--source folder needs --path DIR, the folder with your pictures")
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
      f"{split}: {entry['examples']} pictures, {entry['captions']} image-text pairs, "
      f"{files} file{'' if files == 1 else 's'}"
    )
  held = splits.get("heldout", {"examples": 0})["examples"]
  wanted = round(manifest["heldout_fraction"] * (held + splits["train"]["examples"]))
  if held < wanted:
    yield f"held out {held} of the {wanted} pictures asked for: the captions share too few words for more"
  rejected = manifest["rejected"]
  if rejected["count"]:
    yield f"rejected: {rejected['count']} (listed in manifest.json)"
    for entry in rejected["listed"][:_REJECTED_SHOWN]:
      yield f"  {entry['key']}: {entry['reason']}"
    if rejected["count"] > _REJECTED_SHOWN:
      yield f"  ... and {rejected['count'] - _REJECTED_SHOWN} more"
  else:
    yield "rejected: none"
