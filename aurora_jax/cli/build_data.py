"""Makes a data set: pictures with captions, from a source to sharded tfrecords with index and manifest.

Sources:
  openmoji   about 1,900 emoji pictures with their English names ("red heart", "grinning face"), from Python
             packages that are installed with this program: nothing is downloaded.
  folder     your own pictures: NAME.png (or .jpg, .jpeg, .webp, .bmp, .gif) beside NAME.txt, which holds one caption
             per line, the first one being the main caption. Subfolders are searched too. Pictures are cut to their
             centre square. What cannot be read, or has no caption, is left out, counted and listed in manifest.json.

About 8 % of the pictures are held out (split "heldout"), chosen by caption: every word of a held-out caption occurs in
training, the combination of words does not.

Examples:
  python -m aurora_jax build-data --source openmoji --out datasets/openmoji --resolution 64 --shards 8
  python -m aurora_jax build-data --source folder --path my_pictures --out datasets/mine --resolution 64
"""

import pathlib
import time

from aurora_jax.data import build
from aurora_jax.data import sources
from aurora_jax.errors import UserError


def add_arguments(parser):
  parser.add_argument("--source", required=True, choices=("openmoji", "folder"), help="where the pairs come from")
  parser.add_argument("--out", required=True, metavar="DIR", help="the data set folder to make")
  parser.add_argument("--path", metavar="DIR", help="source folder: the folder with your pictures")
  parser.add_argument("--resolution", type=int, default=64, help="side of the stored pictures in pixels (default 64)")
  parser.add_argument("--shards", type=int, default=8, help="number of training files (default 8)")
  parser.add_argument("--heldout", type=float, default=0.08, metavar="FRACTION",
                      help="share of the pictures to hold out, 0 for none (default 0.08)")
  parser.add_argument("--seed", type=int, default=0, help="of the held-out choice and the order (default 0)")
  parser.add_argument("--name", help="the data set's name, in its file names (default: the source's)")
  parser.add_argument("--skin-tones", action="store_true", help="source openmoji: also the variants in skin tones")
  parser.add_argument("--no-aliases", dest="aliases", action="store_false",
                      help="source openmoji: only the main caption of each picture, no alias names")
  parser.add_argument("--overwrite", action="store_true", help="replace a data set that stands at --out")


def run(args):
  started = time.monotonic()
  build.check_out(args.out, args.overwrite)
  source = _source(args)
  manifest = build.build(
      source, args.out, resolution=args.resolution, shards=args.shards, heldout_fraction=args.heldout, seed=args.seed,
      name=args.name, overwrite=args.overwrite)
  for split, entry in manifest["splits"].items():
    print(f"{split}: {entry['examples']} pictures, {entry['captions']} image-text pairs, {len(entry['shards'])} files")
  print(f"rejected: {manifest['rejected']['count']}")
  print(f"{args.out}: written in {time.monotonic() - started:.1f} s")


def _source(args):
  if args.source == "openmoji":
    return sources.openmoji(skin_tones=args.skin_tones, aliases=args.aliases)
  return sources.folder(args.path)
