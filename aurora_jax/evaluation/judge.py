"""The judge: a CLIP that the generator never saw says whether pictures show what their captions say.

Three questions, each a pure function of arrays:
  retrieval: is the right caption the best match of the picture, among 32 and among all?
  colours:   does "red heart" come out as red as the real one?
  diversity: do other latents give other pictures of the same caption?
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.evaluation.diversity import diversity
from aurora_jax.ops import frechet

# A pixel counts as coloured from this chroma on (0: grey, 1: a pure primary).
CHROMA_FLOOR = 0.15
# Two mean hues agree within this many degrees: red, orange, yellow, green, blue stand further apart than that.
HUE_TOLERANCE = 30.0


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """How often the right caption ranks first.

  Attributes:
    top1_of_few: share of images whose caption wins against `few - 1` random other captions, in [0, 1].
    top1_of_all: the same against all other captions.
    few: int, 32 or the number of distinct captions if that is less.
    captions: int, number of distinct captions.
    images: int.
  """

  top1_of_few: float
  top1_of_all: float
  few: int
  captions: int
  images: int

  @property
  def chance_of_few(self):
    return 1.0 / self.few

  @property
  def chance_of_all(self):
    return 1.0 / self.captions


@dataclasses.dataclass(frozen=True)
class Colour:
  """The mean colour of the coloured pixels of one or more pictures.

  Attributes:
    hue: degrees in [0, 360); NaN where no pixel is coloured.
    rgb: their chroma-weighted mean colour, three floats in [0, 1]; NaN likewise.
    share: share of pixels that are coloured.
  """

  hue: float
  rgb: tuple[float, float, float]
  share: float


@dataclasses.dataclass(frozen=True)
class ColourCheck:
  """A colour prompt: the generated pictures' colour beside the real picture's.

  Attributes:
    caption: str.
    real, generated: Colour.
    difference: degrees between the hues in [0, 180], NaN if one of them has none.
    agrees: whether that is within the tolerance.
  """

  caption: str
  real: Colour
  generated: Colour
  difference: float
  agrees: bool


def caption_key(caption):
  """What makes two captions the same in words: letter case, white space and punctuation do not count.

  Symbols that stand for themselves do ("keycap: #" is not "keycap: *").
  """
  return tuple(re.findall(r"\w+|[^\w\s:,;.!?'\"()\-\u2018\u2019\u201c\u201d\u2013\u2014]", caption.casefold()))


def merge_captions(captions):
  """Distinct captions by `caption_key`.

  Args:
    captions: list of str.

  Returns:
    (first, group): int [M], the position of each distinct caption's first occurrence, and int [len(captions)], the
    distinct caption that each one is.
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


def beaten_by(similarity, right):
  """How many wrong captions score at least as well as the right one.

  Args:
    similarity: float [n, M].
    right: int [n], the right column of each row.

  Returns:
    int [n]. A tie counts against the picture, and so does a similarity that is no number.
  """
  own = np.take_along_axis(similarity, right[:, None], axis=1)
  return similarity.shape[1] - 1 - np.sum(similarity < own, axis=1)


def chance_to_win(better, others, draws):
  """Probability that `draws` captions, drawn without replacement from `others`, hold none of the `better` ones.

  This is the mean over all sets of distractors, so the figure has no sampling noise of its own:
  C(others - better, draws) / C(others, draws).

  Args:
    better: int [n].
    others, draws: int, draws <= others.

  Returns:
    float [n].
  """
  left = others - np.asarray(better, np.int64)[:, None] - np.arange(draws)[None]
  return np.prod(np.maximum(left, 0) / (others - np.arange(draws))[None], axis=1)


