"""Building blocks of generators and discriminators, with an equalized learning rate (arXiv 1710.10196).

A stored weight is ~ N(0, 1) / lr_multiplier. At run time it is multiplied by lr_multiplier / sqrt(fan_in), and a stored
bias by lr_multiplier. That scaling is part of the parameterization, so checkpoints move between systems unchanged. The
factors are applied to the activations: a scaled copy of every weight would cost more than the products of a single
image.

  B batch, H height, W width, N tokens, D channels, K kernels
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.models.module import Module
from aurora_jax.ops import attention as attention_ops
from aurora_jax.ops import deform_conv
from aurora_jax.ops import modulated_conv as modulated

EPSILON = 1e-8


def leaky_relu(x: jax.Array) -> jax.Array:
  """Slope 0.2, gain sqrt(2) (StyleGAN2's bias_act)."""
  return jnp.where(x >= 0, x, 0.2 * x) * math.sqrt(2)


def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), CLIP's approximation of the GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


def pixel_norm(x: jax.Array) -> jax.Array:
  """Divides by the root mean square over the last axis."""
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


def scaled_normal(lr_multiplier: float = 1.0, scale: float = 1.0) -> nn.initializers.Initializer:
  """An initializer: normal with standard deviation scale / lr_multiplier."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale / lr_multiplier, dtype)

  return init


def constant(values: float | Sequence[float], lr_multiplier: float = 1.0) -> nn.initializers.Initializer:
  """An initializer: values / lr_multiplier, broadcast to the shape."""

  def init(key, shape, dtype=jnp.float32):
    del key
    return jnp.broadcast_to(jnp.asarray(values, dtype) / jnp.asarray(lr_multiplier, dtype), shape)

  return init


def join(parts: Sequence[jax.Array], batch: int) -> jax.Array:
  """Joins batches for one pass through a network, sample by sample: all parts of sample 0, then of sample 1, and so on.

  In this order a sharded batch stays on its devices.

  Args:
    parts: arrays [batch * k, ...]; k may differ between parts.
    batch: number of samples.

  Returns:
    [batch * sum of k, ...].
  """
  parts = [part.reshape(batch, -1, *part.shape[1:]) for part in parts]
  joined = jnp.concatenate(parts, axis=1)
  return joined.reshape(-1, *joined.shape[2:])


def unjoin(x: jax.Array, count: int) -> list[jax.Array]:
  """The inverse of `join` for parts with k = 1. [batch * count, ...] -> `count` arrays [batch, ...]."""
  x = x.reshape(-1, count, *x.shape[1:])
  return [x[:, i] for i in range(count)]


class Dense(Module):
  """Linear map over the last axis, on feature maps a 1x1 convolution. [..., I] -> [..., features]."""

  features: int
  use_bias: bool = True
  bias_init: float | tuple[float, ...] = 0.0
  weight_scale: float = 1.0
  lr_multiplier: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = x.shape[-1]
    weight = self.param("weight", scaled_normal(self.lr_multiplier, self.weight_scale), (inputs, self.features))
    y = (x @ weight.astype(x.dtype)) * (self.lr_multiplier / math.sqrt(inputs))
    if self.use_bias:
      bias = self.param("bias", constant(self.bias_init, self.lr_multiplier), (self.features,))
      y = y + (bias * self.lr_multiplier).astype(x.dtype)
    return y


class Conv(Module):
  """Plain "same" convolution with bias. [B, H, W, I] -> [B, H, W, features]."""

  features: int
  kernel_size: int = 3

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size, inputs = self.kernel_size, x.shape[-1]
    weight = self.param("weight", scaled_normal(), (size, size, inputs, self.features))
    bias = self.param("bias", constant(0.0), (self.features,))
    y = jax.lax.conv_general_dilated(
      x, weight.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y / math.sqrt(size * size * inputs) + bias.astype(y.dtype)


class LayerNorm(Module):
  """Layer norm over the last axis in float32, epsilon 1e-5."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    normed = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x.astype(jnp.float32))
    return normed.astype(x.dtype)


