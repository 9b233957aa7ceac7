"""Caption retrieval on hand-made embeddings."""

import itertools
import math

import numpy as np
import pytest

from aurora_jax.evaluation import retrieval


def one_hot(*positions, width):
  return np.eye(width, dtype=np.float32)[list(positions)]


def test_captions_are_compared_by_their_words():
  same = ["flag: Japan", "Flag  Japan", "flag - japan", "(flag) “Japan”"]
  assert len({retrieval.caption_key(c) for c in same}) == 1
  different = ["keycap: #", "keycap: *", "keycap: 1", "keycap", "heart red", "red heart", "café", "cafe"]
  assert len({retrieval.caption_key(c) for c in different}) == len(different)


def test_merge_captions():
  first, group = retrieval.merge_captions(["a b", "c", "A: B", "d", "C!"])
  assert first.tolist() == [0, 1, 3] and group.tolist() == [0, 1, 0, 2, 1]


def test_perfect_and_hopeless_images():
  captions = [f"caption {n}" for n in range(50)]
  texts = np.eye(50, dtype=np.float32)
  right = retrieval.retrieval(texts * 7, np.arange(50), texts * 3, captions)
  assert (right.top1_of_few, right.top1_of_all) == (1.0, 1.0)
  assert (right.few, right.captions, right.images) == (32, 50, 50)
  assert right.chance_of_few == 1 / 32 and right.chance_of_all == 1 / 50
  wrong = retrieval.retrieval(-texts, np.arange(50), texts, captions)
  assert (wrong.top1_of_few, wrong.top1_of_all) == (0.0, 0.0)


def test_the_few_are_averaged_over_all_sets_of_distractors():
  """Against an enumeration of every set."""
  rng = np.random.default_rng(0)
  captions = list("abcdefg")
  texts, images = rng.normal(size=(7, 5)), rng.normal(size=(9, 5))
  right = rng.integers(0, 7, 9)
  similarity = images @ (texts / np.linalg.norm(texts, axis=1, keepdims=True)).T
  wins = [
    all(similarity[n, right[n]] > similarity[n, other] for other in chosen)
    for n in range(9)
    for chosen in itertools.combinations([c for c in range(7) if c != right[n]], 3)
  ]
  result = retrieval.retrieval(images, right, texts, captions, few=4)
  assert result.top1_of_few == pytest.approx(np.mean(wins))
  assert 0 < result.top1_of_all <= result.top1_of_few < 1
  assert result.top1_of_all == np.mean(similarity.argmax(1) == right)


@pytest.mark.parametrize("better, expected", [(0, 1.0), (1, 1 - 31 / 1917), (1886, 1 / math.comb(1917, 31)), (1887, 0)])
def test_chance_to_win(better, expected):
  assert retrieval.chance_to_win(np.array([better]), 1917, 31)[0] == pytest.approx(expected, rel=1e-9)


def test_random_images_score_at_chance():
  rng = np.random.default_rng(1)
  texts, images = rng.normal(size=(200, 64)), rng.normal(size=(4000, 64))
  result = retrieval.retrieval(images, rng.integers(0, 200, 4000), texts, [f"c{n}" for n in range(200)])
  assert result.top1_of_few == pytest.approx(1 / 32, abs=0.01)
  assert result.top1_of_all == pytest.approx(1 / 200, abs=0.005)


def test_same_words_are_one_caption():
  """An image that matches the other spelling of its own caption is right."""
  captions = ["red heart", "Red: heart", "moon"]
  result = retrieval.retrieval(one_hot(0, 0, 2, width=3), [0, 1, 2], one_hot(0, 1, 2, width=3), captions)
  assert result.captions == 2 and result.top1_of_all == 1.0 and result.few == 2


def test_ties_and_nan_never_win():
  captions = ["a", "b", "c"]
  same = np.ones((3, 4), np.float32)
  assert retrieval.retrieval(np.ones((3, 4)), [0, 1, 2], same, captions).top1_of_all == 0.0
  images = one_hot(0, 1, 2, width=3)
  images[1] = np.nan
  assert retrieval.retrieval(images, [0, 1, 2], one_hot(0, 1, 2, width=3), captions).top1_of_all == pytest.approx(2 / 3)
  assert retrieval.retrieval(0 * one_hot(0, width=3), [0], one_hot(0, 1, 2, width=3), captions).top1_of_few == 0.0


@pytest.mark.parametrize("indices", [[0, 3], [-1, 0], [0]])
def test_indices_that_do_not_fit(indices):
  with pytest.raises(ValueError):
    retrieval.retrieval(np.ones((2, 4)), indices, np.ones((3, 4)), ["a", "b", "c"])
