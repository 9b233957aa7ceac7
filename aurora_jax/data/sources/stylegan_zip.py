"""StyleGAN's data sets: a zip (or a folder) of images with labels in `dataset.json`."""

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping

from aurora_jax import text
from aurora_jax.data.sources import base
from aurora_jax.data.sources.base import CaptionFields, FilePart, Item, PartedSource, Rejected
from aurora_jax.data.sources.listing import slices
from aurora_jax.errors import UserError

_LABELS = "dataset.json"
_MAXIMAL_LABELS = 2**30  # bytes
_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError)


def stylegan_zip(path: str | os.PathLike, class_names: Mapping[str, str] | None = None) -> PartedSource:
  """Labelled images. A caption is the name of the class, or "class 3" without names. `label` is a feature.

  Args:
    path: a zip, or a folder of the same content. Its `dataset.json` has `labels`, a list of [name, number].
    class_names: {number as text: caption}.

  Returns:
    A source.

  Raises:
    UserError: it cannot be read or has no labels.
  """
  path, shown = os.fspath(path), base.shown(path)
  try:
    if os.path.isdir(path):
      with open(os.path.join(path, _LABELS), "rb") as file:
        content = json.loads(text.decode(file.read()))
    else:
      with zipfile.ZipFile(path) as opened:
        if opened.getinfo(_LABELS).file_size > _MAXIMAL_LABELS:
          raise ValueError(f"{_LABELS} is too large")
        content = json.loads(text.decode(opened.read(_LABELS)))
    labels = content.get("labels") if isinstance(content, dict) else None
  except RecursionError:
    raise UserError(f"{shown} cannot be read: {_LABELS} is nested too deeply") from None
  except _ERRORS as error:
    reason = text.printable(" ".join(str(error).split()), 100)
    raise UserError(f"{shown} is no StyleGAN data set: {reason}") from None
  if not labels:
    raise UserError(f"{shown} has no labels in {_LABELS}: there is nothing to make captions of")
  if not all(isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in labels):
    raise UserError(f"{shown}: the labels in {_LABELS} are not pairs of a name and a number")
  rows = [(name, label) for name, label in labels]
  size = os.path.getsize(path)
  return PartedSource(
    name=base.name_of(os.path.splitext(path)[0]),
    description=f"StyleGAN data set {base.shown(os.path.basename(os.path.abspath(path)))}",
    licence="unknown (the user's images)",
    list_parts=lambda: (LabelledPart(path, size, group, tuple((class_names or {}).items())) for group in slices(rows)),
    count=len(rows),
  )


@dataclasses.dataclass(frozen=True)
class LabelledPart(FilePart):
  """Some images of a zip or folder: (name, label) each."""

  path: str
  size: int
  rows: tuple[tuple[str, object], ...]
  class_names: tuple[tuple[str, str], ...]

  def files(self) -> Iterable[str]:
    """See `base.Part`."""
    return super().files() if os.path.isdir(self.path) else (self.path,)

  def items(self) -> Iterator[Item | Rejected]:
    """See `base.Part`."""
    names = dict(self.class_names)
    archive = None
    try:
      archive = None if os.path.isdir(self.path) else zipfile.ZipFile(self.path)
      for name, label in self.rows:
        yield self._item(archive, name, label, names)
    except zipfile.BadZipFile as error:
      yield Rejected(text.printable(os.path.basename(self.path)), f"zip is damaged: {error}", base.DAMAGED)
    finally:
      if archive is not None:
        archive.close()

  def _item(self, archive, name, label, names):
    key = text.printable(name, 200)
    if not base.is_inside(name):
      return Rejected(key, "a file name that leads out of the data set", base.BAD_NAME)
    if isinstance(label, bool) or not isinstance(label, int):
      return Rejected(key, "a label that is no whole number", base.NO_CAPTION)
    image, location = None, os.path.join(self.path, name)
    if archive is not None:
      location = ""
      try:
        info = archive.getinfo(name)
        if info.file_size > base.MAXIMAL_IMAGE_BYTES:
          error = base.too_long(info.file_size)
          return Rejected(key, str(error), error.kind)
        image = archive.read(info)
      except _ERRORS as error:
        return Rejected(key, text.printable(" ".join(str(error).split()), 100), base.DAMAGED)
    caption = names.get(str(label), f"class {label}")
    return base.item_or_rejected(
      name, {"caption": caption}, CaptionFields(), image=image, location=location, features={"label": float(label)}
    )
