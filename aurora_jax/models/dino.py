"""Vision transformers of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193; registers: arXiv 2309.16588).

The tokens are the class token, the registers, and the patches in row-major order. Critics read the outputs of some
blocks ("taps") before the final norm. `interop/dino.py` reads checkpoints. Evaluation only: the
weights are frozen, and gradients pass to the image.

  B batch, N patches, T tokens (1 + registers + N), W width, H heads, K width of a head, M width of the feed-forward,
  P side of a patch, L blocks (the leading axis of every block parameter)
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.models.clip import ACTIVATIONS
from aurora_jax.models.dino_config import DinoConfig
from aurora_jax.models.module import Module
from aurora_jax.ops import resample

# Mean and standard deviation of the colors in [0, 1] (ImageNet) that every published DINO expects.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Methods that resize the position table to another grid, by `dino_config.RESIZES`.
_RESIZES = {
  # PyTorch's "bilinear": timm's and StyleGAN-T's.
  "bilinear": lambda x, rows, columns: jax.image.resize(
    x, (1, rows, columns, x.shape[3]), "linear", antialias=False, precision=jax.lax.Precision.HIGHEST
  ),
  # PyTorch's "bicubic": DINO, DINOv2.
  "bicubic": resample.resize_bicubic,
  # The same with antialias=True: DINOv2 with registers, timm's resampling of checkpoints.
  "bicubic_antialiased": lambda x, rows, columns: jax.image.resize(
    x, (1, rows, columns, x.shape[3]), "cubic", antialias=True, precision=jax.lax.Precision.HIGHEST
  ),
}


def dino_vit_s16() -> DinoConfig:
  """DINO's ViT-S/16."""
  return DinoConfig()


def dinov2_vit_b14(registers: int = 0) -> DinoConfig:
  """DINOv2's ViT-B/14, with a position table for 518 pixels. Published with 0 or 4 registers."""
  return DinoConfig(
    image_size=518,
    patch=14,
    width=768,
    heads=12,
    mlp_width=3072,
    registers=registers,
    layer_scale=True,
    position_resize="bicubic_antialiased" if registers else "bicubic",
  )


class DinoOutput(NamedTuple):
  """Tokens [B, T, W], float32.

  Attributes:
    embedded: tokens after the position embedding and, with `pre_norm`, the first norm.
    taps: the outputs of the requested blocks, in the requested order.
    final: the last block's output after the final norm; None if it was not requested.
  """

  embedded: jax.Array
  taps: tuple[jax.Array, ...]
  final: jax.Array | None


def patch_tokens(tokens: jax.Array, cfg: DinoConfig) -> jax.Array:
  """The tokens of the patches, without class token and registers. [B, T, W] -> [B, N, W]."""
  return tokens[:, 1 + cfg.registers :]


def normalize_colors(images: jax.Array) -> jax.Array:
  """Normalizes images [B, R, R, 3] in [-1, 1] by ImageNet's statistics, as the published weights expect."""
  mean, std = jnp.asarray(MEAN, jnp.float32), jnp.asarray(STD, jnp.float32)
  return ((images + 1) / 2 - mean) / std


class Dino(Module):
  """The transformer.

  Attributes:
    cfg: the sizes.
    dtype: compute type of the matrix products; parameters, norms, softmax and the residual stream are float32.
    remat: whether to recompute each block in the backward pass instead of storing its activations.
  """

  cfg: DinoConfig
  dtype: jnp.dtype = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, taps: tuple[int, ...] = (), final: bool = True) -> DinoOutput:
    """Converts images to tokens.

    Args:
      images: [B, R, Q, 3] with normalized colors (`normalize_colors`), both sides multiples of the patch.
      taps: numbers of the blocks whose outputs are returned, from 0.
      final: whether to return the last block's output after the final norm.

    Returns:
      `DinoOutput`. Blocks after the last requested one are not computed.

    Raises:
      ValueError: a side of the image is no multiple of the patch, or a tap does not exist.
    """
    cfg = self.cfg
    if any(not 0 <= tap < cfg.depth for tap in taps):
      raise ValueError(f"DINO: taps {taps}, the blocks are 0 to {cfg.depth - 1}")
    embedded = self._embed(images)
    blocks = self.param("blocks", lambda key: _init_blocks(key, cfg))
    scale = self.param("norm_scale", nn.initializers.ones, (cfg.width,))
    bias = self.param("norm_bias", nn.initializers.zeros, (cfg.width,))
    count = cfg.depth if final else max(taps, default=-1) + 1
    run = lambda x, block: _run_block(cfg, self.dtype, x, block)
    if self.remat:
      run = jax.checkpoint(run)

    def step(x, block):
      x = run(x, block)
      return x, x if taps else None

    with jax.default_matmul_precision("highest"):  # for float32 products; `dtype` selects faster ones
      x, outputs = jax.lax.scan(step, embedded, jax.tree.map(lambda leaf: leaf[:count], blocks))
    normed = _layer_norm(x, scale, bias, cfg.layer_norm_epsilon) if final else None
    chosen = () if outputs is None else tuple(outputs[tap] for tap in taps)
    return DinoOutput(embedded, chosen, normed)

  def _embed(self, images):
    """Converts images to tokens with positions, [B, T, W]."""
    cfg, normal = self.cfg, nn.initializers.truncated_normal(0.02)
    batch, height, width, _ = images.shape
    if height % cfg.patch or width % cfg.patch:
      raise ValueError(f"DINO: an image of {height}x{width} pixels is not made of patches of {cfg.patch}")
    rows, columns = height // cfg.patch, width // cfg.patch
    kernel = self.param("patch_kernel", normal, (cfg.patch, cfg.patch, 3, cfg.width))
    bias = self.param("patch_bias", nn.initializers.zeros, (cfg.width,))
    class_token = self.param("class_token", normal, (cfg.width,))
    positions = self.param("positions", normal, (1 + cfg.grid**2, cfg.width))
    # Patches do not overlap, so their convolution is one matrix product.
    patches = images.reshape(batch, rows, cfg.patch, columns, cfg.patch, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = patches.reshape(batch, rows * columns, -1)
    with jax.default_matmul_precision("highest"):
      x = _dense(patches, kernel.reshape(-1, cfg.width), bias, self.dtype)
    table = positions[1:]
    if (rows, columns) != (cfg.grid, cfg.grid):
      table = table.reshape(1, cfg.grid, cfg.grid, cfg.width)
      table = _RESIZES[cfg.position_resize](table, rows, columns).reshape(-1, cfg.width)
    first = (class_token + positions[0])[None]
    if cfg.registers:
      registers = self.param("registers", normal, (cfg.registers, cfg.width))
      first = jnp.concatenate([first, registers])
    x = jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape)), x + table], axis=1)
    if not cfg.pre_norm:
      return x
    scale = self.param("pre_norm_scale", nn.initializers.ones, (cfg.width,))
    bias = self.param("pre_norm_bias", nn.initializers.zeros, (cfg.width,))
    return _layer_norm(x, scale, bias, cfg.layer_norm_epsilon)


