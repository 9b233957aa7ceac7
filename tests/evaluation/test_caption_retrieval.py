"""What the protocol asks of a generator and makes of its images, with a generator and a judge that are known."""

import types

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import build, loader, sources
from aurora_jax.data.dataset import Dataset
from aurora_jax.evaluation import caption_retrieval
from aurora_jax.evaluation.judge import Judge

COLORS = {"red ball": (255, 0, 0), "green ball": (0, 255, 0), "blue ball": (0, 0, 255)}
SIZES = {"red ball": (4, 8, 16), "green ball": (8,), "blue ball": (4, 16)}  # three, one and two images
SIDE = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("balls")
  for caption, sizes in SIZES.items():
    for size in sizes:
      image = Image.new("RGB", (SIDE, SIDE), "white")
      image.paste(COLORS[caption], (0, 0, size, size))
      image.save(folder / f"{caption.split()[0]}_{size}.png")
      (folder / f"{caption.split()[0]}_{size}.txt").write_text(caption)
  build.build(sources.folder(folder), folder / "data", resolution=SIDE, shards=1, heldout_fraction=0)
  return folder / "data"


class Painter:
  """A generator that paints the right color, in a size that the latents decide or always in the same one."""

  def __init__(self, sizes):
    self.step, self._sizes, self.asked = 7, sizes, []
    self.experiment = types.SimpleNamespace(
      resolution=SIDE, conditional=True, train=types.SimpleNamespace(sample_prompts=())
    )

  def sample(self, prompts, *, latents_per_prompt, seed, choices, on_batch):
    del seed, on_batch
    self.asked.append(list(prompts))
    images = np.full((len(prompts), latents_per_prompt, SIDE, SIDE, 3), 255, np.uint8)
    for p, prompt in enumerate(prompts):
      for l in range(latents_per_prompt):
        size = self._sizes[(p + l) % len(self._sizes)]
        images[p, l, :size, :size] = COLORS[prompt]
    return types.SimpleNamespace(images=loader.to_float(images), choices={} if choices else None)


def by_color():
  """A judge that compares the color of the first pixel."""
  wanted = {caption: loader.to_float(np.array(color, np.uint8)) for caption, color in COLORS.items()}
  return Judge(lambda images: images[:, 0, 0], lambda captions: np.stack([wanted[c] for c in captions]))


def test_a_caption_counts_once_and_its_images_all(data):
  painter = Painter((4, 8, 16))
  figures = caption_retrieval.evaluate(painter, by_color(), data).figures
  captions = [captions[0] for captions in Dataset.open(data, "train").captions()]
  assert painter.asked[0] == captions and len(captions) == 6  # an image for each real one
  for prefix in ("judge/", "judge/real_"):
    assert figures[f"{prefix}images"] == figures[f"{prefix}captions"] == 3
    assert figures[f"{prefix}top1_of_all"] == 1
  assert figures["judge/frechet"] == pytest.approx(0, abs=1e-6)  # the judge sees the colors alone


def test_latents_where_a_caption_has_several_images(data):
  varied = caption_retrieval.evaluate(Painter((4, 8, 16)), by_color(), data).figures
  same = caption_retrieval.evaluate(Painter((8,)), by_color(), data).figures
  assert same["judge/several_diversity_within"] == 0 < varied["judge/several_diversity_within"]
  assert same["judge/several_real_diversity_within"] == varied["judge/several_real_diversity_within"]
  # Squares of other sizes in one color, the larger one with two channels of 2 that the smaller one does not have.
  apart = lambda small, large: np.sqrt((large**2 - small**2) * 2 * 4 / (SIDE**2 * 3))
  numbers = Dataset.open(data, "train")
  sizes = {}
  for number in range(len(numbers)):
    sizes.setdefault(numbers[number].captions[0], []).append(int(numbers[number].key.split("_")[1].split(".")[0]))
  expected = np.mean([apart(*sorted(found[:2])) for found in sizes.values() if len(found) > 1])
  assert same["judge/several_real_diversity_within"] == pytest.approx(expected, rel=1e-5)
