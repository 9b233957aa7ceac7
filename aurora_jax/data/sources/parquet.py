"""Parquet tables with embedded images: Hugging Face's `Image` feature, or bytes as img2dataset writes them."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

from aurora_jax import text
from aurora_jax.data import filters
from aurora_jax.data.sources import base
from aurora_jax.data.sources.base import CaptionFields, FilePart, Item, PartedSource, Rejected
from aurora_jax.data.sources.listing import find_files
from aurora_jax.errors import UserError

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image_data", "bytes")
_KEY_COLUMNS = ("key", "__key__", "id", "uid", "image_id")
_ERROR_COLUMN = "error_message"  # why img2dataset has no image
_BATCH = 64  # rows that are decoded at a time


def parquet(
  path: str | os.PathLike, fields: CaptionFields = CaptionFields(), image_column: str | None = None
) -> PartedSource:
  """Tables of images with captions.

  Args:
    path: a parquet file, or a folder that is searched for `*.parquet`.
    fields: which columns are captions.
    image_column: column of the images; None takes the first of the usual names.

  Returns:
    A source. A part is some row groups that follow each other.

  Raises:
    UserError: no table, pyarrow is missing, or the first table lacks the columns.
  """
  tables = find_files(path, (".parquet",), "parquet")
  opened = _open(tables[0])
  if isinstance(opened, str):
    raise UserError(f"parquet source {base.shown(tables[0])} {opened}")
  image = _image_column(opened.schema_arrow, image_column)
  caption = fields.choose(opened.schema_arrow.names)
  if image is None or caption is None:
    wanted = f"images ({image_column or ', '.join(_IMAGE_COLUMNS)})"
    if image is not None:
      wanted = f"captions ({', '.join(fields.weights or fields.defaults)})"
    columns = text.printable(", ".join(opened.schema_arrow.names) or "none", 200)
    raise UserError(f"parquet source {base.shown(tables[0])} has no column of {wanted}; its columns: {columns}")
  return PartedSource(
    name=base.name_of(path, "parquet"),
    description=f"parquet {base.shown(os.path.basename(os.path.abspath(path)))}",
    licence="unknown (the user's images)",
    list_parts=lambda: (part for table in tables for part in _parts(table, fields, image_column)),
  )


def _open(path) -> Any:
  """The opened table, or why it cannot be read in the form "cannot be read: ..."."""
  try:
    import pyarrow.parquet
  except ImportError:
    raise UserError("source parquet needs the package 'pyarrow' (pip install pyarrow)") from None
  try:
    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
  except (pyarrow.ArrowException, OSError) as error:
    return f"cannot be read: {text.printable(' '.join(str(error).split()), 120)}"


def _parts(path, fields, image_column):
  opened = _open(path)
  size = os.path.getsize(path)
  if isinstance(opened, str):
    yield RowGroupsPart(path, size, (), 0, fields, image_column)
    return
  groups, rows, first = [], 0, 0
  for group in range(opened.metadata.num_row_groups):
    groups.append(group)
    rows += opened.metadata.row_group(group).num_rows
    if rows >= base.PART_ITEMS or group == opened.metadata.num_row_groups - 1:
      yield RowGroupsPart(path, size, tuple(groups), first, fields, image_column)
      groups, rows, first = [], 0, first + rows


def _image_column(schema, wanted):
  """The column of images of an Arrow schema, or None."""
  import pyarrow.types as types

  for name in (wanted,) if wanted else _IMAGE_COLUMNS:
    if name in schema.names:
      kind = schema.field(name).type
      if types.is_struct(kind) and any(kind.field(i).name in ("bytes", "path") for i in range(kind.num_fields)):
        return name
      if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return name
  return None


@dataclasses.dataclass(frozen=True)
class RowGroupsPart(FilePart):
  """Some row groups of a table. `first_row` is the number of their first row in it."""

  path: str
  size: int
  groups: tuple[int, ...]
  first_row: int
  fields: CaptionFields
  image_column: str | None

  def files(self) -> Iterable[str]:
    """See `base.Part`."""
    return (self.path,)

  def items(self) -> Iterator[Item | Rejected]:
    """See `base.Part`."""
    import pyarrow

    name = os.path.basename(self.path)
    opened = _open(self.path)
    if isinstance(opened, str):
      yield Rejected(text.printable(name), f"table {opened}", base.DAMAGED)
      return
    schema = opened.schema_arrow
    image = _image_column(schema, self.image_column)
    if image is None or self.fields.choose(schema.names) is None:
      columns = text.printable(", ".join(schema.names), 200)
      yield Rejected(text.printable(name), f"table lacks the columns of images and captions: {columns}", base.DAMAGED)
      return
    wanted = {image, *(self.fields.weights or self.fields.defaults), *_KEY_COLUMNS, _ERROR_COLUMN}
    wanted.update(column for columns in filters.SCORES.values() for column in columns)
    columns = [column for column in schema.names if column in wanted]
    row = self.first_row
    try:
      for batch in opened.iter_batches(_BATCH, row_groups=list(self.groups), columns=columns):
        for record in batch.to_pylist():
          yield self._item(name.removesuffix(".parquet"), row, record, image)
          row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
      reason = f"table is damaged after row {row:,}: {text.printable(' '.join(str(error).split()), 120)}"
      yield Rejected(text.printable(name), reason, base.DAMAGED)

  def _item(self, stem, row, record, image):
    value = record.pop(image)
    key = next((record[name] for name in _KEY_COLUMNS if record.get(name) not in (None, "") and name != image), row)
    key = key.decode(errors="replace") if isinstance(key, bytes) else str(key)
    data, location = value, ""
    if isinstance(value, dict):
      data, path = value.get("bytes"), value.get("path")
      if not data and path:
        if not base.is_inside(path):
          return Rejected(f"{stem}/{text.printable(key)}", "a path that leads out of the table's folder", base.BAD_NAME)
        location = os.path.join(os.path.dirname(self.path), path)
    error = record.get(_ERROR_COLUMN)
    if not data and not location and error:
      reason = text.printable(" ".join(str(error).split()), 120)
      return Rejected(f"{stem}/{text.printable(key)}", f"no image: {reason}", base.NO_IMAGE)
    scores = filters.scores_of(record)
    return base.item_or_rejected(
      f"{stem}/{key}", record, self.fields, image=data or None, location=location, scores=scores
    )
