"""The interface of a system: a GAN as a value.

A system is a set of networks, the phases of a training step and a way to sample. The generic code (training, evaluation,
performance) knows systems by this file alone. A new system is a folder with `config.py` (its `Experiment`), `system.py` (a
subclass of `System`), its networks and its losses, and one line in `registry.py`.

  P prompts, B images of a batch, R resolution in pixels
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax
import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.config import Ema, Experiment, Optimizer
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.parallel.mesh import KeyPath, ParamLabel  # noqa: F401

PyTree = Any
Metrics = dict[str, Any]
Frozen = Mapping[str, PyTree]
# A network's Flax variables, {"params": ..., other collections}.
Variables = Mapping[str, PyTree]


@flax.struct.dataclass
class NetworkState:
  """Everything that training keeps of one network.

  Attributes:
    params: the trained parameters.
    variables: all other Flax collections, {collection: tree}; {} where there are none.
    opt_state: optax state.
    ema: moving average of `params`, or None.
  """

  params: PyTree
  variables: PyTree
  opt_state: PyTree
  ema: PyTree | None = None


@flax.struct.dataclass
class TrainState:
  """Everything a run needs to continue, and nothing else.

  Attributes:
    step: int32 scalar, steps done.
    networks: {name: NetworkState}.
  """

  step: jax.Array
  networks: dict[str, NetworkState]

  def with_network(self, name: str, network: NetworkState) -> "TrainState":
    """The state with one network replaced."""
    return self.replace(networks={**self.networks, name: network})

  def variables(self, name: str, ema: bool = False) -> Variables:
    """The Flax variables of a network; with `ema`, those of its average where it has one."""
    network = self.networks[name]
    params = network.params if not ema or network.ema is None else network.ema
    return {"params": params, **network.variables}


@dataclasses.dataclass(frozen=True)
class Network:
  """How one network is trained.

  Attributes:
    log_name: short name in metrics: "g" gives "grad_norm/g"; losses are "loss/g_...".
    optimizer: its method, learning rate and so on.
    label: key path of a parameter -> `ParamLabel`.
    ema: its moving average, or None for none.
  """

  log_name: str
  optimizer: Optimizer
  label: Callable[[KeyPath], ParamLabel]
  ema: Ema | None = None


@dataclasses.dataclass(frozen=True)
class Phase:
  """One jitted program of a training step.

  Attributes:
    name: for reports and random keys.
    run: pure: (state, frozen, batch, key) -> (state, metrics). The key is folded from (seed, phase, step, repeat).
    every: it runs at steps that are multiples of this (lazy R1: 16).
    repeats: it runs so often in a row, each time on a batch of its own (WGAN-GP's discriminator: 5).
  """

  name: str
  run: Callable[[TrainState, Frozen, Mapping[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]
  every: int = 1
  repeats: int = 1


class Update(Protocol):
  """Applies gradients: guard, clipping, optimizer, EMA. Made by training/optimizers.py, given to `System.phases`."""

  def __call__(
    self,
    state: TrainState,
    network: str,
    gradients: PyTree,
    metrics: Metrics,
    *,
    healthy: jax.Array | bool = True,
    variables: PyTree | None = None,
    log_name: str | None = None,
  ) -> tuple[TrainState, jax.Array | bool, Metrics]:
    """One optimizer step of one network, or nothing at all where a loss or gradient is not finite.

    Args:
      state: before.
      network: its name.
      gradients: as its parameters.
      metrics: of this update; its losses ("loss/...") must be finite.
      healthy: whether what this update depends on was finite.
      variables: new values of the network's other collections; None leaves them.
      log_name: in place of the network's, for an update of another kind ("r1").

    Returns:
      (state, whether all was finite, metrics with gradient and update norms).
    """


class Sample(NamedTuple):
  """What sampling gives.

  Attributes:
    image: [B, R, R, 3] float32, about [-1, 1].
    choices: {name: int32 [B, N] or [B]}: which expert each feature point went to by layer, or which generator made the
      image; {} for systems that choose nothing.
  """

  image: jax.Array
  choices: Mapping[str, jax.Array] = {}


# Metrics that tell a NaN that came in from one that was made: 1 where not all pixels are finite.
BAD_IMAGES = {"guard/bad_real": "the batch's images", "guard/bad_generated": "the generator's images"}


def bad_images(real: jax.Array, generated: jax.Array) -> Metrics:
  """The metrics of `BAD_IMAGES`, for a phase that sees real and generated images."""
  finite = lambda images: jnp.isfinite(images).all().astype(jnp.float32)
  return {name: 1.0 - finite(images) for name, images in zip(BAD_IMAGES, (real, generated))}


class System:
  """A system for one experiment on one mesh. Building one reads no weights and allocates no arrays.

  Attributes:
    experiment: the configuration.
    layout: the mesh and its sharding rules.
    networks: {name: Network}.
    sampled: names of the networks that `sample` needs.
    log_names: short name in metrics -> words, for messages; networks and special updates such as R1.
    headline: names of the metrics to show while training.
    truncates: whether `sample` heeds psi.
    fixed_text: leaves of a condition that `interpolate` leaves at the first prompt unless it is told to move all.
  """

  sampled: tuple[str, ...] = ("generator",)
  headline: tuple[str, ...] = ()
  truncates: bool = True
  fixed_text: tuple[str, ...] = ()
  networks: Mapping[str, Network]

  def __init__(self, experiment: Experiment, layout: mesh_lib.Layout | None = None):
    self.experiment = experiment
    self.layout = layout or mesh_lib.single_device()

  @property
  def log_names(self) -> Mapping[str, str]:
    return {network.log_name: name for name, network in self.networks.items()}

  def gather(self, network: str, params: PyTree) -> PyTree:
    """Parameters as they are stored -> as a network uses them; gradients come back as they are stored."""
    return self.layout.gather(params, self.networks[network].label)

  def at_stage(self, resolution: int) -> "System":
    """The system at a stage of progressive growing; its phases take the whole system's state."""
    return type(self)(self.experiment.at_stage(resolution), self.layout)

  # ---- for compile reports -----------------------------------------------------------------------------------------

  @property
  def compute_dtype(self) -> str:
    """Of most products: "float32" or "bfloat16"."""
    return getattr(getattr(self.experiment, "generator", None), "compute_dtype", "float32")

  @property
  def frozen_note(self) -> str:
    """Where the sizes of the frozen networks are from, in words; "" where there are none."""
    return ""

  def without_recomputation(self) -> "System":
    """The same computation with nothing computed twice, for counting useful operations."""
    return self

  def with_least_work(self) -> "System":
    """A system whose `sample` does only the products and convolutions that no implementation can do without."""
    return self.without_recomputation()

  def memory_advice(self, temporaries: int) -> list[str]:
    """Config fields that make the temporaries (bytes per device) smaller, one line each."""
    del temporaries
    return []

  # ---- training ----------------------------------------------------------------------------------------------------

  def init(self, key: jax.Array) -> dict[str, Variables]:
    """Fresh variables of all networks, {name: {"params": ..., ...}}. Pure."""
    raise NotImplementedError

  def phases(self, update: Update) -> Sequence[Phase]:
    """The phases of a step, in order."""
    raise NotImplementedError

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What the phases read of a batch, {name: shape and dtype}; entries of data/loader.py's batches."""
    raise NotImplementedError

  @property
  def tokenizer(self) -> Callable[[Sequence[str]], np.ndarray] | None:
    """Captions -> int32 [B, N], or None for a system that reads no text."""
    return None

  def load_frozen(self) -> dict[str, PyTree]:
    """Reads the networks that training uses and never changes, as host arrays; {} where there are none."""
    return {}

  def finish_frozen(self, frozen: Frozen, dataset: Any) -> Frozen:
    """Adds what is computed once from frozen networks (on the devices by now) and the data set."""
    del dataset
    return frozen

  def abstract_frozen(self) -> dict[str, PyTree]:
    """`finish_frozen`'s result as shapes, without reading weights."""
    return {}

  def notes(self) -> Sequence[str]:
    """Lines for the person who starts a run, such as how experts and tokens meet on the mesh."""
    return ()

  # ---- sampling ----------------------------------------------------------------------------------------------------

  def load_sampling_frozen(self) -> dict[str, PyTree]:
    """Reads the frozen networks that `condition` needs, as host arrays."""
    return {}

  def inputs(self, prompts: Sequence[str]) -> PyTree:
    """Prompts as arrays whose leading axis is P; None for a system that reads none."""
    del prompts
    return None

  def abstract_inputs(self, prompts: int) -> PyTree:
    """`inputs` of this many prompts, as shapes."""
    del prompts
    return None

  def condition(self, networks: Mapping[str, Variables], frozen: Frozen, inputs: PyTree) -> dict[str, jax.Array]:
    """What images depend on beside latents, {name: [P, ...]}; {} for an unconditional system. Traced."""
    del networks, frozen, inputs
    return {}

  def draw_latents(self, key: jax.Array) -> dict[str, jax.Array]:
    """The latents of one image, {name: [...]}. Traced."""
    raise NotImplementedError

  def center(
    self, networks: Mapping[str, Variables], condition: dict[str, jax.Array], latents: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Adds to a condition the mean that truncation moves toward, from latents [P, M, ...]. Traced."""
    del networks, latents
    return condition

  def sample(
    self,
    networks: Mapping[str, Variables],
    frozen: Frozen,
    condition: dict[str, jax.Array],
    latents: dict[str, jax.Array],
    psi: jax.Array | float = 1.0,
  ) -> Sample:
    """Images.

    Args:
      networks: {name: variables} of `sampled`.
      frozen: of `load_sampling_frozen`.
      condition, latents: of B images.
      psi: truncation, [B] or a scalar; 1 is none.
    """
    raise NotImplementedError

  def choice_count(self, name: str) -> int:
    """How many options an entry of `Sample.choices` has."""
    raise NotImplementedError

  @property
  def sampling_batch_size(self) -> int:
    """A batch size for sampling that suits the networks' size."""
    return 32