def retrieval(image_embeddings, caption_indices, caption_embeddings, captions, few=32):
  """Top-1 retrieval of captions by pictures.

  Args:
    image_embeddings: float [n, D]; need not be normalised.
    caption_indices: int [n], each picture's caption as a position in `captions`.
    caption_embeddings: float [len(captions), D].
    captions: list of str; captions that are the same in words count as one.
    few: int, the size of the small choice, the right caption included.

  Returns:
    Retrieval.

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
      beaten_by(images[start : start + 1024] @ texts.T, group[indices[start : start + 1024]])
      for start in range(0, len(images), 1024)
    ]
  )
  return Retrieval(
    top1_of_few=float(np.mean(chance_to_win(better, others, few - 1))),
    top1_of_all=float(np.mean(better == 0)),
    few=few,
    captions=len(first),
    images=len(images),
  )


def mean_colour(images):
  """The mean hue of the coloured pixels, weighted by chroma.

  Hue and chroma are the angle and the length of a colour's projection along the grey axis, so the weighted circular
  mean of hues is the hue of the mean projection. White, grey and black have no chroma and do not count.

  Args:
    images: [..., R, R, 3], float in [-1, 1].

  Returns:
    Colour.
  """
  rgb = np.clip((np.asarray(images, np.float64).reshape(-1, 3) + 1) / 2, 0, 1)
  along = rgb[:, 0] - (rgb[:, 1] + rgb[:, 2]) / 2
  across = (rgb[:, 1] - rgb[:, 2]) * np.sqrt(3) / 2
  chroma = np.hypot(along, across)
  coloured = chroma >= CHROMA_FLOOR  # false where a pixel is no number
  if not coloured.any():
    return Colour(float("nan"), (float("nan"),) * 3, 0.0)
  hue = np.degrees(np.arctan2(across[coloured].sum(), along[coloured].sum())) % 360.0
  mean = np.average(rgb[coloured], axis=0, weights=chroma[coloured])
  return Colour(float(hue), tuple(float(v) for v in mean), float(coloured.mean()))


def hue_difference(first, second):
  """Degrees between two hues, in [0, 180]; NaN if one is."""
  return abs((first - second + 180.0) % 360.0 - 180.0)


def check_colour(caption, generated, real, tolerance=HUE_TOLERANCE):
  """Compares the colour of generated pictures with the real picture's.

  Args:
    caption: str.
    generated: [L, R, R, 3] in [-1, 1], pictures of several latents.
    real: [R, R, 3] in [-1, 1].
    tolerance: degrees.

  Returns:
    ColourCheck.
  """
  colours = mean_colour(real), mean_colour(generated)
  difference = hue_difference(colours[0].hue, colours[1].hue)
  return ColourCheck(caption, colours[0], colours[1], difference, bool(difference <= tolerance))


@dataclasses.dataclass(frozen=True)
class Judge:
  """A CLIP as two functions.

  Attributes:
    embed_images: [n, R, R, 3] in [-1, 1] -> float32 [n, D].
    embed_captions: list of n strings -> float32 [n, D].
  """

  embed_images: Callable
  embed_captions: Callable

  def retrieval(self, images, caption_indices, captions, few=32):
    """Top-1 retrieval (see `retrieval`) of pictures [n, R, R, 3] whose captions are positions in `captions`."""
    return retrieval(self.embed_images(images), caption_indices, self.embed_captions(captions), captions, few)


def in_batches(function, arrays, batch_size):
  """Applies a function to equal batches of the leading axis, the last one padded, so that it compiles once.

  Args:
    function: of arrays [batch_size, ...], giving an array [batch_size, ...].
    arrays: tuple of arrays [n, ...], n >= 1.
    batch_size: int.

  Returns:
    numpy array [n, ...].
  """
  results = []
  for start in range(0, len(arrays[0]), batch_size):
    parts = [array[start : start + batch_size] for array in arrays]
    size = len(parts[0])
    parts = [np.concatenate([part, np.repeat(part[-1:], batch_size - size, axis=0)]) for part in parts]
    results.append(np.asarray(function(*parts))[:size])
  return np.concatenate(results)


def from_clip(bundle, batch_size=256):
  """A judge from a CLIP bundle (`interop.clip_hf.load`): config, variables and tokenizer."""
  from aurora_jax.models.clip import Clip

  clip = Clip(bundle.config)
  images = jax.jit(functools.partial(clip.apply, method="encode_image"))
  texts = jax.jit(lambda variables, tokens: clip.apply(variables, tokens, method="encode_text").embedding)
  # Captions repeat from call to call (every evaluation ranks all of them); their embeddings do not change.
  known = collections.OrderedDict()

  def embed_images(pictures):
    pictures = np.asarray(pictures, np.float32)
    return in_batches(lambda x: images(bundle.variables, x), (pictures,), batch_size).astype(np.float32)

  def embed_captions(captions):
    key = tuple(captions)
    if key not in known:
      known[key] = in_batches(
        lambda t: texts(bundle.variables, t), (np.asarray(bundle.tokenizer(list(captions))),), batch_size
      ).astype(np.float32)
      while len(known) > 4:
        known.popitem(last=False)
    return known[key]

  return Judge(embed_images, embed_captions)


def load_judge(folder, batch_size=256):
  """Reads a judge from a run of `train-clip` or a Hugging Face CLIP folder; UserError names what is missing."""
  from aurora_jax.interop import clip_hf

  return from_clip(clip_hf.load(folder), batch_size)


def judge_figures(judge, images, caption_indices, captions, prefix="judge/"):
  """The figures of a set of pictures as named scalars for metrics.jsonl.

  Args:
    judge: Judge.
    images: [P, L, R, R, 3] in [-1, 1].
    caption_indices: int [P], positions in `captions`.
    captions: list of str, all that compete.
    prefix: str in front of every name, "judge/" or "judge/heldout_".

  Returns:
    dict of floats: top1_of_32 (top1_of_M where there are only M < 32 distinct captions), top1_of_all, their chance
    levels, the number of captions and images, and, for more than one latent and prompt, diversity_within,
    diversity_between, diversity_ratio.
  """
  images = np.asarray(images)
  if images.ndim != 5:
    raise UserError(f"pictures [prompts, latents, R, R, 3] expected, not {images.shape}")
  result = judge.retrieval(
    images.reshape((-1,) + images.shape[2:]), np.repeat(np.asarray(caption_indices), images.shape[1]), captions
  )
  figures = {
    f"top1_of_{result.few}": result.top1_of_few,
    "top1_of_all": result.top1_of_all,
    f"chance_of_{result.few}": result.chance_of_few,
    "chance_of_all": result.chance_of_all,
    "captions": result.captions,
    "images": result.images,
  }
  figures = _finite({prefix + name: float(value) for name, value in figures.items()})
  if images.shape[1] > 1 and images.shape[0] > 1:
    figures |= diversity_figures(images, prefix)
  return figures


def diversity_figures(images, prefix="judge/"):
  """How much pictures [P, L, R, R, 3] of a caption differ (evaluation/diversity.py), as named scalars for metrics.jsonl."""
  spread = dataclasses.asdict(diversity(images))
  return _finite({f"{prefix}diversity_{name}": value for name, value in spread.items()})


def frechet_figures(judge, generated, real):
  """Frechet distances of the judge's embeddings, as named scalars for metrics.jsonl; in its own units, so for one judge only.

  Args:
    judge: Judge.
    generated, real: [n, R, R, 3] in [-1, 1].

  Returns:
    dict of floats: judge/frechet, from one set to the other, and judge/frechet_real_halves, between two halves of the real
    pictures, where there are two; the fewer pictures, the larger the distance of equal sets (ops/frechet.py).
  """
  features = judge.embed_images(real)
  pairs = {"judge/frechet": (judge.embed_images(generated), features)}
  if len(features) > 1:
    pairs["judge/frechet_real_halves"] = features[::2], features[1::2]
  return _finite({name: frechet.distance(*map(_moments, pair)) for name, pair in pairs.items()})


def _moments(features):
  moments = frechet.Moments(features.shape[1])
  moments.add(features)
  return moments


def _finite(figures):
  """Leaves out what is no number: metrics.jsonl holds plain JSON."""
  return {name: value for name, value in figures.items() if np.isfinite(value)}


def colour_figures(checks, prefix="judge/colour/"):
  """Colour checks as named scalars: hues and difference per prompt (degrees), how many agree, how many there are."""
  figures = {}
  for check in checks:
    name = "_".join(caption_key(check.caption))
    figures[f"{prefix}{name}/hue"] = check.generated.hue
    figures[f"{prefix}{name}/hue_real"] = check.real.hue
    figures[f"{prefix}{name}/difference"] = check.difference
  figures[prefix + "right"] = float(sum(check.agrees for check in checks))
  figures[prefix + "asked"] = float(len(checks))
  return _finite(figures)
