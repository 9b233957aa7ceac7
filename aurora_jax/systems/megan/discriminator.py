"""MEGAN's discriminator: a DCGAN's without normalization (released: `Discriminator` of `model.py`)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.errors import UserError
from aurora_jax.models.module import Module
from aurora_jax.systems.megan import config as config_lib
from aurora_jax.systems.megan import gate as gate_lib


class Discriminator(Module):
  """4x4 convolutions with stride 2 and leaky ReLU of slope 0.2 down to 4x4 pixels, then one over all 4x4 pixels.

  Both values of `config.Generator.init` mean the same here.
  """

  cfg: config_lib.Discriminator

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """Scores images.

    Args:
      image: [B, S, S, 3] in [-1, 1].

    Returns:
      [B] float32, higher for images that look real. The released code returns a scalar for B = 1.

    Raises:
      UserError: images of another size.
    """
    side = self.cfg.resolution
    if image.ndim != 4 or image.shape[1:] != (side, side, 3):
      raise UserError(f"image must be [batch, {side}, {side}, 3], got {image.shape}")
    dtype = jnp.dtype(self.cfg.compute_dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def conv(x, features, stride, padding, name):
      init = gate_lib.torch_uniform(16 * x.shape[-1])
      return nn.Conv(
        features,
        (4, 4),
        stride,
        padding,
        dtype=dtype,
        precision=precision,
        kernel_init=init,
        bias_init=init,
        name=name,
      )(x)

    x = image
    for i, width in enumerate(self.cfg.widths):
      x = nn.leaky_relu(conv(x, width, 2, 1, f"conv_{i}"), 0.2)
    return conv(x, 1, 1, 0, "logit").reshape(len(image)).astype(jnp.float32)


@functools.cache
def abstract_variables(cfg: config_lib.Discriminator) -> dict[str, Any]:
  """Shapes and dtypes of the discriminator's variables, without allocating them."""
  image = jnp.zeros((1, cfg.resolution, cfg.resolution, 3))
  return jax.eval_shape(lambda key: Discriminator(cfg).init(key, image), jax.random.key(0))
