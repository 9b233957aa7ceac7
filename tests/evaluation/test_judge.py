"""Retrieval, colours and diversity on hand-made arrays, and a real CLIP's plumbing."""

import colorsys
import itertools
import math

import numpy as np
import pytest

from aurora_jax.evaluation import judge


def one_hot(*positions, width):
  return np.eye(width, dtype=np.float32)[list(positions)]


def test_captions_are_compared_by_their_words():
  same = ["flag: Japan", "Flag  Japan", "flag - japan", "(flag) “Japan”"]
  assert len({judge.caption_key(c) for c in same}) == 1
  different = ["keycap: #", "keycap: *", "keycap: 1", "keycap", "heart red", "red heart", "café", "cafe"]
  assert len({judge.caption_key(c) for c in different}) == len(different)


def test_merge_captions():
  first, group = judge.merge_captions(["a b", "c", "A: B", "d", "C!"])
  assert first.tolist() == [0, 1, 3] and group.tolist() == [0, 1, 0, 2, 1]


def test_perfect_and_hopeless_pictures():
  captions = [f"caption {n}" for n in range(50)]
  texts = np.eye(50, dtype=np.float32)
  right = judge.retrieval(texts * 7, np.arange(50), texts * 3, captions)
  assert (right.top1_of_few, right.top1_of_all) == (1.0, 1.0)
  assert (right.few, right.captions, right.images) == (32, 50, 50)
  assert right.chance_of_few == 1 / 32 and right.chance_of_all == 1 / 50
  wrong = judge.retrieval(-texts, np.arange(50), texts, captions)
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
  result = judge.retrieval(images, right, texts, captions, few=4)
  assert result.top1_of_few == pytest.approx(np.mean(wins))
  assert 0 < result.top1_of_all <= result.top1_of_few < 1
  assert result.top1_of_all == np.mean(similarity.argmax(1) == right)


@pytest.mark.parametrize("better, expected", [(0, 1.0), (1, 1 - 31 / 1917), (1886, 1 / math.comb(1917, 31)), (1887, 0)])
def test_chance_to_win(better, expected):
  assert judge.chance_to_win(np.array([better]), 1917, 31)[0] == pytest.approx(expected, rel=1e-9)


def test_random_pictures_score_at_chance():
  rng = np.random.default_rng(1)
  texts, images = rng.normal(size=(200, 64)), rng.normal(size=(4000, 64))
  result = judge.retrieval(images, rng.integers(0, 200, 4000), texts, [f"c{n}" for n in range(200)])
  assert result.top1_of_few == pytest.approx(1 / 32, abs=0.01)
  assert result.top1_of_all == pytest.approx(1 / 200, abs=0.005)


def test_same_words_are_one_caption():
  """A picture that matches the other spelling of its own caption is right."""
  captions = ["red heart", "Red: heart", "moon"]
  result = judge.retrieval(one_hot(0, 0, 2, width=3), [0, 1, 2], one_hot(0, 1, 2, width=3), captions)
  assert result.captions == 2 and result.top1_of_all == 1.0 and result.few == 2


def test_ties_and_numbers_that_are_none_never_win():
  captions = ["a", "b", "c"]
  same = np.ones((3, 4), np.float32)
  assert judge.retrieval(np.ones((3, 4)), [0, 1, 2], same, captions).top1_of_all == 0.0
  images = one_hot(0, 1, 2, width=3)
  images[1] = np.nan
  assert judge.retrieval(images, [0, 1, 2], one_hot(0, 1, 2, width=3), captions).top1_of_all == pytest.approx(2 / 3)
  assert judge.retrieval(0 * one_hot(0, width=3), [0], one_hot(0, 1, 2, width=3), captions).top1_of_few == 0.0


@pytest.mark.parametrize("indices", [[0, 3], [-1, 0], [0]])
def test_indices_that_do_not_fit(indices):
  with pytest.raises(ValueError):
    judge.retrieval(np.ones((2, 4)), indices, np.ones((3, 4)), ["a", "b", "c"])


@pytest.mark.parametrize("hue", [0, 5, 60, 118, 200, 240, 300, 355])
def test_mean_hue_of_one_colour_on_white(hue):
  image = np.ones((16, 16, 3))
  image[4:12, 4:12] = np.array(colorsys.hsv_to_rgb(hue / 360, 0.9, 0.8)) * 2 - 1
  image[3] = -1  # a black outline has no hue
  colour = judge.mean_colour(image)
  # The hexagonal hue of HSV and the angle used here are equal at multiples of 60 and at most 1.12 degrees apart.
  assert judge.hue_difference(colour.hue, hue) < 1.2
  assert colour.share == 64 / 256
  assert np.allclose(colour.rgb, colorsys.hsv_to_rgb(hue / 360, 0.9, 0.8))


def test_mean_hue_goes_round_the_circle():
  image = np.ones((2, 2, 3))
  image[0, 0], image[0, 1] = (np.array(colorsys.hsv_to_rgb(h / 360, 1, 1)) * 2 - 1 for h in (350, 10))
  assert judge.hue_difference(judge.mean_colour(image).hue, 0) < 1e-6


def test_strong_colours_weigh_more():
  image = np.ones((2, 2, 3))
  image[0, 0] = np.array(colorsys.hsv_to_rgb(0, 1, 1)) * 2 - 1
  image[0, 1] = np.array(colorsys.hsv_to_rgb(1 / 3, 0.2, 1)) * 2 - 1
  assert judge.hue_difference(judge.mean_colour(image).hue, 0) < 15


