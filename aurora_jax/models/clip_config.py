"""Sizes of CLIP's two towers (`models/clip.py`). Does not import JAX, for quick commands."""

import dataclasses

# The end-of-text id that old Hugging Face configs have by mistake. It selects OpenAI's own rule: the text ends at the
# largest id. With any other value it ends at the first occurrence of that id.
LEGACY_EOT_ID = 2

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh")  # functions in `models/clip.py`


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
  """Sizes of a transformer. `activation` is one of `ACTIVATIONS`. An impossible value raises ValueError."""

  width: int
  layers: int
  heads: int
  mlp_width: int
  activation: str = "quick_gelu"
  layer_norm_epsilon: float = 1e-5

  def __post_init__(self):
    for name in ("width", "layers", "heads", "mlp_width"):
      if getattr(self, name) < 1:
        raise ValueError(f"CLIP tower: {name} must be at least 1, it is {getattr(self, name)}")
    if self.width % self.heads:
      raise ValueError(f"CLIP tower: width {self.width} is not a multiple of {self.heads} heads")
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"CLIP tower: unknown activation '{self.activation}' (known: {', '.join(ACTIVATIONS)})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(TowerConfig):
  """Sizes of the text tower. `eot_id` is the id of the end-of-text token (see `LEGACY_EOT_ID`)."""

  vocabulary_size: int
  context_length: int = 77
  eot_id: int = LEGACY_EOT_ID


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageConfig(TowerConfig):
  """Sizes of the image tower, in pixels, and statistics of the colors in [0, 1], by default OpenAI's."""

  size: int
  patch: int
  mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

  def __post_init__(self):
    super().__post_init__()
    if self.patch < 1 or self.size % self.patch:
      raise ValueError(f"CLIP image tower: size {self.size} is not a multiple of the patch {self.patch}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
  """Sizes of both towers and D, the width of the shared space."""

  text: TextConfig
  image: ImageConfig
  embedding_width: int


def vit_l14() -> ClipConfig:
  """OpenAI's ViT-L/14, the text encoder of released Aurora: 427.6 M parameters."""
  return ClipConfig(
    text=TextConfig(width=768, layers=12, heads=12, mlp_width=3072, vocabulary_size=49408),
    image=ImageConfig(width=1024, layers=24, heads=16, mlp_width=4096, size=224, patch=14),
    embedding_width=768,
  )


def vit_b32() -> ClipConfig:
  """OpenAI's ViT-B/32: 151.3 M parameters."""
  return ClipConfig(
    text=TextConfig(width=512, layers=12, heads=8, mlp_width=2048, vocabulary_size=49408),
    image=ImageConfig(width=768, layers=12, heads=12, mlp_width=3072, size=224, patch=32),
    embedding_width=512,
  )


def small(width: int, *, resolution: int = 32, patch: int = 8, layers: int = 2, heads: int = 4) -> ClipConfig:
  """The sizes of a CLIP that `train-clip` trains by default, with text features of a given width."""
  heads = heads if width % heads == 0 else 1
  return ClipConfig(
    text=TextConfig(width=width, layers=layers, heads=heads, mlp_width=2 * width, vocabulary_size=3000),
    image=ImageConfig(width=128, layers=layers, heads=4, mlp_width=256, size=resolution, patch=patch),
    embedding_width=128,
  )
