"""GigaGAN's discriminator (arXiv 2303.05511, section 3.4, Figure 5): every pyramid level in, a judgement at every
scale.

Each level of the image pyramid enters the shared trunk at its own resolution and is judged, by itself, at every exit
below: by a conditional head (1x1 convolutions modulated by the text) and an unconditional one (a plain 1x1
convolution). Levels that are at the same resolution travel through a block together, joined along the batch.

  B batch, r resolution, L levels in flight, C channels, T text width
"""

import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from aurora_jax.models import layers
from aurora_jax.models.module import Module
from aurora_jax.ops import attention as attention_ops
from aurora_jax.ops import resample
from aurora_jax.ops.losses import Logit
from aurora_jax.systems import base
from aurora_jax.systems.aurora import config as config_lib


@struct.dataclass
class Feature:
  """What the trunk holds of one level at one exit, before any text is looked at."""

  feature: jax.Array  # [B, exit, exit, C]
  level: int = struct.field(pytree_node=False)  # resolution at which the image entered
  exit: int = struct.field(pytree_node=False)  # resolution of the feature map; 1 is the last


class ResidualBlock(Module):
  """Two 3x3 convolutions around a residual; with `downsample`, halves the resolution between them. [B, r, r, C]."""

  features: int
  downsample: bool
  residual_gain: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shortcut = x
    h = layers.leaky_relu(layers.Conv(x.shape[-1], name="conv1")(x))
    if self.downsample:
      h, shortcut = resample.downsample(h), resample.downsample(shortcut)
    h = layers.leaky_relu(layers.Conv(self.features, name="conv2")(h))
    if shortcut.shape[-1] != self.features:
      shortcut = layers.Dense(self.features, use_bias=False, name="skip")(shortcut)
    return (h + shortcut) * self.residual_gain


class AttentionLayer(Module):
  """L2 self-attention with tied queries and keys, then GEGLU, both pre-LN residuals. [B, r, r, C] -> same."""

  heads: int
  head_dim: int
  ratio: int
  chunk: int
  implementation: str = "xla"
  attend: Callable = attention_ops.l2_attention

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    inner = self.heads * self.head_dim
    tokens = x.reshape(batch, height * width, channels)
    heads = lambda t: t.reshape(*t.shape[:2], self.heads, self.head_dim)
    h = layers.LayerNorm(name="norm1")(tokens)
    qk = heads(layers.Dense(inner, use_bias=False, name="qk")(h))
    values = heads(layers.Dense(inner, use_bias=False, name="v")(h))
    h = self.attend(qk, qk, values, chunk=self.chunk, implementation=self.implementation)
    h = h.reshape(batch, -1, inner)
    tokens = tokens + layers.Dense(channels, weight_scale=0.0, name="out")(h)
    h = layers.Dense(2 * self.ratio * inner, name="mlp_in")(layers.LayerNorm(name="norm2")(tokens))
    value, gate = jnp.split(h, 2, axis=-1)
    tokens = tokens + layers.Dense(channels, weight_scale=0.0, name="mlp_out")(value * nn.gelu(gate, approximate=False))
    return tokens.reshape(x.shape)


class ConditionalHead(Module):
  """`depth` 1x1 convolutions modulated by the text, then one channel. [B, r, r, C], text [B, T] -> [B, r, r]."""

  depth: int

  @nn.compact
  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    for i in range(self.depth):
      x = layers.ModulatedConv(x.shape[-1], kernel_size=1, name=f"conv_{i}")(x, text)
    return layers.ModulatedConv(1, kernel_size=1, demodulate=False, activate=False, name="logit")(x, text)[..., 0]


