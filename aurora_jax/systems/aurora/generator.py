"""Aurora's generator (arXiv 2309.03904; released: `models/text_generator.py`): text and latent to a pyramid of images.

Text head and mapping give w; the synthesis network starts from a Fourier input at 4x4 and alternates residual modulated
convolutions with transformer blocks whose feed-forward is a sparse mixture of experts, routed per feature point under
w. Every resolution adds its RGB to the upsampled image below.

  B batch, r resolution, N tokens (r * r, or text), D width, E experts, W width of w
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.models import layers
from aurora_jax.models.module import Module
from aurora_jax.ops import attention as attention_ops
from aurora_jax.ops import moe, resample
from aurora_jax.systems import base
from aurora_jax.systems.aurora import config as config_lib
from aurora_jax.systems.aurora.attention import CrossAttention, SelfAttention


class Routing(NamedTuple):
  """Where one MoE layer sent its tokens."""

  expert: jax.Array  # [B, r * r] int32
  logits: jax.Array  # [B, r * r, E] float32


class GeneratorOutput(NamedTuple):
  """What the generator returns."""

  image: jax.Array  # [B, R, R, 3] float32, about [-1, 1]
  pyramid: Mapping[int, jax.Array]  # {r: [B, r, r, 3]}
  w: jax.Array  # [B, W]
  moe_loss: jax.Array  # scalar, summed over layers
  routing: Mapping[str, Routing]  # by layer: "r8_block0_layer1"


class FourierInput(Module):
  """Fixed Fourier features, rotated and shifted by w, and a trainable mix (StyleGAN3's input). w [B, W] -> [B, 4, 4,
  C].
  """

  channels: int
  size: int = 4

  @nn.compact
  def __call__(self, w: jax.Array) -> jax.Array:
    channels = self.channels

    def frequencies(key):
      freqs = jax.random.normal(key, (channels, 2))
      radii = jnp.linalg.norm(freqs, axis=1, keepdims=True)
      return freqs / (radii * jnp.exp(jnp.square(radii)) ** 0.25)

    def random_phases(key):
      return jax.random.uniform(jax.random.fold_in(key, 1), (channels,)) - 0.5

    key = self.make_rng("params") if self.is_initializing() else None
    freqs = self.variable("buffers", "freqs", frequencies, key).value  # [C, 2]
    phases = self.variable("buffers", "phases", random_phases, key).value  # [C]
    transform = self.variable("buffers", "transform", lambda: jnp.eye(3)).value

    w = w.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):  # phases span many turns
      t = layers.Dense(4, bias_init=(1.0, 0.0, 0.0, 0.0), weight_scale=0.0, name="affine")(w)
      t = t / jnp.linalg.norm(t[:, :2], axis=1, keepdims=True)
      cos, sin, shift = t[:, 0], t[:, 1], -t[:, 2:]
      zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
      rotate = jnp.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).reshape(-1, 3, 3)
      translate = jnp.stack([one, zero, shift[:, 0], zero, one, shift[:, 1], zero, zero, one], -1).reshape(-1, 3, 3)
      transforms = rotate @ translate @ transform  # [B, 3, 3]
      phases = phases + jnp.einsum("cx,bx->bc", freqs, transforms[:, :2, 2])
      freqs = jnp.einsum("cx,bxy->bcy", freqs, transforms[:, :2, :2])

      line = (jnp.arange(self.size) + 0.5) / self.size - 0.5  # pixel centers, in units of the image
      grid = jnp.stack(jnp.meshgrid(line, line, indexing="xy"), -1)  # [4, 4, (x, y)]
      x = jnp.einsum("hwx,bcx->bhwc", grid, freqs) + phases[:, None, None]
    return layers.Dense(channels, use_bias=False, name="mix")(jnp.sin(2 * jnp.pi * x))


class ConstantInput(Module):
  """A trained feature map, the same for every sample (StyleGAN2's input, GigaGAN's). w [B, W] -> [B, 4, 4, C]."""

  channels: int
  size: int = 4

  @nn.compact
  def __call__(self, w: jax.Array) -> jax.Array:
    constant = self.param("constant", layers.scaled_normal(), (self.size, self.size, self.channels))
    return jnp.broadcast_to(constant, (len(w), *constant.shape))


class ConvBlock(Module):
  """Two modulated convolutions around a residual (released: `ResidualConvBlock`); the second may be deformable."""

  features: int
  kernels: int
  upsample: bool
  deformable: bool
  residual_gain: float

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
    h = layers.ModulatedConv(self.features, kernels=self.kernels, upsample=self.upsample, name="conv1")(x, w)
    h = layers.ModulatedConv(self.features, kernels=self.kernels, deformable=self.deformable, name="conv2")(h, w)
    if self.upsample or x.shape[-1] != self.features:
      x = layers.Dense(self.features, use_bias=False, name="skip")(x)
      x = resample.upsample(x) if self.upsample else x
    return (h + x) * self.residual_gain


class FeedForward(Module):
  """GEGLU feed-forward, one or a sparse mixture of experts (released: `FeedForward`).

  The router is a modulated 1x1 convolution by w with bias and leaky ReLU, in float32; each token goes to its most
  probable expert, whose output is multiplied by that probability.

  Call with x [B, r, r, D], w [B, W]; returns (out [B, r, r, D], moe_loss scalar, Routing or None).
  """

  experts: int
  ratio: int
  backend: str
  z_weight: float
  balance_weight: float
  expert_ffn: Callable = moe.expert_ffn

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array, Routing | None]:
    batch, height, width, channels = x.shape
    hidden, stack = self.ratio * channels, (self.experts,)
    in_weight = self.param("in_weight", layers.scaled_normal(), stack + (channels, 2 * hidden))
    in_bias = self.param("in_bias", layers.constant(0.0), stack + (2 * hidden,))
    out_weight = self.param("out_weight", layers.scaled_normal(), stack + (hidden, channels))
    out_bias = self.param("out_bias", layers.constant(0.0), stack + (channels,))
    params = moe.ExpertParams(in_weight, in_bias, out_weight, out_bias)
    tokens = x.reshape(batch * height * width, channels)
    if self.experts == 1:
      out = moe.geglu_ffn(tokens, jax.tree.map(lambda p: p[0], params))
      return out.reshape(x.shape), jnp.float32(0), None

    router = layers.ModulatedConv(self.experts, kernel_size=1, name="router")
    with jax.default_matmul_precision("highest"):  # a rounded logit sends a token to another expert
      logits = router(x.astype(jnp.float32), w.astype(jnp.float32)).reshape(batch, height * width, self.experts)
    expert = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    probability = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)  # [B, N]
    out = self.expert_ffn(tokens, expert.reshape(-1), params, self.backend)
    out = out * probability.reshape(-1, 1).astype(out.dtype)
    z_loss, balance_loss = moe.router_losses(logits, expert)
    loss = self.z_weight * z_loss + self.balance_weight * balance_loss
    return out.reshape(x.shape), loss, Routing(expert, logits)


class TransformerLayer(Module):
  """Self-attention, cross-attention and feed-forward, each pre-LN with a plain residual sum.

  Call with x [B, r, r, D], w [B, W], text [B, M, T]; returns (out [B, r, r, D], moe_loss scalar, Routing or None).
  """

  cfg: config_lib.Generator
  experts: int
  expert_ffn: Callable = moe.expert_ffn
  attend: Callable = attention_ops.l2_attention

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, Routing | None]:
    cfg, shape = self.cfg, x.shape
    attention = dict(
      heads=cfg.heads,
      head_dim=cfg.head_dim,
      chunk=cfg.attention_chunk,
      implementation=cfg.attention,
      attend=self.attend,
    )
    self_attention = SelfAttention(**attention, tied=cfg.tied_attention, name="self_attention")
    x = x + self_attention(layers.LayerNorm(name="norm1")(x), w)
    if cfg.w_token:
      token = layers.Dense(text.shape[-1], bias_init=1.0, name="w_token")(w.astype(jnp.float32))
      text = jnp.concatenate([text, token[:, None]], axis=1)
    tokens = layers.LayerNorm(name="norm2")(x).reshape(shape[0], -1, shape[-1])
    x = x + CrossAttention(**attention, name="cross_attention")(tokens, text).reshape(shape)
    feed_forward = FeedForward(
      self.experts,
      cfg.feed_forward_ratio,
      cfg.moe_backend,
      cfg.router_z_weight,
      cfg.router_balance_weight,
      self.expert_ffn,
      name="feed_forward",
    )
    out, loss, routing = feed_forward(layers.LayerNorm(name="norm3")(x), w)
    return x + out, loss, routing


class AttentionBlock(Module):
  """Transformer layers between two 1x1 convolutions around a residual (released: `ResidualAttnBlock`).

  Call with x [B, r, r, C], w [B, W], text [B, M, T]; returns (out [B, r, r, C], moe_loss scalar, each layer's Routing
  or None).
  """

  cfg: config_lib.Generator
  resolution: int
  expert_ffn: Callable = moe.expert_ffn
  attend: Callable = attention_ops.l2_attention

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array, list[Routing | None]]:
    cfg = self.cfg
    h = layers.GroupNorm(name="norm")(x)
    h = layers.Dense(cfg.heads * cfg.head_dim, use_bias=False, name="in")(h)
    if cfg.remat and cfg.loop_layers and not self.is_initializing():
      h, loss, routings = self._looped(h, w, text)
    else:
      loss, routings = jnp.float32(0), []
      for i in range(cfg.attention_depth[self.resolution]):
        h, layer_loss, routing = self._layer(name=f"layer_{i}")(h, w, text)
        loss = loss + layer_loss
        routings.append(routing)
    scale = 0.0 if cfg.zero_init_attention else 1.0
    h = layers.Dense(x.shape[-1], use_bias=False, weight_scale=scale, name="out")(h)
    return (x + h) * cfg.attention_residual_gain, loss, routings

  def _layer(self, **flax):
    return TransformerLayer(self.cfg, self.cfg.experts[self.resolution], self.expert_ffn, self.attend, **flax)

  def _looped(self, h, w, text):
    """The layers as a loop: the compiler has one body to compile, not one per layer.

    The loop's parameters are a stacked copy. Only a rematerialized block does not store it for the backward pass.
    """
    layer, count = self._layer(parent=None), self.cfg.attention_depth[self.resolution]
    params = [self.variables["params"][f"layer_{i}"] for i in range(count)]

    def run(h, params):
      h, loss, routing = base.apply(layer, {"params": params}, h, w, text)
      return h, (loss, routing)

    h, (losses, routings) = jax.lax.scan(run, h, jax.tree.map(lambda *leaves: jnp.stack(leaves), *params))
    return h, jnp.sum(losses), [jax.tree.map(lambda leaf: leaf[i], routings) for i in range(count)]


class Synthesis(Module):
  """w [B, W] and local text [B, M, T] to a `GeneratorOutput`.

  Synthesis stops at the largest of `output_resolutions`. Initialization creates the layers above it too, so that
  progressive growing never changes the parameters.
  """

  cfg: config_lib.Generator
  expert_ffn: Callable = moe.expert_ffn
  attend: Callable = attention_ops.l2_attention

  @nn.compact
  def __call__(self, w: jax.Array, text: jax.Array) -> GeneratorOutput:
    cfg = self.cfg
    conv_block = nn.remat(ConvBlock) if cfg.remat else ConvBlock
    attention_block = nn.remat(AttentionBlock) if cfg.remat else AttentionBlock
    dtype = jnp.dtype(cfg.compute_dtype)
    first = FourierInput if cfg.fourier_input else ConstantInput
    x = first(cfg.channels(2), name="input")(w).astype(dtype)
    image, pyramid, routing, moe_loss = None, {}, {}, jnp.float32(0)
    for r in cfg.resolutions:
      if r > max(cfg.output_resolutions) and not self.is_initializing():
        break
      features, kernels = cfg.channels(r), cfg.adaptive_kernels[r]
      deformable = r <= cfg.deformable_max_resolution
      for i in range(cfg.blocks[r]):
        if r == 4 and i == 0:
          x = layers.ModulatedConv(features, kernels=kernels, deformable=deformable, name="r4_block0_conv")(x, w)
        else:
          x = conv_block(
            features,
            kernels,
            upsample=i == 0,
            deformable=deformable,
            residual_gain=cfg.conv_residual_gain,
            name=f"r{r}_block{i}_conv",
          )(x, w)
        if r in cfg.attention_depth:
          attention = attention_block(cfg, r, self.expert_ffn, self.attend, name=f"r{r}_block{i}_attention")
          x, loss, routings = attention(x, w, text)
          moe_loss = moe_loss + loss
          routing.update({f"r{r}_block{i}_layer{k}": item for k, item in enumerate(routings) if item is not None})
      to_rgb = layers.ModulatedConv(
        3, kernel_size=1, kernels=kernels, demodulate=False, activate=False, name=f"r{r}_rgb"
      )
      rgb = to_rgb(x, w).astype(jnp.float32)
      image = rgb if image is None else rgb + resample.upsample(image)
      if r in cfg.output_resolutions:
        pyramid[r] = image
    return GeneratorOutput(pyramid[max(pyramid)], pyramid, w, moe_loss, routing)


class Generator(Module):
  """The whole generator. Variables: {"params", "buffers"}; `buffers` holds Fourier frequencies and the average of w.

  Source: arXiv 2309.03904 and the released `Text2ImageGenerator`; `released.py` exchanges its weights.

  Attributes:
    cfg: the configuration.
    expert_ffn: evaluates the experts, with the signature of `moe.expert_ffn`; on a mesh it is
      `parallel.experts.Exchange`.
    attend: L2 attention, with the signature of `ops.attention.l2_attention`; on a mesh it is
      `parallel.attention.Sharded`.
  """

  cfg: config_lib.Generator
  expert_ffn: Callable = moe.expert_ffn
  attend: Callable = attention_ops.l2_attention

  def setup(self) -> None:
    cfg = self.cfg
    self.text_head = layers.TextHead(
      cfg.text_dim, cfg.text_layers, cfg.text_heads, cfg.text_attention, cfg.text_lr_multiplier, cfg.text_residual_gain
    )
    widths = [cfg.mapping_width] * (cfg.mapping_layers - 1) + [cfg.w_dim]
    self.mapping = [layers.Dense(width, lr_multiplier=cfg.mapping_lr_multiplier) for width in widths]
    self.synthesis = Synthesis(cfg, self.expert_ffn, self.attend)
    self.w_avg = self.variable("buffers", "w_avg", jnp.zeros, (cfg.w_dim,))

  def encode_text(self, text: jax.Array, eot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """CLIP features to the generator's own: text [B, N, F], eot [B] -> (global [B, T], local [B, N - 1, T])."""
    return self.text_head(text.astype(jnp.float32), eot)

  def map_latents(self, z: jax.Array, global_text: jax.Array) -> jax.Array:
    """z [B, Z] and global text [B, T] to w [B, W]. ValueError for z of another width."""
    if z.ndim != 2 or z.shape[1] != self.cfg.z_dim:
      raise ValueError(f"z must be [batch, {self.cfg.z_dim}], got {z.shape}")
    w = jnp.concatenate([layers.pixel_norm(z), layers.pixel_norm(global_text)], axis=-1)
    for dense in self.mapping:
      w = layers.leaky_relu(dense(w))
    return w

  def synthesize(self, w: jax.Array, local_text: jax.Array) -> GeneratorOutput:
    """w [B, W] and local text [B, N - 1, T] to a `GeneratorOutput`."""
    return self.synthesis(w, local_text)

  def __call__(
    self, z: jax.Array, text: jax.Array, eot: jax.Array, truncation: jax.Array | float | None = None
  ) -> GeneratorOutput:
    """Text and latents to images.

    Args:
      z: [B, Z], standard normal.
      text: [B, N, F], CLIP's features after its final layer norm.
      eot: [B] int32, the position of the end-of-text token.
      truncation: psi; w moves toward its average by 1 - psi. None: no truncation.

    Returns:
      A `GeneratorOutput`; its `w` is the one before truncation.
    """
    global_text, local_text = self.encode_text(text, eot)
    w = self.map_latents(z, global_text)
    used = w if truncation is None else self.w_avg.value + truncation * (w - self.w_avg.value)
    return self.synthesize(used, local_text)._replace(w=w)


def abstract_variables(cfg: config_lib.Generator) -> base.Variables:
  """Shapes and dtypes of the generator's variables, without allocating them."""
  latents, text = jnp.zeros((1, cfg.z_dim)), jnp.zeros((1, 2, cfg.text_feature_dim))  # any number of tokens
  init = lambda key: Generator(cfg).init(key, latents, text, jnp.zeros((1,), jnp.int32))
  return jax.eval_shape(init, jax.random.key(0))
