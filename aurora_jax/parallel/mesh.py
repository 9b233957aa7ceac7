"""The device mesh, and which axis of which array lies along which mesh axis.

Mesh axes: `data`, and `expert`, which is built of sub-axes, so that layers with different numbers of experts each use
what divides them: an expert axis of 16 for layers of 4, 8 and 16 experts is (expert0, expert1, expert2) = (4, 2, 2),
and a layer of 8 experts lies along (expert0, expert1), repeated along expert2.

The batch lies along all axes, so no device idles outside the layers with experts. Experts lie along their run of
sub-axes, with their optimiser state and average. All other parameters ("dense") are on every device, or with `fsdp` cut
where they are stored, over as many devices as divide them (of all, or of those along `expert`), and gathered where they
are used.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from aurora_jax import config as config_lib
from aurora_jax.errors import UserError
from aurora_jax.ops import moe

DATA = "data"
EXPERT = "expert"

# Arrays of fewer values than this stay whole under fsdp: cutting them saves less than the exchange costs.
SMALL = 4096


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

  def spec(self, *logical):
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


def sub_axes(size, counts):
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


def longest_run(sizes, count):
  """The run of neighbouring sub-axes with the largest product that divides `count`. Returns (first, after the last)."""
  runs = [(first, last) for first in range(len(sizes)) for last in range(first, len(sizes) + 1)]
  return max(
    (run for run in runs if count % math.prod(sizes[slice(*run)]) == 0),
    key=lambda run: (math.prod(sizes[slice(*run)]), -run[0], -run[1]),
  )


def experts_per_layer(cfg: config_lib.Generator):
  """{resolution: experts} of the layers that have more than one, ascending."""
  return {r: cfg.experts[r] for r in sorted(cfg.attention_depth) if cfg.attention_depth[r] and cfg.experts[r] > 1}


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
  for resolution, count in experts.items():
    first, last = longest_run(sizes, count)
    if math.prod(sizes[first:last]) == 1:
      return f"mesh.expert={expert} has no divisor in common with the {count} experts at {resolution} px"
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
  layers = ", ".join(f"{count} at {resolution} px" for resolution, count in experts.items()) or "one per layer"
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

  mesh: Mesh | AbstractMesh
  rules: Rules

  @property
  def devices(self):
    """Number of devices."""
    return self.mesh.size

  def size(self, axes):
    """Devices along some mesh axes."""
    return math.prod(self.mesh.shape[axis] for axis in axes)

  @property
  def replicated(self):
    """The sharding of what every device has whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def batch(self):
    """The sharding of whatever has samples along its first axis."""
    return NamedSharding(self.mesh, self.rules.spec("batch"))

  def expert_axes(self, count):
    """The mesh axes along which a layer of `count` experts lies; () where every device has all of them."""
    axes = self.rules.experts
    first, last = longest_run([self.mesh.shape[axis] for axis in axes], count)
    return tuple(axis for axis in axes[first:last] if self.mesh.shape[axis] > 1)

  def parameter(self, path, shape):
    """Where a parameter, or its entry in an optimiser state or an average, is stored.

    Args:
      path: its key path in the tree.
      shape: its shape.

    Returns:
      NamedSharding.
    """
    if axes := self._axes_of_experts(path, shape):
      return NamedSharding(self.mesh, dataclasses.replace(self.rules, experts=axes).spec("experts"))
    axes = () if math.prod(shape) < SMALL else self._dense_axes(shape)
    if not axes:
      return self.replicated
    axis = shape.index(max(size for size in shape if size % self.size(axes) == 0))
    return NamedSharding(self.mesh, dataclasses.replace(self.rules, dense=axes).spec(*[None] * axis, "dense"))

  def state(self, tree):
    """The sharding of every leaf of a training state, or of any part of one."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: self.parameter(path, leaf.shape), tree)

  def abstract(self, tree):
    """A tree of shapes with the shardings of `state`."""
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, self.state(tree)
    )

  def gather(self, parameters):
    """Parameters as the networks use them: dense ones whole on every device, experts where they are stored.

    The gradient comes back to where the parameter is stored, so that the optimiser works on its piece alone.
    """

    def whole(path, leaf):
      stored = self.parameter(path, leaf.shape)
      if stored.is_fully_replicated or self._axes_of_experts(path, leaf.shape):
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

  def _axes_of_experts(self, path, shape):
    """The mesh axes along which the experts stacked in this parameter lie; () for a dense one."""
    return self.expert_axes(shape[0]) if is_expert(path) else ()

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


def is_expert(path):
  """Whether a key path ends at stacked experts: `.../feed_forward/in_weight` and the like."""
  names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
  return len(names) > 1 and names[-2] == "feed_forward" and names[-1] in moe.ExpertParams._fields


def _shape(experiment: config_lib.Experiment, devices: int):
  """((mesh axis, size), ...) of an experiment on so many devices.

  Raises:
    UserError: what does not divide what.
  """
  cfg, batch_size = experiment.mesh, experiment.train.batch_size
  experts = experts_per_layer(experiment.generator)
  data = cfg.data or max(devices // cfg.expert, 1)
  problem = _problem(data, cfg.expert, devices, batch_size, experts)
  if problem:
    raise UserError(f"{problem} ({_table(devices, batch_size, experts)})")
  sizes = sub_axes(cfg.expert, experts.values())
  names = [EXPERT] if len(sizes) == 1 else [f"{EXPERT}{i}" for i in range(len(sizes))]
  return ((DATA, data), *zip(names, sizes))


def build(experiment: config_lib.Experiment, devices: Any = None) -> Layout:
  """The layout of an experiment.

  Args:
    experiment: the configuration; `mesh`, `train.batch_size` and the numbers of experts are read.
    devices: a list of devices, of a topology that is not there, say; None: all that there are. Or their number: then
      the mesh is abstract, for looking at.

  Returns:
    `Layout`.

  Raises:
    UserError: the mesh does not divide the devices, the batch or the experts; the line says what would.
  """
  abstract = isinstance(devices, int)
  devices = jax.devices() if devices is None else devices
  names, sizes = zip(*_shape(experiment, devices if abstract else len(devices)))
  types = (AxisType.Auto,) * len(sizes)
  mesh = (
    AbstractMesh(sizes, names, axis_types=types)
    if abstract
    else jax.make_mesh(sizes, names, axis_types=types, devices=devices)
  )
  dense = {"all": names, "expert": names[1:]}[experiment.mesh.fsdp_over] if experiment.mesh.fsdp else ()
  return Layout(mesh, Rules(batch=names, experts=names[1:], dense=dense))
