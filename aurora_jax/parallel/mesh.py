"""The device mesh, and the rules that shard arrays over it.

The mesh axes are `data` and `expert`. The expert axis is built of sub-axes, so that layers with different numbers of
experts can each use the part that divides their number. For layers of 4, 8 and 16 experts an expert axis of 16 is
(expert0, expert1, expert2) = (4, 2, 2). A layer of 8 experts is sharded along (expert0, expert1) and replicated along
expert2.

The batch is sharded along all axes, so that no device idles outside the layers with experts. Experts are sharded along
their run of sub-axes, with their optimizer state and EMA. All other parameters ("dense") are replicated. With `fsdp`
they are stored sharded, over as many devices as divide them (of all devices, or of those along `expert`), and unsharded
where they are used. Labels say which parameters are stacked experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.sharding import Mesh as DeviceMesh

from aurora_jax.config import Mesh
from aurora_jax.errors import UserError

DATA = "data"
EXPERT = "expert"

# With fsdp, arrays with fewer values than this are replicated: sharding them saves less than the exchange costs.
SMALL = 4096

KeyPath = tuple[Any, ...]


class ParamLabel(NamedTuple):
  """The properties of a parameter that the generic code needs. Systems define them; no other code parses names.

  Attributes:
    stage: the smallest resolution of progressive growing, in pixels, at which the parameter is used; 0: always.
    decay: whether the optimizer's decoupled weight decay applies to it.
    experts: whether its leading axis is a stack of experts, which may be sharded along the mesh's expert axis.
    matrix: whether it is a matrix from inputs to outputs, or a stack of such, which Muon may orthogonalize.
    bias: whether it is a bias, which may have its own learning rate.
    module: name of its module, for messages.
    group: its group in the logs, the same for similar modules.
  """

  stage: int = 0
  decay: bool = False
  experts: bool = False
  matrix: bool = False
  bias: bool = False
  module: str = ""
  group: str = ""


Label = Callable[[KeyPath], ParamLabel]


def parameter_path(path: KeyPath) -> KeyPath:
  """The path of a parameter, from the path of its entry in an optimizer state: the dictionary keys at the end."""
  first = len(path)
  while first and isinstance(path[first - 1], jax.tree_util.DictKey):
    first -= 1
  return path[first:]


def names_of(path: KeyPath) -> tuple[str, ...]:
  """The names along a key path, for all kinds of keys."""
  return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


@dataclasses.dataclass(frozen=True)
class Rules:
  """Mesh axes by logical axis name.

  Attributes:
    batch: samples, and the tokens of samples in their order.
    experts: the leading axis of stacked experts.
    dense: the sharded axis of an array without experts, under fsdp; () replicates such arrays.
  """

  batch: tuple[str, ...] = (DATA, EXPERT)
  experts: tuple[str, ...] = (EXPERT,)
  dense: tuple[str, ...] = ()

  def spec(self, *logical: str | None) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes (names of this class's fields, or None for a whole axis).

    Raises:
      ValueError: an unknown name, or two axes of the array along the same mesh axis.
    """
    used, entries = {}, []
    for name in logical:
      if name is not None and name not in (field.name for field in dataclasses.fields(self)):
        raise ValueError(f"no logical axis {name!r}; there are {', '.join(f.name for f in dataclasses.fields(self))}")
      axes = () if name is None else getattr(self, name)
      for axis in axes:
        if axis in used:
          raise ValueError(f"array axes {used[axis]!r} and {name!r} of {logical} both lie along mesh axis {axis!r}")
        used[axis] = name
      entries.append(axes[0] if len(axes) == 1 else axes or None)
    while entries and entries[-1] is None:
      entries.pop()
    return PartitionSpec(*entries)


