"""Inception-v3 for Frechet distances (FID): the TensorFlow graph of 2015-12-05, up to its pooled features.

The architecture is that of arXiv 1512.00567. This graph differs from the usual ones in three ways. FID values are
comparable only with all three, as in pytorch-fid and torch-fidelity: average pools divide by the number of pixels
within the image, the last block pools by the maximum, and images are enlarged to 299 pixels as in TensorFlow 1, without
half-pixel centers.

This is inference only: `interop/inception_torch.py` folds the batch normalization into the convolutions.

  B batch, R pixels of an image's side, S = 299, C colors
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.models.module import Module

SIDE = 299
WIDTH = 2048  # of the features


class Convolution(NamedTuple):
  """A convolution with bias and ReLU. `name` is its name in the weights file."""

  name: str
  width: int
  rows: int = 1
  columns: int = 1
  stride: int = 1
  padding: str = "SAME"


class Fork(NamedTuple):
  """Parallel chains of layers on the same input. Their channels are concatenated in this order."""

  chains: tuple


_average = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
_largest = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
_halve = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


def _numbered(name, *sizes):
  """A chain of convolutions NAME_1, NAME_2, ... of (width, rows, columns, ...) each."""
  return tuple(Convolution(f"{name}_{number}", *size) for number, size in enumerate(sizes, 1))


def _wide(block, pool_width):
  """At 35 pixels."""
  return Fork(
    (
      (Convolution(f"{block}.branch1x1", 64),),
      _numbered(f"{block}.branch5x5", (48,), (64, 5, 5)),
      _numbered(f"{block}.branch3x3dbl", (64,), (96, 3, 3), (96, 3, 3)),
      (_average, Convolution(f"{block}.branch_pool", pool_width)),
    )
  )


def _factored(block, width):
  """At 17 pixels: 7x7 as rows and columns of 7."""
  row, column = (width, 1, 7), (width, 7, 1)
  return Fork(
    (
      (Convolution(f"{block}.branch1x1", 192),),
      _numbered(f"{block}.branch7x7", (width,), row, (192, 7, 1)),
      _numbered(f"{block}.branch7x7dbl", (width,), column, row, column, (192, 1, 7)),
      (_average, Convolution(f"{block}.branch_pool", 192)),
    )
  )


def _parted(block, pool):
  """At 8 pixels: 3x3 as rows and columns of 3, side by side."""
  parts = lambda name: Fork(((Convolution(f"{name}a", 384, 1, 3),), (Convolution(f"{name}b", 384, 3, 1),)))
  return Fork(
    (
      (Convolution(f"{block}.branch1x1", 320),),
      (*_numbered(f"{block}.branch3x3", (384,)), parts(f"{block}.branch3x3_2")),
      (*_numbered(f"{block}.branch3x3dbl", (448,), (384, 3, 3)), parts(f"{block}.branch3x3dbl_3")),
      (pool, Convolution(f"{block}.branch_pool", 192)),
    )
  )


_HALF = (3, 3, 2, "VALID")  # of a convolution that halves
_LAYERS = (
  Convolution("Conv2d_1a_3x3", 32, *_HALF),  # 149 pixels
  Convolution("Conv2d_2a_3x3", 32, 3, 3, 1, "VALID"),
  Convolution("Conv2d_2b_3x3", 64, 3, 3),
  _halve,  # 73
  Convolution("Conv2d_3b_1x1", 80),
  Convolution("Conv2d_4a_3x3", 192, 3, 3, 1, "VALID"),
  _halve,  # 35
  _wide("Mixed_5b", 32),
  _wide("Mixed_5c", 64),
  _wide("Mixed_5d", 64),
  Fork(
    (  # 17
      (Convolution("Mixed_6a.branch3x3", 384, *_HALF),),
      _numbered("Mixed_6a.branch3x3dbl", (64,), (96, 3, 3), (96, *_HALF)),
      (_halve,),
    )
  ),
  _factored("Mixed_6b", 128),
  _factored("Mixed_6c", 160),
  _factored("Mixed_6d", 160),
  _factored("Mixed_6e", 192),
  Fork(
    (  # 8
      _numbered("Mixed_7a.branch3x3", (192,), (320, *_HALF)),
      _numbered("Mixed_7a.branch7x7x3", (192,), (192, 1, 7), (192, 7, 1), (192, *_HALF)),
      (_halve,),
    )
  ),
  _parted("Mixed_7b", _average),
  _parted("Mixed_7c", _largest),
)


class Inception(Module):
  """Converts images to features.

  The parameters are {name in the weights file: {"kernel" [rows, columns, in, out], "bias" [out]}}.
  """

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Computes features. The images are rounded to bytes first, as if they had been saved and read.

    Args:
      images: float32 [B, R, R, 3] in [-1, 1]; values outside are clipped.

    Returns:
      float32 [B, WIDTH], not negative.
    """
    pixels = jnp.floor(jnp.clip(images.astype(jnp.float32) * 127.5 + 128, 0, 255))
    x = self._chain((resize(pixels) - 128) / 128, _LAYERS)
    return jnp.mean(x, axis=(1, 2))

  def _chain(self, x, layers):
    for layer in layers:
      match layer:
        case Convolution(name, width, rows, columns, stride, padding):
          # By default accelerators round the factors to bfloat16 or TF32.
          convolve = nn.Conv(
            width, (rows, columns), (stride, stride), padding, precision=jax.lax.Precision.HIGHEST, name=name
          )
          x = nn.relu(convolve(x))
        case Fork(chains):
          x = jnp.concatenate([self._chain(x, chain) for chain in chains], axis=-1)
        case _:
          x = layer(x)
    return x


def abstract_variables() -> dict[str, Any]:
  """The variables of `Inception` as a tree of `jax.ShapeDtypeStruct`. Nothing is allocated."""
  images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(Inception().init, jax.random.key(0), images)


def resize(images: jax.Array, side: int = SIDE) -> jax.Array:
  """Bilinear resize of TensorFlow 1's `resize_images` (align_corners=False): no half-pixel centers, no antialiasing.

  Args:
    images: float32 [B, R, R, C].
    side: side of the result, in pixels.

  Returns:
    [B, side, side, C].
  """
  weights = _interpolation(images.shape[1], side)  # [S, R]
  rows = jnp.einsum("SR,BRQC->BSQC", weights, images, precision=jax.lax.Precision.HIGHEST)
  return jnp.einsum("TQ,BSQC->BSTC", weights, rows, precision=jax.lax.Precision.HIGHEST)


def _interpolation(given, wanted):
  """Weights [wanted, given] of the pixels along one axis. Pixel i lies at i * given / wanted, computed in float32."""
  places = np.arange(wanted, dtype=np.float32) * np.float32(given / wanted)
  before = places.astype(np.int64)
  share = places - before
  weights = np.zeros((wanted, given), np.float32)
  for column, part in ((before, 1 - share), (np.minimum(before + 1, given - 1), share)):
    weights[np.arange(wanted), column] += part
  return weights
