"""StyleGAN-T's mapping: latents and text to w, and the text encoder that may train along (arXiv 2301.09515, section 3).

B batch, Z width of the latents, D width of the text feature, W = Z + D, N tokens
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.models import clip, layers
from aurora_jax.models.module import Module
from aurora_jax.ops.losses import normalize
from aurora_jax.systems.stylegan_t import config as config_lib

LR_MULTIPLIER = 0.01


class Mapping(Module):
  """Two dense layers on the normalized latents; the text feature is appended as it is.

  Variables: params fc0, fc1; buffers x_avg [Z], the running average of the mapped latents.
  """

  cfg: config_lib.Generator

  @nn.compact
  def __call__(
    self, z: jax.Array, text: jax.Array | None, psi: float | jax.Array = 1.0, train: bool = False
  ) -> jax.Array:
    """Maps latents.

    Args:
      z: [B, Z], standard normal.
      text: [B, D], unit length; None in an unconditional model.
      psi: truncation, a number or [B, 1]; the mapped latents move toward their average by 1 - psi. The text is never
        truncated.
      train: moves the average; the collection "buffers" must be mutable.

    Returns:
      w, float32 [B, W].
    """
    x = layers.pixel_norm(z.astype(jnp.float32))
    x = layers.Dense(self.cfg.z_dim, lr_multiplier=LR_MULTIPLIER, name="fc0")(x)
    x = layers.Dense(self.cfg.z_dim, lr_multiplier=LR_MULTIPLIER, name="fc1")(layers.leaky_relu(x))
    average = self.variable("buffers", "x_avg", jnp.zeros, (self.cfg.z_dim,))
    if train and not self.is_initializing():
      decay = self.cfg.w_average_decay
      mean = jax.lax.stop_gradient(jnp.mean(x, axis=0))
      average.value = decay * average.value + (1 - decay) * mean
    if isinstance(psi, jax.Array) or psi != 1:
      # Exactly x at 1: a sweep of psi on the devices must end with the image that has no truncation.
      x = jnp.where(psi == 1, x, average.value + psi * (x - average.value))
    return x if text is None else jnp.concatenate([x, text.astype(jnp.float32)], axis=-1)


class TextEncoder(Module):
  """A CLIP text tower with its projection, the generator's own copy. tokens int [B, N] -> unit features [B, D].

  Variables: params text, text_projection; buffers log_scale, which nothing uses but a released checkpoint has.
  """

  cfg: config_lib.Generator

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    sizes = self.cfg.text_tower.sizes()
    self.variable("buffers", "log_scale", lambda: jnp.log(jnp.float32(1 / 0.07)))
    tower = clip.TextTower(sizes, jnp.float32, self.cfg.remat, name="text")
    project = nn.Dense(
      self.cfg.text_dim,
      use_bias=False,
      kernel_init=nn.initializers.normal(sizes.width**-0.5),
      name="text_projection",
    )
    return normalize(project(tower(tokens, clip.eot_position(tokens, sizes.eot_id))))
