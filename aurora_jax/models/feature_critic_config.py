"""Configuration of the discriminator on a frozen transformer (`models/feature_critic.py`). Does not import JAX, for
quick commands.
"""

import dataclasses
from typing import ClassVar

from aurora_jax import config as config_lib
from aurora_jax.config import require
from aurora_jax.models.dino_config import DinoConfig
from aurora_jax.ops.diff_augment_policy import POLICY

# Fields that change how the networks are run or trained, not what their weights mean.
RUNTIME_FIELDS = frozenset({"virtual_batch", "augment", "remat", "compute_dtype"})


@dataclasses.dataclass(frozen=True)
class Config:
  """The heads and the frozen transformer. The defaults are StyleGAN-T's: five heads on DINO's ViT-S/16."""

  group: ClassVar[str] = "discriminator"  # the group of these fields in an experiment, for messages

  dino: DinoConfig = DinoConfig()
  image_size: int = 224  # images come to this size before the transformer
  taps: tuple[int, ...] = (2, 5, 8, 11)  # a head on the output of each of these blocks, and one on the embedding
  text_dim: int = 768  # 0: unconditional
  text_map_dim: int = 64  # width in which head and text meet
  kernel_size: int = 9  # of the circular convolution over the tokens
  virtual_batch: int = 8  # at most so many samples share the statistics of a batch norm
  # What images are augmented with in training (ops/diff_augment.py); (): nothing.
  augment: tuple[str, ...] = POLICY
  remat: bool = False  # recompute the transformer's blocks in the backward pass
  compute_dtype: str = "float32"  # of the matrix products; spectral norm, batch norm and logits are always float32

  def __post_init__(self):
    group = self.group
    for name in ("image_size", "text_map_dim", "kernel_size", "virtual_batch"):
      require(getattr(self, name) >= 1, f"{group}.{name} must be at least 1, got {getattr(self, name)}")
    require(self.text_dim >= 0, f"{group}.text_dim must be positive, or 0 for no text, got {self.text_dim}")
    require(
      self.image_size % self.dino.patch == 0,
      f"{group}.image_size {self.image_size} is not a multiple of {group}.dino.patch {self.dino.patch}",
    )
    bad = [tap for tap in self.taps if not 0 <= tap < self.dino.depth]
    require(not bad, f"{group}.taps has {bad}, {group}.dino has blocks 0 to {self.dino.depth - 1}")
    require(
      self.kernel_size % 2 == 1 and self.kernel_size <= self.tokens,
      f"{group}.kernel_size must be odd and at most the {self.tokens} tokens, got {self.kernel_size}",
    )
    unknown = [name for name in self.augment if name not in POLICY]
    require(not unknown, f"{group}.augment has {unknown}, there are {', '.join(POLICY)}")
    require(
      self.compute_dtype in ("float32", "bfloat16"),
      f"{group}.compute_dtype must be 'float32' or 'bfloat16', got {self.compute_dtype!r}",
    )

  @property
  def tokens(self) -> int:
    """Logits of one head per image."""
    return (self.image_size // self.dino.patch) ** 2

  @property
  def heads(self) -> int:
    """Number of heads."""
    return len(self.taps) + 1

  @property
  def summary(self) -> str:
    """The heads and the transformer, for a message."""
    return f"{self.heads} heads on a frozen transformer of {self.dino.depth} blocks, {self.dino.width} wide"


@dataclasses.dataclass(frozen=True)
class Dino:
  """The frozen transformer's weights; its sizes are fields of `Config`."""

  # A folder or a file of DINO or DINOv2, or a CLIP folder, whose image tower stands in for it. "": that of text.clip.
  path: str = config_lib.reference()
