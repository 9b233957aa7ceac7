"""Augmentation of images on the device, for training a small CLIP and for images that a frozen one encodes.

Everything is differentiable and runs inside the compiled step.

  B batch, R side of the images, H height, W width, C channels
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

_NOISE_POOL = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
  """Largest change of an image. Zeros change nothing.

  Attributes:
    shift: shift in each direction, as a fraction of the side.
    scale: the size changes by factors from exp(-scale) to exp(scale).
    rotate: rotation in each direction, in degrees.
    coarsen: share of the images that are mixed with a copy at a half or a quarter of the resolution.
    colour: change of the gain and offset of each color channel, on images in [-1, 1].
    noise: standard deviation of the added noise, on images in [-1, 1].
  """

  shift: float = 0.1
  scale: float = 0.15
  rotate: float = 10.0
  coarsen: float = 0.5
  colour: float = 0.15
  noise: float = 0.15


def augment(key: jax.Array, images: jax.Array, augmentation: Augmentation) -> jax.Array:
  """Changes every image of a batch by random numbers of its own.

  Args:
    key: PRNG key.
    images: float32 [B, R, R, 3] in [-1, 1], on a white background.
    augmentation: ranges of the changes.

  Returns:
    float32 [B, R, R, 3]; noise and color may slightly exceed [-1, 1].
  """
  draw_key, noise_key = jax.random.split(key)
  # One draw for all: each call of the generator takes a quarter of a second to compile.
  draws = jax.random.uniform(draw_key, (images.shape[0], 15), minval=-1.0, maxval=1.0)
  place, coarseness, gain, offset, noise = jnp.split(draws, (4, 7, 10, 13), axis=1)
  # Cubed draws are mostly small. Uniform ones need twice as many training steps.
  images = _warp(images, augmentation, place**3)
  images = _coarsen(images, augmentation.coarsen, (coarseness + 1) / 2)
  gain, offset = (augmentation.colour * x[:, None, None, :] for x in (gain, offset))
  # The gain acts around white, the color of the background.
  return 1 + (images - 1) * (1 + gain) + offset + _noise(noise_key, images.shape, augmentation.noise, noise)


def _warp(images, augmentation, draws):
  """Scale, rotation and shift by draws [B, 4] in [-1, 1], bilinear. Pixels from outside are white."""
  batch, side = images.shape[:2]
  scale, angle, down, right = (x[:, None, None] for x in draws.T)
  scale = jnp.exp(augmentation.scale * scale)
  angle = math.radians(augmentation.rotate) * angle
  cosine, sine = scale * jnp.cos(angle), scale * jnp.sin(angle)
  grid = jnp.arange(side, dtype=jnp.float32) - (side - 1) / 2
  rows, columns = grid[:, None], grid[None, :]
  # The source of each pixel of the result, in pixels of a copy with a white frame of one pixel; [B, R, R].
  to_pixels = (side - 1) / 2 + 1
  y = cosine * rows - sine * columns + augmentation.shift * side * down + to_pixels
  x = sine * rows + cosine * columns + augmentation.shift * side * right + to_pixels
  framed = side + 2
  pixels = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0).reshape(-1, 3)
  y, x = jnp.clip(y, 0, framed - 1.001), jnp.clip(x, 0, framed - 1.001)
  top, left = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
  down, right = (y - top)[..., None], (x - left)[..., None]
  first = (jnp.arange(batch, dtype=jnp.int32) * framed * framed)[:, None, None] + top * framed + left

  def tap(offset):
    return pixels.at[first + offset].get(mode="promise_in_bounds")

  upper = tap(0) * (1 - right) + tap(1) * right
  lower = tap(framed) * (1 - right) + tap(framed + 1) * right
  return upper * (1 - down) + lower * down


def _coarsen(images, share, draws):
  """Mixes a share of the images with a copy at a half or a quarter of the resolution. draws [B, 3] in [0, 1]."""
  batch, side = images.shape[:2]

  def coarse(factor):
    size = max(1, side // factor)
    return jax.image.resize(jax.image.resize(images, (batch, size, size, 3), "linear"), images.shape, "linear")

  chosen, which, amount = (x[:, None, None, None] for x in draws.T)
  amount = jnp.where(chosen < share, amount, 0)
  return images + amount * (jnp.where(which < 0.5, coarse(2), coarse(4)) - images)


def _noise(key, shape, std, draws):
  """White noise, with another strength for each image. draws [B, 2] in [-1, 1].

  A draw per pixel would take longer than the warp. Each image therefore gets a window of one pool of numbers, at a
  random place and with a random factor.
  """
  size = math.prod(shape[1:])
  pool = jax.random.normal(key, (_NOISE_POOL + size,))
  places = ((draws[:, 0] + 1) / 2 * _NOISE_POOL).astype(jnp.int32)
  windows = jax.vmap(lambda place: jax.lax.dynamic_slice(pool, (place,), (size,)))(places)
  return (windows * (std * draws[:, 1:])).reshape(shape)


# ---- before the image tower of a frozen CLIP ---------------------------------------------------------------------


def roughen(key: jax.Array, images: jax.Array) -> jax.Array:
  """Slightly shifts, scales and recolors images and adds noise, before a frozen image tower encodes them.

  Without it, the tower's gradient leads to adversarial pixel patterns.

  Args:
    key: PRNG key.
    images: [B, R, R, 3] in [-1, 1].

  Returns:
    [B, R, R, 3].
  """
  batch, side = images.shape[:2]
  keys = jax.random.split(key, 5)
  shift = jax.random.uniform(keys[0], (batch, 2), minval=-0.06, maxval=0.06) * side
  scale = jnp.exp(jax.random.uniform(keys[1], (batch,), minval=-0.1, maxval=0.1))
  images = shift_and_scale(images, shift, scale)
  gain = jax.random.uniform(keys[2], (batch, 1, 1, 3), minval=0.9, maxval=1.1)
  offset = jax.random.uniform(keys[3], (batch, 1, 1, 3), minval=-0.05, maxval=0.05)
  noise = 0.08 * jax.random.normal(keys[4], images.shape)
  return 1 + (images - 1) * gain + offset + noise


def _line_matrix(shift, scale, size):
  """Matrices of linear interpolation along one axis, zero outside. shift, scale [B] -> [B, out, in]."""
  center = (size - 1) / 2
  line = jnp.arange(size, dtype=jnp.float32) - center
  source = line * scale[:, None] + shift[:, None] + center  # [B, out]
  return jnp.maximum(0, 1 - jnp.abs(source[..., None] - jnp.arange(size, dtype=jnp.float32)))


def shift_and_scale(images: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Shifts and resizes images about their center, bilinear. Pixels from outside are white.

  Args:
    images: [B, H, W, C] in [-1, 1].
    shift: [B, 2] in pixels (rows, columns).
    scale: [B], source pixels per pixel of the result.

  Returns:
    [B, H, W, C].
  """
  rows = _line_matrix(shift[:, 0], scale, images.shape[1])
  columns = _line_matrix(shift[:, 1], scale, images.shape[2])
  exact = jax.lax.Precision.HIGHEST  # images keep their 256 levels
  moved = jnp.einsum("bih,bhwc->biwc", rows, images - 1, precision=exact)
  return 1 + jnp.einsum("bjw,biwc->bijc", columns, moved, precision=exact)
