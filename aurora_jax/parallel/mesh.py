"""The device mesh, and which axis of which array lies along which mesh axis.

Mesh axes: `data`, and `expert`, which is built of sub-axes, so that layers with different numbers of experts each use
what divides them: an expert axis of 16 for layers of 4, 8 and 16 experts is (expert0, expert1, expert2) = (4, 2, 2),
and a layer of 8 experts lies along (expert0, expert1), repeated along expert2.

The batch lies along all axes, so no device idles outside the layers with experts. Experts lie along their run of
sub-axes, with their optimizer state and EMA. All other parameters ("dense") are on every device, or with `fsdp` sharded
where they are stored, over as many devices as divide them (of all, or of those along `expert`), and gathered where they
are used. Which parameters are stacked experts is said by their labels.
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

# Under fsdp, arrays of fewer values than this stay whole: sharding them saves less than the exchange costs.
SMALL = 4096

KeyPath = tuple[Any, ...]


class ParamLabel(NamedTuple):
  """What the generic code needs to know of a parameter. Systems say it; nothing else parses names.

  Attributes:
    stage: the smallest resolution of progressive growing, in pixels, at which the parameter is used; 0: always.
    decay: whether the optimizer's decoupled weight decay acts on it.
    experts: whether its leading axis is a stack of experts, which may lie along the mesh's expert axis.
    matrix: whether it is a weight: a matrix from inputs to outputs, or a stack of such, which Muon may orthogonalise.
    bias: whether it is a bias, which may have a learning rate of its own.
    module: the module that a person would look for.
    group: its group in the logs, the same for like modules.
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
  """The path of a parameter from that of its entry in an optimizer state: the dictionary keys at the end."""
  first = len(path)
  while first and isinstance(path[first - 1], jax.tree_util.DictKey):
    first -= 1
  return path[first:]


