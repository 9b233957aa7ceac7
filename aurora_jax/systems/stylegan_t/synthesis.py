"""StyleGAN-T's synthesis network: w to an image (arXiv 2301.09515, section 3.1).

A Fourier input at 8x8, then per resolution an up-sampling convolution and residual blocks; every resolution adds its
RGB to the upsampled image below ("skip"). A layer's style is of second order in w. Per-sample filters are never built:
the style scales the input of one shared convolution, the demodulation its output.

  B batch, R resolution, C channels (I in, O out), W width of w
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.models import layers
from aurora_jax.models.module import Module
from aurora_jax.ops import modulated_conv, resample
from aurora_jax.systems.stylegan_t import config as config_lib

CLAMP = 256.0
RESIDUAL_GAIN = math.sqrt(0.5)  # of both convolutions of a residual block
BANDWIDTH = 2.0  # of the Fourier input, cycles per image

Noise = Mapping[str, jax.Array]


class FourierInput(Module):
  """Fourier features, rotated and shifted by w and by a transform of the user's, and a trained mix. w [B, W] -> [B, 8,
  8, C].

  Variables: params affine, weight [C, C]; buffers freqs [C, 2] (x, y), phases [C], transform [3, 3].
  """

  channels: int
  size: int = config_lib.FIRST_RESOLUTION

  @nn.compact
  def __call__(self, w: jax.Array) -> jax.Array:
    channels, size = self.channels, self.size

    def frequencies():
      """Uniform in the disc of the bandwidth."""
      normal = jax.random.normal(self.make_rng("params"), (channels, 2))
      length = jnp.linalg.norm(normal, axis=1, keepdims=True)
      return normal / length * BANDWIDTH * jnp.exp(-jnp.square(length) / 4)

    uniform = lambda: jax.random.uniform(self.make_rng("params"), (channels,), minval=-0.5, maxval=0.5)
    freqs = self.variable("buffers", "freqs", frequencies).value
    phases = self.variable("buffers", "phases", uniform).value
    transform = self.variable("buffers", "transform", jnp.eye, 3).value
    weight = self.param("weight", layers.scaled_normal(), (channels, channels))

    t = layers.Dense(4, bias_init=(1.0, 0.0, 0.0, 0.0), weight_scale=0.0, name="affine")(w)
    cos, sin, shift_x, shift_y = jnp.moveaxis(t / jnp.linalg.norm(t[:, :2], axis=1, keepdims=True), -1, 0)
    zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
    matrices = lambda *entries: jnp.stack(entries, -1).reshape(-1, 3, 3)
    rotate = matrices(cos, -sin, zero, sin, cos, zero, zero, zero, one)
    translate = matrices(one, zero, -shift_x, zero, one, -shift_y, zero, zero, one)
    matrix = rotate @ translate @ transform  # [B, 3, 3]
    phases = phases + jnp.einsum("cx,bx->bc", freqs, matrix[:, :2, 2])
    freqs = jnp.einsum("cx,bxy->bcy", freqs, matrix[:, :2, :2])
    # Frequencies that a transform raises above the bandwidth fade out until the sampling limit.
    excess = (jnp.linalg.norm(freqs, axis=2) - BANDWIDTH) / (size / 2 - BANDWIDTH)
    amplitude = jnp.clip(1 - excess, 0, 1)  # [B, C]

    line = (jnp.arange(size) + 0.5) / size - 0.5  # pixel centres, in units of the image
    x, y = freqs[..., 0], freqs[..., 1]
    angle = line[:, None, None] * y[:, None, None] + line[:, None] * x[:, None, None] + phases[:, None, None]
    features = jnp.sin(2 * math.pi * angle) * amplitude[:, None, None]  # [B, 8, 8, C]
    return features @ weight / math.sqrt(channels)


def _style(w, inputs):
  """The scale of a layer's input channels, of second order in w. w [B, W] -> float32 [B, inputs]."""
  first, second, third = jnp.split(layers.Dense(3 * inputs, bias_init=1.0, name="affine")(w), 3, axis=-1)
  return first * second + third


def _group_norm(groups):
  return nn.GroupNorm(num_groups=groups, epsilon=1e-5, use_fast_variance=False, name="norm")


