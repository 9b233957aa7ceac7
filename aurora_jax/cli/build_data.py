"""Makes a data set: images with captions, from a source to sharded tfrecords with index and manifest.

Sources (--source, and --path where it says PATH):
  openmoji      about 1,900 emoji images with their English names ("red heart", "grinning face"), from Python
                packages that are installed with this program: nothing is downloaded.
  folder        PATH is a folder with NAME.png (or .jpg, .webp, .tif, .avif ...) next to NAME.txt (or NAME.png.txt),
                which holds one caption per line in UTF-8, the first one being the main caption. Subfolders are
                searched too, also linked ones.
  imagefolder   PATH is a folder of Hugging Face's kind: metadata.jsonl, .csv or .parquet with file_name and text,
                or one subfolder per class, whose name becomes the caption.
  webdataset    PATH is a folder of tars, as img2dataset writes them: .jpg, .txt and .json of each record.
  parquet       PATH is a folder of parquet tables with embedded images and captions.
  tfrecord      PATH is a folder of tf.train.Example records with images and captions, as img2dataset writes them.
  coco          PATH is annotations/captions_train2017.json (or its like); --images DIR names the images.
  tfds:NAME     a prepared data set of TensorFlow Datasets; PATH is its data_dir.
  stylegan-zip  PATH is a zip of StyleGAN's dataset tool, with labels in dataset.json.

Images are cut to their center square and resized, colors converted to sRGB. What cannot be read, has no caption or
does not pass a filter is left out, and counted in manifest.json by reason.

About 8 % of the images are held out (split "heldout"), chosen by main caption. --split words (of openmoji and folder):
every word of a held-out caption occurs in training, the combination of words does not; records are in mixed order.
--split caption-hash (of all others): each caption alone decides, and memory does not grow with the number of pairs.

The work is spread over --workers processes. A build that was stopped goes on where it was when the same command is
given again. The files do not depend on either.

--out may be a gs:// or s3:// URL: the files are made in the user's cache folder and then copied, the manifest last.

Build at twice the resolution that you train at if you want smooth augmentation (shifts, rotations): the loader reduces.

Examples:
  python -m aurora_jax build-data --source openmoji --out datasets/openmoji --resolution 64 --shards 8
  python -m aurora_jax build-data --source folder --path my_images --out datasets/mine --resolution 64
  python -m aurora_jax build-data --source webdataset --path laion --out datasets/laion --resolution 256 \\
      --min-side 256 --min-similarity 0.28 --max-watermark 0.5 --duplicates perceptual
"""

import argparse
import os
import shutil
import sys
import time

from aurora_jax import local_copies, storage, text
from aurora_jax.cli import flag_types
from aurora_jax.errors import UserError

_REJECTED_SHOWN, _LEFT_OUT_SHOWN = 10, 3
_NAME_SHOWN, _REASON_SHOWN = 100, 200
# Those of data/, which takes a while to import.
SKIN_TONES = ("named", "unnamed")
SPLITS = ("words", "caption-hash")
ENCODINGS = ("keep", "png", "jpeg", "webp")
DUPLICATES = ("exact", "perceptual")
SCORES = ("similarity", "aesthetic", "watermark", "unsafe")
_SMALL_SOURCES = ("openmoji", "folder")  # whose captions are all in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--source", required=True, metavar="NAME", help="where the pairs come from, see above")
  parser.add_argument(
    "--out", type=flag_types.path, required=True, metavar="DIR", help="the data set folder or URL to make"
  )
  parser.add_argument(
    "--resolution", type=int, default=64, metavar="R", help="side of the stored images in pixels (default 64)"
  )
  parser.add_argument("--path", type=flag_types.path, metavar="PATH", help="the source's folder or file")
  parser.add_argument("--name", help="the data set's name, as in its file names (default: the source's)")
  parser.add_argument("--overwrite", action="store_true", help="replace a data set that stands at --out")
  _add_split(parser.add_argument_group("split and files"))
  _add_source(parser.add_argument_group("about the source"))
  _add_filters(parser.add_argument_group("filters (no limit by default)"))
  _add_execution(parser.add_argument_group("how the work is done"))


