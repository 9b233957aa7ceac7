"""A discriminator on a frozen DINO: StyleGAN-T's (arXiv 2301.09515, section 3.2), five heads, one logit per token and
head.

Images are augmented, sometimes cropped, brought to DINO's size by area resizing, and judged from the transformer's
tokens. All heads have one shape; their parameters are stacked on a leading axis of length H. Float32 products are
float32 on every machine (`Precision.HIGHEST`); the config's `compute_dtype` is the way to faster ones.

  B batch, R image side, S side of DINO's input, N tokens, C width of the tokens, H heads, D text width, M joint width,
  K kernel size, I input channels, O output channels
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.models import dino, layers
from aurora_jax.models.feature_critic_config import Config
from aurora_jax.models.module import Module
from aurora_jax.ops import diff_augment, local_batch_norm, resample, spectral_norm


def _slope(x):
  """Leaky ReLU 0.2 without a gain."""
  return jnp.where(x >= 0, x, 0.2 * x)


class SpectralConv(Module):
  """A convolution over the tokens with spectral norm; with K > 1 it is circular, from the last token on to the first.

  Variables: params weight [K, I, O], bias [O]; spectral u [O], v [I * K].
  """

  features: int
  kernel_size: int = 1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """x float32 [B, N, I] -> float32 [B, N, O]. `train`: one power iteration, stored in the collection "spectral"."""
    size, inputs, features = self.kernel_size, x.shape[-1], self.features
    limit = 1 / math.sqrt(inputs * size)  # PyTorch's default
    uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-limit, maxval=limit)
    weight = self.param("weight", uniform, (size, inputs, features))
    bias = self.param("bias", uniform, (features,))
    random = lambda length: spectral_norm.unit(jax.random.normal(self.make_rng("params"), (length,)))
    u = self.variable("spectral", "u", random, features)
    v = self.variable("spectral", "v", random, inputs * size)
    matrix = weight.transpose(2, 1, 0).reshape(features, -1)
    if train and not self.is_initializing():
      u.value, v.value = spectral_norm.power_iteration(matrix, u.value)
    weight = (weight / spectral_norm.sigma(matrix, u.value, v.value)).astype(self.dtype)
    x = x.astype(self.dtype)
    if size > 1:  # all taps side by side, so that one product does for all
      x = jnp.concatenate([jnp.roll(x, size // 2 - tap, axis=1) for tap in range(size)], axis=-1)
    return (x @ weight.reshape(-1, features)).astype(jnp.float32) + bias


class LocalBatchNorm(Module):
  """`local_batch_norm.normalize` with a trained scale and bias per channel. [B, N, C] -> float32 [B, N, C]."""

  virtual_batch: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return local_batch_norm.normalize(x, self.virtual_batch) * scale + bias


class Head(Module):
  """One head: two spectral-normalized convolutions, a logit per token, projected on the text."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array, text: jax.Array | None, train: bool) -> jax.Array:
    """x [B, N, C], text [B, D] or None -> [B, N]."""
    cfg, width = self.cfg, x.shape[-1]
    conv = lambda features, size, name: SpectralConv(features, size, cfg.compute_dtype, name=name)
    h = _slope(LocalBatchNorm(cfg.virtual_batch, name="norm_in")(conv(width, 1, "conv_in")(x, train)))
    mixed = conv(width, cfg.kernel_size, "conv_mix")(h, train)
    h = (_slope(LocalBatchNorm(cfg.virtual_batch, name="norm_mix")(mixed)) + h) / math.sqrt(2)
    self.sow("intermediates", "trunk", h)
    if text is None:
      return conv(1, 1, "conv_out")(h, train)[..., 0]
    out = conv(cfg.text_map_dim, 1, "conv_out")(h, train)
    mapped = layers.Dense(cfg.text_map_dim, name="text_map")(text)
    return jnp.einsum("bnm,bm->bn", out, mapped) / math.sqrt(cfg.text_map_dim)


def stacked_heads(cfg: Config, **options: Any) -> nn.Module:
  """All heads as one module; every variable has a leading axis of length H. (x [H, B, N, C], text, train) -> [H, B,
  N].
  """
  heads = nn.vmap(
    Head,
    in_axes=(0, None, None),  # pyright: ignore[reportArgumentType]
    variable_axes={"params": 0, "spectral": 0, "intermediates": 0},
    split_rngs={"params": True},
    axis_size=cfg.heads,
  )
  return heads(cfg, **options)


