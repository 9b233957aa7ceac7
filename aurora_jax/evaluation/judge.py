"""The judge: a CLIP that the generator and its losses never saw.

It says whether images show what their captions say.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from aurora_jax.evaluation.retrieval import Retrieval, retrieval

if TYPE_CHECKING:
  from aurora_jax.interop.clip_hf import ClipBundle

_CAPTION_SETS_HELD = 4  # whose embeddings are cached


@dataclasses.dataclass(frozen=True)
class Judge:
  """A CLIP as two functions.

  Attributes:
    embed_images: [n, R, R, 3] in [-1, 1] -> float32 [n, D].
    embed_captions: n captions -> float32 [n, D].
  """

  embed_images: Callable[[np.ndarray], np.ndarray]
  embed_captions: Callable[[Sequence[str]], np.ndarray]

  def retrieval(
    self, images: np.ndarray, caption_indices: Sequence[int] | np.ndarray, captions: Sequence[str], few: int = 32
  ) -> Retrieval:
    """Top-1 retrieval of captions by images (see `retrieval.retrieval`).

    Args:
      images: [n, R, R, 3] in [-1, 1].
      caption_indices: int [n], the position of each image's caption in `captions`.
      captions: all captions that compete.
      few: size of the small choice, the right caption included.

    Returns:
      `Retrieval`.
    """
    return retrieval(self.embed_images(images), caption_indices, self.embed_captions(captions), captions, few)


def in_batches(
  function: Callable[..., np.ndarray | jax.Array], arrays: tuple[np.ndarray, ...], batch_size: int
) -> np.ndarray:
  """Applies a function to equal batches of the leading axis. The last batch is padded, for a single compilation.

  Args:
    function: takes arrays [batch_size, ...], returns an array [batch_size, ...].
    arrays: arrays [n, ...], n >= 1.
    batch_size: rows per call.

  Returns:
    [n, ...].
  """
  results = []
  for start in range(0, len(arrays[0]), batch_size):
    parts = [array[start : start + batch_size] for array in arrays]
    size = len(parts[0])
    parts = [np.concatenate([part, np.repeat(part[-1:], batch_size - size, axis=0)]) for part in parts]
    results.append(np.asarray(function(*parts))[:size])
  return np.concatenate(results)


def from_clip(bundle: "ClipBundle", batch_size: int = 256) -> Judge:
  """A judge from a CLIP.

  Args:
    bundle: config, variables and tokenizer.
    batch_size: images or captions per call of the CLIP.
  """
  from aurora_jax.models.clip import Clip

  clip = Clip(bundle.config)
  images = jax.jit(functools.partial(clip.apply, method="encode_image"))
  texts = jax.jit(lambda variables, tokens: clip.apply(variables, tokens, method="encode_text").embedding)
  # Every evaluation ranks the same captions.
  cache: collections.OrderedDict[tuple[str, ...], np.ndarray] = collections.OrderedDict()

  def embed_images(batch: np.ndarray) -> np.ndarray:
    batch = np.asarray(batch, np.float32)
    return in_batches(lambda x: images(bundle.variables, x), (batch,), batch_size).astype(np.float32)

  def embed_captions(captions: Sequence[str]) -> np.ndarray:
    key = tuple(captions)
    if key not in cache:
      tokens = np.asarray(bundle.tokenizer(list(captions)))
      cache[key] = in_batches(lambda t: texts(bundle.variables, t), (tokens,), batch_size).astype(np.float32)
      while len(cache) > _CAPTION_SETS_HELD:
        cache.popitem(last=False)
    return cache[key]

  return Judge(embed_images, embed_captions)


def load_judge(folder: str, batch_size: int = 256) -> Judge:
  """Reads a judge from a folder of `train-clip` or a Hugging Face CLIP folder.

  Raises:
    UserError: no such folder, or not a CLIP.
  """
  from aurora_jax.interop import clip_hf

  return from_clip(clip_hf.load(folder), batch_size)
