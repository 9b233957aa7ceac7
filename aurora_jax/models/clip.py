"""CLIP (Radford et al., arXiv 2103.00020): OpenAI's text and vision transformers, of any size.

The text tower conditions the generator, the image tower serves the CLIP loss. Both have exactly the released
architecture: a class token, pre-layer-norm blocks, a causal mask over the text, a final layer norm, projections without
bias into one space and a learned temperature. `interop/clip_hf.py` reads and writes Hugging Face folders.

Axis letters: B batch, N tokens, W width of a tower, H heads, K width of a head, M width of the feed-forward,
D width of the shared space, P side of a patch, C colors, L layers (the leading axis of every block parameter).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.models.clip_config import LEGACY_EOT_ID as LEGACY_EOT_ID
from aurora_jax.models.clip_config import ClipConfig as ClipConfig
from aurora_jax.models.clip_config import ImageConfig as ImageConfig
from aurora_jax.models.clip_config import TextConfig as TextConfig
from aurora_jax.models.clip_config import TowerConfig as TowerConfig
from aurora_jax.models.clip_config import small as small
from aurora_jax.models.clip_config import vit_b32 as vit_b32
from aurora_jax.models.clip_config import vit_l14 as vit_l14
from aurora_jax.models.module import Module

ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

# A short stack of blocks is unrolled, which is faster. A long one is a loop over the layers, for a far smaller program.
_UNROLLED_LAYERS = 4


class TextOutput(NamedTuple):
  """Output of the text tower for B captions.

  Attributes:
    features: [B, N, W], one vector per token after the final layer norm; padding positions included.
    eot: int32 [B], the position of the end-of-text token.
    embedding: [B, D], the projected feature at `eot`, not normalized.
  """

  features: jax.Array
  eot: jax.Array
  embedding: jax.Array


def eot_position(tokens: jax.Array, eot_id: int = LEGACY_EOT_ID) -> jax.Array:
  """The position at which each caption ends: the first `eot_id`, or with `LEGACY_EOT_ID` the largest id.

  Args:
    tokens: int [B, N].
    eot_id: id of the end-of-text token.

  Returns:
    int32 [B].
  """
  score = tokens if eot_id == LEGACY_EOT_ID else tokens == eot_id
  return jnp.argmax(score, axis=-1).astype(jnp.int32)


class Dense(Module):
  """A dense layer on the last axis.

  The other axes are merged for the matmul: on a CPU the gradient of a matmul over several axes takes 1.7 times as long.
  """

  features: int
  dtype: jnp.dtype
  std: float  # standard deviation of the initial weights

  @nn.compact
  def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
    """x [..., in] -> [..., features], or only the given `columns` of the output."""
    kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))[:, columns]
    bias = self.param("bias", nn.initializers.zeros, (self.features,))[columns]
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    flat = flat @ kernel.astype(self.dtype) + bias.astype(self.dtype)
    return flat.reshape(*x.shape[:-1], -1)


Pick = Callable[[jax.Array], jax.Array]  # [B, N, W] -> [B, Q, W]


def _layer_norm(tower, name):
  """A layer norm in float32 for every compute type of the tower."""
  return nn.LayerNorm(epsilon=tower.layer_norm_epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


class Block(Module):
  """A pre-layer-norm block: multi-head self-attention, then two dense layers around the activation."""

  tower: TowerConfig
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | np.ndarray | None = None, pick: Pick | None = None) -> jax.Array:
    """Applies the block.

    Args:
      x: [B, N, W].
      mask: bool, broadcastable to [B, H, Q, N], True where row q sees token n; None: every row sees every token.
      pick: selects the rows of x that are computed, [B, N, W] -> [B, Q, W]; None computes all of them.

    Returns:
      [B, Q, W].
    """
    tower, width = self.tower, self.tower.width
    # OpenAI's initialization of the layers that add to the residual stream; it decreases with the depth.
    residual_std = (2 * tower.layers * width) ** -0.5
    normed = _layer_norm(tower, "attention_norm")(x).astype(self.dtype)
    qkv = Dense(3 * width, self.dtype, width**-0.5, name="qkv")
    if pick is None:
      query, key, value = jnp.split(qkv(normed), 3, axis=-1)
    else:
      query = qkv(pick(normed), slice(0, width))
      key, value = jnp.split(qkv(normed, slice(width, None)), 2, axis=-1)
      x = pick(x)
    x = x + Dense(width, self.dtype, residual_std, name="out")(self._attend(query, key, value, mask))
    normed = _layer_norm(tower, "mlp_norm")(x).astype(self.dtype)
    hidden = ACTIVATIONS[tower.activation](Dense(tower.mlp_width, self.dtype, (2 * width) ** -0.5, name="up")(normed))
    return x + Dense(width, self.dtype, residual_std, name="down")(hidden)

  def _attend(self, query, key, value, mask):
    """query [B, Q, W], key and value [B, N, W] -> [B, Q, W]; the softmax in float32."""
    head_width = self.tower.width // self.tower.heads
    query, key, value = (x.reshape(*x.shape[:2], -1, head_width) for x in (query, key, value))
    logits = jnp.einsum("BQHK,BNHK->BHQN", query * head_width**-0.5, key).astype(jnp.float32)
    if mask is not None:
      logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
    mixed = jnp.einsum("BHQN,BNHK->BQHK", weights, value)
    return mixed.reshape(*mixed.shape[:2], -1)


class Transformer(Module):
  """The stack of blocks; every parameter has a leading axis of length `layers`.

  Attributes:
    remat: whether to recompute each block in the backward pass instead of storing its activations.
  """

  tower: TowerConfig
  dtype: jnp.dtype
  remat: bool

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    mask: jax.Array | np.ndarray | None = None,
    pick: Pick | None = None,
    picked_mask: jax.Array | np.ndarray | None = None,
  ) -> jax.Array:
    """x [B, N, W] -> [B, N, W], or only the rows that `pick` selects (see `Block`).

    The last block then computes only these rows. With two blocks this saves a third of the work.
    """
    layers = self.tower.layers
    block = Block(self.tower, self.dtype, parent=None)

    def init(key):
      sample = jnp.zeros((1, 1, self.tower.width), self.dtype)
      return jax.vmap(lambda key: block.init(key, sample)["params"])(jax.random.split(key, layers))

    stacked = self.param("blocks", init)

    def apply(x, layer, mask, pick):
      return block.apply({"params": jax.tree.map(lambda leaf: leaf[layer], stacked)}, x, mask, pick)

    if self.remat:
      apply = jax.checkpoint(apply, static_argnums=3)
    if layers <= _UNROLLED_LAYERS:
      for layer in range(layers - 1):
        x = apply(x, layer, mask, None)
    else:
      x, _ = jax.lax.scan(lambda x, layer: (apply(x, layer, mask, None), None), x, jnp.arange(layers - 1))
    return apply(x, layers - 1, mask if pick is None else picked_mask, pick)


class TextTower(Module):
  """Converts tokens to one vector per token, after the final layer norm."""

  text: TextConfig
  dtype: jnp.dtype
  remat: bool

  @nn.compact
  def __call__(self, tokens: jax.Array, only: jax.Array | None = None) -> jax.Array:
    """tokens int [B, N] -> [B, N, W], or, with the positions `only` int [B], -> [B, W]."""
    text, length = self.text, tokens.shape[1]
    if length > text.context_length:
      raise ValueError(f"CLIP text tower: {length} tokens, the context holds {text.context_length}")
    embedding = self.param("token_embedding", nn.initializers.normal(0.02), (text.vocabulary_size, text.width))
    position = self.param("position_embedding", nn.initializers.normal(0.01), (text.context_length, text.width))
    x = (embedding[tokens] + position[:length]).astype(self.dtype)  # [B, N, W]
    norm = _layer_norm(text, "final_norm")
    transformer = Transformer(text, self.dtype, self.remat, name="transformer")
    causal = np.tril(np.ones((length, length), bool))
    if only is None:
      return norm(transformer(x, causal)).astype(self.dtype)
    pick = lambda x: jnp.take_along_axis(x, only[:, None, None], axis=1)
    seen = (np.arange(length) <= only[:, None])[:, None, None, :]
    return norm(transformer(x, causal, pick, seen))[:, 0].astype(self.dtype)


class ImageTower(Module):
  """Converts normalized images [B, size, size, 3] to the class token after the last layer norm, [B, W]."""

  image: ImageConfig
  dtype: jnp.dtype
  remat: bool

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    image, grid = self.image, self.image.size // self.image.patch
    initializer = nn.initializers.normal(image.width**-0.5)
    kernel = self.param("patch_embedding", initializer, (image.patch, image.patch, 3, image.width))
    class_token = self.param("class_embedding", initializer, (image.width,))
    position = self.param("position_embedding", initializer, (grid * grid + 1, image.width))
    # Patches do not overlap, so their convolution is one matmul.
    patches = images.reshape(-1, grid, image.patch, grid, image.patch, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(-1, image.patch * image.patch * 3).astype(self.dtype)
    x = patches @ kernel.reshape(-1, image.width).astype(self.dtype)
    x = x.reshape(-1, grid * grid, image.width)
    class_token = jnp.broadcast_to(class_token.astype(self.dtype), (x.shape[0], 1, image.width))
    x = jnp.concatenate([class_token, x], axis=1) + position.astype(self.dtype)  # [B, N, W]
    x = _layer_norm(image, "pre_norm")(x).astype(self.dtype)
    x = Transformer(image, self.dtype, self.remat, name="transformer")(x, pick=lambda x: x[:, :1])
    return _layer_norm(image, "final_norm")(x)[:, 0].astype(self.dtype)


class Clip(Module):
  """Both towers, the projections and the temperature.

  Call `encode_text`, `encode_image` and `logit_scale` through `apply(variables, ..., method="encode_text")`.

  Attributes:
    config: the sizes.
    dtype: compute type of the blocks; parameters, layer norms, softmax and embeddings are float32.
    remat: whether to recompute the blocks in the backward pass, for gradients through a large tower.
  """

  config: ClipConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  def setup(self) -> None:
    config = self.config
    self.text = TextTower(config.text, self.dtype, self.remat)
    self.image = ImageTower(config.image, self.dtype, self.remat)
    self.text_projection = nn.Dense(
      config.embedding_width, use_bias=False, kernel_init=nn.initializers.normal(config.text.width**-0.5)
    )
    self.image_projection = nn.Dense(
      config.embedding_width, use_bias=False, kernel_init=nn.initializers.normal(config.image.width**-0.5)
    )
    self.log_scale = self.param("log_scale", nn.initializers.constant(np.log(1 / 0.07)), (), jnp.float32)

  def __call__(self, tokens: jax.Array, images: jax.Array) -> tuple[TextOutput, jax.Array, jax.Array]:
    """Both towers, for initialization: (TextOutput, image embeddings [B, D], logit scale)."""
    return self.encode_text(tokens), self.encode_image(images), self.logit_scale()

  def encode_text(self, tokens: jax.Array) -> TextOutput:
    """Encodes captions.

    Args:
      tokens: int [B, N], N at most the context length; begin of text, words, end of text, padding.

    Returns:
      `TextOutput`, float32 for every compute type.
    """
    features = self.text(tokens).astype(jnp.float32)
    eot = eot_position(tokens, self.config.text.eot_id)
    pooled = jnp.take_along_axis(features, eot[:, None, None], axis=1)[:, 0]
    return TextOutput(features, eot, self.text_projection(pooled))

  def embed_text(self, tokens: jax.Array) -> jax.Array:
    """Only the `embedding` of `encode_text`, at a lower cost. int [B, N] -> float32 [B, D]."""
    eot = eot_position(tokens, self.config.text.eot_id)
    return self.text_projection(self.text(tokens, eot).astype(jnp.float32))

  def encode_image(self, images: jax.Array) -> jax.Array:
    """Embeds images.

    Args:
      images: [B, R, R, 3] in [-1, 1] of any size R; resized (bicubic, antialiased) to the tower's size.

    Returns:
      float32 [B, D], not normalized.
    """
    image, images = self.config.image, self.fit(images)
    # The mean and the standard deviation are those of colors in [0, 1], (x + 1) / 2.
    mean, std = np.asarray(image.mean, np.float32), np.asarray(image.std, np.float32)
    images = images * (0.5 / std) + (0.5 - mean) / std
    return self.image_projection(self.image(images).astype(jnp.float32))

  def fit(self, images: jax.Array) -> jax.Array:
    """Resizes images to the tower's size (bicubic, antialiased). [B, R, R, 3] -> float32 [B, size, size, 3]."""
    size, images = self.config.image.size, images.astype(jnp.float32)
    if images.shape[1:3] == (size, size):
      return images
    return jax.image.resize(images, (images.shape[0], size, size, 3), "bicubic")

  def logit_scale(self) -> jax.Array:
    """The factor on cosines in the contrastive loss, 1 / temperature: a float32 scalar, 100 in released models."""
    return jnp.exp(self.log_scale)


def abstract_variables(config: ClipConfig) -> dict[str, Any]:
  """The variables of `Clip(config)` as a tree of `jax.ShapeDtypeStruct`. Nothing is allocated."""
  tokens = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
  images = jax.ShapeDtypeStruct((1, config.image.size, config.image.size, 3), jnp.float32)
  return jax.eval_shape(Clip(config).init, jax.random.key(0), tokens, images)