class GroupNorm(Module):
  """Group norm with 32 groups in float32, epsilon 1e-5. x: [B, H, W, D]."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = nn.GroupNorm(num_groups=32, epsilon=1e-5, use_fast_variance=False, name="norm")
    return norm(x.astype(jnp.float32)).astype(x.dtype)


class ModulatedConv(Module):
  """Modulated convolution with adaptive kernels, bias and activation, optionally deformable (MTM, arXiv 2308.15472).

  The released counterpart is `AdaptiveModulateConvLayer`. Inputs are x [B, H, W, I] and w [B, w_dim]. The output is
  [B, H, W, features], with `upsample` at twice the resolution.
  """

  features: int
  kernel_size: int = 3
  kernels: int = 1
  demodulate: bool = True
  upsample: bool = False
  deformable: bool = False
  activate: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
    inputs, size = x.shape[-1], self.kernel_size
    weight = self.param("weight", scaled_normal(), (self.kernels, size, size, inputs, self.features))
    bias = self.param("bias", constant(0.0), (self.features,))
    style = Dense(inputs, bias_init=1.0, name="style")(w) / math.sqrt(size * size * inputs)
    mix = None
    if self.kernels > 1:
      mix = jax.nn.softmax(Dense(self.kernels, bias_init=1.0, name="mix")(w), axis=-1)
    if self.deformable:
      y = self._deformed(x, w, weight, style, mix)
    else:
      y = modulated.modulated_conv(x, weight, style, mix, demodulate=self.demodulate, upsample=self.upsample)
    y = y + bias.astype(y.dtype)
    return leaky_relu(y) if self.activate else y

  def _deformed(self, x, w, weight, style, mix):
    """Reads the taps at positions that a second modulated convolution predicts: 18 offsets and 9 masks per pixel."""
    batch, height, width, inputs = x.shape
    outputs = 27
    mtm_weight = self.param("mtm_weight", scaled_normal(), (1, 3, 3, inputs, outputs))
    mtm_bias = self.param("mtm_bias", constant(0.0), (outputs,))
    mtm_scale = self.param("mtm_scale", constant(0.0), (outputs,))
    mtm_style = Dense(inputs, bias_init=1.0, name="mtm_style")(w) / math.sqrt(9 * inputs)
    # Demodulated without the scale, as released: otherwise the scale would cancel.
    prediction = modulated.modulated_conv(x, mtm_weight, mtm_style)
    prediction = prediction.astype(jnp.float32) * mtm_scale + mtm_bias
    offsets = prediction[..., :18].reshape(batch, height, width, 9, 2)
    mask = 2 * jax.nn.sigmoid(prediction[..., 18:])
    taps = deform_conv.sample_taps(x, offsets, mask)
    y = modulated.modulated_taps(taps, weight, style, mix)
    return y.reshape(batch, height, width, self.features)


class TextBlock(Module):
  """Pre-layer-norm transformer block of a text head, [B, N, D] -> [B, N, D].

  Every residual sum is multiplied by `residual_gain`.

  `attention` is one of
    "scaled": attention over the tokens of a text, with logits q . k / sqrt(head width);
    "uniform": what the released code computes. Its attention takes the token axis for the batch axis and multiplies the
      logits by False, so that each token position averages its values over the samples of the batch;
    "independent": "uniform" for a batch of one, as in the released scripts: the values themselves.
  """

  heads: int
  attention: str
  lr_multiplier: float
  residual_gain: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]

    def dense(features, name):
      return Dense(features, lr_multiplier=self.lr_multiplier, name=name)

    h = dense(3 * width, "qkv")(LayerNorm(name="norm1")(x))
    queries, keys, values = jnp.split(h, 3, axis=-1)
    if self.attention == "independent":
      h = values
    elif self.attention == "uniform":
      h = jnp.broadcast_to(values.mean(axis=0, keepdims=True), values.shape)
    else:
      heads = lambda t: t.reshape(*t.shape[:2], self.heads, -1)
      h = attention_ops.dot_attention(heads(queries), heads(keys), heads(values)).reshape(x.shape)
    x = (x + dense(width, "out")(h)) * self.residual_gain
    h = quick_gelu(dense(4 * width, "mlp_in")(LayerNorm(name="norm2")(x)))
    return (x + dense(width, "mlp_out")(h)) * self.residual_gain


class TextHead(Module):
  """Trainable layers on top of frozen CLIP features. The released counterpart is `TextHead`.

  Inputs are text [B, N, F] and the end-of-text position eot [B]. The output is (global_text, local_text): the feature
  at that position [B, D], and all other features in order, including padding, [B, N - 1, D].
  """

  width: int
  layers: int
  heads: int
  attention: str
  lr_multiplier: float
  residual_gain: float = 1.0

  @nn.compact
  def __call__(self, text: jax.Array, eot: jax.Array) -> tuple[jax.Array, jax.Array]:
    if text.shape[-1] != self.width:
      text = Dense(self.width, bias_init=1.0, lr_multiplier=self.lr_multiplier, name="align")(text)
    for i in range(self.layers):
      text = TextBlock(self.heads, self.attention, self.lr_multiplier, self.residual_gain, name=f"block_{i}")(text)
    global_text = jnp.take_along_axis(text, eot[:, None, None], axis=1)[:, 0]
    rest = jnp.arange(text.shape[1] - 1)
    rest = rest + (rest >= eot[:, None])  # [B, N - 1]: every position but EOT's
    return global_text, jnp.take_along_axis(text, rest[..., None], axis=1)
