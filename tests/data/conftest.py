"""A small data set that several tests read."""

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import build, sources

COLOURS = ("red", "green", "blue", "black")
SHAPES = ("square", "circle", "heart", "star", "moon")


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
  """20 images of 16 x 16 random pixels, each with two captions, the first one of two words."""
  folder = tmp_path_factory.mktemp("pictures")
  generator = np.random.default_rng(7)
  for colour in COLOURS:
    for shape in SHAPES:
      pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
      Image.fromarray(pixels).save(folder / f"{colour}_{shape}.png")
      (folder / f"{colour}_{shape}.txt").write_text(f"{colour} {shape}\na {shape} in {colour}\nthe {shape}\n")
  return folder


@pytest.fixture(scope="session")
def data_folder(picture_folder, tmp_path_factory):
  """A data set of those images: 16 x 16, 3 shards of training, 1 held out."""
  out = tmp_path_factory.mktemp("data") / "shapes"
  build.build(sources.folder(picture_folder), out, resolution=16, shards=3, heldout_fraction=0.2, name="shapes")
  return out


@pytest.fixture(scope="session")
def tf():
  """TensorFlow, imported by the first test that needs it: that takes seconds."""
  import tensorflow

  return tensorflow
