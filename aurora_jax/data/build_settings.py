"""What a data set is to look like: the settings of a build, and the held-out split by hash of the caption."""

import dataclasses
import hashlib
import re

from aurora_jax import text
from aurora_jax.data import duplicates as duplicates_lib
from aurora_jax.data import filters as filters_lib
from aurora_jax.data import shaping
from aurora_jax.data.sources.base import words
from aurora_jax.errors import UserError

MAXIMAL_RESOLUTION = 4096
SPLITS = ("words", "caption-hash")
TRAIN, HELDOUT = "train", "heldout"
# An evaluation compares the colors of these prompts with the real images, so they stay in the training split.
KEEP_FOR_TRAINING = ("red circle", "blue circle", "green circle", "red heart", "blue heart")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a build. The records of a part depend on the part and on these alone.

  Attributes:
    name: of the data set.
    resolution: side of the stored images, in pixels.
    split: "words" chooses the held-out images together and mixes all records; see `heldout.choose_heldout`. It holds
      all captions in memory. "caption-hash" decides for each caption alone; the records keep the order of the source.
    shards: number of training shards, with split "words".
    heldout_fraction: fraction of the images to hold out.
    seed: of the held-out choice and of the order.
    keep: captions that are never held out.
    encoding: how images are stored.
    filters: which images are taken.
    duplicates: "exact", "perceptual" or None; see `duplicates`.
    shard_bytes: a shard of more bytes is closed, with split "caption-hash".
    store_scores: names of scores that become features of the records.
  """

  name: str
  resolution: int
  split: str = "words"
  shards: int = 8
  heldout_fraction: float = 0.08
  seed: int = 0
  keep: tuple[str, ...] = KEEP_FOR_TRAINING
  encoding: shaping.Encoding = shaping.Encoding()
  filters: filters_lib.Filters = filters_lib.Filters()
  duplicates: str | None = None
  shard_bytes: int = 2**28
  store_scores: tuple[str, ...] = ()

  def __post_init__(self):
    if not 1 <= self.resolution <= MAXIMAL_RESOLUTION:
      raise UserError(f"resolution must be between 1 and {MAXIMAL_RESOLUTION}, not {self.resolution}")
    if not 1 <= self.shards <= 99999:
      raise UserError(f"shards must be between 1 and 99999, not {self.shards}")
    if not 0 <= self.heldout_fraction < 1:
      raise UserError(f"held-out fraction must be at least 0 and below 1, not {self.heldout_fraction}")
    if self.seed < 0:
      raise UserError(f"seed must be 0 or more, not {self.seed}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
      shown = text.printable(repr(self.name), 100)
      raise UserError(f"data set name {shown} may only have letters, digits, '_', '-' and '.'")
    if self.split not in SPLITS:
      raise UserError(f"split must be one of {', '.join(SPLITS)}, not {self.split}")
    if self.duplicates not in (None, *duplicates_lib.METHODS):
      raise UserError(f"duplicates must be one of {', '.join(duplicates_lib.METHODS)}, not {self.duplicates}")
    if self.shard_bytes < 1:
      raise UserError(f"the size of a shard must be positive, not {self.shard_bytes} bytes")
    unknown = [name for name in self.store_scores if name not in filters_lib.SCORES]
    if unknown:
      raise UserError(f"there is no score {text.printable(unknown[0], 40)}, only {', '.join(filters_lib.SCORES)}")

  def split_of(self, caption: str) -> str:
    """The split of an image by its primary caption. Captions of the same words, in any order, share one."""
    if self.split != "caption-hash" or not self.heldout_fraction or caption in self.keep:
      return TRAIN
    number = uniform(self.seed, "heldout", " ".join(sorted(set(words(caption)))) or caption)
    return HELDOUT if number < self.heldout_fraction else TRAIN


def uniform(seed: int, purpose: str, value: str) -> float:
  """A number in [0, 1) that depends on the arguments alone."""
  digest = hashlib.blake2b(f"{seed}\0{purpose}\0{value}".encode(errors="surrogatepass"), digest_size=8).digest()
  return int.from_bytes(digest, "little") / 2**64
