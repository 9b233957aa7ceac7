"""Protocol "caption-retrieval": does an independent CLIP, the judge, recognize what the generated images show?

Every training caption and every held-out caption is sampled with EMA weights, random latents and no truncation. The
judge is a CLIP that the generator and its losses never saw. It ranks all captions of the data set for each image. The
same figures of the real images show what can be reached.

The Frechet distance of the judge's embeddings compares the generated images of the training captions with the real
ones, one for each real image. The distance between two halves of the real images stands next to it. If a caption has
several real images, two generated ones should differ as much as two real ones do. Five prompts that name a color are
compared with their real images by hue.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np

from aurora_jax.data import loader
from aurora_jax.data.dataset import Dataset
from aurora_jax.evaluation import figures as figures_lib
from aurora_jax.evaluation import sampling
from aurora_jax.evaluation import trained_generator as trained_lib
from aurora_jax.evaluation.color import ColorCheck, check_color
from aurora_jax.evaluation.examples import ColorExample, ExpertExample, HeldOutExample
from aurora_jax.evaluation.judge import Judge
from aurora_jax.evaluation.retrieval import merge_captions

COLOR_PROMPTS = ("red circle", "blue circle", "green circle", "red heart", "blue heart")
HELD_OUT_LATENTS = 4
HELD_OUT_SHOWN = 12
EXPERT_EXAMPLES = 6
_COLOR_LATENTS = 8

_Sample = Callable[..., sampling.Samples]  # (message, prompts, latents, choices=False)


@dataclasses.dataclass(frozen=True)
class Result:
  """What the protocol found.

  Attributes:
    figures: scalars by their names in metrics.jsonl (see `figures.judge_figures`).
    heldout: some held-out prompts with their images; empty without a held-out split.
    colors: the prompts that name a color.
    experts: images with the choices of the generator's experts; empty if it has none.
    notes: sentences about how the figures were made.
  """

  figures: dict[str, float]
  heldout: tuple[HeldOutExample, ...]
  colors: tuple[ColorExample, ...]
  experts: tuple[ExpertExample, ...]
  notes: tuple[str, ...]

  @property
  def color_checks(self) -> tuple[ColorCheck, ...]:
    """The checks of the prompts that name a color."""
    return tuple(example.check for example in self.colors)


class _Split:
  """Images of one split of a data set; empty if there is no such split.

  Attributes:
    captions: the primary caption of each image.
    first: int [M], the number of the first image of each distinct caption.
    pairs: int [P, 2], the numbers of the first two images of each caption that has several.
  """

  def __init__(self, path: str | os.PathLike, name: str, resolution: int):
    names = Dataset.open(path, "train").manifest["splits"]
    self.dataset = Dataset.open(path, name) if name in names else None
    self.captions = [captions[0] for captions in self.dataset.captions()] if self.dataset else []
    self.first, group = merge_captions(self.captions)
    by_caption, counts = np.argsort(group, kind="stable"), np.bincount(group, minlength=len(self.first))
    begin = (np.cumsum(counts) - counts)[counts > 1]
    self.pairs = by_caption[begin[:, None] + np.arange(2)]
    self.resolution = resolution

  def images(self, numbers: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    return loader.to_float(loader.load_images(self.dataset, self.resolution, numbers))

  def image(self, caption: str) -> np.ndarray:
    """The first real image of a caption."""
    return self.images([self.captions.index(caption)])[0]


def evaluate(
  model: trained_lib.TrainedGenerator,
  judge: Judge,
  data_path: str | os.PathLike,
  *,
  seed: int = 0,
  on_progress: Callable[[str, int, int], None] = lambda message, done, total: None,
) -> Result:
  """Runs the protocol.

  Args:
    model: the generator.
    judge: the judge.
    data_path: the data set with the split "train" and optionally "heldout".
    seed: of the latents.
    on_progress: called with (what is sampled, images done, total).

  Returns:
    `Result`.

  Raises:
    UserError: the data set cannot be read.
  """
  resolution = model.experiment.resolution
  train, heldout = (_Split(data_path, name, resolution) for name in ("train", "heldout"))
  captions = train.captions + heldout.captions

  def sample(message: str, prompts: Sequence[str], latents: int, choices: bool = False) -> sampling.Samples:
    report = lambda done, total: on_progress(message, done, total)
    return model.sample(prompts, latents_per_prompt=latents, seed=seed, choices=choices, on_batch=report)

  figures: dict[str, float] = {}
  generated, real = sample("training captions", train.captions, 1).images, train.images()[:, None]
  for prefix, images in (("judge/", generated), ("judge/real_", real)):
    figures |= figures_lib.judge_figures(judge, images[train.first], train.first, captions, prefix)
  figures |= figures_lib.frechet_figures(judge, generated[:, 0], real[:, 0])
  if len(train.pairs):
    figures |= figures_lib.diversity_figures(generated[train.pairs, 0], "judge/several_")
    figures |= figures_lib.diversity_figures(real[train.pairs, 0], "judge/several_real_")
  examples: tuple[HeldOutExample, ...] = ()
  if heldout.captions:
    distinct, numbers = [heldout.captions[i] for i in heldout.first], heldout.first + len(train.captions)
    generated, real = sample("held-out captions", distinct, HELD_OUT_LATENTS).images, heldout.images(heldout.first)
    figures |= figures_lib.judge_figures(judge, generated, numbers, captions, "judge/heldout_")
    figures |= figures_lib.judge_figures(judge, real[:, None], numbers, captions, "judge/heldout_real_")
    shown = np.linspace(0, len(distinct) - 1, min(HELD_OUT_SHOWN, len(distinct))).astype(int)
    examples = tuple(HeldOutExample(distinct[i], real[i], generated[i]) for i in shown)

  colors = _colors(sample, train)
  if colors:
    figures |= figures_lib.color_figures([example.check for example in colors])
  notes = (
    f"EMA weights at step {model.step:,}, random latents, no truncation; "
    f"{len(train.first):,} training and {len(heldout.first):,} held-out captions compete.",
  )
  return Result(figures, examples, colors, _experts(model, sample, train.captions), notes)


def _colors(sample: _Sample, train: _Split) -> tuple[ColorExample, ...]:
  prompts = [prompt for prompt in COLOR_PROMPTS if prompt in train.captions]
  if not prompts:
    return ()
  examples = []
  for prompt, generated in zip(prompts, sample("color prompts", prompts, _COLOR_LATENTS).images):
    real = train.image(prompt)
    examples.append(ColorExample(check_color(prompt, generated, real), real, generated))
  return tuple(examples)


def _experts(
  model: trained_lib.TrainedGenerator, sample: _Sample, captions: Sequence[str]
) -> tuple[ExpertExample, ...]:
  prompts = list(model.experiment.train.sample_prompts or captions)[:EXPERT_EXAMPLES]
  samples = sample("expert maps", prompts, 1, choices=True)
  if not samples.choices:
    return ()
  experts = {layer: model.system.choice_count(layer) for layer in samples.choices}
  return tuple(
    ExpertExample(
      prompt, samples.images[p, 0], {layer: index[p, 0] for layer, index in samples.choices.items()}, experts
    )
    for p, prompt in enumerate(prompts)
  )
