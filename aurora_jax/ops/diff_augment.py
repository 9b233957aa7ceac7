"""DiffAugment (arXiv 2006.10738): differentiable changes of a critic's images, different for every image.

`draw` makes the random numbers, `apply` is a pure function of numbers and images, `augment` does both. The result is
not clipped to the range of the images.

  B batch, H height, W width, C channels
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from aurora_jax.ops.diff_augment_policy import POLICY

TRANSLATION = 0.125  # at most this fraction of the side
CUTOUT = 0.2  # side of the square, as a fraction of the image's

Draws = Mapping[str, Mapping[str, jax.Array]]


def check_policy(policy: Sequence[str]) -> None:
  """Raises ValueError for a name that is not in `POLICY`."""
  unknown = [name for name in policy if name not in POLICY]
  if unknown:
    raise ValueError(f"augmentation {unknown[0]!r} does not exist, there are {', '.join(POLICY)}")


def draw(key: jax.Array, batch: int, height: int, width: int, policy: Sequence[str] = POLICY) -> Draws:
  """The random numbers of one call.

  Args:
    key: PRNG key.
    batch: number of images.
    height, width: of the images, in pixels.
    policy: names of `POLICY`.

  Returns:
    {name: {"u": float32 [B] in [0, 1)}} for colors, {name: {"rows": int32 [B], "columns": int32 [B]}} for translation
    (offsets) and cutout (centers).
  """
  check_policy(policy)
  draws = {}
  for index, name in enumerate(POLICY):
    if name not in policy:
      continue
    keys = jax.random.split(jax.random.fold_in(key, index))
    if name == "translation":
      shift_rows, shift_columns = _shift(height), _shift(width)
      draws[name] = {
        "rows": jax.random.randint(keys[0], (batch,), -shift_rows, shift_rows + 1),
        "columns": jax.random.randint(keys[1], (batch,), -shift_columns, shift_columns + 1),
      }
    elif name == "cutout":
      draws[name] = {
        "rows": jax.random.randint(keys[0], (batch,), 0, height + 1 - _square(height) % 2),
        "columns": jax.random.randint(keys[1], (batch,), 0, width + 1 - _square(width) % 2),
      }
    else:
      draws[name] = {"u": jax.random.uniform(keys[0], (batch,))}
  return draws


def apply(draws: Draws, images: jax.Array) -> jax.Array:
  """Changes every image by its own numbers, in the order of `POLICY`; gradients pass to the images.

  Args:
    draws: numbers of `draw`; changes without numbers are left out.
    images: [B, H, W, C] in [-1, 1].

  Returns:
    float32 [B, H, W, C]; pixels from outside and those cut out are 0, medium gray.
  """
  check_policy(tuple(draws))
  images = images.astype(jnp.float32)
  for name in POLICY:
    if name in draws:
      images = _CHANGES[name](images, **draws[name])
  return images


def augment(key: jax.Array, images: jax.Array, policy: Sequence[str] = POLICY) -> jax.Array:
  """`draw` and `apply`. images: [B, H, W, C] in [-1, 1] -> float32 [B, H, W, C]."""
  batch, height, width, _ = images.shape
  return apply(draw(key, batch, height, width, policy), images)


def _shift(side):
  """Largest translation, in pixels."""
  return int(side * TRANSLATION + 0.5)


def _square(side):
  """Side of the cutout, in pixels."""
  return int(side * CUTOUT + 0.5)


def _brightness(images, u):
  return images + (u - 0.5)[:, None, None, None]


def _saturation(images, u):
  mean = jnp.mean(images, axis=3, keepdims=True)
  return (images - mean) * (2 * u)[:, None, None, None] + mean


def _contrast(images, u):
  mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
  return (images - mean) * (u + 0.5)[:, None, None, None] + mean


def _translation(images, rows, columns):
  """out[i, j] = images[i + row, j + column], by one matrix of ones and zeros per image and axis."""
  choose = lambda side, offsets: (jnp.arange(side)[:, None] + offsets[:, None, None] == jnp.arange(side)).astype(
    jnp.float32
  )
  exact = jax.lax.Precision.HIGHEST
  height, width = images.shape[1:3]
  images = jnp.einsum("bqw,bhwc->bhqc", choose(width, columns), images, precision=exact)
  return jnp.einsum("bph,bhqc->bpqc", choose(height, rows), images, precision=exact)


def _cutout(images, rows, columns):
  """The square is clipped to the image: beyond the border it still covers the outermost line, as released."""

  def covered(side, centers):
    size = _square(side)
    first = centers - size // 2
    begin, end = jnp.clip(first, 0, side - 1), jnp.clip(first + size - 1, 0, side - 1)
    line = jnp.arange(side)
    return (line >= begin[:, None]) & (line <= end[:, None]) & (size > 0)

  height, width = images.shape[1:3]
  hole = covered(height, rows)[:, :, None] & covered(width, columns)[:, None, :]
  return jnp.where(hole[..., None], 0.0, images)


_CHANGES = {
  "brightness": _brightness,
  "saturation": _saturation,
  "contrast": _contrast,
  "translation": _translation,
  "cutout": _cutout,
}
