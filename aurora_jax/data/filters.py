"""Filters: which images and captions of a source a data set takes.

Cheap filters come first: scores and captions, then the size in the image's header. An image that fails one of them is
not decoded.
"""

import dataclasses
import math
from collections.abc import Mapping

from aurora_jax.errors import UserError

# Names of scores in img2dataset's tables and in LAION's and COYO's metadata, by our name.
SCORES: Mapping[str, tuple[str, ...]] = {
  "similarity": ("similarity", "clip_similarity", "clip_similarity_vitl14", "clip_similarity_vitb32"),
  "aesthetic": ("aesthetic", "aesthetic_score", "aesthetic_score_laion_v2", "AESTHETIC_SCORE"),
  "watermark": ("pwatermark", "watermark", "watermark_score"),
  "unsafe": ("punsafe", "unsafe", "nsfw_score_gantman", "nsfw_score_opennsfw2"),
}
TOO_SMALL, ASPECT, ANIMATED = "images that are too small", "images that are too wide or too high", "animated images"
SHORT, LONG = "captions that are too short", "captions that are too long"


@dataclasses.dataclass(frozen=True)
class Filters:
  """Limits; None is no limit. An item without a score passes the filter of that score, unless `require_scores` is set.

  Attributes:
    min_side: least number of pixels of the smaller side.
    max_aspect: largest ratio of the longer to the shorter side.
    min_similarity: least CLIP similarity of image and caption.
    min_aesthetic: least aesthetic score.
    max_watermark: largest probability of a watermark.
    max_unsafe: largest probability that the image is unsafe.
    min_caption: least number of characters of a caption. Captions out of the limits are dropped; an item without a
      caption left is rejected.
    max_caption: largest number of characters of a caption.
    require_scores: reject an item that lacks a score that is filtered.
    skip_animated: reject an image of several frames; otherwise the first frame is taken.
  """

  min_side: int | None = None
  max_aspect: float | None = None
  min_similarity: float | None = None
  min_aesthetic: float | None = None
  max_watermark: float | None = None
  max_unsafe: float | None = None
  min_caption: int | None = None
  max_caption: int | None = None
  require_scores: bool = False
  skip_animated: bool = False

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value is not None and not math.isfinite(value):
        raise UserError(f"filter {name.replace('_', '-')} must be a finite number, not {value}")
    if self.max_aspect is not None and self.max_aspect < 1:
      raise UserError(f"filter max-aspect must be at least 1, not {self.max_aspect}")

  def bad_score(self, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """(reason, kind) if a score is out of its limit or missing, else None."""
    for name in SCORES:
      least, largest = getattr(self, f"min_{name}", None), getattr(self, f"max_{name}", None)
      if least is None and largest is None:
        continue
      value = scores.get(name)
      if value is None or math.isnan(value):
        if self.require_scores:
          return f"no {name} score", f"no {name} score"
      elif least is not None and value < least and not _equal(value, least):
        return f"{name} {value:.4g} is less than {least:g}", f"{name} too low"
      elif largest is not None and value > largest and not _equal(value, largest):
        return f"{name} {value:.4g} is more than {largest:g}", f"{name} too high"
    return None

  def choose_captions(self, captions: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, str] | None]:
    """Positions of the captions within the limits, and (reason, kind) if there is none."""
    least, largest = self.min_caption or 0, self.max_caption or math.inf
    chosen = tuple(i for i, caption in enumerate(captions) if least <= len(caption) <= largest)
    if chosen or not captions:
      return chosen, None
    length = len(captions[0])
    if length < least:
      return (), (f"the caption has {length} characters, at least {least} are wanted", SHORT)
    return (), (f"the caption has {length:,} characters, at most {largest:,} are wanted", LONG)

  def bad_size(self, size: tuple[int, int], frames: int = 1) -> tuple[str, str] | None:
    """(reason, kind) if an image of a size in pixels is not wanted, else None."""
    if self.skip_animated and frames > 1:
      return f"animated: {frames} frames", ANIMATED
    width, height = size
    if self.min_side is not None and min(size) < self.min_side:
      return f"{width}x{height} pixels, the smaller side must have {self.min_side}", TOO_SMALL
    if self.max_aspect is not None and max(size) > self.max_aspect * min(size):
      return f"{width}x{height} pixels, one side is more than {self.max_aspect:g} times the other", ASPECT
    return None


def _equal(score, limit):
  """Whether a score is its limit: sources store scores as float32 or float64, and all must pass the same ones."""
  return math.isclose(score, limit, rel_tol=1e-6)


def scores_of(record: Mapping[str, object]) -> dict[str, float]:
  """The scores in a record of a source, by our names."""
  found = {}
  for name, columns in SCORES.items():
    for column in columns:
      value = record.get(column)
      if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
      if isinstance(value, (int, float, str, bytes)) and not isinstance(value, bool):  # text in tfrecords is bytes
        try:
          found[name] = float(value)
        except (ValueError, OverflowError):  # JSON's integers have no largest value
          continue
        break
  return found