def _layer_norm(x, scale, bias, epsilon):
  """Layer norm over the last axis, float32."""
  centered = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
  return centered * jax.lax.rsqrt(variance + epsilon) * scale + bias


def _dense(x, kernel, bias, dtype):
  """[..., in] -> float32 [..., out], the product in `dtype`. Merging the other axes makes gradients faster on a CPU."""
  flat = x.reshape(-1, x.shape[-1]).astype(dtype) @ kernel.astype(dtype)
  return (flat.astype(jnp.float32) + bias).reshape(*x.shape[:-1], -1)


def _attend(query, key, value, heads, dtype):
  """[B, T, W] three times -> [B, T, W]; the softmax in float32."""
  query, key, value = (x.reshape(*x.shape[:2], heads, -1).astype(dtype) for x in (query, key, value))
  logits = jnp.einsum("BQHK,BTHK->BHQT", query, key).astype(jnp.float32) * query.shape[-1] ** -0.5
  weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
  mixed = jnp.einsum("BHQT,BTHK->BQHK", weights, value)
  return mixed.reshape(*mixed.shape[:2], -1)


def _run_block(cfg, dtype, x, block):
  """One pre-norm block. x [B, T, W], block {name: array} -> [B, T, W]."""
  dense = lambda x, name: _dense(x, block[f"{name}_kernel"], block.get(f"{name}_bias", 0.0), dtype)
  norm = lambda x, name: _layer_norm(x, block[f"{name}_scale"], block[f"{name}_bias"], cfg.layer_norm_epsilon)
  gain = lambda x, name: x * block[name] if cfg.layer_scale else x
  query, key, value = jnp.split(dense(norm(x, "norm1"), "qkv"), 3, axis=-1)
  x = x + gain(dense(_attend(query, key, value, cfg.heads, dtype), "out"), "gain1")
  hidden = dense(norm(x, "norm2"), "up")
  if cfg.swiglu:
    gate, hidden = jnp.split(hidden, 2, axis=-1)
    hidden = jax.nn.silu(gate) * hidden
  else:
    hidden = ACTIVATIONS[cfg.activation](hidden)
  return x + gain(dense(hidden, "down"), "gain2")


def block_shapes(cfg: DinoConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of one block's parameters by name."""
  width, inner = cfg.width, cfg.mlp_width
  up = 2 * inner if cfg.swiglu else inner
  shapes = {}
  for name, inputs, outputs in (
    ("qkv", width, 3 * width),
    ("out", width, width),
    ("up", width, up),
    ("down", inner, width),
  ):
    shapes[f"{name}_kernel"] = inputs, outputs
    if name != "qkv" or cfg.qkv_bias:
      shapes[f"{name}_bias"] = (outputs,)
  for name in ("norm1", "norm2"):
    shapes |= {f"{name}_scale": (width,), f"{name}_bias": (width,)}
  if cfg.layer_scale:
    shapes |= {"gain1": (width,), "gain2": (width,)}
  return shapes


def _init_blocks(key, cfg):
  """Random blocks, stacked: truncated normal kernels, zero biases, unit norms and gains."""
  blocks = {}
  for index, (name, shape) in enumerate(block_shapes(cfg).items()):
    if name.endswith("kernel"):
      init = nn.initializers.truncated_normal(0.02)
    else:
      init = nn.initializers.zeros if name.endswith("bias") else nn.initializers.ones
    blocks[name] = init(jax.random.fold_in(key, index), (cfg.depth, *shape), jnp.float32)
  return blocks


def abstract_variables(cfg: DinoConfig) -> dict[str, Any]:
  """The variables of `Dino(cfg)` as a tree of `jax.ShapeDtypeStruct`. Nothing is allocated."""
  image = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.float32)
  return jax.eval_shape(Dino(cfg).init, jax.random.key(0), image)
