"""Typed configuration: what can be set of an experiment, in frozen dataclasses that check their values.

`config_files.py` reads and writes them; nothing else sees a ConfigDict. Sources of defaults are named beside the values:
"released" is the released generator's code, "GigaGAN A2" is Table A2 of arXiv 2303.05511, "StyleGAN2" is arXiv 1912.04958.
"""

import dataclasses
from collections.abc import Mapping

from aurora_jax.errors import UserError


class PerResolution(dict):
  """A mapping {resolution: value} that hashes, so that configurations can be static arguments. Not to be changed."""

  def __hash__(self):
    return hash(tuple(sorted(self.items())))


def _per_resolution(**values):
  """`_per_resolution(r4=3, r8=3)`: a dataclass field with that default."""
  return dataclasses.field(default_factory=lambda: PerResolution({int(k[1:]): v for k, v in values.items()}))


def require(condition, message):
  """Raises a UserError unless the condition holds."""
  if not condition:
    raise UserError(f"config: {message}")


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
  blocks: Mapping[int, int] = _per_resolution(r4=3, r8=3, r16=3, r32=2, r64=2)
  adaptive_kernels: Mapping[int, int] = _per_resolution(r4=1, r8=1, r16=2, r32=4, r64=8)
  attention_depth: Mapping[int, int] = _per_resolution(r8=2, r16=2, r32=2, r64=1)
  experts: Mapping[int, int] = _per_resolution(r8=4, r16=8, r32=16, r64=16)
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
  # How the experts of a layer are evaluated: "bucket", "grouped" or "dense", see ops/moe.py.
  moe_backend: str = "bucket"
  router_z_weight: float = 0.001  # released
  router_balance_weight: float = 0.001  # released
  # Attention over more than this many query positions is computed in chunks of this size with rematerialisation.
  attention_chunk: int = 1024
  remat: bool = False  # recompute each block in the backward pass
  # With remat: an attention block's layers are a loop. Less to compile for TPUs, more memory on GPUs (benchmarks/README.md).
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
    require(
      self.text_attention in ("uniform", "independent", "scaled"),
      f"generator.text_attention must be 'uniform', 'independent' or 'scaled', got {self.text_attention!r}",
    )
    require(
      self.moe_backend in ("dense", "bucket", "grouped"),
      f"generator.moe_backend must be 'dense', 'bucket' or 'grouped', got {self.moe_backend!r}",
    )
    require(
      all(count > 0 for count in self.experts.values()),
      f"generator.experts must be at least 1 (a dense feed-forward), got {dict(self.experts)}",
    )
    require(
      self.text_dim % self.text_heads == 0,
      f"generator.text_heads {self.text_heads} does not divide text_dim {self.text_dim}",
    )
    require(
      self.compute_dtype in ("float32", "bfloat16"),
      f"generator.compute_dtype must be 'float32' or 'bfloat16', got {self.compute_dtype!r}",
    )

  @property
  def resolutions(self):
    """All resolutions of the synthesis network, ascending: (4, 8, ...)."""
    return tuple(2**k for k in range(2, self.resolution.bit_length()))

  def channels(self, resolution):
    """Feature channels at a resolution."""
    return min(self.channels_base // resolution, self.channels_max)

  def for_sampling(self, backend):
    """The same generator as it is sampled from: results as the released scripts give them, ways that suit the machine.

    Every sample is by itself, whatever the batch. On a CPU experts and attention work in pieces that fit its cache.

    Args:
      backend: "cpu", "gpu" or "tpu".
    """
    changes = {"remat": False}
    if self.text_attention == "uniform":
      changes["text_attention"] = "independent"
    if backend == "cpu":
      changes |= {"moe_backend": "grouped", "attention_chunk": min(128, self.attention_chunk)}
    return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Discriminator:
  """GigaGAN's multi-scale-input, multi-scale-output discriminator (arXiv 2303.05511, section 3.4 and Table A2).

  Each pyramid level enters at its own resolution and is judged at every later exit. Defaults count 380 M parameters.
  """

  resolution: int = 64
  channels_base: int = 16384
  channels_max: int = 1536
  blocks: Mapping[int, int] = _per_resolution(r64=2, r32=2, r16=2, r8=2, r4=1)
  attention_depth: Mapping[int, int] = _per_resolution(r32=1, r16=2, r8=2)
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
  # The last exit sees how much a picture differs from another one of its caption in the batch (PacGAN, arXiv 1712.04086;
  # not in the paper), see `data.pairs`.
  compare_pairs: bool = False
  remat: bool = False
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

  @property
  def resolutions(self):
    """All resolutions of the trunk, descending: (64, ..., 4)."""
    return tuple(2**k for k in range(self.resolution.bit_length() - 1, 1, -1))

  def channels(self, resolution):
    """Feature channels at a resolution."""
    return min(self.channels_base // resolution, self.channels_max)


@dataclasses.dataclass(frozen=True)
class Loss:
  """Weights of the losses (aurora.md, sections 3 and 10: the four losses are the paper's, the weights are choices)."""

  # Relative weight of a pyramid level in the adversarial and matching losses, {resolution: weight}; levels that are
  # not named weigh `level_weight_default`. GigaGAN A2 (recalled): 0.33 for the highest level, 0.17 for the others.
  level_weights: Mapping[int, float] = _per_resolution()
  level_weight_default: float = 0.17
  early_exit_adversarial: float = 0.01  # GigaGAN A2 (recalled); the last exit weighs 1
  early_exit_matching: float = 0.05
  matching_weight: float = 1.0  # mismatched pairs in the discriminator's step, GigaGAN eq. 8
  matching_real: float = 1.0  # its share on real pictures with another caption ...
  matching_fake: float = 1.0  # ... and on generated ones: GigaGAN's equation has both with the same weight
  generator_matching_weight: float = 0.0  # the paper does not say; 0 is the safe reading
  r1_gamma: float = 0.2048  # GigaGAN A2, start of its range
  # GigaGAN A2. A step of its own every so many, times as much; rate and beta2 of the discriminator shrink by
  # interval / (interval + 1) for it (StyleGAN2, appendix B). 1: in every step.
  r1_interval: int = 16
  r1_levels: tuple[int, ...] = ()  # pyramid levels that R1 covers; (): all that enter the discriminator (choice)
  # GigaGAN A2 (recalled 0.2-1.0), StyleGAN-T 0.2. It is that of the loss over the global batch. The released `clip_model.py`
  # passes back only the part of the gradient that belongs to a GPU's own rows, and data-parallel training takes the mean
  # over W GPUs: a weight tuned there acts as weight / W here.
  clip_weight: float = 0.2
  # The loss is the mean over pyramid levels of at least this many pixels; smaller ones carry hardly any signal for CLIP.
  clip_min_resolution: int = 16
  clip_logit_scale: float = 0.0  # 0 takes CLIP's own temperature (released)
  clip_bank: int = 0  # further negatives: this many training captions beside the batch's own (0: batch only)
  clip_augment: bool = False  # shift, noise and colour shift before the image tower
  moe_weight: float = 1.0  # on the sum over layers that the generator returns


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Adam without a first moment (beta1 = 0): GigaGAN A2 and StyleGAN2 agree on betas (0, 0.99). Or Muon for matrices."""

  # Of the weights: "adam", or "muon" (training/muon.py), whose steps are of the same size but of full rank. That is no
  # recipe of a paper on GANs; for what it is worth on OpenMoji see benchmarks/README.md.
  method: str = "adam"
  muon_momentum: float = 0.9  # 0.95 diverged there, at a rate of 0.02
  muon_iterations: int = 5  # of Newton and Schulz, as K. Jordan's; with 3 the gain in retrieval was gone
  generator_lr: float = 0.0025
  discriminator_lr: float = 0.0025
  # On biases; an equalised bias moves by the full rate while a weight moves by rate / sqrt(fan_in). 1: as StyleGAN2.
  bias_lr_factor: float = 1.0
  beta2: float = 0.99
  eps: float = 1e-8
  attention_weight_decay: float = 0.01  # GigaGAN A2: on attention matrices only, decoupled
  final_lr_fraction: float = 1.0  # cosine from the full rate to this fraction of it at total_steps; 1: constant
  warmup_steps: int = 0
  ema_half_life_images: float = 10_000.0  # StyleGAN2 / Hammer default
  ema_ramp_up: float = 0.05  # StyleGAN2-ADA: half-life at most this fraction of the images seen
  w_average_decay: float = 0.998  # Hammer default

  def __post_init__(self):
    require(self.method in ("adam", "muon"), f"optimizer.method must be 'adam' or 'muon', got {self.method!r}")
    require(0 <= self.muon_momentum < 1, f"optimizer.muon_momentum must be from 0 to below 1, got {self.muon_momentum}")
    require(self.muon_iterations >= 1, f"optimizer.muon_iterations must be at least 1, got {self.muon_iterations}")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Progressive growing by reference FID (aurora.md, section 4.1: the rule is the paper's, all numbers are choices).

  A stage trains up to one resolution. It ends when the Frechet distance of the generator's pictures to real ones is less
  than `factor` times that between two disjoint sets of real pictures, all sets of one size, or at its cap in images.
  """

  resolutions: tuple[int, ...] = ()  # one per stage, the last is generator.resolution; (): no stages
  # What the distance is of: "clip", embeddings by the image tower of text.clip; "inception", as FIDs are published.
  features: str = "clip"
  inception: str = (
    ""  # for the latter: pt_inception-2015-12-05-6726825d.pth (of pytorch-fid or torch-fidelity), or as .safetensors
  )
  factor: float = 1.0  # the paper: better than the reference
  images: int = 10_000  # in each set; the paper's table has "FID 10K". At most half the training split
  every_images: int = 1_000_000  # images of training from one measurement to the next
  max_images: Mapping[int, int] = (
    _per_resolution()
  )  # caps, {resolution: images of training}; of all stages but the last

  def __post_init__(self):
    require(
      all(b > a for a, b in zip(self.resolutions, self.resolutions[1:])),
      f"schedule.resolutions must ascend, got {self.resolutions}",
    )
    require(
      self.features in ("clip", "inception"),
      f"schedule.features must be 'clip' (the image tower of text.clip) or 'inception', got {self.features!r}",
    )
    require(
      self.features == "clip" or self.inception,
      "schedule.features='inception' needs schedule.inception, the path of the weights "
      "(pt_inception-2015-12-05-6726825d.pth)",
    )
    for name in ("factor", "every_images"):
      require(getattr(self, name) > 0, f"schedule.{name} must be positive, got {getattr(self, name)}")
    require(self.images > 1, f"schedule.images must be at least 2, got {self.images}")
    for resolution in self.resolutions[:-1]:
      cap = self.max_images.get(resolution, 0)
      require(
        cap > 0, f"schedule.max_images needs a positive cap for the stage of {resolution} pixels, got {cap or 'none'}"
      )

  def stage(self, resolution):
    """The stage (0, 1, ...) from which on something is used that needs `resolution` pixels."""
    return next(i for i, reached in enumerate(self.resolutions) if reached >= resolution)


@dataclasses.dataclass(frozen=True)
class Data:
  """The training data and what is done to a picture before it is shown."""

  path: str = ""
  split: str = "train"
  primary_caption_probability: float = 1.0  # else one of the picture's other captions
  # What an epoch has once: "pictures", or "captions" (primary ones), each with any one of its pictures.
  visit: str = "pictures"
  # So many slots of a batch show another picture of a caption that is in it, where there is one that has several, or
  # where pictures are warped (below) the same one in another way. With this or visits of captions all captions are read
  # at the start.
  pairs: int = 0
  shift: float = 0.0  # augmentation: up to this fraction of the width
  scale: float = 0.0  # up to this fraction larger or smaller
  rotate: float = 0.0  # degrees
  flip: bool = False
  workers: int = 2
  # Training stops when more than this share of the split's distinct records could not be read. build-data shuffles
  # pictures over its shards, so that a lost shard is a random sample: training may go on without one of its eight (12.5
  # %), but not without two, nor when a disk goes bad or a mount is gone. Every skipped record is warned of and listed.
  max_skipped: float = 0.2
  # Start although shards or indices are missing, cut off or broken; their records count as skipped when they are met.
  tolerate_damage: bool = False

  def __post_init__(self):
    require(0 <= self.max_skipped <= 1, f"data.max_skipped must be a share from 0 to 1, got {self.max_skipped}")
    require(self.visit in ("pictures", "captions"), f"data.visit must be 'pictures' or 'captions', got {self.visit!r}")
    require(self.pairs >= 0, f"data.pairs must be positive, or 0 for none, got {self.pairs}")


@dataclasses.dataclass(frozen=True)
class Text:
  """The frozen text encoder."""

  clip: str = ""  # a run of `train-clip` or a Hugging Face CLIP folder


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices by axis; their product must be the number of devices. See parallel/mesh.py."""

  data: int = 0  # 0: what `expert` leaves
  expert: int = 1  # must divide the numbers of experts, as far as the layers' sub-axes go
  fsdp: bool = False  # dense parameters, their optimiser state and average are stored in pieces over the devices
  # Which devices: "all", the least memory; or "expert", those along that axis, so that each of `data` blocks has a whole
  # state: what is gathered and summed comes from a block's own devices, however many blocks there are (benchmarks/README.md).
  fsdp_over: str = "all"
  exchange: str = "auto"  # "tokens" travel to experts or "weights" to tokens; "auto": what moves fewer bytes
  # "tokens": room for this many times the mean from each device to each other one. A layer that needs more somewhere goes
  # the way of "weights" in that step; nothing is dropped.
  exchange_capacity: float = 2.0

  def __post_init__(self):
    require(self.data >= 0, f"mesh.data must be positive, or 0 for what mesh.expert leaves, got {self.data}")
    require(self.expert > 0, f"mesh.expert must be positive, got {self.expert}")
    require(self.fsdp_over in ("all", "expert"), f"mesh.fsdp_over must be 'all' or 'expert', got {self.fsdp_over!r}")
    require(
      self.fsdp_over == "all" or self.expert > 1,
      f"mesh.fsdp_over='expert' cuts over the devices along the expert axis, mesh.expert is {self.expert}",
    )
    require(
      self.exchange in ("auto", "tokens", "weights"),
      f"mesh.exchange must be 'auto', 'tokens' or 'weights', got {self.exchange!r}",
    )
    require(self.exchange_capacity >= 1, f"mesh.exchange_capacity must be at least 1, got {self.exchange_capacity}")


@dataclasses.dataclass(frozen=True)
class Train:
  """Length, batch and what is written when."""

  total_steps: int = 1_350_000
  batch_size: int = 1024
  seed: int = 0
  max_seconds: float = 0.0  # stop (and save) after this much wall time in this process; 0: no limit
  checkpoint_every: int = 1000
  keep_checkpoints: int = 3  # the newest so many stay; 0: all
  keep_every: int = 0  # besides, those whose step is a multiple of this stay for ever; 0: none
  # Besides, the best stays: "lower:NAME" or "higher:NAME" of any number in metrics.jsonl (an evaluation's, a loss), as
  # measured at the checkpoint's step or within the checkpoint_every steps before it.
  keep_best: str = ""
  log_every: int = 50
  sample_every: int = 1000
  sample_prompts: tuple[str, ...] = ()
  sample_latents: int = 2
  # A checkpoint to begin with (of `convert` or any run; its folder, or RUN/checkpoints/STEP): networks, not optimisers.
  init_from: str = ""
  # A step whose loss or gradient is not finite changes nothing but the step's number, see training/guard.py; norms per
  # module are measured with it. Without it the first NaN ends the run.
  guard: bool = True
  # That many steps skipped in a row end the run (exit status 3). A single bad batch should not; MaxText and T5X stop at
  # the first NaN, Levanter never does (facts/jax.md, part D).
  max_skipped_in_a_row: int = 10

  def __post_init__(self):
    for name in ("total_steps", "batch_size", "checkpoint_every", "log_every", "sample_every", "max_skipped_in_a_row"):
      require(getattr(self, name) > 0, f"train.{name} must be positive, got {getattr(self, name)}")
    for name in ("keep_checkpoints", "keep_every"):
      require(getattr(self, name) >= 0, f"train.{name} must be positive, or 0, got {getattr(self, name)}")
    require(
      self.keep_every % self.checkpoint_every == 0,
      f"train.keep_every {self.keep_every} must be a multiple of train.checkpoint_every {self.checkpoint_every}",
    )
    order, _, metric = self.keep_best.partition(":")
    require(
      not self.keep_best or order in ("lower", "higher") and metric,
      f"train.keep_best must be 'lower:NAME' or 'higher:NAME' of a metric, got {self.keep_best!r}",
    )


@dataclasses.dataclass(frozen=True)
class Watch:
  """When training warns that it goes astray (training/health.py); nothing but words depends on it. 0 turns a warning off.

  The quickstart's run of configs/openmoji_32.py that these limits were checked against is sound to the end.
  """

  # Mean logit of real pictures minus that of generated ones, over a window. The losses of a healthy GigaGAN lie between
  # 0 and 10 (README of gigagan-pytorch), which is a logit of 10 on either side. Quickstart: at most 9.8.
  logit_gap: float = 20.0
  # Mean distance between the sample pictures of one prompt, or of different prompts, against the largest that this run
  # has had since its first step. Quickstart: never below 0.56 for one prompt, 0.98 for several.
  diversity: float = 0.1
  # Entropy of the load of a layer's experts over a window, 1: even, 0: one has it all. At 0.25 sixteen experts do the
  # work of two. Quickstart: at least 0.82.
  expert_entropy: float = 0.25

  def __post_init__(self):
    require(self.logit_gap >= 0, f"watch.logit_gap must not be negative, got {self.logit_gap}")
    for name in ("diversity", "expert_entropy"):
      require(0 <= getattr(self, name) < 1, f"watch.{name} must be from 0 to below 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One experiment: everything that `train` needs to know."""

  name: str = "aurora"
  generator: Generator = Generator()
  discriminator: Discriminator = Discriminator()
  loss: Loss = Loss()
  optimizer: Optimizer = Optimizer()
  schedule: Schedule = Schedule()
  data: Data = Data()
  text: Text = Text()
  mesh: Mesh = Mesh()
  train: Train = Train()
  watch: Watch = Watch()

  def __post_init__(self):
    require(
      self.generator.resolution == self.discriminator.resolution,
      f"generator.resolution {self.generator.resolution} and discriminator.resolution "
      f"{self.discriminator.resolution} differ",
    )
    missing = set(self.discriminator.input_resolutions) - set(self.generator.output_resolutions)
    require(not missing, f"discriminator.input_resolutions names {sorted(missing)}, which the generator does not give")
    for r in self.loss.r1_levels:
      require(
        r in self.discriminator.input_resolutions,
        f"loss.r1_levels names {r}, discriminator.input_resolutions are {self.discriminator.input_resolutions}",
      )
    require(
      2 * self.data.pairs <= self.train.batch_size,
      f"data.pairs {self.data.pairs} are more than half of train.batch_size {self.train.batch_size}",
    )


def at_stage(experiment, resolution):
  """The experiment whose networks and losses end at `resolution`, a stage of progressive growing.

  Its networks take the parameters of the whole one; those of higher resolutions are not looked at. Of a loss that names
  levels there remain those that exist; where none remains R1 takes all, the CLIP loss is off.

  Args:
    experiment: the whole one.
    resolution: one of `schedule.resolutions`.

  Returns:
    `Experiment`; data, rates and lengths are those of the whole one.
  """
  replace = dataclasses.replace
  within = lambda values: tuple(r for r in values if r <= resolution)
  depths = lambda values: PerResolution({r: depth for r, depth in values.items() if r <= resolution})
  generator, discriminator, loss = experiment.generator, experiment.discriminator, experiment.loss
  outputs = within(generator.output_resolutions)
  return replace(
    experiment,
    generator=replace(
      generator, resolution=resolution, output_resolutions=outputs, attention_depth=depths(generator.attention_depth)
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
