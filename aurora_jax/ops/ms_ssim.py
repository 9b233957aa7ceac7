"""Multi-scale structural similarity of image batches (Wang et al. 2003), a measure of diversity (arXiv 1805.02481).

This is the variant of TensorFlow's `msssim.py`: at every level, means over batch, space and channels are taken before
the powers, so a pair of batches has one value. Everything is float64 on the host, because variances are differences of
large squares.

  B batch, H height, W width, C channels
"""

from collections.abc import Sequence

import numpy as np

from aurora_jax.errors import UserError

LEVEL_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from the paper; they do not sum to 1
_WINDOW, _SIGMA = 11, 1.5
_RANGE = 255.0
_C1, _C2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2


def _gaussian(size: int) -> np.ndarray:
  """The window along one axis, [size], of sum 1. A smaller window has a smaller sigma."""
  offsets = np.arange(size) - (size - 1) / 2
  window = np.exp(-0.5 * np.square(offsets / (_SIGMA * size / _WINDOW)))
  return window / window.sum()


def _filtered(x: np.ndarray, window: np.ndarray) -> np.ndarray:
  """Correlation along height and width, inside the image only. [B, H, W, C] -> [B, H - size + 1, W - size + 1, C]."""
  for axis in (1, 2):
    size = x.shape[axis] - len(window) + 1
    filtered = window[0] * x.take(range(size), axis)
    for k, weight in enumerate(window[1:], start=1):
      filtered += weight * x.take(range(k, k + size), axis)
    x = filtered
  return x


def _halved(x: np.ndarray) -> np.ndarray:
  """Means of 2x2 pixels; at an odd side the border is repeated. [B, H, W, C] -> [B, (H + 1) // 2, (W + 1) // 2, C]."""
  x = np.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)], mode="edge")
  return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def _similarity(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
  """(SSIM, its contrast and structure term) at one level, means over everything."""
  window = _gaussian(min(_WINDOW, *one.shape[1:3]))
  mean1, mean2 = _filtered(one, window), _filtered(other, window)
  variance1 = _filtered(one * one, window) - mean1 * mean1
  variance2 = _filtered(other * other, window) - mean2 * mean2
  covariance = _filtered(one * other, window) - mean1 * mean2
  contrast = (2 * covariance + _C2) / (variance1 + variance2 + _C2)
  luminance = (2 * mean1 * mean2 + _C1) / (mean1 * mean1 + mean2 * mean2 + _C1)
  return float(np.mean(luminance * contrast)), float(np.mean(contrast))


def level_similarities(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """The terms of `ms_ssim`: per level the mean SSIM and the mean of its contrast and structure term. float64 [5, 2].

  Raises:
    UserError: the batches are not two of the same shape [B, H, W, C], or empty.
  """
  if np.ndim(one) != 4 or np.shape(one) != np.shape(other) or 0 in np.shape(one):
    raise UserError(
      f"MS-SSIM compares two batches [B, H, W, C] of one shape, got {np.shape(one)} and {np.shape(other)}"
    )
  one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
  levels = []
  for level in range(len(LEVEL_WEIGHTS)):
    if level:
      one, other = _halved(one), _halved(other)
    levels.append(_similarity(one, other))
  return np.array(levels)


def ms_ssim(one: np.ndarray, other: np.ndarray) -> float:
  """MS-SSIM of two batches, image by image: 1 for equal batches, less for different ones.

  Args:
    one, other: [B, H, W, C] in [0, 255], uint8 or any float type.

  Returns:
    float; NaN if a mean term is negative, because its power does not exist.

  Raises:
    UserError: as `level_similarities`.
  """
  levels = level_similarities(one, other)
  terms = np.append(levels[:-1, 1], levels[-1, 0])
  if not (terms >= 0).all():
    return float("nan")
  return float(np.prod(terms ** np.array(LEVEL_WEIGHTS)))


def mean_ms_ssim(images: np.ndarray, batch_size: int = 100) -> float:
  """Similarity of the images of a set: the mean MS-SSIM over all pairs of its batches. Less is more diverse.

  Args:
    images: [N, H, W, C] in [0, 255]. Images that do not fill a batch are left out. The released protocol has one pair:
      200 generated images in batches of 100.
    batch_size: images per batch.

  Returns:
    float, the mean over the pairs that are not NaN; NaN if all are.

  Raises:
    UserError: fewer than two whole batches.
  """
  if batch_size < 1 or len(images) < 2 * batch_size:
    raise UserError(f"MS-SSIM of a set needs two batches of {batch_size} images or more, got {len(images)} images")
  batches: Sequence[np.ndarray] = [
    images[start : start + batch_size] for start in range(0, len(images) - batch_size + 1, batch_size)
  ]
  # MS-SSIM is symmetric, so every pair is computed once.
  values = [ms_ssim(one, other) for i, one in enumerate(batches) for other in batches[:i]]
  values = [value for value in values if not np.isnan(value)]
  return float(np.mean(values)) if values else float("nan")
