"""The interface of a system: a GAN as a value.

A system is a set of networks, the phases of a training step and a way to sample. The generic code (training,
evaluation, performance) knows systems by this file alone. A new system is a folder with `config.py` (its `Experiment`),
`system.py` (a subclass of `System`), its networks and its losses, and one line in `registry.py`.

  P prompts, B images of a batch, R resolution in pixels
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aurora_jax.config import Ema, Experiment, ExperimentT, Optimizer
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.parallel.mesh import KeyPath, ParamLabel  # noqa: F401
from aurora_jax.systems.metric_names import BAD_IMAGES

PyTree = Any
Metrics = dict[str, Any]
Frozen = Mapping[str, PyTree]
# A network's Flax variables, {"params": ..., other collections}.
Variables = Mapping[str, PyTree]


@struct.dataclass
class NetworkState:
  """The state of one network.

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


@struct.dataclass
class TrainState:
  """The state of a run: all that a checkpoint must hold.

  Attributes:
    step: int32 scalar, steps done.
    networks: {name: NetworkState}.
  """

  step: jax.Array
  networks: dict[str, NetworkState]

  def with_network(self, name: str, network: NetworkState) -> "TrainState":
    """The state with one network replaced."""
    return dataclasses.replace(self, networks={**self.networks, name: network})

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
    every: the phase runs at steps that are multiples of this (lazy R1: 16).
    repeats: how often it runs in such a step, each time on a new batch (WGAN-GP's discriminator: 5).
  """

  name: str
  run: Callable[[TrainState, Frozen, Mapping[str, jax.Array], jax.Array], tuple[TrainState, Metrics]]
  every: int = 1
  repeats: int = 1


class Update(Protocol):
  """Applies gradients: guard, clipping, optimizer, EMA. `System.phases` takes one; training/optimizers.py makes it."""

  def __call__(
    self,
    state: TrainState,
    network: str,
    gradients: PyTree,
    metrics: Metrics,
    *,
    all_finite: jax.Array | bool = True,
    variables: PyTree | None = None,
    log_name: str | None = None,
  ) -> tuple[TrainState, jax.Array | bool, Metrics]:
    """One optimizer step of one network. Where a loss or a gradient is not finite, the network stays as it was.

    Args:
      state: the state before the update.
      network: name of the network.
      gradients: a tree like the network's parameters.
      metrics: metrics of this update. Its losses ("loss/...") must be finite.
      all_finite: bool scalar, whether the updates that this one depends on were finite.
      variables: new values of the network's other collections; None leaves them.
      log_name: short name in metrics that replaces the network's, for an additional update such as "r1".

    Returns:
      (state, bool scalar: whether all was finite, metrics with gradient and update norms).
    """
    ...


class Sample(NamedTuple):
  """What sampling returns.

  Attributes:
    image: [B, R, R, 3] float32, about [-1, 1].
    choices: {name: int32 [B, N] or [B]}: the expert of each feature point, by layer, or the generator of each image; {}
      for systems without such choices.
  """

  image: jax.Array
  choices: Mapping[str, jax.Array] = {}


def bad_images(real: jax.Array, generated: jax.Array) -> Metrics:
  """The metrics of `BAD_IMAGES`, for a phase that sees real and generated images."""
  finite = lambda images: jnp.isfinite(images).all().astype(jnp.float32)
  return {name: 1.0 - finite(images) for name, images in zip(BAD_IMAGES, (real, generated))}


def apply(module: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> Any:
  """`module.apply` without mutable collections. Flax types its result as a union with that of a call with such."""
  return module.apply(variables, *args, **kwargs)


class System(Generic[ExperimentT]):
  """A system for one experiment on one mesh. Building one reads no weights and allocates no arrays.

  Attributes:
    experiment: the configuration.
    layout: the mesh and its sharding rules.
    networks: {name: Network}.
    sampled: names of the networks that `sample` needs.
    headline: names of the metrics to show while training.
    remedies: {field of `config.Health`: config fields that act on what it alerts to}, for messages.
    truncates: whether `sample` uses psi.
    fixed_text: leaves of a condition that `interpolate` keeps from the first prompt, unless it is told to move all.
    active_experts: what of the parameters that are labeled as experts makes one sample, for a message.
  """

  sampled: tuple[str, ...] = ("generator",)
  headline: tuple[str, ...] = ()
  remedies: Mapping[str, str] = {}
  truncates: bool = True
  fixed_text: tuple[str, ...] = ()
  active_experts: str = "one expert per layer"
  networks: Mapping[str, Network]

  def __init__(self, experiment: ExperimentT, layout: mesh_lib.Layout | None = None):
    self.experiment = experiment
    self.layout = layout or mesh_lib.single_device()

  @property
  def log_names(self) -> Mapping[str, str]:
    """{short name in metrics: name for messages} of the networks and of additional updates such as R1."""
    return {network.log_name: name for name, network in self.networks.items()}

  def unshard(self, network: str, params: PyTree) -> PyTree:
    """Parameters as a network uses them, from their stored shards. Gradients return to the stored sharding."""
    return self.layout.unshard(params, self.networks[network].label)

  def at_stage(self, resolution: int) -> Self:
    """The system at a stage of progressive growing. Its phases take the whole system's state."""
    return type(self)(self.experiment.at_stage(resolution), self.layout)

  # ---- for compile reports -----------------------------------------------------------------------------------------

  @property
  def compute_dtype(self) -> str:
    """The dtype of most products: "float32" or "bfloat16"."""
    return getattr(getattr(self.experiment, "generator", None), "compute_dtype", "float32")

  @property
  def frozen_note(self) -> str:
    """A sentence on where the sizes of the frozen networks are from; "" without frozen networks."""
    return ""

  def without_recomputation(self) -> "System":
    """The same system without rematerialization, for counting useful operations."""
    return self

  def with_least_work(self) -> "System":
    """A system whose `sample` does only the products and convolutions that every implementation needs."""
    return self.without_recomputation()

  def memory_advice(self, temporaries: int) -> list[str]:
    """Lines on the config fields that make a step's temporaries smaller. `temporaries`: their bytes per device."""
    del temporaries
    return []

  # ---- training ----------------------------------------------------------------------------------------------------

  def init(self, key: jax.Array) -> dict[str, Variables]:
    """Fresh variables of all networks, {name: {"params": ..., ...}}. Pure."""
    raise NotImplementedError

  def begins_fresh(self, stored: Experiment) -> Callable[[str, KeyPath], bool]:
    """Which entries `train.init_from` need not find in a checkpoint of another experiment.

    Args:
      stored: the experiment of the checkpoint.

    Returns:
      A function of (network, key path of a parameter or an entry of another collection): whether it begins as in a
      fresh run.

    Raises:
      UserError: the two experiments do not fit together.
    """
    del stored
    return lambda network, path: False

  def initial_weights(self) -> dict[str, PyTree]:
    """Parameters that start from values in files, {network: part of its tree}, as host arrays; {} for none."""
    return {}

  def phases(self, update: Update) -> Sequence[Phase]:
    """The phases of a step, in order."""
    raise NotImplementedError

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The entries of a batch (of data/loader.py) that the phases read, {name: shape and dtype}."""
    raise NotImplementedError

  @property
  def tokenizer(self) -> Callable[[Sequence[str]], np.ndarray] | None:
    """Captions -> int32 [B, N], or None for a system that reads no text."""
    return None

  def load_frozen(self) -> dict[str, PyTree]:
    """Reads the networks that training uses and never changes, as host arrays; {} without such networks."""
    return {}

  def finish_frozen(self, frozen: Frozen, dataset: Any) -> Frozen:
    """Adds what is computed once from the frozen networks, which are on the devices, and the data set."""
    del dataset
    return frozen

  def abstract_frozen(self) -> dict[str, PyTree]:
    """Shapes of the result of `finish_frozen`, without reading weights."""
    return {}

  def notes(self) -> Sequence[str]:
    """Lines for the user who starts a run, such as the plan of the expert exchange."""
    return ()

  # ---- sampling ----------------------------------------------------------------------------------------------------

  def load_sampling_frozen(self) -> dict[str, PyTree]:
    """Reads the frozen networks that `condition` needs, as host arrays."""
    return {}

  def inputs(self, prompts: Sequence[str]) -> PyTree:
    """Prompts as arrays whose leading axis is P; None for an unconditional system."""
    del prompts
    return None

  def abstract_inputs(self, prompts: int) -> PyTree:
    """Shapes of `inputs` for this many prompts."""
    del prompts
    return None

  def condition(self, networks: Mapping[str, Variables], frozen: Frozen, inputs: PyTree) -> dict[str, jax.Array]:
    """What images depend on besides latents, {name: [P, ...]}; {} for an unconditional system. Traced."""
    del networks, frozen, inputs
    return {}

  def draw_latents(self, key: jax.Array) -> dict[str, jax.Array]:
    """The latents of one image, {name: [...]}. Traced."""
    raise NotImplementedError

  def center(
    self, networks: Mapping[str, Variables], condition: dict[str, jax.Array], latents: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """Adds to a condition the mean toward which truncation moves, from M latents [P, M, ...] of each prompt. Traced."""
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
    """Draws images. Traced.

    Args:
      networks: {name: variables} of the networks in `sampled`.
      frozen: the result of `load_sampling_frozen`.
      condition: conditions of B images, {name: [B, ...]}.
      latents: latents of B images, {name: [B, ...]}.
      psi: truncation, [B] or a scalar; 1 turns it off.
    """
    raise NotImplementedError

  def choice_count(self, name: str) -> int:
    """Number of options of an entry of `Sample.choices`."""
    raise NotImplementedError

  @property
  def sampling_batch_size(self) -> int:
    """A batch size for sampling that suits the size of the networks."""
    return 32