def test_grey_has_no_hue_and_agrees_with_nothing():
  check = judge.check_colour("red heart", np.zeros((2, 4, 4, 3)), np.broadcast_to([1.0, -1, -1], (4, 4, 3)))
  assert math.isnan(check.generated.hue) and not check.agrees and check.real.hue == 0
  assert judge.colour_figures([check]) == {
    "judge/colour/red_heart/hue_real": 0.0,
    "judge/colour/right": 0.0,
    "judge/colour/asked": 1.0,
  }


@pytest.mark.parametrize("hue, agrees", [(230, True), (210, True), (265, False), (0, False)])
def test_colours_agree_within_the_tolerance(hue, agrees):
  real, made = (np.broadcast_to(np.array(colorsys.hsv_to_rgb(h / 360, 1, 1)) * 2 - 1, (4, 4, 3)) for h in (225, hue))
  check = judge.check_colour("blue circle", made[None], real)
  assert check.agrees is agrees
  figures = judge.colour_figures([check])
  assert figures["judge/colour/right"] == float(agrees)
  assert figures["judge/colour/blue_circle/difference"] == pytest.approx(abs((hue - 225 + 180) % 360 - 180), abs=2)


def test_hue_difference():
  assert judge.hue_difference(350, 20) == 30 and judge.hue_difference(20, 350) == 30
  assert judge.hue_difference(0, 180) == 180 and judge.hue_difference(90, 90) == 0


def test_diversity_by_hand():
  # One pixel per picture: prompt 0 shows 0 and 0.5, prompt 1 shows -1 and -1.
  images = np.array([[0.0, 0.5], [-1.0, -1.0]])[:, :, None, None, None] * np.ones((2, 2, 1, 1, 3))
  result = judge.diversity(images)
  assert result.within == pytest.approx((0.5 + 0.0) / 2, abs=1e-6)
  assert result.between == pytest.approx((1 + 1 + 1.5 + 1.5) / 4)
  assert result.ratio == pytest.approx(result.within / result.between)


def test_diversity_without_pairs():
  assert math.isnan(judge.diversity(np.zeros((3, 1, 2, 2, 3))).within)
  assert math.isnan(judge.diversity(np.zeros((1, 3, 2, 2, 3))).between)


def test_in_batches_pads_to_one_shape():
  shapes = []

  def double(x):
    shapes.append(x.shape)
    return 2 * x

  values = np.arange(14).reshape(7, 2)
  assert (judge.in_batches(double, (values,), 3) == 2 * values).all()
  assert shapes == [(3, 2)] * 3


def fake_judge(captions):
  """Reads the caption's position off the first pixel's red."""
  return judge.Judge(
    embed_images=lambda images: np.eye(len(captions))[np.rint(np.asarray(images)[:, 0, 0, 0]).astype(int)],
    embed_captions=lambda words: np.eye(len(captions))[[captions.index(w) for w in words]],
  )


def test_frechet_distances_of_embeddings():
  """Sets of known moments: one moved by 3 in one direction is at 9 from the other, whose halves are at 16."""
  rng = np.random.default_rng(0)
  half = rng.standard_normal((50, 3)).astype(np.float32)
  real = np.stack([half, half + np.array([0, 4, 0], np.float32)], axis=1).reshape(100, 3)
  features = {0: real, 1: real[::-1] + np.array([3, 0, 0], np.float32)}
  clip = judge.Judge(lambda pictures: features[int(pictures[0, 0, 0, 0])][: len(pictures)], None)
  pictures = lambda kind, count=100: np.full((count, 2, 2, 3), kind, np.float32)
  figures = judge.frechet_figures(clip, pictures(1), pictures(0))
  assert figures == pytest.approx({"judge/frechet": 9, "judge/frechet_real_halves": 16}, rel=1e-5)
  assert set(judge.frechet_figures(clip, pictures(1), pictures(0, 1))) == {"judge/frechet"}


def test_judge_figures_repeat_each_caption_over_its_latents():
  captions = [f"caption {n}" for n in range(40)]
  images = np.zeros((3, 2, 4, 4, 3))
  images[..., 0] = np.array([[5, 5], [6, 39], [0, 0]])[:, :, None, None]
  figures = judge.judge_figures(fake_judge(captions), images, [5, 6, 7], captions, prefix="judge/heldout_")
  assert figures["judge/heldout_top1_of_all"] == pytest.approx(3 / 6)
  assert figures["judge/heldout_top1_of_32"] == pytest.approx(3 / 6)  # the wrong ones tie with all but one: lost
  assert figures["judge/heldout_images"] == 6 and figures["judge/heldout_captions"] == 40
  assert figures["judge/heldout_diversity_within"] > 0
  single = judge.judge_figures(fake_judge(captions), images[:, :1], [5, 6, 7], captions)
  assert "judge/diversity_within" not in single and single["judge/top1_of_all"] == pytest.approx(2 / 3)


def test_a_real_clip_as_a_judge(tiny_clip):
  made = judge.from_clip(tiny_clip.bundle, batch_size=2)
  words, text = tiny_clip.words, tiny_clip.text.embedding
  np.testing.assert_allclose(made.embed_images(tiny_clip.images), tiny_clip.image_embeddings, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(made.embed_captions(words), text, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(made.embed_captions(words[::-1]), text[::-1], rtol=1e-4, atol=1e-5)
  assert made.retrieval(tiny_clip.images, [0, 1, 2], words).images == 3