def names_of(path: KeyPath) -> tuple[str, ...]:
  """The names along a key path, whatever the kinds of its keys."""
  return tuple(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


@dataclasses.dataclass(frozen=True)
class Rules:
  """Mesh axes by logical axis name.

  Attributes:
    batch: samples, and the tokens of samples in their order.
    experts: the leading axis of stacked experts.
    dense: of an array without experts, the axis that most of these devices divide; () leaves such arrays whole.
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
  """Cuts an expert axis into sub-axes, so that as much of it as can divides each count. (16, {4, 8, 16}) -> (4, 2, 2).

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
  """The run of neighbouring sub-axes with the largest product that divides `count`. Returns (first, after the last)."""
  runs = [(first, last) for first in range(len(sizes)) for last in range(first, len(sizes) + 1)]
  return max(
    (run for run in runs if count % math.prod(sizes[slice(*run)]) == 0),
    key=lambda run: (math.prod(sizes[slice(*run)]), -run[0], -run[1]),
  )


def _problem(data, expert, devices, batch_size, experts):
  """What is wrong with a mesh, in words, or None."""
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
  """What divides what, in one line."""
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
  """A mesh and what lies where on it.

  Attributes:
    mesh: axes `data` and the sub-axes of `expert`; an AbstractMesh where nothing is to be placed.
    rules: Rules.
  """

  mesh: DeviceMesh | AbstractMesh
  rules: Rules

  @property
  def devices(self) -> int:
    """Number of devices."""
    return self.mesh.size

  def size(self, axes: Iterable[str]) -> int:
    """Devices along some mesh axes."""
    return math.prod(self.mesh.shape[axis] for axis in axes)

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of what every device has whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch(self) -> NamedSharding:
    """The sharding of whatever has samples along its first axis."""
    return NamedSharding(self.mesh, self.rules.spec("batch"))

  def expert_axes(self, count: int) -> tuple[str, ...]:
    """The mesh axes along which a layer of `count` experts lies; () where every device has all of them."""
    axes = self.rules.experts
    first, last = longest_run([self.mesh.shape[axis] for axis in axes], count)
    return tuple(axis for axis in axes[first:last] if self.mesh.shape[axis] > 1)

  def parameter(self, label: ParamLabel, shape: Sequence[int]) -> NamedSharding:
    """Where a parameter, or its entry in an optimizer state or an average, is stored."""
    if label.experts and (axes := self.expert_axes(shape[0])):
      return NamedSharding(self.mesh, dataclasses.replace(self.rules, experts=axes).spec("experts"))
    axes = () if math.prod(shape) < SMALL else self._dense_axes(shape)
    if not axes:
      return self.replicated
    axis = shape.index(max(size for size in shape if size % self.size(axes) == 0))
    return NamedSharding(self.mesh, dataclasses.replace(self.rules, dense=axes).spec(*[None] * axis, "dense"))

  def shardings(self, tree: Any, label: Label) -> Any:
    """The sharding of every leaf of a network's parameters, average or optimizer state."""

    def one(path, leaf):
      name = parameter_path(path)
      # What an optimizer keeps beside the parameters (a count) belongs to none of them.
      return self.parameter(label(name), leaf.shape) if name and leaf.shape else self.replicated

    return jax.tree_util.tree_map_with_path(one, tree)

  def gather(self, parameters: Any, label: Label) -> Any:
    """Parameters as a network uses them: dense ones whole on every device, experts where they are stored.

    Gradients come back sharded as the parameters are stored, so the optimizer updates each device's shard alone.
    """

    def whole(path, leaf):
      stored = self.parameter(label(path), leaf.shape)
      if stored.is_fully_replicated or (label(path).experts and self.expert_axes(leaf.shape[0])):
        return leaf
      return _gathered(leaf, self._stages(stored), self.replicated)

    return jax.tree_util.tree_map_with_path(whole, parameters)

  def _stages(self, stored):
    """The shardings that the gradient of a gathered parameter passes through, up to that of the parameter.

    A TPU's compiler makes a reduce-scatter of a sum over some of the devices that is then cut, but an all-reduce of one
    over all of them (seen for 16, benchmarks/README.md). So where the cut is over all, it is along the first axis before
    it is along the others: two sums, over a part of the devices each, whose pieces together are no more than one's.
    """
    axis = next(i for i, axes in enumerate(stored.spec) if axes)
    axes = [name for name in jax.tree.leaves(stored.spec[axis]) if self.mesh.shape[name] > 1]
    if self.size(axes) < self.devices or len(axes) == 1:
      return (stored,)
    return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, axes[0])), stored

  def _dense_axes(self, shape):
    """The mesh axes along which an array without experts is cut: the most, `data` first, that divide one of its axes."""
    axes = self.rules.dense
    fitting = [
      axes[:last]
      for last in range(1, len(axes) + 1)
      if self.size(axes[:last]) > 1 and any(size % self.size(axes[:last]) == 0 for size in shape)
    ]
    return fitting[-1] if fitting else ()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x, stages, used):
  del stages
  return jax.lax.with_sharding_constraint(x, used)


def _gathered_forward(x, stages, used):
  return _gathered(x, stages, used), None


def _gathered_backward(stages, used, _, cotangent):
  del used
  for sharding in stages:
    cotangent = jax.lax.with_sharding_constraint(cotangent, sharding)
  return (cotangent,)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _shape(mesh, batch_size, experts, devices):
  """((mesh axis, size), ...) on so many devices; UserError says what does not divide what."""
  data = mesh.data or max(devices // mesh.expert, 1)
  problem = _problem(data, mesh.expert, devices, batch_size, experts)
  if problem:
    raise UserError(f"{problem} ({_table(devices, batch_size, experts)})")
  sizes = sub_axes(mesh.expert, experts.values())
  names = [EXPERT] if len(sizes) == 1 else [f"{EXPERT}{i}" for i in range(len(sizes))]
  return ((DATA, data), *zip(names, sizes))


def single_device() -> Layout:
  """The layout on the default device, for what runs without a mesh."""
  mesh = jax.make_mesh((1, 1), (DATA, EXPERT), axis_types=(AxisType.Auto,) * 2, devices=jax.local_devices()[:1])
  return Layout(mesh, Rules(batch=(DATA, EXPERT), experts=(EXPERT,)))


def build(cfg: Mesh, batch_size: int, experts: Mapping[str, int], devices: Any = None) -> Layout:
  """The layout of an experiment.

  Args:
    cfg: the configuration of the mesh.
    batch_size: images per step.
    experts: {place, in words: number of experts} of the layers that have several.
    devices: a list of devices, such as those of a topology that is not there; None: all that there are. Or their number:
      then the mesh is abstract, for looking at.

  Raises:
    UserError: the mesh does not divide the devices, the batch or the experts; the line says what would.
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
