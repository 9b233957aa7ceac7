"""Building blocks of generator and discriminator, all with an equalised learning rate (arXiv 1710.10196).

A stored weight is ~ N(0, 1) / lr_multiplier and is multiplied by lr_multiplier / sqrt(fan_in) at run time; a stored bias
by lr_multiplier. That scaling is part of the parameterisation, so checkpoints move between systems unchanged. It is done
to the activations: a scaled copy of every weight would cost more memory and time than the products of a single image.

  B batch, H height, W width, N tokens, D channels, K kernels
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.ops import attention as attention_ops
from aurora_jax.ops import deform_conv
from aurora_jax.ops import modulated_conv as modulated

EPSILON = 1e-8


def leaky_relu(x):
  """Slope 0.2, gain sqrt(2) (StyleGAN2's bias_act)."""
  return jnp.where(x >= 0, x, 0.2 * x) * math.sqrt(2)


def quick_gelu(x):
  return x * jax.nn.sigmoid(1.702 * x)


def pixel_norm(x):
  """Divides by the RMS over the last axis."""
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


def scaled_normal(lr_multiplier=1.0, scale=1.0):
  def init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale / lr_multiplier, dtype)

  return init


def constant(values, lr_multiplier=1.0):
  def init(key, shape, dtype=jnp.float32):
    del key
    return jnp.broadcast_to(jnp.asarray(values, dtype) / jnp.asarray(lr_multiplier, dtype), shape)

  return init


def join(parts, batch):
  """Lays arrays side by side for one pass through a network, sample by sample: all parts of sample 0, of sample 1, ...

  One part after the other would do as well on one device; but where the samples lie on different devices, this order
  leaves every one where it is.

  Args:
    parts: list of [batch * k, ...], k of any part its own.
    batch: number of samples.

  Returns:
    [batch * sum of k, ...].
  """
  parts = [part.reshape(batch, -1, *part.shape[1:]) for part in parts]
  joined = jnp.concatenate(parts, axis=1)
  return joined.reshape(-1, *joined.shape[2:])


def unjoin(x, count):
  """The inverse of `join` of `count` parts of [batch, ...]. [batch * count, ...] -> list."""
  x = x.reshape(-1, count, *x.shape[1:])
  return [x[:, i] for i in range(count)]


class Dense(nn.Module):
  """Linear map over the last axis; on feature maps it is the 1x1 convolution. [..., I] -> [..., features]."""

  features: int
  use_bias: bool = True
  bias_init: float | tuple[float, ...] = 0.0
  weight_scale: float = 1.0
  lr_multiplier: float = 1.0

  @nn.compact
  def __call__(self, x):
    inputs = x.shape[-1]
    weight = self.param("weight", scaled_normal(self.lr_multiplier, self.weight_scale), (inputs, self.features))
    y = (x @ weight.astype(x.dtype)) * (self.lr_multiplier / math.sqrt(inputs))
    if self.use_bias:
      bias = self.param("bias", constant(self.bias_init, self.lr_multiplier), (self.features,))
      y = y + (bias * self.lr_multiplier).astype(x.dtype)
    return y


class Conv(nn.Module):
  """Plain "same" convolution with bias. [B, H, W, I] -> [B, H, W, features]."""

  features: int
  kernel_size: int = 3

  @nn.compact
  def __call__(self, x):
    size, inputs = self.kernel_size, x.shape[-1]
    weight = self.param("weight", scaled_normal(), (size, size, inputs, self.features))
    bias = self.param("bias", constant(0.0), (self.features,))
    y = jax.lax.conv_general_dilated(
      x, weight.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y / math.sqrt(size * size * inputs) + bias.astype(y.dtype)


class LayerNorm(nn.Module):
  """Layer norm over the last axis in float32, epsilon 1e-5."""

  @nn.compact
  def __call__(self, x):
    normed = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name="norm")(x.astype(jnp.float32))
    return normed.astype(x.dtype)


