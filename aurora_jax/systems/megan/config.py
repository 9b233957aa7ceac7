"""Configuration of MEGAN (arXiv 1805.02481). Defaults are the released code's (github tuanl12/MEGAN) for CIFAR-10."""

import dataclasses
from collections.abc import Mapping

from aurora_jax import config as config_lib
from aurora_jax.config import require

FEATURE_RESOLUTION = 8  # the output of a generator's first half, which the gate sees
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # weight of the batch in the running statistics


def _require_sizes(group, values, names):
  for name in names:
    require(getattr(values, name) >= 1, f"{group}.{name} must be at least 1, got {getattr(values, name)}")


def _require_resolution(group, resolution):
  require(
    resolution >= 16 and resolution.bit_count() == 1,
    f"{group}.resolution must be a power of two, 16 or more, got {resolution}",
  )


def _require_choice(group, values, name, *choices):
  value = getattr(values, name)
  require(value in choices, f"{group}.{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Generator:
  """The generators, the projection that they share, and the gate. Defaults count 12 889 374 + 1 085 130 parameters."""

  resolution: int = 32  # side of the images
  z_dim: int = 128
  channels: int = 64  # width of the last feature map; it doubles with every halving of the resolution
  generators: int = 10
  # Default initialization of the framework: "torch031", PyTorch 0.3.1, which the release names; "modern", today's
  # torch. They differ in batch norm scales, U(0, 1) or 1, and in the range of transposed convolutions.
  init: str = "torch031"
  # Sampling. Released: "batch" and "sample", since the released code never leaves training mode.
  bn_at_eval: str = "batch"  # statistics of batch norms: those of the "batch", or the "running" ones
  gate_at_eval: str = "sample"  # "sample": a draw at the current temperature; "argmax": always the likeliest generator
  compute_dtype: str = "float32"  # of the generators; batch norm, projection and gate are always float32

  def __post_init__(self):
    _require_resolution("generator", self.resolution)
    _require_sizes("generator", self, ("z_dim", "channels", "generators"))
    _require_choice("generator", self, "init", "torch031", "modern")
    _require_choice("generator", self, "bn_at_eval", "batch", "running")
    _require_choice("generator", self, "gate_at_eval", "sample", "argmax")
    _require_choice("generator", self, "compute_dtype", "float32", "bfloat16")

  @property
  def resolutions(self) -> tuple[int, ...]:
    """Resolutions of a generator's layers, ascending: (4, 8, ..., resolution)."""
    return tuple(2**k for k in range(2, self.resolution.bit_length()))

  def width(self, resolution: int) -> int:
    """Channels of the layer at a resolution; those of the last layer are RGB."""
    return 3 if resolution == self.resolution else self.channels * self.resolution // (2 * resolution)

  @property
  def gate_width(self) -> int:
    """Width of the gate's first hidden layer: half its input's."""
    return (self.z_dim + self.generators * self.z_dim) // 2


@dataclasses.dataclass(frozen=True)
class Discriminator:
  """Strided convolutions without any normalization, as the gradient penalty wants. Defaults count 662 977
  parameters.
  """

  resolution: int = 32
  channels: int = 64  # of the first convolution; every further one doubles them
  compute_dtype: str = "float32"

  def __post_init__(self):
    _require_resolution("discriminator", self.resolution)
    _require_sizes("discriminator", self, ("channels",))
    _require_choice("discriminator", self, "compute_dtype", "float32", "bfloat16")

  @property
  def widths(self) -> tuple[int, ...]:
    """Channels of the strided convolutions; the last one's output has 4 x 4 pixels."""
    return tuple(self.channels * 2**k for k in range(self.resolution.bit_length() - 3))


@dataclasses.dataclass(frozen=True)
class Loss:
  """WGAN-GP (arXiv 1704.00028), the gate's balance and its annealing."""

  gradient_penalty_weight: float = 10.0
  # Released: the penalty has a separate optimizer step, after that of the Wasserstein loss and at its new weights, with
  # the same moments. False: one step on the sum.
  gp_separate_step: bool = True
  d_steps: int = 5  # discriminator rounds per iteration, each on a new real batch
  load_balance: bool = False  # an extra step on the gate toward equal use of the generators
  balance_weight: float = 1.0
  balance_weight_min: float = 0.001
  temperature: float = 1.0  # of the gate's Gumbel softmax, before annealing
  temperature_min: float = 0.01
  anneal_rate: float = 1e-4  # per iteration, of temperature and balance weight
  anneal_every: int = 781  # iterations between two changes; released: images // batch size, here CIFAR-10's
  anneal_start: int = 0  # first iteration that counts

  def __post_init__(self):
    _require_sizes("loss", self, ("d_steps", "anneal_every"))
    for name in ("temperature", "temperature_min"):
      require(getattr(self, name) > 0, f"loss.{name} must be positive, got {getattr(self, name)}")
    require(
      self.temperature_min <= self.temperature,
      f"loss.temperature_min {self.temperature_min} is above loss.temperature {self.temperature}",
    )
    for name in (
      "gradient_penalty_weight",
      "balance_weight",
      "balance_weight_min",
      "anneal_rate",
      "anneal_start",
    ):
      require(getattr(self, name) >= 0, f"loss.{name} must not be negative, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Optimizers:
  """One optimizer per network: Adam (0, 0.9) at 2e-4. The gate's L2 is added to the gradient of all its parameters."""

  generator: config_lib.Optimizer = config_lib.Optimizer(learning_rate=2e-4, beta2=0.9)
  gate: config_lib.Optimizer = config_lib.Optimizer(learning_rate=2e-4, beta2=0.9, l2=0.1)
  discriminator: config_lib.Optimizer = config_lib.Optimizer(learning_rate=2e-4, beta2=0.9)


@dataclasses.dataclass(frozen=True)
class Experiment(config_lib.Experiment):
  """An experiment with MEGAN."""

  name: str = "megan"
  system: str = "megan"
  generator: Generator = Generator()
  discriminator: Discriminator = Discriminator()
  loss: Loss = Loss()
  optimizer: Optimizers = Optimizers()

  def __post_init__(self):
    super().__post_init__()
    require(
      self.generator.resolution == self.discriminator.resolution,
      f"generator.resolution {self.generator.resolution} and discriminator.resolution "
      f"{self.discriminator.resolution} differ",
    )
    require(
      self.train.batch_size >= 2, f"train.batch_size must be at least 2 for batch norm, got {self.train.batch_size}"
    )

  @property
  def resolution(self) -> int:
    return self.generator.resolution

  @property
  def conditional(self) -> bool:
    return False

  @property
  def expert_counts(self) -> Mapping[str, int]:
    return {"as generators": self.generator.generators} if self.generator.generators > 1 else {}

  @property
  def summary(self) -> str:
    return f"{super().summary}, unconditional, by {self.generator.generators} generators and a gate"
