"""The Frechet distance between two sets of features, each modeled as a normal distribution (FID, arXiv 1706.08500).

Everything is float64 on the host, because the distance is a small difference of large numbers.

  N samples, D features
"""

import numpy as np


class Moments:
  """Mean and covariance of a set, accumulated batch by batch.

  Batches are merged by Chan, Golub and LeVeque's update (Technical Report STAN-CS-79-773), which never subtracts the
  square of a large mean.

  Attributes:
    count: number of samples.
    mean: float64 [D].
  """

  def __init__(self, width: int):
    """An empty set.

    Args:
      width: D.
    """
    self.count = 0
    self.mean = np.zeros(width)
    self._scatter = np.zeros((width, width))

  def add(self, features: np.ndarray) -> None:
    """Adds a batch [N, D]."""
    features = np.asarray(features, np.float64)
    if not len(features):
      return
    mean = features.mean(axis=0)
    centered, gap, total = features - mean, mean - self.mean, self.count + len(features)
    self._scatter += centered.T @ centered + np.outer(gap, gap) * (self.count * len(features) / total)
    self.mean = self.mean + gap * (len(features) / total)
    self.count = total

  @property
  def covariance(self) -> np.ndarray:
    """The sample covariance, float64 [D, D], divided by N - 1."""
    return self._scatter / max(self.count - 1, 1)


def distance(one: Moments, other: Moments) -> float:
  """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

  The product of two covariances is not symmetric. C1^(1/2) C2 C1^(1/2) is symmetric and has the same eigenvalues. Two
  symmetric eigenproblems therefore replace the matrix square root. Covariances without full rank (fewer samples than
  features) need no offset.

  Args:
    one, other: moments of the same width.

  Returns:
    float, in units of squared features, not negative; NaN if a moment is not finite.
  """
  first, second = one.covariance, other.covariance
  if not all(np.isfinite(values).all() for values in (one.mean, other.mean, first, second)):
    return float("nan")
  values, vectors = np.linalg.eigh(first)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  inner = root @ second @ root
  mixed = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
  gap = one.mean - other.mean
  return max(0.0, float(gap @ gap + np.trace(first) + np.trace(second) - 2 * mixed))