class GroupNorm(nn.Module):
  """Group norm with 32 groups in float32, epsilon 1e-5. x: [B, H, W, D]."""

  @nn.compact
  def __call__(self, x):
    norm = nn.GroupNorm(num_groups=32, epsilon=1e-5, use_fast_variance=False, name="norm")
    return norm(x.astype(jnp.float32)).astype(x.dtype)


class ModulatedConv(nn.Module):
  """Modulated convolution with adaptive kernels, bias and activation; optionally deformable (MTM, arXiv 2308.15472).

  Released counterpart: `AdaptiveModulateConvLayer`. Call with x [B, H, W, I] and w [B, w_dim]; returns
  [B, H, W, features], or twice the resolution with `upsample`.
  """

  features: int
  kernel_size: int = 3
  kernels: int = 1
  demodulate: bool = True
  upsample: bool = False
  deformable: bool = False
  activate: bool = True

  @nn.compact
  def __call__(self, x, w):
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
    """A second modulated convolution predicts 18 offsets and 9 masks; the taps are read there."""
    batch, height, width, inputs = x.shape
    outputs = 27
    mtm_weight = self.param("mtm_weight", scaled_normal(), (1, 3, 3, inputs, outputs))
    mtm_bias = self.param("mtm_bias", constant(0.0), (outputs,))
    mtm_scale = self.param("mtm_scale", constant(0.0), (outputs,))
    mtm_style = Dense(inputs, bias_init=1.0, name="mtm_style")(w) / math.sqrt(9 * inputs)
    # The norm of the unscaled filter, as released (demodulation's epsilon aside the scale would cancel).
    prediction = modulated.modulated_conv(x, mtm_weight, mtm_style)
    prediction = prediction.astype(jnp.float32) * mtm_scale + mtm_bias
    offsets = prediction[..., :18].reshape(batch, height, width, 9, 2)
    mask = 2 * jax.nn.sigmoid(prediction[..., 18:])
    taps = deform_conv.sample_taps(x, offsets, mask)
    y = modulated.modulated_taps(taps, weight, style, mix)
    return y.reshape(batch, height, width, self.features)


class TextBlock(nn.Module):
  """Pre-LN transformer block of a text head; every residual sum is multiplied by `residual_gain`. [B, N, D] -> same.

  `attention` is one of
    "scaled": over the tokens of a text, logits q . k / sqrt(head width): what was meant;
    "uniform": what the released code computes. It puts the token axis where its attention expects the batch and
      multiplies the logits by False, so that each token position averages its values over the *samples of the batch*;
    "independent": the same for a batch of one, as the released scripts run it: the values themselves.
  """

  heads: int
  attention: str
  lr_multiplier: float
  residual_gain: float

  @nn.compact
  def __call__(self, x):
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


class TextHead(nn.Module):
  """Trainable layers on top of frozen CLIP features (released: `TextHead`).

  Call with text [B, N, F] and eot [B]; returns (global_text [B, D], the feature at EOT, local_text [B, N - 1, D], all
  others in order, padding included).
  """

  width: int
  layers: int
  heads: int
  attention: str
  lr_multiplier: float
  residual_gain: float = 1.0

  @nn.compact
  def __call__(self, text, eot):
    if text.shape[-1] != self.width:
      text = Dense(self.width, bias_init=1.0, lr_multiplier=self.lr_multiplier, name="align")(text)
    for i in range(self.layers):
      text = TextBlock(self.heads, self.attention, self.lr_multiplier, self.residual_gain, name=f"block_{i}")(text)
    global_text = jnp.take_along_axis(text, eot[:, None, None], axis=1)[:, 0]
    rest = jnp.arange(text.shape[1] - 1)
    rest = rest + (rest >= eot[:, None])  # [B, N - 1]: every position but EOT's
    return global_text, jnp.take_along_axis(text, rest[..., None], axis=1)
