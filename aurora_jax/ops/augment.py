"""Augmentation of images on the device: what a small CLIP learns from, and what a frozen one is shown.

Everything is differentiable, cheap and runs inside the compiled step.

  B batch, R side of the images, H height, W width, C channels
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

_NOISE_POOL = 65_536


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
  """How far a picture is changed, at most. Zeros change nothing.

  Attributes:
    shift: to either side, as a fraction of the picture.
    scale: exp(-scale) to exp(scale) times the size.
    rotate: degrees to either side.
    coarsen: share of the pictures that are mixed with a copy of a half or a quarter of their resolution.
    colour: change of each colour's gain, and offset on pictures in [-1, 1].
    noise: standard deviation of the noise added, on pictures in [-1, 1].
  """

  shift: float = 0.1
  scale: float = 0.15
  rotate: float = 10.0
  coarsen: float = 0.5
  colour: float = 0.15
  noise: float = 0.15


def augment(key, images, augmentation: Augmentation):
  """Changes every picture of a batch in its own way.

  Args:
    key: a PRNG key.
    images: float32 [B, R, R, 3] in [-1, 1], on white.
    augmentation: the ranges.

  Returns:
    float32 [B, R, R, 3]; noise and colour may leave [-1, 1] a little.
  """
  draw_key, noise_key = jax.random.split(key)
  # All draws at once: each call of the generator costs a quarter of a second of compilation.
  draws = jax.random.uniform(draw_key, (images.shape[0], 15), minval=-1.0, maxval=1.0)
  place, coarseness, gain, offset, noise = jnp.split(draws, (4, 7, 10, 13), axis=1)
  # Cubed: mostly small, now and then the most. Evenly drawn moves cost twice the steps.
  images = _warp(images, augmentation, place**3)
  images = _coarsen(images, augmentation.coarsen, (coarseness + 1) / 2)
  gain, offset = (augmentation.colour * x[:, None, None, :] for x in (gain, offset))
  # The gain acts around white, the colour of the ground.
  return 1 + (images - 1) * (1 + gain) + offset + _noise(noise_key, images.shape, augmentation.noise, noise)


def _warp(images, augmentation, draws):
  """Scale, rotation and shift by draws [B, 4] in [-1, 1], bilinear; white comes in from outside."""
  batch, side = images.shape[:2]
  scale, angle, down, right = (x[:, None, None] for x in draws.T)
  scale = jnp.exp(augmentation.scale * scale)
  angle = math.radians(augmentation.rotate) * angle
  cosine, sine = scale * jnp.cos(angle), scale * jnp.sin(angle)
  grid = jnp.arange(side, dtype=jnp.float32) - (side - 1) / 2
  rows, columns = grid[:, None], grid[None, :]
  # Where each pixel of the result comes from, in pixels of a copy with a white frame of one pixel; [B, R, R].
  to_pixels = (side - 1) / 2 + 1
  y = cosine * rows - sine * columns + augmentation.shift * side * down + to_pixels
  x = sine * rows + cosine * columns + augmentation.shift * side * right + to_pixels
  framed = side + 2
  pixels = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0).reshape(-1, 3)
  y, x = jnp.clip(y, 0, framed - 1.001), jnp.clip(x, 0, framed - 1.001)
  top, left = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
  below, beside = (y - top)[..., None], (x - left)[..., None]
  first = (jnp.arange(batch, dtype=jnp.int32) * framed * framed)[:, None, None] + top * framed + left

  def tap(offset):
    return pixels.at[first + offset].get(mode="promise_in_bounds")

  upper = tap(0) * (1 - beside) + tap(1) * beside
  lower = tap(framed) * (1 - beside) + tap(framed + 1) * beside
  return upper * (1 - below) + lower * below


def _coarsen(images, share, draws):
  """Mixes a share of the pictures with a copy of a half or a quarter of their resolution; draws [B, 3] in [0, 1]."""
  batch, side = images.shape[:2]

  def coarse(factor):
    size = max(1, side // factor)
    return jax.image.resize(jax.image.resize(images, (batch, size, size, 3), "linear"), images.shape, "linear")

  chosen, which, amount = (x[:, None, None, None] for x in draws.T)
  amount = jnp.where(chosen < share, amount, 0)
  return images + amount * (jnp.where(which < 0.5, coarse(2), coarse(4)) - images)


def _noise(key, shape, deviation, draws):
  """White noise, of a strength of its own for each picture; draws [B, 2] in [-1, 1].

  Drawing a number per pixel would take longer than the warp; each picture gets a window, at a random place and with a
  random factor, of one pool of numbers.
  """
  size = math.prod(shape[1:])
  pool = jax.random.normal(key, (_NOISE_POOL + size,))
  places = ((draws[:, 0] + 1) / 2 * _NOISE_POOL).astype(jnp.int32)
  windows = jax.vmap(lambda place: jax.lax.dynamic_slice(pool, (place,), (size,)))(places)
  return (windows * (deviation * draws[:, 1:])).reshape(shape)


# ---- before the image tower of a frozen CLIP ---------------------------------------------------------------------


def roughen(key: jax.Array, images: jax.Array) -> jax.Array:
  """Shifts, scales, recolours and roughens pictures a little before an image tower sees them.

  The tower's gradient would otherwise find pixel patterns that please it and nobody else.

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
  """Linear interpolation along one axis, white outside handled by the caller. shift, scale [B] -> [B, out, in]."""
  centre = (size - 1) / 2
  line = jnp.arange(size, dtype=jnp.float32) - centre
  source = line * scale[:, None] + shift[:, None] + centre  # [B, out]
  return jnp.maximum(0, 1 - jnp.abs(source[..., None] - jnp.arange(size, dtype=jnp.float32)))


def shift_and_scale(images: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """Moves and resizes pictures about their centre, bilinear; white comes in from outside.

  Args:
    images: [B, H, W, C] in [-1, 1].
    shift: [B, 2] in pixels (rows, columns).
    scale: [B], source pixels per result pixel.

  Returns:
    [B, H, W, C].
  """
  rows = _line_matrix(shift[:, 0], scale, images.shape[1])
  columns = _line_matrix(shift[:, 1], scale, images.shape[2])
  moved = jnp.einsum("bih,bhwc->biwc", rows, images - 1)
  return 1 + jnp.einsum("bjw,biwc->bijc", columns, moved)