class FeatureCritic(Module):
  """The transformer and its heads. Variables: {"params", "spectral", "dino"}.

  `params` and `spectral` (the power iteration's vectors, moved by every call in training) are the heads'. `dino` is
  {"vit": parameters of `models.dino.Dino`}: frozen, and a collection of its own, so that neither an optimizer nor a
  checkpoint needs to hold it.
  """

  cfg: Config

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array | None = None,
    train: bool = False,
    crop: tuple[int | jax.Array, int | jax.Array] | None = None,
  ) -> jax.Array:
    """Judges images; a positive logit means real.

    Args:
      image: [B, R, R, 3] in [-1, 1], B a multiple of `virtual_batch` or at most that. With the rng "augment", every
        image is augmented by the config's policy.
      text: [B, D] CLIP's text features of unit length; None if unconditional.
      train: one power iteration of every spectral norm, for which the collection "spectral" must be mutable.
      crop: (row, column) of the one window of S pixels that all images are cut to, for R > S. None: with the rng "crop"
        a random one in half of all calls, as released; without it the whole images.

    Returns:
      float32 [B, H * N], head after head; the last head sees the embedding.

    Raises:
      ValueError: a batch that does not split evenly, an image or a text of another shape.
    """
    cfg = self.cfg
    self._check(image, text, crop)
    with jax.default_matmul_precision("highest"):
      image = image.astype(jnp.float32)
      if cfg.augment and self.has_rng("augment"):
        image = diff_augment.augment(self.make_rng("augment"), image, cfg.augment)
      key = self.make_rng("crop") if crop is None and self.has_rng("crop") else None
      image = fit(image, cfg.image_size, crop, key)
      features = self._features(dino.normalize_colors(image))  # [H, B, N, C]
      text = None if text is None else text.astype(jnp.float32)
      logits = stacked_heads(cfg, name="heads")(features, text, train)  # [H, B, N]
    return jnp.moveaxis(logits, 0, 1).reshape(len(image), -1)

  def _features(self, image):
    """What the heads see: the patches' tokens of every tap, and of the embedding, each plus the class token."""
    cfg = self.cfg
    self.sow("intermediates", "dino_input", image)
    vit = dino.Dino(cfg.dino, jnp.dtype(cfg.compute_dtype), cfg.remat, parent=None)
    init = lambda: vit.init(self.make_rng("params"), jnp.zeros((1, cfg.dino.patch, cfg.dino.patch, 3)))["params"]
    params = jax.lax.stop_gradient(self.variable("dino", "vit", init).value)
    out = cast(dino.DinoOutput, vit.apply({"params": params}, image, taps=cfg.taps, final=False))
    tokens = jnp.stack([*out.taps, out.embedded])
    features = tokens[:, :, 1 + cfg.dino.registers :] + tokens[:, :, :1]
    self.sow("intermediates", "features", features)
    return features

  def _check(self, image, text, crop):
    cfg, side = self.cfg, self.cfg.image_size
    if image.ndim != 4 or image.shape[3] != 3:
      raise ValueError(f"image must be [batch, height, width, 3], got {image.shape}")
    if crop is not None and min(image.shape[1:3]) < side:
      raise ValueError(f"a window of {side} pixels cannot be cut out of an image of {image.shape[1:3]}")
    expected = (len(image), cfg.text_dim) if cfg.text_dim else None
    if (None if text is None else text.shape) != expected:
      raise ValueError(f"text must be {expected}, got {None if text is None else text.shape}")


def fit(
  image: jax.Array,
  side: int,
  crop: tuple[int | jax.Array, int | jax.Array] | None = None,
  key: jax.Array | None = None,
) -> jax.Array:
  """Images of any size to `side`: a window, or the whole by area resizing. Gradients pass to the image.

  Args:
    image: [B, P, Q, 3].
    side: of the result.
    crop: (row, column) of the window's first pixel; traced numbers will do.
    key: PRNG key of the released rule: one random window for the whole batch with probability 0.5, for images larger
      than `side`; else the whole images. None: the whole images.

  Returns:
    float32 [B, side, side, 3].
  """
  height, width = image.shape[1:3]
  if crop is not None:
    return jax.lax.dynamic_slice(image, (0, *crop, 0), (len(image), side, side, 3)).astype(jnp.float32)
  if key is None or min(height, width) <= side:
    return resample.resize_area(image, side, side)
  # A window is a matrix of ones and zeros: the choice is one of matrices, and both ways are one computation.
  whether, row, column = jax.random.split(key, 3)
  whether = jax.random.bernoulli(whether)

  def matrix(key, size):
    first = jax.random.randint(key, (), 0, size - side + 1)
    window = (jnp.arange(side)[:, None] + first == jnp.arange(size)).astype(jnp.float32)
    return jnp.where(whether, window, resample.area_matrix(size, side))

  return resample.resize_by_matrices(image, matrix(row, height), matrix(column, width))


def abstract_variables(cfg: Config) -> Mapping[str, Any]:
  """Shapes and dtypes of the discriminator's variables, without allocating them."""
  image = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.float32)
  text = jax.ShapeDtypeStruct((1, cfg.text_dim), jnp.float32) if cfg.text_dim else None
  return jax.eval_shape(FeatureCritic(cfg).init, jax.random.key(0), image, text)