def sub_axes(size: int, counts: Iterable[int]) -> tuple[int, ...]:
  """Splits an expert axis into sub-axes, so that each count is divided by as much of the axis as possible.

  For example (16, {4, 8, 16}) -> (4, 2, 2).

  Args:
    size: devices along the expert axis.
    counts: experts per layer, of all layers.

  Returns:
    Sizes whose product is `size`; (1,) for a size of 1.
  """
  sizes, product = [], 1
  for divisor in sorted({math.gcd(count, size) for count in counts}):
    if divisor > product and divisor % product == 0:
      sizes.append(divisor // product)
      product = divisor
  if product < size or not sizes:
    sizes.append(size // product)
  return tuple(sizes)


def longest_run(sizes: Sequence[int], count: int) -> tuple[int, int]:
  """The run of adjacent sub-axes whose product is the largest that divides `count`. Returns (first, last + 1)."""
  runs = [(first, last) for first in range(len(sizes)) for last in range(first, len(sizes) + 1)]
  return max(
    (run for run in runs if count % math.prod(sizes[slice(*run)]) == 0),
    key=lambda run: (math.prod(sizes[slice(*run)]), -run[0], -run[1]),
  )


def _problem(data, expert, devices, batch_size, experts):
  """An error message about a mesh, or None."""
  if data * expert != devices:
    return f"mesh.data={data} x mesh.expert={expert} makes {data * expert} devices, there are {devices}"
  if batch_size % devices:
    return (
      f"train.batch_size={batch_size} is no multiple of the {devices} devices of mesh.data={data} x "
      f"mesh.expert={expert}"
    )
  if expert == 1:
    return None
  if not experts:
    return f"mesh.expert={expert}, but no layer has more than one expert"
  sizes = sub_axes(expert, experts.values())
  used = set()
  for place, count in experts.items():
    first, last = longest_run(sizes, count)
    if math.prod(sizes[first:last]) == 1:
      return f"mesh.expert={expert} has no divisor in common with the {count} experts {place}"
    used.update(range(first, last))
  idle = math.prod(size for i, size in enumerate(sizes) if i not in used)
  if idle > 1:
    return f"mesh.expert={expert} is {idle} times what the experts can be spread over"
  return None


def _table(devices, batch_size, experts):
  """One line with the devices, the batch, the experts and the meshes that fit."""
  fitting = [
    f"{devices // expert}x{expert}"
    for expert in range(1, devices + 1)
    if devices % expert == 0 and _problem(devices // expert, expert, devices, batch_size, experts) is None
  ]
  layers = ", ".join(f"{count} {place}" for place, count in experts.items()) or "one per layer"
  return (
    f"devices {devices}; train.batch_size {batch_size}; experts {layers}; data x expert that fit: "
    f"{', '.join(fitting) or 'none'}"
  )


@dataclasses.dataclass(frozen=True)
class Layout:
  """A mesh and the shardings of arrays on it.

  Attributes:
    mesh: axes `data` and the sub-axes of `expert`; an AbstractMesh if no arrays are to be placed.
    rules: logical to mesh axes.
  """

  mesh: DeviceMesh | AbstractMesh
  rules: Rules

  @property
  def devices(self) -> int:
    """Number of devices."""
    return self.mesh.size

  def size(self, axes: Iterable[str]) -> int:
    """Number of devices along these mesh axes."""
    return math.prod(self.mesh.shape[axis] for axis in axes)

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device holds in full."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch(self) -> NamedSharding:
    """The sharding of an array with samples along its first axis."""
    return NamedSharding(self.mesh, self.rules.spec("batch"))

  def expert_axes(self, count: int) -> tuple[str, ...]:
    """The mesh axes that shard a layer of `count` experts; () if every device has all experts."""
    axes = self.rules.experts
    first, last = longest_run([self.mesh.shape[axis] for axis in axes], count)
    return tuple(axis for axis in axes[first:last] if self.mesh.shape[axis] > 1)

  def parameter(self, label: ParamLabel, shape: Sequence[int]) -> NamedSharding:
    """The stored sharding of a parameter, and of its entries in optimizer state and EMA."""
    if label.experts and (axes := self.expert_axes(shape[0])):
      return NamedSharding(self.mesh, dataclasses.replace(self.rules, experts=axes).spec("experts"))
    axes = () if math.prod(shape) < SMALL else self._dense_axes(shape)
    if not axes:
      return self.replicated
    axis = shape.index(max(size for size in shape if size % self.size(axes) == 0))
    return NamedSharding(self.mesh, dataclasses.replace(self.rules, dense=axes).spec(*[None] * axis, "dense"))

  def shardings(self, tree: Any, label: Label) -> Any:
    """The stored sharding of every leaf of a network's parameters, EMA or optimizer state (a pytree like `tree`)."""

    def one(path, leaf):
      name = parameter_path(path)
      # A leaf of the optimizer state without such a path (a step count) belongs to no parameter.
      return self.parameter(label(name), leaf.shape) if name and leaf.shape else self.replicated

    return jax.tree_util.tree_map_with_path(one, tree)

  def unshard(self, parameters: Any, label: Label) -> Any:
    """Parameters as a network uses them: dense ones are gathered to every device, experts stay sharded.

    Gradients get the stored sharding, so that the optimizer on each device updates only its own shard.
    """

    def whole(path, leaf):
      stored = self.parameter(label(path), leaf.shape)
      if stored.is_fully_replicated or (label(path).experts and self.expert_axes(leaf.shape[0])):
        return leaf
      return _unsharded(leaf, self._stages(stored), self.replicated)

    return jax.tree_util.tree_map_with_path(whole, parameters)

  def _stages(self, stored):
    """The shardings that the gradient of an unsharded parameter takes in turn; the last one is the stored sharding.

    XLA for TPU turns a sum that is then sharded into a reduce-scatter if the sum is over some of the devices, but into
    an all-reduce if it is over all of them (seen with 16, benchmarks/README.md). A parameter that is sharded over all
    devices therefore takes two steps: along the first mesh axis, then along the others. Each is a sum over part of the
    devices, and together they move no more than one reduce-scatter.
    """
    axis = next(i for i, axes in enumerate(stored.spec) if axes)
    axes = [name for name in jax.tree.leaves(stored.spec[axis]) if self.mesh.shape[name] > 1]
    if self.size(axes) < self.devices or len(axes) == 1:
      return (stored,)
    return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, axes[0])), stored

  def _dense_axes(self, shape):
    """The mesh axes that shard an array without experts: as many as divide one of its axes, `data` first."""
    axes = self.rules.dense
    fitting = [
      axes[:last]
      for last in range(1, len(axes) + 1)
      if self.size(axes[:last]) > 1 and any(size % self.size(axes[:last]) == 0 for size in shape)
    ]
    return fitting[-1] if fitting else ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _unsharded(x, stages, used):
  del stages
  return jax.lax.with_sharding_constraint(x, used)


def _unsharded_forward(x, stages, used):
  return _unsharded(x, stages, used), None


def _unsharded_backward(stages, used, _, cotangent):
  del used
  for sharding in stages:
    cotangent = jax.lax.with_sharding_constraint(cotangent, sharding)
  return (cotangent,)


_unsharded.defvjp(_unsharded_forward, _unsharded_backward)


def _shape(mesh, batch_size, experts, devices):
  """((mesh axis, size), ...) for a number of devices. UserError if the mesh does not fit."""
  data = mesh.data or max(devices // mesh.expert, 1)
  problem = _problem(data, mesh.expert, devices, batch_size, experts)
  if problem:
    raise UserError(f"{problem} ({_table(devices, batch_size, experts)})")
  sizes = sub_axes(mesh.expert, experts.values())
  names = [EXPERT] if len(sizes) == 1 else [f"{EXPERT}{i}" for i in range(len(sizes))]
  return ((DATA, data), *zip(names, sizes))


def single_device() -> Layout:
  """The layout on one local device, for code that runs without a mesh."""
  mesh = jax.make_mesh((1, 1), (DATA, EXPERT), axis_types=(AxisType.Auto,) * 2, devices=jax.local_devices()[:1])
  return Layout(mesh, Rules(batch=(DATA, EXPERT), experts=(EXPERT,)))


def build(cfg: Mesh, batch_size: int, experts: Mapping[str, int], devices: Any = None) -> Layout:
  """The layout of an experiment.

  Args:
    cfg: the configuration of the mesh.
    batch_size: images per step.
    experts: {description of a place: number of experts}, of the layers that have several.
    devices: list of devices, such as those of an ahead-of-time topology; None: all devices. If an integer, their
      number: the mesh is then abstract, for inspection.

  Raises:
    UserError: the mesh does not divide the devices, the batch or the experts; the message lists meshes that do.
  """
  abstract = isinstance(devices, int)
  devices = jax.devices() if devices is None else devices
  names, sizes = zip(*_shape(cfg, batch_size, experts, devices if abstract else len(devices)))
  types = (AxisType.Auto,) * len(sizes)
  mesh = (
    AbstractMesh(sizes, names, axis_types=types)
    if abstract
    else jax.make_mesh(sizes, names, axis_types=types, devices=devices)
  )
  dense = {"all": names, "expert": names[1:]}[cfg.fsdp_over] if cfg.fsdp else ()
  return Layout(mesh, Rules(batch=names, experts=names[1:], dense=dense))
