"""Sources of image-text pairs: one file per kind. `catalog` opens one by its name."""

from aurora_jax.data.sources.base import Item, Part, PartedSource, Rejected, Source, words
from aurora_jax.data.sources.listed import Files, ListedSource
from aurora_jax.data.sources.openmoji_svg import NAMED, UNNAMED, openmoji
from aurora_jax.data.sources.text_folder import folder

__all__ = [
  "NAMED",
  "UNNAMED",
  "Files",
  "Item",
  "ListedSource",
  "Part",
  "PartedSource",
  "Rejected",
  "Source",
  "folder",
  "openmoji",
  "words",
]