class ModulatedConv(Module):
  """A demodulated 3x3 convolution with noise, bias, leaky ReLU and clamp; a plain, an up-sampling or a residual one.

  Attributes:
    features: output channels.
    key: the name of its noise in `Noise`, "b16.conv0".
    gain: of the activation and of its clamp.
    upsample: doubles the resolution (a stride-2 transposed convolution, then the FIR filter).
    residual_groups: 0, or the groups of the norm before it. Then the normalized input is added to its output.
    dtype: of the convolution and of the result.
  """

  features: int
  key: str
  gain: float = 1.0
  upsample: bool = False
  residual_groups: int = 0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array, noise: Noise | None) -> jax.Array:
    """x [B, R, R, I], w [B, W] -> [B, R, R, O], or twice the resolution. `noise`: see `_with_noise`."""
    inputs = x.shape[-1]
    weight = self.param("weight", layers.scaled_normal(), (3, 3, inputs, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x = x.astype(jnp.float32)
    if self.residual_groups:
      x = _group_norm(self.residual_groups)(x)
    style = _style(w, inputs)
    y = (x * style[:, None, None]).astype(self.dtype)
    kernel = weight.astype(self.dtype)
    if self.upsample:
      y = resample.smooth_transposed(modulated_conv.transposed_conv(y, kernel).astype(jnp.float32))
    else:
      y = jax.lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = y.astype(jnp.float32) * modulated_conv.demodulation(weight[None], style)[:, None, None]
    y = layers.leaky_relu(self._with_noise(y, noise) + bias) * self.gain
    y = jnp.clip(y, -CLAMP * self.gain, CLAMP * self.gain)
    if self.residual_groups:
      gamma = self.param("gamma", nn.initializers.constant(1e-5), (self.features,))
      y = (gamma * y + x) * math.sqrt(2)
    return y.astype(self.dtype)

  def _with_noise(self, y, noise):
    """Adds this layer's noise of `noise`, the layer's constant where it has none; nothing if `noise` is None."""
    strength = self.param("noise_strength", nn.initializers.zeros, ())
    size = y.shape[1]
    draw = lambda: jax.random.normal(self.make_rng("params"), (size, size))
    constant = self.variable("buffers", "noise_const", draw)
    if noise is None:
      return y
    return y + strength * noise.get(self.key, constant.value[None, ..., None])


class ToRgb(Module):
  """A 1x1 convolution modulated by w, not demodulated. x [B, R, R, I], w [B, W] -> float32 [B, R, R, 3]."""

  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
    inputs = x.shape[-1]
    weight = self.param("weight", layers.scaled_normal(scale=0.1), (inputs, 3))
    bias = self.param("bias", nn.initializers.zeros, (3,))
    style = _style(w, inputs) / math.sqrt(inputs)
    x = (x.astype(jnp.float32) * style[:, None, None]).astype(self.dtype)
    return jnp.clip((x @ weight.astype(self.dtype)).astype(jnp.float32) + bias, -CLAMP, CLAMP)


class Block(Module):
  """One resolution: the input or an up-sampling convolution, then pairs of a plain and a residual one, then ToRGB."""

  cfg: config_lib.Generator
  resolution: int

  @nn.compact
  def __call__(
    self, x: jax.Array | None, image: jax.Array | None, w: jax.Array, noise: Noise | None
  ) -> tuple[jax.Array, jax.Array]:
    """x [B, R / 2, R / 2, I] and image [B, R / 2, R / 2, 3], None in the first block -> the same at R."""
    cfg, prefix = self.cfg, f"b{self.resolution}"
    features, dtype = cfg.channels(self.resolution), cfg.block_dtype(self.resolution)
    if x is None:
      x = FourierInput(features, name="input")(w)
    else:
      x = ModulatedConv(features, f"{prefix}.conv0", upsample=True, dtype=dtype, name="conv0")(x, w, noise)
    for i in range(2 * cfg.residual_blocks):
      x = ModulatedConv(
        features,
        f"{prefix}.convs1.{i}",
        gain=RESIDUAL_GAIN,
        residual_groups=cfg.norm_groups if i % 2 else 0,
        dtype=dtype,
        name=f"convs1_{i}",
      )(x, w, noise)
    rgb = ToRgb(dtype, name="torgb")(x, w)
    return x, rgb if image is None else resample.upsample(image) + rgb


class Synthesis(Module):
  """All blocks. w [B, W] -> image, float32 [B, R, R, 3]."""

  cfg: config_lib.Generator

  @nn.compact
  def __call__(self, w: jax.Array, noise: str | Noise = "const") -> jax.Array:
    """`noise`: see `generator.Generator`."""
    arrays = self._noise_arrays(noise, len(w))
    block = nn.remat(Block) if self.cfg.remat else Block
    x = image = None
    for r in self.cfg.resolutions:
      x, image = block(self.cfg, r, name=f"b{r}")(x, image, w, arrays)
      self.sow("intermediates", f"b{r}_image", image)
    assert image is not None  # there is at least one resolution
    return image

  def _noise_arrays(self, noise, batch):
    """{layer: array}; {} for constants, None for no noise."""
    shapes = {name: (size, size, 1) for name, size in noise_sizes(self.cfg).items()}
    if isinstance(noise, str):
      if noise not in config_lib.NOISE_MODES:
        raise ValueError(f"noise must be 'const', 'none', 'random' or arrays by layer, got {noise!r}")
      if noise != "random":
        return {} if noise == "const" else None
      # All layers' in one draw: every call of the random generator is a good part of a second to compile.
      ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
      drawn = jnp.split(jax.random.normal(self.make_rng("noise"), (batch, ends[-1])), ends[:-1], axis=1)
      return {name: part.reshape(batch, *shape) for (name, shape), part in zip(shapes.items(), drawn)}
    if set(noise) != set(shapes):
      odd = ", ".join(sorted(set(noise) ^ set(shapes)))
      raise ValueError(f"noise must have one array for each of {', '.join(shapes)}; it differs in {odd}")
    for name, shape in shapes.items():
      if noise[name].shape not in ((batch, *shape), (1, *shape)):
        raise ValueError(f"noise of {name} is {noise[name].shape}, expected {(batch, *shape)}")
    return dict(noise)


def noise_sizes(cfg: config_lib.Generator) -> dict[str, int]:
  """The layers that have noise, in order, with their resolution: {"b8.convs1.0": 8, ..., "b16.conv0": 16, ...}."""
  sizes = {}
  for r in cfg.resolutions:
    names = ["conv0"] if r > config_lib.FIRST_RESOLUTION else []
    sizes |= {f"b{r}.{name}": r for name in names + [f"convs1.{i}" for i in range(2 * cfg.residual_blocks)]}
  return sizes
