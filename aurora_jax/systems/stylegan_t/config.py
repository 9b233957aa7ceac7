"""Configuration of StyleGAN-T (arXiv 2301.09515): networks, losses, micro-batches, what trains.

Defaults are the published training code's for its full model unless a comment says otherwise.
"""

import dataclasses
from typing import Any

from aurora_jax import config as config_lib
from aurora_jax.config import require
from aurora_jax.models import feature_critic_config
from aurora_jax.models.clip_config import ACTIVATIONS, TextConfig
from aurora_jax.models.feature_critic_config import Dino

FIRST_RESOLUTION = 8
MODES = ("all", "freeze64", "text_encoder")
NOISE_MODES = ("const", "none", "random")

# Fields that change how a network is run or trained, not what its weights mean.
_RUNTIME_FIELDS = {
  "generator": {
    "resolution",  # a smaller model is the beginning of a larger one
    "text_tower",  # `System.begins_fresh` looks at it
    "noise_in_training",
    "noise_at_eval",
    "w_average_decay",
    "remat",
    "compute_dtype",
    "low_precision_blocks",
  },
  "discriminator": feature_critic_config.RUNTIME_FIELDS,
}


def _require_positive(group, values, names):
  for name in names:
    require(getattr(values, name) >= 1, f"{group}.{name} must be at least 1, got {getattr(values, name)}")


