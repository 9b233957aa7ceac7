"""Captions that are drawn by the weights in a record, and by position where there are none."""

import dataclasses

import numpy as np
import pytest
import source_files as made

from aurora_jax.data import loader, schema
from aurora_jax.data.dataset import Dataset
from aurora_jax.performance import data_benchmark

CAPTIONS = ("alt text", "rewritten", "tags")
BATCH, STEPS = 16, 60


def write(folder, weights, captions=CAPTIONS):
  """Eight records; `weights` is None or the feature of each."""
  features = {} if weights is None else {schema.CAPTION_WEIGHT: np.array(weights, np.float32)}
  examples = [schema.Example(made.encoded(n, side=8), captions, 8, 8, str(n), features) for n in range(8)]
  data_benchmark.write_dataset(folder, examples, 8, 1)
  return Dataset.open(folder)


def drawn(dataset, *, start=0, steps=STEPS, **settings):
  """The captions of some steps, [step][slot]."""
  settings = {"resolution": 8, "batch_size": BATCH, "seed": 3, "workers": 1} | settings
  with loader.train_batches(dataset, start_step=start, **settings) as batches:
    return [next(batches)["caption"] for _ in range(steps)]


def shares(found):
  flat = np.array(found).reshape(-1)
  return np.array([(flat == caption).mean() for caption in CAPTIONS])


def test_weights_are_honored_and_the_draw_depends_on_step_and_slot_alone(tmp_path):
  dataset = write(tmp_path / "data", (0.5, 0.3, 0.2))
  found = drawn(dataset)
  np.testing.assert_allclose(shares(found), (0.5, 0.3, 0.2), atol=4 * np.sqrt(0.25 / (BATCH * STEPS)))
  assert drawn(dataset, start=40, steps=5, workers=2) == found[40:45]
  assert drawn(dataset, steps=5, cache_bytes=0) == found[:5]
  assert [captions[8:] for captions in found[:5]] == drawn(dataset, steps=5, slots=range(8, 16))
  assert drawn(dataset, seed=4, steps=5) != found[:5]
  # The weights stand in for this probability.
  assert drawn(dataset, steps=5, primary_caption_probability=0.0) == found[:5]


def test_weights_of_zero_and_single_captions(tmp_path):
  assert shares(drawn(write(tmp_path / "zero", (0, 2, 0)))).tolist() == [0, 1, 0]
  assert shares(drawn(write(tmp_path / "one", (0.7,), CAPTIONS[:1]), steps=3)).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
  "weights", [(0.5, 0.5), (0, 0, 0), (1, -1, 1), (1, float("nan"), 1), (float("inf"), 1, 1), ()], ids=str
)
def test_weights_that_are_none(tmp_path, weights):
  """Such a feature may come from another program: the captions are chosen as without it."""
  plain = drawn(write(tmp_path / "plain", None), steps=10, primary_caption_probability=0.6)
  assert 0.4 < shares(plain)[0] < 0.8
  assert drawn(write(tmp_path / "data", weights), steps=10, primary_caption_probability=0.6) == plain


def test_ids_are_those_of_the_primary_caption(tmp_path):
  dataset = write(tmp_path / "data", (0, 1, 0))
  maker = loader.BatchMaker(dataset, 8, BATCH, 0)
  batch = maker(0)
  assert set(batch["caption"]) == {"rewritten"} and set(batch["caption_id"]) == {schema.caption_id("alt text")}
  augmented = dataclasses.replace(maker, augment=loader.Augment(shift=0.1))(0)
  assert augmented["caption"] == batch["caption"] and not np.array_equal(augmented["image"], batch["image"])
