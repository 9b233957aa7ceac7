"""A folder of images with captions: NAME.png (or another image suffix) next to NAME.txt, and perhaps NAME.json."""

import os
import pathlib

from aurora_jax import text
from aurora_jax.data import image_folder
from aurora_jax.data.image_folder import IMAGE_SUFFIXES
from aurora_jax.data.sources import listed
from aurora_jax.data.sources.base import Item, name_of, shown
from aurora_jax.errors import UserError

LICENCE = "unknown (the user's images)"


def folder(path: str | os.PathLike) -> listed.ListedSource:
  """A folder of images with captions. Subfolders are searched too.

  A caption file holds one caption per line; the first is the primary caption. Scores come from NAME.json, if there is
  one. See `image_folder` for the other rules.

  Args:
    path: the folder.

  Returns:
    A `ListedSource`. Its `rejected` lists images without captions, its `files` all other files.

  Raises:
    UserError: no such folder, or no image in it has a caption.
  """
  root = pathlib.Path(path)
  check_folder(root)
  scan = image_folder.scan(root)
  if not scan.pairs:
    raise UserError(
      f"image folder {shown(root)} has no image ({', '.join(IMAGE_SUFFIXES)}) with a caption file"
      + (f"; {len(scan.rejected)} rejected, the first is {': '.join(scan.rejected[0])}" if scan.rejected else "")
    )
  root = root.resolve()
  return listed.ListedSource(
    name=name_of(root),
    description=f"folder {shown(root.name)}",
    licence=LICENCE,
    items=tuple(Item(pair.key, pair.captions, pair.key, pair.path, scores=pair.scores) for pair in scan.pairs),
    rejected=tuple(scan.rejected),
    files=listed.Files(dict(scan.counts), tuple(scan.passed_over), tuple(scan.captions_left_out)),
  )


def check_folder(root: pathlib.Path) -> None:
  """Raises `UserError` if there is no such folder."""
  if not root.is_dir():
    what = "is not a folder" if root.exists() else "does not exist"
    raise UserError(f"image folder {text.printable(text.path_text(root))} {what}")