def _require_choice(name, value, choices):
  require(value in choices, f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _require_dtype(group, value):
  require(value in ("float32", "bfloat16"), f"{group}.compute_dtype must be 'float32' or 'bfloat16', got {value!r}")


@dataclasses.dataclass(frozen=True)
class TextTower:
  """A CLIP text encoder inside the generator, for training it along. Sizes: ViT-L/14's. With 0 layers there is none."""

  layers: int = 0
  width: int = 768
  heads: int = 12
  mlp_width: int = 3072
  vocabulary_size: int = 49408
  context_length: int = 77
  activation: str = "quick_gelu"  # OpenAI's; OpenCLIP's own models have "gelu"

  def __post_init__(self):
    require(self.layers >= 0, f"generator.text_tower.layers must be positive, or 0 for no tower, got {self.layers}")
    _require_positive(
      "generator.text_tower", self, ("width", "heads", "mlp_width", "vocabulary_size", "context_length")
    )
    require(
      self.width % self.heads == 0,
      f"generator.text_tower.heads {self.heads} does not divide its width {self.width}",
    )
    require(
      self.activation in ACTIVATIONS,
      f"generator.text_tower.activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}",
    )

  def sizes(self) -> TextConfig:
    """As `models/clip.py` takes them."""
    return TextConfig(
      width=self.width,
      layers=self.layers,
      heads=self.heads,
      mlp_width=self.mlp_width,
      activation=self.activation,
      vocabulary_size=self.vocabulary_size,
      context_length=self.context_length,
    )


@dataclasses.dataclass(frozen=True)
class Generator:
  """The generator. `full`, `lite` and `custom` are the published sizes."""

  resolution: int = 64  # a power of two, 8 or more; a smaller model's layers are the first ones of a larger one
  z_dim: int = 64
  text_dim: int = 768  # width of the text feature (CLIP ViT-L/14's embedding); 0: unconditional
  channels_base: int = 65536  # channels at resolution r: min(base / r, max)
  channels_max: int = 2048
  residual_blocks: int = 3  # per resolution, of two convolutions each
  norm_groups: int = 32  # of the residual layers' group norm
  w_average_decay: float = 0.995  # of the running average of the mapped latents, for truncation; per training call
  text_tower: TextTower = TextTower()
  noise_in_training: str = "random"  # "const": each layer's constant; "none"; "random": drawn anew in every call
  noise_at_eval: str = "const"  # of samples. The published metrics draw it: "random", by each image's latents
  remat: bool = False  # recompute each block in the backward pass
  # Of convolutions and feature maps in the `low_precision_blocks` highest resolutions. Styles, demodulation, group norm
  # and the RGB sum are always float32. Released: float16 in the highest four.
  compute_dtype: str = "float32"
  low_precision_blocks: int = 4

  def __post_init__(self):
    r = self.resolution
    require(
      r >= FIRST_RESOLUTION and r.bit_count() == 1,
      f"generator.resolution must be a power of two, {FIRST_RESOLUTION} or more, got {r}",
    )
    _require_positive("generator", self, ("z_dim", "channels_base", "channels_max", "residual_blocks", "norm_groups"))
    require(self.text_dim >= 0, f"generator.text_dim must be positive, or 0 for no text, got {self.text_dim}")
    require(
      0 <= self.w_average_decay < 1, f"generator.w_average_decay must be from 0 to below 1, got {self.w_average_decay}"
    )
    for resolution in self.resolutions:
      channels = self.channels(resolution)
      require(
        channels > 0 and channels % self.norm_groups == 0,
        f"generator.norm_groups {self.norm_groups} does not divide the {channels} channels at {resolution} pixels",
      )
    require(
      self.text_dim or not self.text_tower.layers,
      f"generator.text_tower has {self.text_tower.layers} layers, generator.text_dim is 0",
    )
    for name in ("noise_in_training", "noise_at_eval"):
      _require_choice(f"generator.{name}", getattr(self, name), NOISE_MODES)
    _require_dtype("generator", self.compute_dtype)
    require(
      self.low_precision_blocks >= 0,
      f"generator.low_precision_blocks must not be negative, got {self.low_precision_blocks}",
    )

  @property
  def resolutions(self) -> tuple[int, ...]:
    """Resolutions of the blocks, ascending: (8, 16, ..., resolution)."""
    return tuple(2**k for k in range(3, self.resolution.bit_length()))

  @property
  def w_dim(self) -> int:
    """Width of w: the mapped latent, then the text feature."""
    return self.z_dim + self.text_dim

  @property
  def num_ws(self) -> int:
    """Layers that take a w of their own, the last ToRGB included. All of them get the same."""
    return len(self.resolutions) * (2 * self.residual_blocks + 1) + 1

  def channels(self, resolution: int) -> int:
    """Feature channels at a resolution; they do not depend on the target."""
    return min(self.channels_base // resolution, self.channels_max)

  def block_dtype(self, resolution: int) -> str:
    """Type of the feature maps at a resolution."""
    low = self.resolutions[len(self.resolutions) - min(self.low_precision_blocks, len(self.resolutions)) :]
    return self.compute_dtype if resolution in low else "float32"


def full(resolution: int = 64) -> Generator:
  """The full model: 975,556,011 parameters at 64 pixels, 1,020,497,609 at 512."""
  return Generator(resolution=resolution)


def lite(resolution: int = 64) -> Generator:
  """The lite model, also what the training code builds unless told otherwise: 74,556,835 parameters at 64 pixels."""
  return Generator(resolution=resolution, channels_base=32768, channels_max=512, residual_blocks=2)


def custom(resolution: int = 64) -> Generator:
  """The small example of the published README."""
  return Generator(resolution=resolution, channels_base=16384, channels_max=256, residual_blocks=1)


@dataclasses.dataclass(frozen=True)
class Discriminator(feature_critic_config.Config):
  """Five heads on a frozen DINO ViT-S/16."""


@dataclasses.dataclass(frozen=True)
class Loss:
  """Weights of the losses and what images go through before them."""

  # Published default 0, that is none. The paper has 0.2, and 50 while the text encoder trains. The hinge has a further
  # factor 1 / micro_batch.size where `micro_batch.reduction` is "sum".
  clip_weight: float = 0.0
  clip_crop: int = 64  # larger images are judged by CLIP in one random window of this side per micro-batch
  clip_size: int = 224  # side to which that window is brought before CLIP's own preprocessing
  blur_sigma: float = 32.0  # where the blur of the discriminator's images begins, pixels
  # Thousands of images over which it fades to 0; at most 1: no blur. It begins anew with every run, so that a run with
  # train.init_from had better have none.
  blur_fade_kimg: float = 1000.0
  # Gradients that are NaN become 0, infinite ones 1e5 in size, before the optimizer sees them: the angle of the CLIP
  # loss has no finite gradient at 0. Losses must be finite in any case (training/guard.py).
  clean_gradients: bool = True

  def __post_init__(self):
    for name in ("clip_weight", "blur_sigma", "blur_fade_kimg"):
      require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")
    _require_positive("loss", self, ("clip_crop", "clip_size"))


@dataclasses.dataclass(frozen=True)
class MicroBatch:
  """How a batch is worked through. `size` and `count` are part of the recipe: they do not depend on the devices.

  The published code has `size` images on each GPU at once, and `count` such micro-batches per step. Statistics of the
  discriminator's batch norms stay within `size` images, and spectral norms and the average of mapped latents move
  `count` times. A micro-step works on train.batch_size / `count` images at once, of all devices.
  """

  size: int = 8  # published: 8, and 4 at 512 pixels
  count: int = 1
  # "sum", as published: gradients are summed over micro-batches and multiplied by their number, and the hinge is
  # divided by `size`. Adam hides the factors but for this one: CLIP weighs `size` times loss.clip_weight against the
  # hinge. "mean": the gradient of the mean over the batch, and the hinge as it is.
  reduction: str = "sum"

  def __post_init__(self):
    _require_positive("micro_batch", self, ("size", "count"))
    _require_choice("micro_batch.reduction", self.reduction, ("sum", "mean"))


@dataclasses.dataclass(frozen=True)
class Optimizers:
  """One optimizer per network: Adam (0, 0.99) at 2e-3. Published: 3e-6 for the generator in mode "text_encoder"."""

  generator: config_lib.Optimizer = config_lib.Optimizer(learning_rate=2e-3)
  discriminator: config_lib.Optimizer = config_lib.Optimizer(learning_rate=2e-3)


@dataclasses.dataclass(frozen=True)
class Experiment(config_lib.Experiment):
  """An experiment with StyleGAN-T."""

  name: str = "stylegan_t"
  system: str = "stylegan_t"
  # What trains of the generator. "all": all but its text tower. "freeze64": the blocks above 64 pixels and every ToRGB.
  # "text_encoder": its text tower alone. The last two go on from a trained generator (train.init_from).
  mode: str = "all"
  generator: Generator = Generator()
  discriminator: Discriminator = Discriminator()
  dino: Dino = Dino()
  loss: Loss = Loss()
  micro_batch: MicroBatch = MicroBatch()
  optimizer: Optimizers = Optimizers()
  # Published: half-life 312.5 batches, here of 128 images; the images seen do not include the step's own.
  ema: config_lib.Ema = config_lib.Ema(half_life_images=40_000.0, ramp_up_includes_batch=False)
  train: config_lib.Train = config_lib.Train(batch_size=128, total_steps=195_312)  # 25 M images

  def __post_init__(self):
    super().__post_init__()
    generator, discriminator, micro, batch = self.generator, self.discriminator, self.micro_batch, self.train.batch_size
    _require_choice("mode", self.mode, MODES)
    require(
      generator.text_dim == discriminator.text_dim,
      f"generator.text_dim {generator.text_dim} and discriminator.text_dim {discriminator.text_dim} differ",
    )
    require(
      batch % (micro.size * micro.count) == 0,
      f"train.batch_size {batch} is no multiple of micro_batch.size {micro.size} x micro_batch.count {micro.count}",
    )
    groups = -(-micro.size // discriminator.virtual_batch)
    require(
      micro.size % groups == 0,
      f"micro_batch.size {micro.size} cannot be split into equal groups of at most discriminator.virtual_batch "
      f"{discriminator.virtual_batch} images",
    )
    require(
      generator.text_dim or not self.loss.clip_weight,
      f"loss.clip_weight is {self.loss.clip_weight:g}, but the generator is unconditional (generator.text_dim is 0)",
    )
    require(
      not self.loss.clip_weight or self.loss.clip_crop <= generator.resolution,
      f"loss.clip_crop {self.loss.clip_crop}: a window of that side cannot be cut out of images of "
      f"generator.resolution {generator.resolution}; set loss.clip_crop={generator.resolution}, or loss.clip_weight=0",
    )
    require(
      self.mode != "text_encoder" or generator.text_tower.layers,
      "mode 'text_encoder' trains the generator's text tower, but generator.text_tower.layers is 0",
    )

  @property
  def resolution(self) -> int:
    return self.generator.resolution

  @property
  def conditional(self) -> bool:
    return self.generator.text_dim > 0

  @property
  def summary(self) -> str:
    text = f"text features {self.generator.text_dim} wide" if self.conditional else "unconditional"
    return f"{super().summary}, {text}; discriminator: {self.discriminator.summary}; mode '{self.mode}'"

  def identity(self, network: str) -> dict[str, Any]:
    fields = super().identity(network)
    return {name: value for name, value in fields.items() if name not in _RUNTIME_FIELDS[network]}

  def check_whole(self) -> None:
    stages = self.schedule.resolutions
    require(
      self.mode == "all" or self.train.init_from,
      f"mode '{self.mode}' goes on from a trained generator, but train.init_from names no checkpoint",
    )
    require(
      not stages or self.mode == "all",
      f"mode '{self.mode}' does not grow in stages: schedule.resolutions is {stages}, it must be ()",
    )
    require(
      not stages or stages[-1] == self.generator.resolution,
      f"schedule.resolutions {stages} must end with generator.resolution {self.generator.resolution}",
    )
    missing = [r for r in stages if r not in self.generator.resolutions]
    require(
      not missing, f"schedule.resolutions {stages}: {missing} are none of the generator's {self.generator.resolutions}"
    )

  def at_stage(self, resolution: int) -> "Experiment":
    """The experiment whose generator ends at `resolution`; real images are resized to it before the discriminator."""
    return dataclasses.replace(
      self,
      generator=dataclasses.replace(self.generator, resolution=resolution),
      loss=dataclasses.replace(self.loss, clip_crop=min(self.loss.clip_crop, resolution)),
    )
