"""Caption retrieval: how often is the right caption the best match of an image, among a few and among all?"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

_ROWS_AT_ONCE = 1024  # of the similarity matrix


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """How often the right caption ranks first.

  Attributes:
    top1_of_few: share of images whose caption wins against `few - 1` random other captions, in [0, 1].
    top1_of_all: the same against all other captions.
    few: 32, or the number of distinct captions if that is less.
    captions: number of distinct captions.
    images: number of images.
  """

  top1_of_few: float
  top1_of_all: float
  few: int
  captions: int
  images: int

  @property
  def chance_of_few(self) -> float:
    """`top1_of_few` of random guesses."""
    return 1.0 / self.few

  @property
  def chance_of_all(self) -> float:
    """`top1_of_all` of random guesses."""
    return 1.0 / self.captions


def caption_key(caption: str) -> tuple[str, ...]:
  """The words of a caption, without letter case, white space and punctuation. Captions with equal words count as one.

  Symbols with a meaning of their own are words: "keycap: #" is not "keycap: *".
  """
  return tuple(re.findall(r"\w+|[^\w\s:,;.!?'\"()\-\u2018\u2019\u201c\u201d\u2013\u2014]", caption.casefold()))


def merge_captions(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Finds the M distinct captions by `caption_key`.

  Args:
    captions: n captions.

  Returns:
    (first, group). first: int64 [M], the position at which each distinct caption first occurs. group: int64 [n], the
    distinct caption of each position.
  """
  groups, first = {}, []
  group = np.empty(len(captions), np.int64)
  for position, caption in enumerate(captions):
    key = caption_key(caption)
    if key not in groups:
      groups[key] = len(first)
      first.append(position)
    group[position] = groups[key]
  return np.asarray(first, np.int64), group


def beaten_by(similarity: np.ndarray, right: np.ndarray) -> np.ndarray:
  """Counts the wrong captions that score at least as well as the right one.

  Args:
    similarity: float [n, M].
    right: int [n], the right column of each row.

  Returns:
    int [n]. A tie counts against the image, and so does a NaN.
  """
  score = np.take_along_axis(similarity, right[:, None], axis=1)
  return similarity.shape[1] - 1 - np.sum(similarity < score, axis=1)


def chance_to_win(better: np.ndarray, others: int, draws: int) -> np.ndarray:
  """The probability that captions drawn without replacement include none of the better ones.

  This is the mean over all sets of distractors, C(others - better, draws) / C(others, draws). It has no sampling noise.

  Args:
    better: int [n], how many of the others score at least as well as the right caption.
    others: number of captions to draw from.
    draws: number of captions drawn, at most `others`.

  Returns:
    float [n].
  """
  left = others - np.asarray(better, np.int64)[:, None] - np.arange(draws)[None]
  return np.prod(np.maximum(left, 0) / (others - np.arange(draws))[None], axis=1)


def retrieval(
  image_embeddings: np.ndarray,
  caption_indices: Sequence[int] | np.ndarray,
  caption_embeddings: np.ndarray,
  captions: Sequence[str],
  few: int = 32,
) -> Retrieval:
  """Top-1 retrieval of captions by images.

  Args:
    image_embeddings: float [n, D], of any norm.
    caption_indices: int [n], the position of each image's caption in `captions`.
    caption_embeddings: float [len(captions), D], of any norm.
    captions: captions with equal words count as one.
    few: size of the small choice, the right caption included.

  Returns:
    `Retrieval`.

  Raises:
    ValueError: shapes or indices that do not fit together.
  """
  images, texts = np.asarray(image_embeddings, np.float32), np.asarray(caption_embeddings, np.float32)
  indices = np.asarray(caption_indices, np.int64)
  if len(texts) != len(captions) or images.shape[1:] != texts.shape[1:] or indices.shape != (len(images),):
    raise ValueError(
      f"images {images.shape} with captions {indices.shape} against {len(captions)} captions {texts.shape}"
    )
  if not len(images) or indices.min() < 0 or indices.max() >= len(captions):
    raise ValueError(
      f"{len(images)} images; captions {indices.min(initial=0)} to {indices.max(initial=-1)} of {len(captions)}"
    )
  first, group = merge_captions(captions)
  texts = texts[first]
  with np.errstate(invalid="ignore", divide="ignore"):
    images = images / np.linalg.norm(images, axis=-1, keepdims=True)
    texts = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
  others = len(first) - 1
  few = min(few, len(first))
  better = np.concatenate(
    [
      beaten_by(images[start : start + _ROWS_AT_ONCE] @ texts.T, group[indices[start : start + _ROWS_AT_ONCE]])
      for start in range(0, len(images), _ROWS_AT_ONCE)
    ]
  )
  return Retrieval(
    top1_of_few=float(np.mean(chance_to_win(better, others, few - 1))),
    top1_of_all=float(np.mean(better == 0)),
    few=few,
    captions=len(first),
    images=len(images),
  )
