"""Aurora's configuration: the architecture of its networks, the weights of its losses, and the whole experiment.

Comments name the source of a default: "released" is the released generator's code, "GigaGAN A2" is Table A2 of
arXiv 2303.05511, "StyleGAN2" is arXiv 1912.04958.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from aurora_jax import config as config_lib
from aurora_jax.config import PerResolution, per_resolution, require
from aurora_jax.models import feature_critic_config as critic_lib
from aurora_jax.ops.diff_augment_policy import POLICY

# How results are computed, not which. The router's weights act in training alone.
RUNTIME_FIELDS = frozenset(
  {
    "moe_backend",
    "attention",
    "attention_chunk",
    "remat",
    "loop_layers",
    "compute_dtype",
    "router_z_weight",
    "router_balance_weight",
    "w_average_decay",
  }
)


def _require_choice(cfg, group, name, *allowed):
  value, (*others, last) = getattr(cfg, name), map(repr, allowed)
  require(value in allowed, f"{group}.{name} must be {', '.join(others)} or {last}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Generator:
  """The generator's architecture. Defaults are the released 64-pixel model's (its `g_config`), 1,166.33 M parameters.

  Per-resolution values are mappings {resolution: value}; resolutions double from 4 to `resolution`.
  """

  resolution: int = 64
  z_dim: int = 128
  w_dim: int = 1024
  mapping_layers: int = 4
  mapping_width: int = 1024
  mapping_lr_multiplier: float = 0.01
  text_feature_dim: int = 768  # CLIP ViT-L/14 hidden width
  text_dim: int = 1024  # width of the text head
  text_layers: int = 4
  text_heads: int = 8
  text_lr_multiplier: float = 0.01
  text_residual_gain: float = 1.0
  # `scaled`: attention over the tokens, what was meant. `uniform`: what the released code computes, an average over the
  # samples of the batch; `independent`: the same for a batch of one, as the released scripts run it, which keeps the
  # samples of a batch apart. See models/layers.py, TextBlock.
  text_attention: str = "independent"
  channels_base: int = 16384  # channels at resolution r: min(base / r, max)
  channels_max: int = 1600
  blocks: Mapping[int, int] = per_resolution(r4=3, r8=3, r16=3, r32=2, r64=2)
  adaptive_kernels: Mapping[int, int] = per_resolution(r4=1, r8=1, r16=2, r32=4, r64=8)
  attention_depth: Mapping[int, int] = per_resolution(r8=2, r16=2, r32=2, r64=1)
  experts: Mapping[int, int] = per_resolution(r8=4, r16=8, r32=16, r64=16)
  heads: int = 8
  head_dim: int = 64
  feed_forward_ratio: int = 4
  conv_residual_gain: float = 0.4
  attention_residual_gain: float = 0.3
  zero_init_attention: bool = True
  fourier_input: bool = True  # released; False: a trained constant (StyleGAN2, GigaGAN)
  tied_attention: bool = False  # queries and keys of self-attention are one projection (GigaGAN; released: apart)
  w_token: bool = False  # w, projected, is one more token that cross-attention sees (GigaGAN; released: not)
  deformable_max_resolution: int = 16  # modulated transformation module (MTM) up to here; 0 turns it off
  output_resolutions: tuple[int, ...] = (4, 8, 16, 32, 64)
  # How the experts of a layer are evaluated: "bucket", "grouped", "kernel" or "dense", see ops/moe.py.
  moe_backend: str = "bucket"
  router_z_weight: float = 0.001  # released
  router_balance_weight: float = 0.001  # released
  w_average_decay: float = 0.998  # of the running average of w, for truncation (Hammer's default)
  # "xla", or "pallas": the fused kernels of ops/l2_flash.py on TPUs and NVIDIA GPUs, the same as "xla" on a CPU.
  attention: str = "xla"
  # Attention over more than this many query positions is computed in chunks of this size with rematerialization.
  attention_chunk: int = 1024
  remat: bool = False  # recompute each block in the backward pass
  # With remat: an attention block's layers are a loop. Less to compile for TPUs, more memory on GPUs
  # (benchmarks/README.md).
  loop_layers: bool = False
  compute_dtype: str = "float32"

  def __post_init__(self):
    resolutions = self.resolutions
    require(
      self.resolution in (4, 8, 16, 32, 64, 128, 256, 512),
      f"generator.resolution must be a power of two from 4 to 512, got {self.resolution}",
    )
    for name in ("blocks", "adaptive_kernels"):
      missing = [r for r in resolutions if r not in getattr(self, name)]
      require(not missing, f"generator.{name} has no value for resolution {missing}")
    for r in self.attention_depth:
      require(r in resolutions, f"generator.attention_depth names resolution {r}, the generator has {resolutions}")
      require(r in self.experts, f"generator.experts has no value for attention resolution {r}")
      require(
        self.channels(r) % 32 == 0,
        f"generator: {self.channels(r)} channels at {r} pixels; attention needs a multiple of 32 (group norm)",
      )
    require(
      set(self.output_resolutions) <= set(resolutions) and self.output_resolutions,
      f"generator.output_resolutions {self.output_resolutions} must be some of {resolutions}",
    )
    require(
      tuple(sorted(self.output_resolutions)) == tuple(resolutions[: len(self.output_resolutions)]),
      f"generator.output_resolutions {self.output_resolutions} must run from 4 upward without a gap",
    )
    _require_choice(self, "generator", "text_attention", "uniform", "independent", "scaled")
    _require_choice(self, "generator", "moe_backend", "dense", "bucket", "grouped", "kernel")
    _require_choice(self, "generator", "attention", "xla", "pallas")
    require(
      all(count > 0 for count in self.experts.values()),
      f"generator.experts must be at least 1 (a dense feed-forward), got {dict(self.experts)}",
    )
    require(
      self.text_dim % self.text_heads == 0,
      f"generator.text_heads {self.text_heads} does not divide text_dim {self.text_dim}",
    )
    _require_choice(self, "generator", "compute_dtype", "float32", "bfloat16")

  @property
  def resolutions(self) -> tuple[int, ...]:
    """All resolutions of the synthesis network, ascending: (4, 8, ...)."""
    return tuple(2**k for k in range(2, self.resolution.bit_length()))

  def channels(self, resolution: int) -> int:
    """Feature channels at a resolution."""
    return min(self.channels_base // resolution, self.channels_max)

  def for_sampling(self, backend: str) -> "Generator":
    """The configuration for sampling. Its results are those of the released scripts, and no sample depends on its
    batch.

    On a CPU experts and attention work in pieces that fit its cache.

    Args:
      backend: "cpu", "gpu" or "tpu".
    """
    changes: dict[str, Any] = {"remat": False}
    if self.text_attention == "uniform":
      changes["text_attention"] = "independent"
    if backend == "cpu":
      changes |= {"moe_backend": "grouped", "attention": "xla", "attention_chunk": min(128, self.attention_chunk)}
    return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Discriminator:
  """GigaGAN's multi-scale-input, multi-scale-output discriminator (arXiv 2303.05511, section 3.4 and Table A2).

  Each pyramid level enters at its own resolution and is judged at every later exit. Defaults count 380 M parameters.
  """

  resolution: int = 64
  channels_base: int = 16384
  channels_max: int = 1536
  blocks: Mapping[int, int] = per_resolution(r64=2, r32=2, r16=2, r8=2, r4=1)
  attention_depth: Mapping[int, int] = per_resolution(r32=1, r16=2, r8=2)
  heads: int = 8
  head_dim: int = 64
  feed_forward_ratio: int = 4
  input_resolutions: tuple[int, ...] = (64, 32, 16, 8, 4)
  exit_resolutions: tuple[int, ...] = (32, 16, 8, 4, 1)
  head_layers: int = 4  # modulated 1x1 convolutions of a conditional head
  text_feature_dim: int = 768
  text_dim: int = 1024
  text_layers: int = 4
  text_heads: int = 8
  text_lr_multiplier: float = 0.01
  residual_gain: float = 0.7071067811865476  # StyleGAN2's residual discriminator: 1/sqrt(2)
  minibatch_std: int = 0  # group size of the minibatch standard deviation; 0 turns it off (GigaGAN A2, T2I-64)
  # The last exit sees how much an image differs from another one of its caption in the batch (PacGAN, arXiv 1712.04086;
  # not in the paper), see `data.pairs`.
  compare_pairs: bool = False
  # DiffAugment (arXiv 2006.10738; not in the paper): names of `ops/diff_augment.POLICY`, applied to real and generated
  # images alike, in the discriminator's update, in R1 and in the generator's loss. (): none.
  augment: tuple[str, ...] = ()
  remat: bool = False
  attention: str = "xla"  # or "pallas", see `Generator`; R1 is computed by "xla" in either case
  attention_chunk: int = 1024
  compute_dtype: str = "float32"

  def __post_init__(self):
    resolutions = self.resolutions
    missing = [r for r in resolutions if r not in self.blocks]
    require(not missing, f"discriminator.blocks has no value for resolution {missing}")
    require(
      set(self.input_resolutions) <= set(resolutions) and self.resolution in self.input_resolutions,
      f"discriminator.input_resolutions {self.input_resolutions} must be some of {resolutions} with "
      f"{self.resolution} among them",
    )
    require(
      set(self.exit_resolutions) <= set(resolutions[1:]) | {1} and 1 in self.exit_resolutions,
      f"discriminator.exit_resolutions {self.exit_resolutions} must be some of {resolutions[1:] + (1,)} with 1 "
      "among them",
    )
    for r in self.attention_depth:
      require(r in resolutions, f"discriminator.attention_depth names resolution {r}, there are {resolutions}")
    _require_choice(self, "discriminator", "attention", "xla", "pallas")
    unknown = [name for name in self.augment if name not in POLICY]
    require(not unknown, f"discriminator.augment has {unknown}, there are {', '.join(POLICY)}")

  @property
  def resolutions(self) -> tuple[int, ...]:
    """All resolutions of the trunk, descending: (64, ..., 4)."""
    return tuple(2**k for k in range(self.resolution.bit_length() - 1, 1, -1))

  def channels(self, resolution: int) -> int:
    """Feature channels at a resolution."""
    return min(self.channels_base // resolution, self.channels_max)


@dataclasses.dataclass(frozen=True)
class FeatureCritic(critic_lib.Config):
  """A second critic, StyleGAN-T's discriminator on a frozen DINO (arXiv 2301.09515; not in Aurora's paper).

  It judges images of the highest resolution and has a hinge loss. Its text is CLIP's embedding of the caption.
  """

  group: ClassVar[str] = "feature_critic"

  weight: float = 0.0  # of its loss in the generator's; 0: no such critic

  def __post_init__(self):
    super().__post_init__()
    require(self.weight >= 0, f"feature_critic.weight must be positive, or 0 for no such critic, got {self.weight}")


@dataclasses.dataclass(frozen=True)
class Loss:
  """Weights of the losses (aurora.md, sections 3 and 10: the four losses are the paper's, the weights are choices)."""

  # Relative weight of a pyramid level in the adversarial and matching losses, {resolution: weight}; levels that are
  # not named weigh `level_weight_default`. GigaGAN A2 (recalled): 0.33 for the highest level, 0.17 for the others.
  level_weights: Mapping[int, float] = per_resolution()
  level_weight_default: float = 0.17
  early_exit_adversarial: float = 0.01  # GigaGAN A2 (recalled); the last exit weighs 1
  early_exit_matching: float = 0.05
  matching_weight: float = 1.0  # mismatched pairs in the discriminator's step, GigaGAN eq. 8
  matching_real: float = 1.0  # its share on real images with another caption ...
  matching_fake: float = 1.0  # ... and on generated ones: GigaGAN's equation has both with the same weight
  generator_matching_weight: float = 0.0  # the paper does not say; 0 is the safe reading
  r1_gamma: float = 0.2048  # GigaGAN A2, start of its range
  # GigaGAN A2. R1 runs once in so many steps, weighted by as much; learning rate and beta2 of the discriminator shrink
  # by interval / (interval + 1) for it (StyleGAN2, appendix B). 1: in every step.
  r1_interval: int = 16
  r1_levels: tuple[int, ...] = ()  # pyramid levels that R1 covers; (): all that enter the discriminator (choice)
  # GigaGAN A2 (recalled 0.2-1.0), StyleGAN-T 0.2. It is that of the loss over the global batch. The released
  # `clip_model.py` passes back only the part of the gradient that belongs to a GPU's own rows, and data-parallel
  # training takes the mean over W GPUs: a weight tuned there acts as weight / W here.
  clip_weight: float = 0.2
  # The loss is the mean over pyramid levels of at least this many pixels; smaller ones carry hardly any signal for
  # CLIP.
  clip_min_resolution: int = 16
  clip_logit_scale: float = 0.0  # 0 takes CLIP's own temperature (released)
  clip_bank: int = 0  # further negatives: this many training captions besides the batch's own (0: batch only)
  clip_augment: bool = False  # shift, noise and color shift before the image tower
  moe_weight: float = 1.0  # on the sum over layers that the generator returns


@dataclasses.dataclass(frozen=True)
class Optimizers:
  """One optimizer per network. Weight decay acts on attention matrices only (GigaGAN A2)."""

  generator: config_lib.Optimizer = config_lib.Optimizer(weight_decay=0.01)
  discriminator: config_lib.Optimizer = config_lib.Optimizer(weight_decay=0.01)
  feature_critic: config_lib.Optimizer = config_lib.Optimizer(learning_rate=2e-3)  # StyleGAN-T


@dataclasses.dataclass(frozen=True)
class Experiment(config_lib.Experiment):
  """An experiment with Aurora."""

  name: str = "aurora"
  system: str = "aurora"
  generator: Generator = Generator()
  discriminator: Discriminator = Discriminator()
  feature_critic: FeatureCritic = FeatureCritic()
  dino: critic_lib.Dino = critic_lib.Dino()  # of the feature critic
  loss: Loss = Loss()
  optimizer: Optimizers = Optimizers()
  ema: config_lib.Ema = config_lib.Ema()

  def __post_init__(self):
    super().__post_init__()
    require(
      self.generator.resolution == self.discriminator.resolution,
      f"generator.resolution {self.generator.resolution} and discriminator.resolution "
      f"{self.discriminator.resolution} differ",
    )
    missing = set(self.discriminator.input_resolutions) - set(self.generator.output_resolutions)
    require(
      not missing, f"discriminator.input_resolutions names {sorted(missing)}, which the generator does not produce"
    )
    for r in self.loss.r1_levels:
      require(
        r in self.discriminator.input_resolutions,
        f"loss.r1_levels names {r}, discriminator.input_resolutions are {self.discriminator.input_resolutions}",
      )
    if self.feature_critic.weight:
      batch, virtual_batch = self.train.batch_size, self.feature_critic.virtual_batch
      require(
        batch % -(-batch // virtual_batch) == 0,
        f"train.batch_size {batch} cannot be split into equal groups of at most feature_critic.virtual_batch "
        f"{virtual_batch} images",
      )

  @property
  def resolution(self) -> int:
    return self.generator.resolution

  def identity(self, network: str) -> dict[str, Any]:
    fields = super().identity(network)
    # Where training begins and ends does not change what weights mean.
    ignored = RUNTIME_FIELDS | critic_lib.RUNTIME_FIELDS | {"weight"}
    if network == "generator":
      ignored |= {"zero_init_attention", "output_resolutions"}
    fields = {name: value for name, value in fields.items() if name not in ignored}
    if fields.get("text_attention") == "uniform":  # the same for a batch of one; "independent" keeps samples apart
      fields["text_attention"] = "independent"
    return fields

  @property
  def expert_counts(self) -> Mapping[str, int]:
    return {f"at {r} px": count for r, count in experts_per_layer(self.generator).items()}

  @property
  def summary(self) -> str:
    experts = ", ".join(f"{count} at {r}" for r, count in experts_per_layer(self.generator).items())
    critic = f"; feature critic: {self.feature_critic.summary}" if self.feature_critic.weight else ""
    return f"{super().summary}; experts per layer by resolution: {experts or 'none'}{critic}"

  def check_whole(self) -> None:
    stages, cfg = self.schedule.resolutions, self.discriminator
    require(
      not stages or stages[-1] == self.generator.resolution,
      f"schedule.resolutions {stages} must end with generator.resolution {self.generator.resolution}",
    )
    missing = [r for r in stages if r not in cfg.input_resolutions]
    require(
      not missing,
      f"schedule.resolutions {stages}: the images of stage {missing} do not enter the discriminator, "
      f"discriminator.input_resolutions are {cfg.input_resolutions}",
    )

  def at_stage(self, resolution: int) -> "Experiment":
    """The experiment whose networks and losses end at `resolution`, a stage of progressive growing.

    Its networks take the parameters of the whole experiment and ignore those of higher resolutions. Losses keep the
    levels that exist; where none remains, R1 covers all levels and the CLIP loss is off. Data, learning rates and
    lengths stay as they are.

    Args:
      resolution: one of `schedule.resolutions`.
    """
    replace = dataclasses.replace
    within = lambda values: tuple(r for r in values if r <= resolution)
    depths = lambda values: PerResolution({r: depth for r, depth in values.items() if r <= resolution})
    generator, discriminator, loss = self.generator, self.discriminator, self.loss
    return replace(
      self,
      generator=replace(
        generator,
        resolution=resolution,
        output_resolutions=within(generator.output_resolutions),
        attention_depth=depths(generator.attention_depth),
      ),
      discriminator=replace(
        discriminator,
        resolution=resolution,
        input_resolutions=within(discriminator.input_resolutions),
        exit_resolutions=tuple(r for r in discriminator.exit_resolutions if r < resolution),
        attention_depth=depths(discriminator.attention_depth),
      ),
      loss=replace(
        loss,
        r1_levels=within(loss.r1_levels),
        clip_weight=loss.clip_weight if resolution >= loss.clip_min_resolution else 0.0,
      ),
    )


def experts_per_layer(cfg: Generator) -> dict[int, int]:
  """{resolution: experts} of the layers that have more than one, ascending."""
  return {r: cfg.experts[r] for r in sorted(cfg.attention_depth) if cfg.attention_depth[r] and cfg.experts[r] > 1}
