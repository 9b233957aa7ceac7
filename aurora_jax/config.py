"""The configuration that all systems share: frozen dataclasses that check their values.

Each system adds its own groups of fields in `systems/NAME/config.py`, whose `Experiment` extends the one here.
`config_files.py` reads and writes configurations; no other file handles a ConfigDict.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Self, TypeVar

from aurora_jax.errors import UserError


class PerResolution(dict):
  """A hashable mapping {resolution: value}, so that configurations can be static arguments. It must not be changed."""

  def __hash__(self) -> int:
    return hash(tuple(sorted(self.items())))


def per_resolution(**values: float) -> PerResolution:
  """A dataclass field with the default `{4: 3, 8: 3}`, written `per_resolution(r4=3, r8=3)`."""
  return dataclasses.field(default_factory=lambda: PerResolution({int(k[1:]): v for k, v in values.items()}))


def reference() -> str:
  """A dataclass field, "" by default: the path of a data set or of weights that a run depends on
  (runs/references.py).
  """
  return dataclasses.field(default="", metadata={"reference": True})


def require(condition: object, message: str) -> None:
  """Raises a UserError unless the condition holds."""
  if not condition:
    raise UserError(f"config: {message}")


def require_positive(group: str, values: object, names: Iterable[str]) -> None:
  """Raises a UserError that names the first of these fields that is not positive."""
  for name in names:
    require(getattr(values, name) > 0, f"{group}.{name} must be positive, got {getattr(values, name)}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """The optimizer of one network: Adam, or Muon for its matrices and Adam for the rest.

  The defaults are GigaGAN's (arXiv 2303.05511, Table A2) and StyleGAN2's (arXiv 1912.04958): Adam without a first
  moment.
  """

  # "muon": training/muon.py. Its updates have Adam's size but full rank. No GAN paper uses it; benchmarks/README.md
  # shows what it is worth on OpenMoji.
  method: str = "adam"
  learning_rate: float = 0.0025
  beta1: float = 0.0  # 0 needs no buffer
  beta2: float = 0.99
  eps: float = 1e-8
  momentum: float = 0.9  # of Muon; 0.95 diverged on OpenMoji at a learning rate of 0.02
  iterations: int = 5  # of Muon's Newton-Schulz iteration (K. Jordan's choice); 3 lost the gain in retrieval
  # An equalized bias moves by the full learning rate, a weight by learning rate / sqrt(fan_in). 1: as StyleGAN2.
  bias_lr_factor: float = 1.0
  weight_decay: float = 0.0  # decoupled; on the parameters that the system labels for it
  l2: float = 0.0  # times the parameter, added to the gradient of every parameter
  clip_norm: float = 0.0  # largest norm of the whole gradient; 0: no clipping
  warmup_steps: int = 0
  final_lr_fraction: float = (
    1.0  # cosine from the full learning rate to this fraction of it at total_steps; 1: constant
  )

  def __post_init__(self):
    require(self.method in ("adam", "muon"), f"optimizer method must be 'adam' or 'muon', got {self.method!r}")
    for name in ("beta1", "beta2", "momentum"):
      value = getattr(self, name)
      require(0 <= value < 1, f"optimizer {name} must be from 0 to below 1, got {value}")
    require(self.iterations >= 1, f"optimizer iterations must be at least 1, got {self.iterations}")
    for name in ("weight_decay", "l2", "clip_norm", "warmup_steps", "final_lr_fraction", "bias_lr_factor"):
      require(getattr(self, name) >= 0, f"optimizer {name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Ema:
  """The exponential moving average of a network's parameters."""

  half_life_images: float = 10_000.0  # StyleGAN2's and Hammer's default
  ramp_up: float = 0.05  # the half-life is at most this fraction of the images seen (StyleGAN2-ADA); 0: no ramp-up
  # Whether the images seen include those of the present step. Without them, as in StyleGAN-T's released code, the first
  # average is the parameters after their first step.
  ramp_up_includes_batch: bool = True

  def __post_init__(self):
    for name in ("half_life_images", "ramp_up"):
      require(getattr(self, name) >= 0, f"ema.{name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Progressive growing by reference FID (aurora.md, section 4.1: the rule is the paper's, all numbers are choices).

  A stage trains up to one resolution. It ends when the Frechet distance of the generated images to real ones is less
  than `factor` times that between two disjoint sets of real images, all sets of one size, or at its cap in images.
  """

  resolutions: tuple[int, ...] = ()  # one per stage, the last is the generator's; (): no stages
  # Which features the distance compares: "clip", embeddings by the image tower of text.clip; "inception", as published
  # FIDs.
  features: str = "clip"
  # For the latter: pt_inception-2015-12-05-6726825d.pth (pytorch-fid, torch-fidelity) or .safetensors.
  inception: str = reference()
  factor: float = 1.0  # the paper: better than the reference
  images: int = 10_000  # in each set; the paper's table has "FID 10K". At most half the training split
  every_images: int = 1_000_000  # training images from one measurement to the next
  max_images: Mapping[int, int] = per_resolution()  # caps of all stages but the last, {resolution: training images}

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
    require_positive("schedule", self, ("factor", "every_images"))
    require(self.images > 1, f"schedule.images must be at least 2, got {self.images}")
    for resolution in self.resolutions[:-1]:
      cap = self.max_images.get(resolution, 0)
      require(
        cap > 0, f"schedule.max_images needs a positive cap for the stage of {resolution} pixels, got {cap or 'none'}"
      )

  def stage(self, resolution: int) -> int:
    """The first stage (0, 1, ...) that trains what needs `resolution` pixels."""
    return next(i for i, reached in enumerate(self.resolutions) if reached >= resolution)


@dataclasses.dataclass(frozen=True)
class Data:
  """The training data and how an image is augmented before a network sees it."""

  path: str = reference()
  split: str = "train"
  primary_caption_probability: float = 1.0  # else one of the image's other captions
  # What an epoch visits once: every "image", or every (primary) "caption", with any one of its images.
  epoch_unit: str = "image"
  # This many slots of a batch repeat a caption of the batch: with another image of it, or, where images are augmented
  # (below), with the same image augmented differently. With this or caption epochs all captions are read at the start.
  pairs: int = 0
  shift: float = 0.0  # augmentation: up to this fraction of the width
  scale: float = 0.0  # up to this fraction larger or smaller
  rotate: float = 0.0  # degrees
  flip: bool = False
  workers: int = 2
  # Training stops when more than this fraction of the split's distinct records could not be read. build-data shuffles
  # images over its shards, so a lost shard is a random sample: training may go on without one of eight (12.5 %), but
  # not without two, nor with a failing disk or a lost mount. Every skipped record is listed.
  max_skipped: float = 0.2
  # Start although shards or indices are missing, cut off or broken. Their records are skipped when they are read.
  tolerate_corruption: bool = False
  # How JPEGs are reduced: "full" decodes every pixel and averages, "shrink" reduces inside the decoder, several times
  # faster, with slightly other pixels (data/decode.py). "auto": as the data set's manifest says, "full" by default.
  decode: str = "auto"
  # The order: "full", a permutation of all records; or "blocks", for storage with slow single reads: a permutation of
  # blocks of neighboring records, and permutations of records within windows of blocks (data/orders.py).
  shuffle: str = "full"
  block_records: int = 64  # records of a block, which are read at once
  window_blocks: int = 64  # blocks of a window, at least; their records are held in memory
  # The slots of a batch are divided into so many groups, each with its own blocks. If the number of hosts divides it, a
  # block is read by one host only. The order does not depend on the number of hosts.
  shuffle_groups: int = 8
  # Reads at a time, begun ahead of the batches that need them: images per second times seconds per read hides the
  # latency of storage. 0: the loading threads read, or 256 reads at a time where `path` is a URL.
  reads: int = 0
  # Further data sets as "WEIGHT:FOLDER". Each provides its weight of all images, `path` the rest; weights are below 1
  # and add up to less than 1. Each set is visited in its own order, every record once per epoch of that set.
  mixture: tuple[str, ...] = dataclasses.field(default=(), metadata={"reference": True})

  def __post_init__(self):
    require(0 <= self.max_skipped <= 1, f"data.max_skipped must be a share from 0 to 1, got {self.max_skipped}")
    require(
      self.epoch_unit in ("image", "caption"), f"data.epoch_unit must be 'image' or 'caption', got {self.epoch_unit!r}"
    )
    require(self.pairs >= 0, f"data.pairs must be positive, or 0 for none, got {self.pairs}")
    require(
      self.decode in ("auto", "full", "shrink"), f"data.decode must be 'auto', 'full' or 'shrink', got {self.decode!r}"
    )
    require(self.shuffle in ("full", "blocks"), f"data.shuffle must be 'full' or 'blocks', got {self.shuffle!r}")
    require_positive("data", self, ("block_records", "window_blocks", "shuffle_groups"))
    require(self.reads >= 0, f"data.reads must not be negative, got {self.reads}")
    require(
      self.epoch_unit == "image" or (self.shuffle == "full" and not self.mixture),
      "data.epoch_unit='caption' has an order of its own: it needs data.shuffle='full' and no data.mixture",
    )
    rest = self.sources[0][0]
    require(
      rest > 0, f"data.mixture leaves {rest:g} of the images to data.path; its weights must add up to less than 1"
    )

  @property
  def sources(self) -> tuple[tuple[float, str], ...]:
    """(weight, folder) of every data set: first that of `path`, then those of `mixture`. The weights add up to 1.

    Raises:
      UserError: an entry of `mixture` is not a weight and a folder.
    """
    further = []
    for entry in self.mixture:
      weight, colon, path = entry.partition(":")
      try:
        value = float(weight)
      except ValueError:
        value = 0.0
      require(
        colon and path and 0 < value < 1,
        f"data.mixture has entries 'WEIGHT:FOLDER' with a weight between 0 and 1, got {entry!r}",
      )
      further.append((value, path))
    return ((1 - sum(weight for weight, _ in further), self.path), *further)


@dataclasses.dataclass(frozen=True)
class Text:
  """The frozen text encoder."""

  clip: str = reference()  # a run of `train-clip` or a Hugging Face CLIP folder


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices by axis; their product must be the number of devices. See parallel/mesh.py."""

  data: int = 0  # 0: the devices that `expert` leaves
  expert: int = 1  # must divide the numbers of experts, as far as the layers' sub-axes go
  fsdp: bool = False  # dense parameters, their optimizer state and EMA are sharded where they are stored
  # Over which devices: "all", the least memory; or "expert", those along that axis, so that each of `data` blocks holds
  # a whole state and gathers and reduces within itself, however many blocks there are (benchmarks/README.md).
  fsdp_over: str = "all"
  exchange: str = "auto"  # "tokens" travel to experts or "weights" to tokens; "auto": what moves fewer bytes
  # "tokens": buffers hold this many times the mean from each device to each other one. A layer that needs more in some
  # step exchanges weights in that step instead; nothing is dropped.
  capacity_factor: float = 2.0

  def __post_init__(self):
    require(self.data >= 0, f"mesh.data must be positive, or 0 for what mesh.expert leaves, got {self.data}")
    require(self.expert > 0, f"mesh.expert must be positive, got {self.expert}")
    require(self.fsdp_over in ("all", "expert"), f"mesh.fsdp_over must be 'all' or 'expert', got {self.fsdp_over!r}")
    require(
      self.fsdp_over == "all" or self.expert > 1,
      f"mesh.fsdp_over='expert' shards over the devices along the expert axis, mesh.expert is {self.expert}",
    )
    require(
      self.exchange in ("auto", "tokens", "weights"),
      f"mesh.exchange must be 'auto', 'tokens' or 'weights', got {self.exchange!r}",
    )
    require(self.capacity_factor >= 1, f"mesh.capacity_factor must be at least 1, got {self.capacity_factor}")


@dataclasses.dataclass(frozen=True)
class Train:
  """Length, batch size, and what is written when."""

  total_steps: int = 1_350_000
  batch_size: int = 1024
  seed: int = 0
  max_seconds: float = 0.0  # stop (and save) after this much wall time in this process; 0: no limit
  checkpoint_every: int = 1000
  keep_checkpoints: int = 3  # retention: the newest so many; 0: all
  keep_every: int = 0  # and those whose step is a multiple of this, for ever; 0: none
  # And the best: "lower:NAME" or "higher:NAME" of any number in metrics.jsonl (an evaluation's, a loss), as measured at
  # the checkpoint's step or within the checkpoint_every steps before it.
  keep_best: str = ""
  log_every: int = 50
  sample_every: int = 1000
  sample_prompts: tuple[str, ...] = ()
  sample_latents: int = 2
  # A checkpoint to begin with (of `convert` or any run; its folder, or RUN/checkpoints/STEP): networks, not optimizers.
  init_from: str = ""
  init_from_ema: bool = False  # its averages for the parameters too
  # An update whose loss or gradient is not finite is skipped, see training/guard.py. Without it the first NaN ends the
  # run.
  guard: bool = True
  # This many skipped steps in a row end the run (exit status 3). A single bad batch should not; MaxText and T5X stop at
  # the first NaN, Levanter never does (facts/jax.md, part D).
  max_skipped_in_a_row: int = 10

  def __post_init__(self):
    require_positive(
      "train",
      self,
      ("total_steps", "batch_size", "checkpoint_every", "log_every", "sample_every", "max_skipped_in_a_row"),
    )
    for name in ("keep_checkpoints", "keep_every"):
      require(getattr(self, name) >= 0, f"train.{name} must be positive, or 0, got {getattr(self, name)}")
    require(0 <= self.seed < 2**32, f"train.seed must be from 0 to {2**32 - 1}, got {self.seed}")
    require(
      self.keep_every % self.checkpoint_every == 0,
      f"train.keep_every {self.keep_every} must be a multiple of train.checkpoint_every {self.checkpoint_every}",
    )
    order, _, metric = self.keep_best.partition(":")
    require(
      not self.keep_best or (order in ("lower", "higher") and metric),
      f"train.keep_best must be 'lower:NAME' or 'higher:NAME' of a metric, got {self.keep_best!r}",
    )


@dataclasses.dataclass(frozen=True)
class Health:
  """Limits of the alerts (training/health.py). They change messages only. 0 turns an alert off.

  The limits were checked against the quickstart's run of configs/openmoji_32.py, which has no problems to the end.
  """

  # Mean logit of real images minus that of generated ones, over a window. The losses of a good GigaGAN run lie between
  # 0 and 10 (README of gigagan-pytorch), which is a logit of 10 on either side. Quickstart: at most 9.8.
  logit_gap: float = 20.0
  # Mean distance between the sample images of one prompt, or of different prompts, relative to the largest of this run
  # since its first step. Quickstart: never below 0.56 for one prompt, 0.98 for several.
  diversity: float = 0.1
  # Entropy of the load of a layer's experts, 1: even, 0: one has it all. At 0.25 sixteen experts do the work of two.
  # Quickstart: at least 0.82.
  expert_entropy: float = 0.25

  def __post_init__(self):
    require(self.logit_gap >= 0, f"health.logit_gap must not be negative, got {self.logit_gap}")
    for name in ("diversity", "expert_entropy"):
      require(0 <= getattr(self, name) < 1, f"health.{name} must be from 0 to below 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One experiment: everything that `train` needs to know. A system's own class adds its networks and losses."""

  name: str = "experiment"
  system: str = ""  # a name of systems/registry.py
  schedule: Schedule = Schedule()
  data: Data = Data()
  text: Text = Text()
  mesh: Mesh = Mesh()
  train: Train = Train()
  health: Health = Health()

  def __post_init__(self):
    require(
      2 * self.data.pairs <= self.train.batch_size,
      f"data.pairs {self.data.pairs} are more than half of train.batch_size {self.train.batch_size}",
    )

  @property
  def resolution(self) -> int:
    """Side of the images that the experiment trains on, in pixels."""
    raise AttributeError(f"{type(self).__name__} has no resolution")

  @property
  def conditional(self) -> bool:
    """Whether images depend on prompts."""
    return True

  @property
  def expert_counts(self) -> Mapping[str, int]:
    """Layers with several experts, {description of the place: experts}: the possible divisors of the mesh's expert
    axis.
    """
    return {}

  @property
  def summary(self) -> str:
    """The networks in one line."""
    return f"{self.resolution}x{self.resolution} images"

  def identity(self, network: str) -> dict[str, Any]:
    """The fields of a network's configuration that determine what its weights mean; {} for one without fields."""
    cfg = getattr(self, network, None)
    return dataclasses.asdict(cfg) if cfg is not None else {}

  def check_whole(self) -> None:
    """Checks conditions that hold for a whole experiment but not for its `at_stage`. Raises UserError."""
    require(
      not self.schedule.resolutions,
      f"system '{self.system}' has no progressive growing: schedule.resolutions is "
      f"{self.schedule.resolutions}, it must be ()",
    )

  def at_stage(self, resolution: int) -> Self:
    """The experiment whose networks end at `resolution`, a stage of progressive growing."""
    raise AttributeError(f"system '{self.system}' has no progressive growing")


ExperimentT = TypeVar("ExperimentT", bound=Experiment)
