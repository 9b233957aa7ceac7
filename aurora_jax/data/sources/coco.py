"""COCO's caption annotations: one JSON file with images and captions, and a folder of images."""

import dataclasses
import json
import os
from collections.abc import Iterator

from aurora_jax import text
from aurora_jax.data.sources import base
from aurora_jax.data.sources.base import CaptionFields, FilePart, Item, PartedSource, Rejected
from aurora_jax.data.sources.listing import slices
from aurora_jax.errors import UserError


def coco(path: str | os.PathLike, images: str | os.PathLike | None = None) -> PartedSource:
  """COCO captions. Images have several captions; the first one in the file is the primary caption.

  The file is held in memory (90 MB for COCO's 118,287 training images).

  Args:
    path: the JSON file, such as `annotations/captions_train2017.json`.
    images: the folder of the images; None takes `train2017` (or `val2017` ...) next to the file or to its folder.

  Returns:
    A source.

  Raises:
    UserError: the file cannot be read, has another form, or the images are not found.
  """
  path = os.fspath(path)
  shown = base.shown(path)
  try:
    content = json.loads(text.read_text(path))
    rows = {image["id"]: (str(image["file_name"]), []) for image in content["images"]}
    strays = 0
    for annotation in content["annotations"]:
      if annotation["image_id"] in rows:
        rows[annotation["image_id"]][1].append(annotation["caption"])
      else:
        strays += 1
  except RecursionError:
    raise UserError(f"{shown} cannot be read: it is nested too deeply") from None
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f"{shown} is no JSON: {text.printable(error, 100)}") from None
  except (KeyError, TypeError) as error:
    raise UserError(f"{shown} has no COCO captions (images, annotations): {text.printable(repr(error), 60)}") from None
  folder = _image_folder(path) if images is None else os.fspath(images)
  if folder is None or not os.path.isdir(folder):
    wanted = "next to it" if folder is None else f"in {base.shown(folder)}"
    raise UserError(f"the images of {shown} are not found {wanted}: give --images FOLDER")
  listed = [(name, tuple(captions)) for name, captions in rows.values()]
  return PartedSource(
    name=base.name_of(os.path.splitext(path)[0]),
    description=f"COCO captions {base.shown(os.path.basename(path))}",
    licence="see the licenses in the annotation file",
    list_parts=lambda: (CocoPart(folder, rows) for rows in slices(listed)),
    count=len(listed),
  )


def _image_folder(path):
  """The folder of images that goes with `annotations/captions_NAME.json`, or None."""
  folder = os.path.dirname(os.path.abspath(path))
  name = os.path.splitext(os.path.basename(path))[0].removeprefix("captions_")
  candidates = [os.path.join(place, name) for place in (folder, os.path.dirname(folder))]
  candidates += [os.path.join(place, "images", name) for place in (folder, os.path.dirname(folder))]
  candidates += [os.path.join(folder, "images")]
  return next((candidate for candidate in candidates if os.path.isdir(candidate)), None)


@dataclasses.dataclass(frozen=True)
class CocoPart(FilePart):
  """Some images: (file name, captions) each."""

  folder: str
  rows: tuple[tuple[str, tuple[str, ...]], ...]

  def items(self) -> Iterator[Item | Rejected]:
    """See `base.Part`."""
    for name, captions in self.rows:
      if base.is_inside(name):
        location = os.path.join(self.folder, name)
        yield base.item_or_rejected(name, {"caption": captions}, CaptionFields(), location=location)
      else:
        yield Rejected(text.printable(name, 200), "a file name that leads out of the folder", base.BAD_NAME)
