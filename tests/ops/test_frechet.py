"""The Frechet distance against scipy's matrix square root and closed forms; moments a batch at a time."""

import numpy as np
import pytest
import scipy.linalg

from aurora_jax.ops import frechet


def moments(samples, batch=7):
  found = frechet.Moments(samples.shape[1])
  for first in range(0, len(samples), batch):
    found.add(samples[first : first + batch])
  return found


def test_moments_a_batch_at_a_time_are_those_of_the_whole():
  samples = np.random.default_rng(0).normal(size=(40, 5)) @ np.diag([1, 2, 3, 0.1, 10]) + 1e6  # a large mean
  found = moments(samples.astype(np.float32))
  whole = samples.astype(np.float32).astype(np.float64)
  assert found.count == 40
  np.testing.assert_allclose(found.mean, whole.mean(0), rtol=1e-15)
  np.testing.assert_allclose(found.covariance, np.cov(whole.T), rtol=1e-9, atol=1e-9)
  found.add(np.zeros((0, 5)))
  assert found.count == 40


@pytest.mark.parametrize("count", [200, 12])  # more and fewer samples than features: the latter without full rank
def test_distance_is_scipys(count):
  rng = np.random.default_rng(1)
  mix = rng.normal(size=(2, 30, 30))
  one, other = (rng.normal(size=(count, 30)) @ mix[i] + 0.3 * i for i in range(2))
  first, second = np.cov(one.T), np.cov(other.T)
  root = scipy.linalg.sqrtm(first @ second)
  gap = one.mean(0) - other.mean(0)
  expected = gap @ gap + np.trace(first + second - 2 * np.real(root))
  assert frechet.distance(moments(one), moments(other)) == pytest.approx(expected, rel=1e-6)
  assert frechet.distance(moments(other), moments(one)) == pytest.approx(expected, rel=1e-6)


def test_closed_forms():
  def of(mean, covariance):
    found = frechet.Moments(len(mean))
    found.count, found.mean, found._scatter = 2, np.array(mean, float), np.array(covariance, float)  # divided by 2 - 1
    return found

  # Covariances that commute: the sum of squared differences of their standard deviations.
  assert frechet.distance(of([0, 0], np.diag([4, 9])), of([3, 4], np.diag([1, 16]))) == pytest.approx(25 + 1 + 1)
  turn = np.array([[0.6, -0.8], [0.8, 0.6]])
  turned = [of([0, 0], turn @ np.diag(values) @ turn.T) for values in ([4, 9], [1, 16])]
  assert frechet.distance(*turned) == pytest.approx(2, rel=1e-12)
  # Two dimensions that do not: tr (C1 C2)^(1/2) = sqrt(tr C1 C2 + 2 sqrt(det C1 C2)).
  first, second = np.array([[2, 1], [1, 3.0]]), np.array([[5, -2], [-2, 1.5]])
  product = first @ second
  expected = np.trace(first + second) - 2 * np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  assert frechet.distance(of([1, 1], first), of([1, 1], second)) == pytest.approx(expected, rel=1e-12)


def test_a_set_has_no_distance_from_itself_and_no_number_is_not_hidden():
  samples = np.random.default_rng(2).normal(size=(50, 8))
  assert frechet.distance(moments(samples), moments(samples)) == pytest.approx(0, abs=1e-12)
  samples[3, 3] = np.nan
  assert np.isnan(frechet.distance(moments(samples), moments(samples)))
