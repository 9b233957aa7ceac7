"""The attention layers of Aurora's generator (arXiv 2309.03904; released: `models/text_generator.py`).

Attributes of both:
  heads, head_dim: A heads of width D / A.
  chunk, implementation: see `ops.attention.l2_attention`.
  attend: that function; on a mesh it is `parallel.attention.Sharded`.

  B batch, r resolution, N image tokens, M text tokens, D width, W width of w, T width of text
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.models import layers
from aurora_jax.models.module import Module
from aurora_jax.ops import attention as attention_ops


class SelfAttention(Module):
  """L2 self-attention whose output projection is modulated by w. [B, r, r, D] -> same.

  `tied`: queries and keys are one projection (arXiv 2006.04710, GigaGAN), which bounds the map's slope.
  """

  heads: int
  head_dim: int
  chunk: int
  implementation: str = "xla"
  attend: Callable = attention_ops.l2_attention
  tied: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    tokens = x.reshape(batch, height * width, channels)
    projections = 1 if self.tied else 2
    qk = layers.Dense(projections * channels, use_bias=False, name="qk")(tokens)
    qk = qk.reshape(batch, -1, self.heads, projections, self.head_dim)  # per head: queries, then keys
    values = layers.Dense(channels, use_bias=False, name="v")(tokens).reshape(batch, -1, self.heads, self.head_dim)
    queries, keys = qk[..., 0, :], qk[..., -1, :]
    out = self.attend(queries, keys, values, chunk=self.chunk, implementation=self.implementation)
    return layers.ModulatedConv(channels, kernel_size=1, activate=False, name="out")(out.reshape(x.shape), w)


class CrossAttention(Module):
  """L2 attention from image tokens to the local text tokens. x [B, N, D], text [B, M, T] -> [B, N, D]."""

  heads: int
  head_dim: int
  chunk: int
  implementation: str = "xla"
  attend: Callable = attention_ops.l2_attention

  @nn.compact
  def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
    inner = self.heads * self.head_dim
    heads = lambda t: t.reshape(*t.shape[:2], self.heads, self.head_dim)
    queries = layers.Dense(inner, use_bias=False, name="q")(x)
    keys, values = jnp.split(layers.Dense(2 * inner, use_bias=False, name="kv")(text.astype(x.dtype)), 2, axis=-1)
    queries, keys, values = map(heads, (queries, keys, values))
    out = self.attend(queries, keys, values, chunk=self.chunk, implementation=self.implementation)
    return layers.Dense(x.shape[-1], name="out")(out.reshape(*x.shape[:2], inner))
