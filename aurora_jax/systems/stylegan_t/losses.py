"""StyleGAN-T's losses as pure functions (arXiv 2301.09515, section 3.3, and the published training code).

Adversarial hinge terms per micro-batch of b images carry a further factor 1 / b, the CLIP term does not: the published
balance of the two depends on b (8; 4 at 512 pixels).

  B images of a micro-batch, R image side, N logits per image, D width of CLIP's features
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.ops import resample
from aurora_jax.ops.losses import normalize
from aurora_jax.systems.stylegan_t import config as config_lib


def discriminator_fake(logits: jax.Array, micro_batch: int = 0) -> jax.Array:
  """The hinge on generated images, mean(relu(1 + logit)) / b.

  Args:
    logits: [B, N].
    micro_batch: b; 0: B.

  Returns:
    float32 scalar.
  """
  return jnp.mean(jax.nn.relu(1 + logits)) / (micro_batch or len(logits))


def discriminator_real(logits: jax.Array, micro_batch: int = 0) -> jax.Array:
  """The hinge on real images, mean(relu(1 - logit)) / b. Arguments as in `discriminator_fake`."""
  return jnp.mean(jax.nn.relu(1 - logits)) / (micro_batch or len(logits))


def generator_adversarial(logits: jax.Array, micro_batch: int = 0) -> jax.Array:
  """The generator's term, -mean(logit) / b. Arguments as in `discriminator_fake`."""
  return -jnp.mean(logits) / (micro_batch or len(logits))


# ----------------------------------------------------------------------------------------------------------------------
# CLIP guidance


def clip_window(key: jax.Array, height: int, width: int, crop: int) -> tuple[jax.Array, jax.Array]:
  """The first row and column of one random window of `crop` pixels (or the whole, where the image is smaller)."""
  row, column = jax.random.split(key)
  draw = lambda key, size: jax.random.randint(key, (), 0, max(size - crop, 0) + 1)
  return draw(row, height), draw(column, width)


def clip_view(
  image: jax.Array,
  tower_size: int,
  cfg: config_lib.Loss,
  window: tuple[int | jax.Array, int | jax.Array] = (0, 0),
) -> jax.Array:
  """What CLIP's image tower sees of generated images: one window for the whole batch, resized.

  Args:
    image: [B, R, R, 3] in [-1, 1], not blurred.
    tower_size: side that the tower takes.
    cfg: `config.Loss`.
    window: first row and column of the window (`clip_window`); only images larger than `clip_crop` are cut.

  Returns:
    float32 [B, tower_size, tower_size, 3] in [-1, 1]: what `Clip.encode_image` takes without resizing.
  """
  height, width = (min(size, cfg.clip_crop) for size in image.shape[1:3])
  if (height, width) != image.shape[1:3]:
    image = jax.lax.dynamic_slice(image, (0, *window, 0), (len(image), height, width, 3))
  image = resample.resize_area(image, cfg.clip_size, cfg.clip_size)
  return resample.resize_bicubic(image, tower_size, tower_size)


def squared_angle(first: jax.Array, second: jax.Array) -> jax.Array:
  """The squared angle between embeddings, radians. Both [B, D], of any length -> float32 [B].

  At an angle of 0 or pi the gradient is not finite, as released; the clean-up of gradients takes care of it.
  """
  cosine = jnp.sum(normalize(first) * normalize(second), axis=-1)
  return jnp.square(jnp.arccos(cosine))


def clip_guidance(image_embedding: jax.Array, text_embedding: jax.Array) -> jax.Array:
  """The CLIP term before its weight: the mean over the batch of `squared_angle`. Both [B, D] -> float32 scalar."""
  return jnp.mean(squared_angle(image_embedding, text_embedding))


# ----------------------------------------------------------------------------------------------------------------------
# Blur of what the discriminator sees


def has_blur(cfg: config_lib.Loss) -> bool:
  """Whether any image is ever blurred."""
  return cfg.blur_fade_kimg > 1 and cfg.blur_sigma > 0


def blur_sigma(images_seen: int | jax.Array, cfg: config_lib.Loss) -> jax.Array:
  """The blur at a point of the training: falls linearly from `blur_sigma` to 0.

  Args:
    images_seen: real images so far, before this batch.
    cfg: `config.Loss`.

  Returns:
    float32 scalar, pixels; always 0 where `blur_fade_kimg` is at most 1.
  """
  if not has_blur(cfg):
    return jnp.float32(0)
  left = 1 - jnp.asarray(images_seen, jnp.float32) / (1000 * cfg.blur_fade_kimg)
  return cfg.blur_sigma * jnp.maximum(left, 0)


def blur_matrix(size: int, sigma: jax.Array | float, sigma_max: float) -> jax.Array:
  """The blur along one axis, zeros beyond the border.

  Taps are 2^-(i / sigma)^2 for |i| <= floor(3 sigma), divided by their sum; `sigma` is no standard deviation (that is
  sigma / sqrt(2 log 2)).

  Args:
    size: of the axis.
    sigma: pixels; a traced number will do. Below 1/3 nothing is blurred.
    sigma_max: no smaller than `sigma` will ever be; fixes the shapes of the computation.

  Returns:
    float32 [size, size].
  """
  sigma = jnp.asarray(sigma, jnp.float32)
  radius = jnp.floor(3 * sigma)
  safe = jnp.maximum(sigma, 1e-3)  # a fully faded blur: the center is the only tap
  tap = lambda offset: jnp.where(jnp.abs(offset) <= radius, jnp.exp2(-jnp.square(offset / safe)), 0.0)
  reach = np.arange(math.floor(3 * sigma_max) + 1, dtype=np.float32)
  total = 2 * jnp.sum(tap(reach)) - 1
  line = np.arange(size, dtype=np.float32)
  return tap(line[:, None] - line) / total


def blur(image: jax.Array, sigma: jax.Array | float, sigma_max: float | None = None) -> jax.Array:
  """Blurs rows and columns; toward the border images fade to 0, mid gray.

  Args:
    image: [B, P, Q, C].
    sigma: of `blur_sigma`; may be traced.
    sigma_max: an upper bound of `sigma`, `Loss.blur_sigma`; None: `sigma` itself, which must then be a number.

  Returns:
    float32 [B, P, Q, C].
  """
  sigma_max = float(sigma) if sigma_max is None else sigma_max
  height, width = image.shape[1:3]
  return resample.resize_by_matrices(image, blur_matrix(height, sigma, sigma_max), blur_matrix(width, sigma, sigma_max))


def discriminator_view(image: jax.Array, resolution: int, sigma: jax.Array | float, cfg: config_lib.Loss) -> jax.Array:
  """What the discriminator sees of real and generated images: area-resized if larger than the generator's, then
  blurred.

  Args:
    image: [B, P, P, 3] in [-1, 1].
    resolution: the generator's.
    sigma: of `blur_sigma`; may be traced.
    cfg: `config.Loss`; without a blur in it none is computed.

  Returns:
    float32 [B, min(P, resolution), min(P, resolution), 3].
  """
  if image.shape[1] > resolution:
    image = resample.resize_area(image, resolution, resolution)
  return blur(image, sigma, cfg.blur_sigma) if has_blur(cfg) else image.astype(jnp.float32)
