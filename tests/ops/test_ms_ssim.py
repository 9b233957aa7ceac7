"""MS-SSIM against the numbers of MEGAN's released code and against SciPy's filters."""

import math
import pathlib

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
from safetensors.numpy import load_file

from aurora_jax.errors import UserError
from aurora_jax.ops import ms_ssim

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "megan" / "msssim.safetensors"


@pytest.fixture(scope="module")
def golden():
  return load_file(GOLDEN)


@pytest.mark.parametrize("side", [32, 64])
def test_matches_the_release(golden, side):
  a, b = golden[f"in.a{side}"], golden[f"in.b{side}"]
  np.testing.assert_allclose(
    ms_ssim.level_similarities(a, b), golden[f"out.per_level_ssim_cs{side}"], rtol=1e-9, atol=1e-12
  )
  assert ms_ssim.ms_ssim(a, b) == pytest.approx(golden[f"out.msssim{side}"].item(), rel=1e-9)
  assert ms_ssim.ms_ssim(a, a) == pytest.approx(golden[f"out.self{side}"].item(), rel=1e-12)
  assert ms_ssim.ms_ssim(b.astype(np.float32), a) == pytest.approx(ms_ssim.ms_ssim(a, b), rel=1e-12)


@pytest.mark.parametrize("side", [32, 64])
def test_a_negative_term_gives_nan(golden, side):
  a, c = golden[f"in.a{side}"], golden[f"in.c{side}"]
  assert np.isnan(golden[f"out.msssim_a_c{side}"]).all()
  levels = ms_ssim.level_similarities(a, c)
  assert levels[:4, 1].min() < 0 or levels[4, 0] < 0
  assert math.isnan(ms_ssim.ms_ssim(a, c))


def by_scipy(one, other):
  """The recipe with two-dimensional filters at every level."""
  one, other, rows = one.astype(np.float64), other.astype(np.float64), []
  for _ in range(5):
    size = min(11, *one.shape[1:3])
    grid = np.arange(size) - (size - 1) / 2
    window = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * (1.5 * size / 11) ** 2))
    window = (window / window.sum())[None, :, :, None]
    blur = lambda x: scipy.signal.fftconvolve(x, window, mode="valid")
    m1, m2 = blur(one), blur(other)
    v1, v2, v12 = blur(one**2) - m1**2, blur(other**2) - m2**2, blur(one * other) - m1 * m2
    cs = (2 * v12 + 58.5225) / (v1 + v2 + 58.5225)
    rows.append((np.mean((2 * m1 * m2 + 6.5025) / (m1**2 + m2**2 + 6.5025) * cs), np.mean(cs)))
    box = np.full((1, 2, 2, 1), 0.25)
    one, other = (scipy.ndimage.convolve(x, box, mode="reflect")[:, ::2, ::2] for x in (one, other))
  return np.array(rows)


@pytest.mark.parametrize("shape", [(2, 48, 48, 3), (1, 37, 26, 1), (3, 5, 9, 4)])
def test_other_shapes_match_scipys_filters(shape):
  rng = np.random.default_rng(0)
  one = rng.uniform(0, 255, shape)
  other = np.clip(one + rng.normal(0, 40, shape), 0, 255)
  np.testing.assert_allclose(ms_ssim.level_similarities(one, other), by_scipy(one, other), rtol=1e-8, atol=1e-10)


def test_a_set_is_the_mean_over_pairs_of_batches_that_are_numbers(golden):
  a, b, c = (golden[f"in.{name}32"] for name in "abc")
  value = ms_ssim.ms_ssim(a, b)
  assert ms_ssim.mean_ms_ssim(np.concatenate([a, b]), 3) == pytest.approx(value)
  assert ms_ssim.mean_ms_ssim(np.concatenate([a, b, a[:2]]), 3) == pytest.approx(value)  # no whole batch at the end
  assert ms_ssim.mean_ms_ssim(np.concatenate([a, b, a]), 3) == pytest.approx((2 * value + 1) / 3)
  of_c = [x for x in (ms_ssim.ms_ssim(c, a), ms_ssim.ms_ssim(c, b), value) if not math.isnan(x)]
  assert len(of_c) < 3 and ms_ssim.mean_ms_ssim(np.concatenate([a, b, c]), 3) == pytest.approx(np.mean(of_c))
  assert math.isnan(ms_ssim.mean_ms_ssim(np.concatenate([a, c]), 3))


def test_bad_input_is_named(golden):
  a = golden["in.a32"]
  with pytest.raises(UserError, match=r"\(3, 32, 32, 3\) and \(2, 32, 32, 3\)"):
    ms_ssim.ms_ssim(a, a[:2])
  with pytest.raises(UserError, match=r"got \(32, 32, 3\) and \(32, 32, 3\)"):
    ms_ssim.ms_ssim(a[0], a[0])
  with pytest.raises(UserError, match="two batches of 100 images or more, got 3 images"):
    ms_ssim.mean_ms_ssim(a)
