"""Smooth warps: exact where they do nothing, geometrically right where they do something."""

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import augment
from aurora_jax.data.augment import Augment
from aurora_jax.errors import UserError

NONE = [0.5, 0.5, 0.5, 0.5, 0.0]
RESOLUTION = 16


def picture(side):
  """Smooth, without symmetry, white at the border."""
  y, x = (np.mgrid[:side, :side] + 0.5) / side
  spot = lambda cx, cy, r: np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / r**2)
  darkness = np.stack([spot(0.35, 0.4, 0.1), spot(0.6, 0.45, 0.12), spot(0.45, 0.65, 0.09)], axis=-1)
  return np.round(255 * (1 - darkness)).astype(np.uint8)


def warped(pixels, config, draws):
  prepared = augment.prepare(pixels, RESOLUTION)
  inverse = augment.inverse_affine(config, np.array([draws]))[0]
  return augment.warp(prepared, RESOLUTION, inverse.tolist())


def reduced(pixels):
  return np.asarray(Image.fromarray(pixels).reduce(len(pixels) // RESOLUTION))


def centre(pixels):
  """Center of the darkness of each channel, in fractions of the side, float [3, 2] (x, y)."""
  darkness = 255.0 - pixels
  y, x = (np.mgrid[: len(pixels), : len(pixels)] + 0.5) / len(pixels)
  return np.stack([(darkness * axis[..., None]).sum((0, 1)) / darkness.sum((0, 1)) for axis in (x, y)], axis=-1)


sides = pytest.mark.parametrize("side", [RESOLUTION, 2 * RESOLUTION])
ALL = Augment(shift=0.2, scale=0.5, rotate=30, flip=True)


@sides
def test_no_change_is_exact(side):
  pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
  np.testing.assert_array_equal(warped(pixels, ALL, NONE), reduced(pixels))


@sides
def test_shift(side):
  draws = [1.0, 0.25, 0.5, 0.5, 0.0]  # all the way right, half the way up
  moved = centre(warped(picture(side), Augment(shift=0.2), draws))
  np.testing.assert_allclose(moved - centre(reduced(picture(side))), np.tile([0.2, -0.1], (3, 1)), atol=0.01)


@sides
def test_scale(side):
  before = centre(reduced(picture(side))) - 0.5
  for draw, factor in ((1.0, 1.5), (0.0, 1 / 1.5)):
    after = centre(warped(picture(side), Augment(scale=0.5), [0.5, 0.5, draw, 0.5, 0.0])) - 0.5
    np.testing.assert_allclose(after, factor * before, atol=0.01)


@sides
def test_rotate(side):
  x, y = (centre(reduced(picture(side))) - 0.5).T
  after = centre(warped(picture(side), Augment(rotate=90), [0.5, 0.5, 0.5, 1.0, 0.0])) - 0.5
  np.testing.assert_allclose(after, np.stack([-y, x], axis=-1), atol=0.01)
  np.testing.assert_allclose(
    warped(picture(side), Augment(rotate=180), [0.5, 0.5, 0.5, 1.0, 0.0]).astype(int),
    reduced(picture(side))[::-1, ::-1].astype(int),
    atol=2,
  )


@sides
def test_flip(side):
  plain = warped(picture(side), ALL, NONE)
  mirrored = warped(picture(side), ALL, NONE[:4] + [0.9])
  np.testing.assert_allclose(mirrored.astype(int), plain[:, ::-1].astype(int), atol=1)
  unflipped = Augment(shift=0.2, scale=0.5, rotate=30)
  np.testing.assert_array_equal(warped(picture(side), unflipped, NONE[:4] + [0.9]), plain)


@sides
def test_white_comes_in(side):
  black = np.zeros((side, side, 3), np.uint8)
  result = warped(black, Augment(shift=0.25), [1.0, 0.5, 0.5, 0.5, 0.0])
  assert (result[:, :4] == 255).all() and (result[:, 5:] == 0).all()
  shrunk = warped(black, Augment(scale=1), [0.5, 0.5, 0.0, 0.5, 0.0])
  assert (shrunk[:3] == 255).all() and (shrunk[5:-5, 5:-5] == 0).all()


def test_doubled_pictures_do_not_flicker():
  # A pattern that is gray at the asked resolution stays gray wherever it is shifted to.
  pixels = np.zeros((2 * RESOLUTION, 2 * RESOLUTION, 3), np.uint8)
  pixels[::2, ::2] = pixels[1::2, 1::2] = 255
  for draw in np.linspace(0, 1, 17):
    result = warped(pixels, Augment(shift=0.1), [draw, draw / 3 + 0.3, 0.5, 0.5, 0.0])
    np.testing.assert_allclose(result[3:-3, 3:-3], 127.5, atol=1)


def test_working_side():
  assert augment.working_side(64, 32) == 64
  assert augment.working_side(100, 32) == 64
  assert augment.working_side(63, 32) == 32
  assert augment.working_side(32, 32) == 32


@pytest.mark.parametrize(
  "values, words",
  [
    ({"shift": -0.1}, "augment shift must be between 0 and 1, not -0.1"),
    ({"scale": 11}, "augment scale must be between 0 and 10, not 11"),
    ({"rotate": 181}, "augment rotate must be between 0 and 180, not 181"),
    ({"rotate": float("nan")}, "not nan"),
  ],
)
def test_bad_values(values, words):
  with pytest.raises(UserError, match=words):
    Augment(**values)


def test_active():
  assert not Augment().active
  for values in ({"shift": 0.1}, {"scale": 0.1}, {"rotate": 1}, {"flip": True}):
    assert Augment(**values).active
