"""Protocol "caption-retrieval": does an independent CLIP, the judge, recognise what the generated pictures show?

Every training caption and every held-out caption is sampled (EMA weights, random latents, no truncation); the judge, a
CLIP that the generator and its losses never saw, ranks all captions of the data set for each picture. The same figures
of the real pictures say what is within reach. The Frechet distance of the judge's embeddings compares the generated
pictures of the training captions with the real ones, one for each real picture; that between two halves of the real ones
stands beside it. Where a caption has several real pictures, two generated ones should differ as much as two real ones do.
Five prompts that name a colour are compared with their real pictures by hue.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from aurora_jax.data import loader
from aurora_jax.data.dataset import Dataset
from aurora_jax.evaluation import judge as judge_lib
from aurora_jax.evaluation import trained_generator as trained_lib
from aurora_jax.reporting import report

COLOUR_PROMPTS = ("red circle", "blue circle", "green circle", "red heart", "blue heart")
HELD_OUT_LATENTS = 4
HELD_OUT_SHOWN = 12
EXPERT_EXAMPLES = 6


@dataclasses.dataclass(frozen=True)
class Result:
  """Figures by name (see `judge.judge_figures`), the colour checks, and the panels of the report."""

  figures: dict
  colours: tuple
  panels: report.Panels


class _Split:
  """Pictures of one split of a data set; empty if there is no such split.

  Attributes:
    captions: the primary caption of each picture.
    first: the number of the first picture of each distinct caption.
    pairs: [P, 2] numbers: the first two pictures of each caption that has several.
  """

  def __init__(self, path, name, resolution):
    names = Dataset.open(path, "train").manifest["splits"]
    self.dataset = Dataset.open(path, name) if name in names else None
    self.captions = [captions[0] for captions in self.dataset.captions()] if self.dataset else []
    self.first, group = judge_lib.merge_captions(self.captions)
    by_caption, counts = np.argsort(group, kind="stable"), np.bincount(group, minlength=len(self.first))
    begin = (np.cumsum(counts) - counts)[counts > 1]
    self.pairs = by_caption[begin[:, None] + np.arange(2)]
    self.resolution = resolution

  def pictures(self, numbers=None):
    return loader.to_float(loader.load_images(self.dataset, self.resolution, numbers))

  def picture(self, caption):
    """The real picture of a caption, or None."""
    if caption not in self.captions:
      return None
    return self.pictures([self.captions.index(caption)])[0]


def evaluate(
  model: trained_lib.TrainedGenerator,
  judge: judge_lib.Judge,
  data_path,
  *,
  seed=0,
  on_progress: Callable = lambda words, done, total: None,
) -> Result:
  """Runs the protocol.

  Args:
    model: the generator.
    judge: the judge.
    data_path: the data set with the splits "train" and, if there is one, "heldout".
    seed: of the latents.
    on_progress: called with (words, done, total).

  Returns:
    `Result`.
  """
  resolution = model.experiment.resolution
  train, heldout = (_Split(data_path, name, resolution) for name in ("train", "heldout"))
  captions = train.captions + heldout.captions

  def sample(words, prompts, latents, choices=False):
    return model.sample(
      prompts, latents=latents, seed=seed, choices=choices, on_batch=lambda done, total: on_progress(words, done, total)
    )

  figures = {}
  images, real = sample("training captions", train.captions, 1).images, train.pictures()[:, None]
  for prefix, pictures in (("judge/", images), ("judge/real_", real)):
    figures |= judge_lib.judge_figures(judge, pictures[train.first], train.first, captions, prefix)
  figures |= judge_lib.frechet_figures(judge, images[:, 0], real[:, 0])
  if len(train.pairs):
    figures |= judge_lib.diversity_figures(images[train.pairs, 0], "judge/several_")
    figures |= judge_lib.diversity_figures(real[train.pairs, 0], "judge/several_real_")
  examples = ()
  if heldout.captions:
    distinct, numbers = [heldout.captions[i] for i in heldout.first], heldout.first + len(train.captions)
    images = sample("held-out captions", distinct, HELD_OUT_LATENTS).images
    figures |= judge_lib.judge_figures(judge, images, numbers, captions, "judge/heldout_")
    real = heldout.pictures(heldout.first)
    figures |= judge_lib.judge_figures(judge, real[:, None], numbers, captions, "judge/heldout_real_")
    shown = np.linspace(0, len(distinct) - 1, min(HELD_OUT_SHOWN, len(distinct))).astype(int)
    examples = tuple(report.HeldOutExample(distinct[i], real[i], images[i]) for i in shown)

  colours = _colours(sample, train)
  if colours:
    figures |= judge_lib.colour_figures([example.check for example in colours])
  panels = report.Panels(
    figures=figures,
    heldout=examples,
    colours=colours,
    expert_examples=_experts(model, sample, train.captions),
    notes=(
      f"EMA weights at step {model.step:,}, random latents, no truncation; "
      f"{len(train.first):,} training and {len(heldout.first):,} held-out captions compete.",
    ),
  )
  return Result(figures, tuple(example.check for example in colours), panels)


def _colours(sample, train):
  prompts = [prompt for prompt in COLOUR_PROMPTS if prompt in train.captions]
  if not prompts:
    return ()
  images = sample("colour prompts", prompts, 8).images
  examples = []
  for prompt, generated in zip(prompts, images):
    real = train.picture(prompt)
    examples.append(report.ColourExample(judge_lib.check_colour(prompt, generated, real), real, generated))
  return tuple(examples)


def _experts(model, sample, captions):
  prompts = [prompt for prompt in model.experiment.train.sample_prompts][:EXPERT_EXAMPLES] or captions[:EXPERT_EXAMPLES]
  samples = sample("expert maps", prompts, 1, choices=True)
  if not samples.choices:
    return ()
  experts = {layer: model.system.choice_count(layer) for layer in samples.choices}
  return tuple(
    report.ExpertExample(
      prompt, samples.images[p, 0], {layer: index[p, 0] for layer, index in samples.choices.items()}, experts
    )
    for p, prompt in enumerate(prompts)
  )
