"""Hugging Face's imagefolder: images with `metadata.jsonl`, `.csv` or `.parquet`, or one folder per class."""

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from aurora_jax import text
from aurora_jax.data import filters
from aurora_jax.data.image_folder import IMAGE_SUFFIXES
from aurora_jax.data.sources import base
from aurora_jax.data.sources.base import CaptionFields, FilePart, Item, PartedSource, Rejected
from aurora_jax.data.sources.listing import slices
from aurora_jax.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_FIELDS = ("file_name", "image_file_name", "filename", "file", "path", "image_path", "image")


def imagefolder(
  path: str | os.PathLike, fields: CaptionFields = CaptionFields(), class_names: Mapping[str, str] | None = None
) -> PartedSource:
  """A folder in Hugging Face's convention.

  Args:
    path: the folder. It and its subfolders are searched for metadata files, whose rows name an image (`file_name`,
      relative to the file) and its captions. Without any, the images in each subfolder have its name as caption.
    fields: which fields of the metadata are captions.
    class_names: {name of a subfolder: caption}; None takes the names, with spaces for underscores.

  Returns:
    A source. A part is some rows of the metadata or some images of a class.

  Raises:
    UserError: no such folder, or nothing in it.
  """
  root = os.fspath(path)
  if not os.path.isdir(root):
    what = "is not a folder" if os.path.exists(root) else "does not exist"
    raise UserError(f"image folder {base.shown(root)} {what}")
  tables = []
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    tables += [os.path.join(folder, name) for name in _METADATA if name in names][:1]
  classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
  if not tables and not classes:
    raise UserError(f"image folder {base.shown(root)} has no {', '.join(_METADATA)} and no folders of classes")
  if tables:
    list_parts = lambda: (
      MetadataPart(os.path.dirname(table), os.path.relpath(os.path.dirname(table), root), rows, fields)
      for table in tables
      for rows in slices(_rows(table))
    )
  else:
    list_parts = lambda: _class_parts(root, classes, class_names)
  return PartedSource(
    name=base.name_of(root),
    description=f"imagefolder {base.shown(os.path.basename(os.path.abspath(root)))}",
    licence="unknown (the user's images)",
    list_parts=list_parts,
  )


def _rows(path) -> Iterable[str | dict[str, Any]]:
  """The rows of a metadata file: lines of JSON, or records."""
  try:
    if path.endswith(".jsonl"):
      with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from (line for line in file if line.strip())
    elif path.endswith(".csv"):
      csv.field_size_limit(2**24)
      with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        yield from csv.DictReader(file)
    else:
      import pyarrow.parquet

      for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
        yield from batch.to_pylist()
  except (OSError, csv.Error, ValueError) as error:  # pyarrow's errors are OSErrors and ValueErrors
    raise UserError(f"{base.shown(path)} cannot be read: {text.printable(' '.join(str(error).split()), 120)}") from None


@dataclasses.dataclass(frozen=True)
class MetadataPart(FilePart):
  """Some rows of a metadata file in `folder`, which is called `name` in keys."""

  folder: str
  name: str
  rows: tuple[str | dict[str, Any], ...]
  fields: CaptionFields

  def items(self) -> Iterator[Item | Rejected]:
    """See `base.Part`."""
    for row in self.rows:
      record = row
      if isinstance(row, str):
        try:
          record = json.loads(row)
        except (ValueError, RecursionError):
          record = None
      if not isinstance(record, dict):
        yield Rejected(text.printable(str(row).strip(), 60), "a line of metadata that is no JSON object", base.DAMAGED)
        continue
      file = next((record[field] for field in _FILE_FIELDS if isinstance(record.get(field), str)), "")
      key = file if self.name == "." else f"{self.name}/{file}"
      if not base.is_inside(file):
        reason = "a file name that leads out of the folder" if file else f"no file name ({_FILE_FIELDS[0]})"
        yield Rejected(text.printable(key, 200), reason, base.BAD_NAME)
        continue
      yield base.item_or_rejected(
        key, record, self.fields, location=os.path.join(self.folder, file), scores=filters.scores_of(record)
      )


def _class_parts(root, classes, class_names):
  """Parts of some images each, class by class."""
  for label, name in enumerate(classes):
    caption = (class_names or {}).get(name, name.replace("_", " "))
    try:
      with os.scandir(os.path.join(root, name)) as listing:
        files = sorted(entry.name for entry in listing if entry.name.lower().endswith(IMAGE_SUFFIXES))
    except OSError as error:
      raise UserError(f"{base.shown(os.path.join(root, name))} cannot be read: {error.strerror}") from None
    for group in slices(files):
      yield ClassPart(os.path.join(root, name), name, caption, label, group)


@dataclasses.dataclass(frozen=True)
class ClassPart(FilePart):
  """Some images of a class. Their feature `label` is the number of the class."""

  folder: str
  name: str
  caption: str
  label: int
  names: tuple[str, ...]

  def items(self) -> Iterator[Item | Rejected]:
    """See `base.Part`."""
    for file in self.names:
      yield base.item_or_rejected(
        f"{text.path_text(self.name)}/{text.path_text(file)}",
        {"caption": text.path_text(self.caption)},
        CaptionFields(),
        location=os.path.join(self.folder, file),
        features={"label": float(self.label)},
      )
