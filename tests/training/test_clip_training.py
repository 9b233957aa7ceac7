"""The training of a small CLIP: augmentation, schedule, and that it learns, repeatably."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import build, loader, sources
from aurora_jax.data.dataset import Dataset
from aurora_jax.errors import UserError
from aurora_jax.ops import augment as augment_lib
from aurora_jax.ops.augment import Augmentation
from aurora_jax.training import clip

pytestmark = pytest.mark.slow

NOTHING = Augmentation(shift=0, scale=0, rotate=0, coarsen=0, colour=0, noise=0)
TINY = clip.ClipTraining(
  resolution=16,
  patch=4,
  image_width=16,
  image_layers=1,
  text_width=16,
  text_layers=1,
  heads=2,
  embedding_width=16,
  vocabulary_size=600,
  batch_size=12,
  warmup_steps=20,
)
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}
PLACES = {"left": (0, 4, 8, 12), "right": (8, 4, 16, 12), "top": (4, 0, 12, 8), "bottom": (4, 8, 12, 16)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """16 images: a square of one of four colours at one of four places."""
  folder = tmp_path_factory.mktemp("images")
  for (colour, rgb), (place, box) in itertools.product(COLOURS.items(), PLACES.items()):
    image = Image.new("RGB", (16, 16), "white")
    image.paste(rgb, box)
    image.save(folder / f"{colour}_{place}.png")
    (folder / f"{colour}_{place}.txt").write_text(f"{colour} {place}\n{place} in {colour}\n")
  out = tmp_path_factory.mktemp("data") / "squares"
  build.build(sources.folder(folder), out, resolution=16, shards=2, heldout_fraction=0.2, name="squares")
  return out


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation


@pytest.fixture(scope="module")
def dots():
  """64 times the same image: a black square around the center of a white one."""
  images = np.ones((64, 16, 16, 3), np.float32)
  images[:, 6:10, 6:10] = -1
  return images


compiled_augment = jax.jit(augment_lib.augment, static_argnums=2)  # once per `Augmentation` and shape


def augment(images, seed=0, **ranges):
  return np.asarray(compiled_augment(jax.random.key(seed), images, dataclasses.replace(NOTHING, **ranges)))


def centres(images):
  """Centre of mass of what is not white, in pixels [B, 2]."""
  mass = (1 - images.mean(axis=-1)) / 2
  grid = np.arange(images.shape[1])
  return np.stack([(mass.sum(axis=3 - axis) @ grid) for axis in (1, 2)], axis=1) / mass.sum(axis=(1, 2))[:, None]


def test_nothing_changes_nothing(dots):
  images = np.random.default_rng(0).uniform(-1, 1, dots.shape).astype(np.float32)
  np.testing.assert_allclose(augment(images), images, atol=1e-5)


def test_shift(dots):
  moved = augment(dots, shift=0.2)
  offsets = centres(moved) - 7.5
  limit = 0.2 * 16
  assert np.abs(offsets).max() <= limit + 1e-3
  assert (offsets.max(axis=0) > 0.7 * limit).all() and (offsets.min(axis=0) < -0.7 * limit).all()
  assert np.abs(np.corrcoef(offsets.T)[0, 1]) < 0.4  # rows and columns on their own
  np.testing.assert_allclose((1 - moved).sum(axis=(1, 2, 3)), (1 - dots).sum(axis=(1, 2, 3)), rtol=1e-3)
  assert moved.max() <= 1 + 1e-6  # white comes in


def test_scale(dots):
  area = (1 - augment(dots, scale=0.3)).sum(axis=(1, 2, 3)) / (1 - dots[0]).sum()
  assert np.exp(-0.6) * 0.97 < area.min() < 0.8 and 1.25 < area.max() < np.exp(0.6) * 1.03
  np.testing.assert_allclose(centres(augment(dots, scale=0.3)), 7.5, atol=1e-3)


def test_rotate():
  bars = np.ones((64, 17, 17, 3), np.float32)
  bars[:, 8] = -1
  turned = augment(bars, rotate=45)
  mass = (1 - turned.mean(axis=-1)) / 2
  grid = np.arange(17) - 8.0
  second = [[np.einsum("bhw,h,w->b", mass, grid**i, grid**j) for i, j in ((1, 1), (0, 2), (2, 0))]]
  cross, columns, rows = second[0]
  angles = np.degrees(0.5 * np.arctan2(2 * cross, columns - rows))
  assert np.abs(angles).max() <= 46 and angles.max() > 25 and angles.min() < -25


def test_coarsen(dots):
  coarse = augment(dots, coarsen=0.5)
  changed = np.abs(coarse - dots).max(axis=(1, 2, 3)) > 1e-3
  assert 0.3 < changed.mean() < 0.7
  np.testing.assert_allclose((1 - coarse).sum(axis=(1, 2, 3)), (1 - dots).sum(axis=(1, 2, 3)), rtol=0.05)


def test_colour(dots):
  offset = augment(dots, colour=0.2)[:, 0, 0] - 1  # of white
  contrast = (augment(dots, colour=0.2)[:, 0, 0] - augment(dots, colour=0.2)[:, 7, 7]) / 2
  for values, middle in ((offset, 0), (contrast, 1)):
    assert np.abs(values - middle).max() <= 0.2 + 1e-5 and values.std(axis=0).min() > 0.08
    assert np.abs(np.corrcoef(values.T)[np.triu_indices(3, 1)]).max() < 0.4  # each colour on its own


def test_noise(dots):
  noise = (augment(dots, noise=0.3) - dots).reshape(64, -1)
  deviations = noise.std(axis=1)
  assert deviations.max() <= 0.33 and deviations.min() < 0.05 and deviations.max() > 0.25
  correlations = np.corrcoef(noise[deviations > 0.05])
  assert np.abs(correlations[np.triu_indices(len(correlations), 1)]).max() < 0.3


def test_every_picture_in_its_own_way_and_repeatably(dots):
  full = dataclasses.asdict(Augmentation())
  once = augment(dots, **full)
  assert (once == augment(dots, **full)).all()
  assert not np.isclose(once, augment(dots, seed=1, **full)).all()
  assert len({image.tobytes() for image in once}) == 64
  assert np.isfinite(once).all()


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module", autouse=True)
def _one_program():
  """Runs with the same settings share their compiled step, of which the seed is an argument."""
  make_step = functools.cache(clip.make_step)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(clip, "make_step", lambda config, settings: make_step(config, dataclasses.replace(settings, seed=0)))
    yield


def test_learning_rate():
  settings = clip.ClipTraining(learning_rate=2.0, warmup_steps=10)
  rates = np.array([clip.learning_rate(settings, step, 110) for step in range(111)])
  np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
  assert rates.argmax() in (9, 10) and (np.diff(rates[10:]) < 0).all()
  assert rates[60] == pytest.approx(1) and rates[110] == pytest.approx(0, abs=1e-6)
  # What a time limit needs: before it is known how many steps there will be, nothing depends on that.
  assert (rates[:10] == [clip.learning_rate(settings, step, 10**9) for step in range(10)]).all()


def first_batch(settings, data):
  dataset = Dataset.open(data)
  tokenizer = clip.build_tokenizer(dataset.captions(), settings)
  config = clip.clip_config(settings, tokenizer, clip.measure_colors(dataset, settings.resolution))
  with loader.train_batches(dataset, resolution=16, batch_size=12, seed=0, tokenizer=tokenizer) as batches:
    batch = next(batches)
  return config, {name: batch[name] for name in ("image", "tokens", "caption_id")}


def test_step(data):
  config, batch = first_batch(TINY, data)
  state, step = clip.init_state(config, TINY), clip.make_step(config, TINY)
  before, compiled = jax.tree.map(np.asarray, state.params), set()
  for number in range(3):
    state, metrics = step(state, batch, np.int32(50))
    assert int(state.step) == number + 1
    compiled.add(step._cache_size())
  assert len(compiled) == 1  # no second compilation, of weak types for one
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
  still = jax.tree.map(lambda a, b: bool((a == b).all()), before, state.params)
  assert not any(jax.tree.leaves(still)), still
  assert metrics["learning_rate"] == pytest.approx(TINY.learning_rate * 3 / 20)
  assert all(np.isfinite(value) for value in metrics.values())


def test_the_temperature_is_limited(data):
  config, batch = first_batch(TINY, data)
  state, step = clip.init_state(config, TINY), clip.make_step(config, TINY)
  state.params["log_scale"] = jnp.float32(9.0)
  state, _ = step(state, batch, np.int32(50))
  assert np.exp(state.params["log_scale"]) == pytest.approx(100)


def test_same_captions_are_no_negatives(data):
  """A batch of one caption, of one image under several names, has nothing to tell apart: no loss, no gradient."""
  config, batch = first_batch(TINY, data)
  step = clip.make_step(config, TINY)
  for change in ({"tokens": np.repeat(batch["tokens"][:1], 12, axis=0)}, {"caption_id": np.zeros(12, np.int32)}):
    _, metrics = step(clip.init_state(config, TINY), batch | change, np.int32(50))
    assert metrics["loss"] == pytest.approx(0, abs=1e-5)
  _, metrics = step(clip.init_state(config, TINY), batch, np.int32(50))
  assert metrics["loss"] > 1


def test_it_learns(data):
  dataset = Dataset.open(data)
  seen = []
  bundle, steps = clip.train_clip(dataset, TINY, steps=300, on_step=lambda *report: seen.append(report))
  assert steps == 300
  assert [step for step, _, _ in seen] == list(range(1, 301)) and {total for _, total, _ in seen} == {300}
  assert np.mean([metrics["accuracy"] for _, _, metrics in seen[-10:]]) > 0.8
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(bundle.variables))

  # The images find their captions.
  images = loader.to_float(loader.load_images(dataset, 16))
  tokens = bundle.tokenizer([captions[0] for captions in dataset.captions()])
  text, image, _ = jax.jit(bundle.module().apply)(bundle.variables, tokens, images)
  found = np.argmax(clip.losses.normalize(image) @ clip.losses.normalize(text.embedding).T, axis=1)
  assert np.mean(found == np.arange(len(images))) > 0.8


def test_the_same_steps_give_the_same_weights(data):
  dataset = Dataset.open(data)
  bundle, again = (clip.train_clip(dataset, TINY, steps=50)[0] for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, bundle.variables, again.variables)
  other, _ = clip.train_clip(dataset, dataclasses.replace(TINY, seed=1), steps=2)
  assert not np.allclose(
    bundle.variables["params"]["image"]["patch_embedding"], other.variables["params"]["image"]["patch_embedding"]
  )


def test_seconds_become_steps(data, monkeypatch):
  """The clock says that a step takes 2 s and compilation 10 s: what is left of 60 s is 25 steps."""
  dataset, now = Dataset.open(data), iter([100.0, 100 + 10 + 2 * 4, 100 + 10 + 2 * 20])
  monkeypatch.setattr(clip, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
  totals = []
  bundle, steps = clip.train_clip(dataset, TINY, seconds=60, on_step=lambda step, total, _: totals.append(total))
  assert steps == TINY.warmup_steps + (60 - 10 - 40) // 2
  assert totals[:19] == [None] * 19 and set(totals[20:]) == {steps}
  monkeypatch.undo()
  same, _ = clip.train_clip(dataset, TINY, steps=steps)
  jax.tree.map(np.testing.assert_array_equal, bundle.variables, same.variables)


def test_context_length_follows_the_captions():
  short = [("red heart",)] * 50
  assert clip.build_tokenizer(short, TINY).context_length == 12
  long = [(" ".join("abcdefghijklmnopqr"),)] * 50
  assert clip.build_tokenizer(long, TINY).context_length == 20
  assert clip.build_tokenizer(short * 10 + long[:1], TINY).context_length == 12  # one in a hundred may be cut
  assert clip.build_tokenizer([("x " * 500,)] * 9, TINY).context_length == 77
  assert clip.build_tokenizer(short, dataclasses.replace(TINY, context_length=5)).context_length == 5


def test_joined_splits(data):
  train, heldout = Dataset.open(data), Dataset.open(data, "heldout")
  joined = clip.Joined(train, heldout)
  assert len(joined) == len(train) + len(heldout) == 16 and len(heldout) > 0
  assert joined.captions() == train.captions() + heldout.captions()
  assert [joined[i].captions[0] for i in range(16)] == [captions[0] for captions in joined.captions()]
  assert joined.place(len(train)) == heldout.place(0) and joined.place(0) == train.place(0)
  np.testing.assert_array_equal(loader.load_images(joined, 16)[len(train) :], loader.load_images(heldout, 16))


@pytest.mark.parametrize(
  "change, length, words",
  [
    ({}, {}, "either a number of steps or of seconds"),
    ({}, {"steps": 0}, "nothing to train: 0 steps"),
    ({}, {"seconds": -1.0}, "nothing to train: -1.0 seconds"),
    ({"batch_size": 1}, {"steps": 2}, "a batch of 1 has no negatives"),
    ({"patch": 5}, {"steps": 2}, "size 16 is not a multiple of the patch 5"),
    ({"heads": 3}, {"steps": 2}, "width 16 is not a multiple of 3 heads"),
    ({"resolution": 32}, {"steps": 2}, "resolution 32"),
    ({"vocabulary_size": 100}, {"steps": 2}, "vocabulary of 100 is too small"),
    ({"learning_rate": 1e30}, {"steps": 30}, "training diverged: the loss is nan"),
  ],
)
def test_bad_settings(data, change, length, words):
  with pytest.raises(UserError, match=words):
    clip.train_clip(Dataset.open(data), dataclasses.replace(TINY, **change), **length)
