"""Opens a source by its name."""

import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Mapping

from aurora_jax import text
from aurora_jax.data.sources.base import CaptionFields, Source, shown
from aurora_jax.errors import UserError

TFDS = "tfds"


@dataclasses.dataclass(frozen=True)
class Request:
  """What a source is opened with.

  Attributes:
    kind: a name of `KINDS`, or "tfds:NAME".
    path: file or folder of the source.
    captions: which fields are captions, and their mixing weights.
    options: the options that are given of those in `OPTIONS`.
  """

  kind: str
  path: str | None = None
  captions: Mapping[str, float] = dataclasses.field(default_factory=dict)
  options: Mapping[str, str] = dataclasses.field(default_factory=dict)


# Options, and the kinds that have them.
OPTIONS: Mapping[str, tuple[str, ...]] = {
  "image_column": ("parquet", "tfrecord", TFDS),
  "images": ("coco",),
  "class_names": ("imagefolder", "stylegan-zip"),
  "source_split": (TFDS,),
  "skin_tones": ("openmoji",),
  "no_aliases": ("openmoji",),
}
_WITH_CAPTION_FIELDS = ("imagefolder", "webdataset", "parquet", "tfrecord", TFDS)


def _openmoji(request, fields, options):
  del fields
  if request.path is not None:
    raise UserError(f"--path {request.path} is for --source folder and others; openmoji comes from installed packages")
  return _module("openmoji_svg").openmoji(options.get("skin_tones"), not options.get("no_aliases"))


KINDS: Mapping[str, Callable[..., Source]] = {
  "folder": lambda request, fields, options: _module("text_folder").folder(request.path),
  "imagefolder": lambda request, fields, options: _module("image_folder_metadata").imagefolder(
    request.path, fields, _class_names(options.get("class_names"))
  ),
  "webdataset": lambda request, fields, options: _module("webdataset").webdataset(request.path, fields),
  "parquet": lambda request, fields, options: _module("parquet").parquet(
    request.path, fields, options.get("image_column")
  ),
  "tfrecord": lambda request, fields, options: _module("tfrecord").tfrecord(
    request.path, fields, options.get("image_column")
  ),
  "coco": lambda request, fields, options: _module("coco").coco(request.path, options.get("images")),
  "stylegan-zip": lambda request, fields, options: _module("stylegan_zip").stylegan_zip(
    request.path, _class_names(options.get("class_names"))
  ),
  "openmoji": _openmoji,
}


def _module(name):
  return importlib.import_module(f"aurora_jax.data.sources.{name}")


def open_source(request: Request) -> Source:
  """Opens a source.

  Raises:
    UserError: an unknown kind, an option of another kind, a missing path, or what the source itself cannot use.
  """
  kind, _, name = request.kind.partition(":")
  if request.kind not in KINDS and not (kind == TFDS and name):
    known = ", ".join((*KINDS, "tfds:NAME"))
    raise UserError(f"there is no source {text.printable(request.kind, 60)}, only {known}")
  for option, value in request.options.items():
    if kind not in OPTIONS[option]:
      flag = f"--{option.replace('_', '-')}{'' if option == 'no_aliases' else f' {text.printable(value, 60)}'}"
      raise UserError(f"{flag} is for --source {' and '.join(OPTIONS[option])}")
  if request.captions and kind not in _WITH_CAPTION_FIELDS:
    raise UserError(f"--caption is for --source {', '.join(_WITH_CAPTION_FIELDS)}")
  fields = CaptionFields(dict(request.captions))
  if kind == TFDS:
    split, column = request.options.get("source_split", "train"), request.options.get("image_column")
    return _module("tfds_source").tfds(name, request.path, split, fields, column)
  if request.path is None and kind != "openmoji":
    what = "DIR, the folder with your images" if kind == "folder" else "PATH"
    raise UserError(f"--source {kind} needs --path {what}")
  if (
    request.path is not None and not os.path.exists(request.path) and kind not in ("folder", "imagefolder", "openmoji")
  ):
    raise UserError(f"{kind} source {shown(request.path)} does not exist")
  return KINDS[kind](request, fields, request.options)


def _class_names(path):
  """{class: caption} of a file, or None: a JSON object or list, lines "CLASS NAME", or one name per line."""
  if path is None:
    return None
  content = text.read_text(path)
  try:
    values = json.loads(content)
  except ValueError:
    rows = [line.split(None, 1) for line in text.lines(content)]
    if rows and all(len(row) == 2 and (row[0].isdigit() or row[0][1:].isdigit()) for row in rows):
      return {row[0]: row[1] for row in rows}
    return {str(number): " ".join(row) for number, row in enumerate(rows)}
  if isinstance(values, list) and all(isinstance(value, str) for value in values):
    return {str(number): value for number, value in enumerate(values)}
  if isinstance(values, dict) and all(isinstance(value, str) for value in values.values()):
    return values
  raise UserError(f"class names {shown(path)}: no JSON object or list of names")