def _add_split(group):
  group.add_argument(
    "--heldout",
    type=float,
    default=0.08,
    metavar="FRACTION",
    help="share of the images to hold out, 0 for none (default 0.08)",
  )
  group.add_argument(
    "--split", choices=SPLITS, help="how they are chosen (default: words for openmoji and folder, else caption-hash)"
  )
  group.add_argument(
    "--seed", type=flag_types.long_seed, default=0, help="of the held-out choice and the order (default 0)"
  )
  group.add_argument("--shards", type=int, metavar="N", help="split words: number of training files (default 8)")
  group.add_argument(
    "--shard-size", type=int, metavar="MB", help="split caption-hash: a longer file is closed (default 256)"
  )
  group.add_argument(
    "--encoding",
    choices=ENCODINGS,
    help="of the stored images; keep: what needs no change keeps its bytes, a JPEG that is resized becomes a JPEG, and "
    "what was lossless a PNG (default: png for openmoji and folder, else keep)",
  )
  group.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEG and WebP, 1 to 100 (default 95)")
  group.add_argument(
    "--store-score", action="append", choices=SCORES, default=[], help="keep this score as a feature of each record"
  )


def _add_source(group):
  group.add_argument(
    "--caption",
    action="append",
    default=[],
    metavar="FIELD[=WEIGHT]",
    help="a column or field of captions; several with weights are mixed: the main caption of an image is drawn by "
    "weight (--caption text=0.3 --caption rewritten=0.7)",
  )
  group.add_argument("--image-column", metavar="FIELD", help="parquet, tfrecord, tfds: column of the images")
  group.add_argument("--images", type=flag_types.path, metavar="DIR", help="coco: the folder of the images")
  group.add_argument(
    "--class-names",
    type=flag_types.path,
    metavar="FILE",
    help="imagefolder, stylegan-zip: captions of the classes, as JSON or lines (n01440764 tench)",
  )
  group.add_argument("--source-split", metavar="SPLIT", help="tfds: the split to read (default train)")
  group.add_argument(
    "--skin-tones",
    choices=SKIN_TONES,
    help="openmoji: also the variants in skin tones, named (thumbs up dark skin tone; about 3,950 "
    "images in all) or as further images of the same caption (thumbs up; about 3,570)",
  )
  group.add_argument(
    "--no-aliases",
    action="store_true",
    help="openmoji: only the main caption of each image, no alias names",
  )


def _add_filters(group):
  group.add_argument("--min-side", type=int, metavar="PIXELS", help="least size of the smaller side")
  group.add_argument("--max-aspect", type=float, metavar="RATIO", help="of the longer to the shorter side")
  group.add_argument("--min-similarity", type=float, metavar="X", help="least CLIP similarity, where the source has it")
  group.add_argument("--min-aesthetic", type=float, metavar="X", help="least aesthetic score, likewise")
  group.add_argument("--max-watermark", type=float, metavar="P", help="largest probability of a watermark, likewise")
  group.add_argument("--max-unsafe", type=float, metavar="P", help="largest probability of unsafe content, likewise")
  group.add_argument("--require-scores", action="store_true", help="leave out what lacks a score that is filtered")
  group.add_argument("--min-caption", type=int, metavar="N", help="least number of characters of a caption")
  group.add_argument("--max-caption", type=int, metavar="N", help="largest number of characters of a caption")
  group.add_argument("--skip-animated", action="store_true", help="leave out animations instead of taking a frame")
  group.add_argument(
    "--duplicates",
    choices=DUPLICATES,
    help="leave out all but the first of the same images, by bytes or by look (takes about 40 bytes of memory each)",
  )


def _add_execution(group):
  group.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
  group.add_argument(
    "--runner", metavar="NAME", help="build on Apache Beam: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner ..."
  )
  group.add_argument(
    "--runner-option", action="append", default=[], metavar="FLAG", help="a flag of Beam's, as in --runner-option=--x=1"
  )