def minibatch_std(x: jax.Array, group: int, kinds: int = 1) -> jax.Array:
  """Appends one channel: the mean standard deviation within groups of adjacent samples (arXiv 1710.10196).

  Args:
    x: [B * kinds, r, r, C].
    group: samples per group; the largest common divisor with B is taken.
    kinds: images of each sample, which are adjacent (`layers.join`); groups are within a kind.

  Returns:
    [B * kinds, r, r, C + 1].
  """
  total, height, width, channels = x.shape
  group = math.gcd(group, total // kinds)
  stat = x.astype(jnp.float32).reshape(-1, group, kinds, height, width, channels)
  stat = jnp.sqrt(stat.var(axis=1) + layers.EPSILON).mean((2, 3, 4))  # [B / group, kinds]
  stat = jnp.repeat(stat, group, axis=0).reshape(total, 1, 1, 1).astype(x.dtype)
  return jnp.concatenate([x, jnp.broadcast_to(stat, (total, height, width, 1))], axis=-1)


def compare_pairs(x: jax.Array, caption_id: jax.Array, kinds: int = 1) -> jax.Array:
  """Appends how much each image differs from another one of its caption, and whether there is one.

  A single image does not show whether all images of its caption are the same; a pair does (PacGAN, arXiv 1712.04086,
  which joins the images at the input).

  Args:
    x: [B * kinds, r, r, C].
    caption_id: [B] int32. The partner is the first other sample of the same.
    kinds: images of each sample, which are adjacent (`layers.join`); partners are of a kind.

  Returns:
    [B * kinds, r, r, 2 C + 1]: x, then the difference and a one, or zeros for a sample without a partner.
  """
  same = (caption_id[:, None] == caption_id) & ~jnp.eye(len(caption_id), dtype=bool)
  paired = same.any(axis=1)[:, None, None, None, None].astype(x.dtype)
  images = x.reshape(-1, kinds, *x.shape[1:])
  # Smooth at zero: between two equal images the sign of a difference is that of its rounding errors.
  difference = jnp.sqrt(jnp.square(images - images[jnp.argmax(same, axis=1)]) + 0.01) * paired
  paired = jnp.broadcast_to(paired, (*images.shape[:-1], 1))
  return jnp.concatenate([images, difference, paired], axis=-1).reshape(*x.shape[:-1], -1)


class Discriminator(Module):
  """The whole discriminator, in three methods, so that a mismatched caption costs only the heads.

  `features` runs the trunk, `encode_text` the text head, `judge` the heads. A logit is the sum of a conditional and an
  unconditional part, as in GigaGAN: D_ij = psi_j(phi, t) + conv(phi).

  Attributes:
    cfg: the configuration.
    attend: L2 attention, with the signature of `ops.attention.l2_attention`; on a mesh it is
      `parallel.attention.Sharded`.
  """

  cfg: config_lib.Discriminator
  attend: Callable = attention_ops.l2_attention

  def setup(self) -> None:
    cfg = self.cfg
    self.text_head = layers.TextHead(cfg.text_dim, cfg.text_layers, cfg.text_heads, "scaled", cfg.text_lr_multiplier)
    block = nn.remat(ResidualBlock) if cfg.remat else ResidualBlock
    attention = nn.remat(AttentionLayer) if cfg.remat else AttentionLayer
    trunk, entries = {}, {}
    for r in cfg.resolutions:
      if r in cfg.input_resolutions:
        entries[f"r{r}"] = layers.Dense(cfg.channels(r), name=f"r{r}_from_rgb")
      for i in range(cfg.blocks[r]):
        last = i == cfg.blocks[r] - 1
        if r in cfg.attention_depth and i == 0:
          for k in range(cfg.attention_depth[r]):
            trunk[f"r{r}_attention{k}"] = attention(
              cfg.heads,
              cfg.head_dim,
              cfg.feed_forward_ratio,
              cfg.attention_chunk,
              cfg.attention,
              self.attend,
              name=f"r{r}_attention{k}",
            )
        downsample = last and r > 4
        features = cfg.channels(r // 2) if downsample else cfg.channels(r)
        trunk[f"r{r}_block{i}"] = block(features, downsample, cfg.residual_gain, name=f"r{r}_block{i}")
    self.trunk, self.entries = trunk, entries
    self.last = layers.Dense(cfg.channels(4), name="last")
    self.conditional = {
      f"r{r}": ConditionalHead(cfg.head_layers, name=f"r{r}_conditional") for r in cfg.exit_resolutions
    }
    self.unconditional = {f"r{r}": layers.Dense(1, name=f"r{r}_unconditional") for r in cfg.exit_resolutions}

  def encode_text(self, text: jax.Array, eot: jax.Array) -> jax.Array:
    """CLIP features to the heads' modulation: text [B, N, F], eot [B] -> [B, T]."""
    return layers.pixel_norm(self.text_head(text.astype(jnp.float32), eot)[0])

  def features(
    self, pyramid: Mapping[int, jax.Array], kinds: int = 1, caption_id: jax.Array | None = None
  ) -> list[Feature]:
    """The trunk.

    Args:
      pyramid: {r: [B * kinds, r, r, 3]} in [-1, 1].
      kinds: images of each sample, such as a real and a generated one, which are adjacent (`layers.join`).
      caption_id: [B] int32, equal for samples of one caption; None: all captions differ.

    Returns:
      Every level at every exit below it.
    """
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.compute_dtype)
    batch = len(next(iter(pyramid.values())))
    enter = lambda r: layers.leaky_relu(self.entries[f"r{r}"](pyramid[r].astype(dtype)))
    found, levels, x = [], [cfg.resolution], enter(cfg.resolution)
    for r in cfg.resolutions:
      if r in cfg.input_resolutions and r != cfg.resolution:
        x = layers.join([x, enter(r)], batch)
        levels.append(r)
      for i in range(cfg.blocks[r]):
        if i == 0:
          for k in range(cfg.attention_depth.get(r, 0)):
            x = self.trunk[f"r{r}_attention{k}"](x)
        x = self.trunk[f"r{r}_block{i}"](x)
      if r > 4 and r // 2 in cfg.exit_resolutions:
        found += [Feature(part, level, r // 2) for level, part in zip(levels, layers.unjoin(x, len(levels)))]
    for level, part in zip(levels, layers.unjoin(x, len(levels))):
      if cfg.minibatch_std:
        part = minibatch_std(part, cfg.minibatch_std, kinds)
      if cfg.compare_pairs:
        ids = jnp.arange(len(part) // kinds) if caption_id is None else caption_id
        part = compare_pairs(part, ids, kinds)
      part = layers.leaky_relu(self.last(part.reshape(part.shape[0], 1, 1, -1)))
      found.append(Feature(part, level, 1))
    return found

  def judge(self, features: Sequence[Feature], text: jax.Array) -> list[Logit]:
    """The heads, on the results of `features` and `encode_text` (text [B, T])."""
    logits = []
    for exit_resolution in self.cfg.exit_resolutions:
      group = [f for f in features if f.exit == exit_resolution]
      x = layers.join([f.feature for f in group], len(text))
      name = f"r{exit_resolution}"
      repeated = jnp.repeat(text, len(group), axis=0).astype(x.dtype)
      value = self.conditional[name](x, repeated) + self.unconditional[name](x)[..., 0]
      parts = layers.unjoin(value.astype(jnp.float32), len(group))
      logits += [Logit(part, f.level, f.exit) for f, part in zip(group, parts)]
    return logits

  def __call__(self, pyramid: Mapping[int, jax.Array], text: jax.Array, eot: jax.Array) -> list[Logit]:
    """pyramid {r: [B, r, r, 3]}, text [B, N, F], eot [B] -> list of `Logit`."""
    return self.judge(self.features(pyramid), self.encode_text(text, eot))


def abstract_params(cfg: config_lib.Discriminator) -> base.PyTree:
  """Shapes and dtypes of the discriminator's parameters, without allocating them."""

  def init(key):
    pyramid = {r: jnp.zeros((1, r, r, 3)) for r in cfg.input_resolutions}
    return Discriminator(cfg).init(key, pyramid, jnp.zeros((1, 2, cfg.text_feature_dim)), jnp.zeros((1,), jnp.int32))

  return jax.eval_shape(init, jax.random.key(0))["params"]
