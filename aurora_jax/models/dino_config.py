"""Sizes of DINO's and DINOv2's vision transformers (`models/dino.py`). Does not import JAX, for quick commands."""

import dataclasses

from aurora_jax.config import require
from aurora_jax.models.clip_config import ACTIVATIONS

RESIZES = ("bilinear", "bicubic", "bicubic_antialiased")  # of the position table to another grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class DinoConfig:
  """Sizes. The defaults are those of DINO's ViT-S/16: 21,665,664 parameters.

  Attributes:
    image_size: side of the images that have the grid of the position table, in pixels.
    patch: side of a patch, in pixels.
    width: W.
    depth: number of blocks.
    heads: attention heads per block.
    mlp_width: width of the feed-forward; with `swiglu` the width of each half.
    registers: number of register tokens.
    qkv_bias: whether query, key and value have a bias.
    layer_scale: whether each residual branch has a gain per channel (DINOv2).
    swiglu: whether the feed-forward is silu(gate) * value (DINOv2's giant).
    activation: activation of the feed-forward without `swiglu`, one of `models.clip_config.ACTIVATIONS`.
    pre_norm: whether there is a layer norm after the position embedding, as in CLIP's image towers.
    layer_norm_epsilon: epsilon of all layer norms.
    position_resize: "bilinear", "bicubic" or "bicubic_antialiased", for images of another size.
  """

  image_size: int = 224
  patch: int = 16
  width: int = 384
  depth: int = 12
  heads: int = 6
  mlp_width: int = 1536
  registers: int = 0
  qkv_bias: bool = True
  layer_scale: bool = False
  swiglu: bool = False
  activation: str = "gelu"
  pre_norm: bool = False
  layer_norm_epsilon: float = 1e-6
  position_resize: str = "bilinear"

  def __post_init__(self):
    for name in ("image_size", "patch", "width", "depth", "heads", "mlp_width"):
      require(getattr(self, name) >= 1, f"dino.{name} must be at least 1, got {getattr(self, name)}")
    require(self.registers >= 0, f"dino.registers must not be negative, got {self.registers}")
    require(self.width % self.heads == 0, f"dino.width {self.width} is not a multiple of dino.heads {self.heads}")
    require(
      self.image_size % self.patch == 0,
      f"dino.image_size {self.image_size} is not a multiple of dino.patch {self.patch}",
    )
    require(
      self.activation in ACTIVATIONS,
      f"dino.activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}",
    )
    require(
      self.position_resize in RESIZES,
      f"dino.position_resize must be one of {', '.join(RESIZES)}, got {self.position_resize!r}",
    )

  @property
  def grid(self) -> int:
    """Side of the position table, in patches."""
    return self.image_size // self.patch