def run(args: argparse.Namespace) -> None:
  """Builds the data set and prints what became of the source's files."""
  from aurora_jax.data import build
  from aurora_jax.runs.progress import progress

  started = time.monotonic()
  out = _local_out(args)
  execution = build.Execution(_workers(args), args.runner, tuple(args.runner_option))
  if args.runner_option and not args.runner:
    raise UserError("--runner-option is for --runner")
  small = args.source in _SMALL_SOURCES
  split = args.split or ("words" if small else "caption-hash")
  if args.shards is not None and split != "words":
    raise UserError("--shards is for --split words: otherwise the files follow from the source, see --shard-size")
  if args.shard_size is not None and split == "words":
    raise UserError("--shard-size is for --split caption-hash")
  source = _source(args)
  settings = _settings(args, source.name, split, args.encoding or ("png" if small else "keep"))
  try:
    with progress(f"{args.source}: images") as on_progress:
      overwrite = args.overwrite or storage.is_url(args.out)  # there it is a folder of our own
      manifest = build.build_with(source, out, settings, execution, overwrite=overwrite, on_progress=on_progress)
  except KeyboardInterrupt:
    if split != "words":
      print("finished parts are kept: the same command goes on with them", file=sys.stderr)
    raise
  if storage.is_url(args.out):
    from aurora_jax.data import remote_shards

    with progress(f"to {args.out}: files") as on_progress:
      remote_shards.upload(out, args.out, on_progress)
    shutil.rmtree(out, ignore_errors=True)
  for line in _summary(manifest):
    print(line)
  print(f"{text.printable(text.path_text(args.out))}: written in {time.monotonic() - started:.1f} s")


def _local_out(args):
  """The folder to build in, after a check of --out. For a URL it is in the user's cache folder until it is copied."""
  from aurora_jax.data import build

  if not storage.is_url(args.out):
    build.check_out(args.out, args.overwrite)
    return args.out
  from aurora_jax.data import remote_shards

  remote_shards.check_out(args.out, args.overwrite)
  out = local_copies.cache_folder("build", args.out)
  local_copies.show_as(out, args.out)
  return out


def _workers(args):
  if args.workers is not None:
    return args.workers
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _source(args):
  """The source that the flags name; UserError for flags of another one."""
  from aurora_jax.data.sources import catalog

  options = {name: value for name in catalog.OPTIONS if (value := getattr(args, name))}
  captions = {}
  for caption in args.caption:
    field, _, weight = caption.partition("=")
    try:
      captions[field] = float(weight or 1)
    except ValueError:
      captions[field] = -1.0
    if not field or not 0 < captions[field] < float("inf"):
      raise UserError(f"--caption {text.printable(caption, 60)}: a weight must be a positive number")
  return catalog.open_source(catalog.Request(args.source, args.path, captions, options))


def _settings(args, source_name, split, encoding):
  from aurora_jax.data import build_settings, filters, shaping

  limits = ("min_side", "max_aspect", "min_similarity", "min_aesthetic", "max_watermark", "max_unsafe")
  limits += ("min_caption", "max_caption", "require_scores", "skip_animated")
  return build_settings.Settings(
    name=source_name if args.name is None else args.name,
    resolution=args.resolution,
    split=split,
    shards=8 if args.shards is None else args.shards,
    heldout_fraction=args.heldout,
    seed=args.seed,
    encoding=shaping.Encoding(encoding, args.quality),
    filters=filters.Filters(**{name: getattr(args, name) for name in limits}),
    duplicates=args.duplicates,
    shard_bytes=(256 if args.shard_size is None else args.shard_size) * 2**20,
    store_scores=tuple(args.store_score),
  )


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
    if "files" not in manifest:
      yield from (f"  {kind}: {entry['count']}" for kind, entry in rejected["reasons"].items())
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
  if manifest.get("distinct_captions") == 1 < examples:
    yield f"all {examples} images have the same main caption: a prompt will have nothing to choose"
  elif held < wanted and manifest["split"] == "words":
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
