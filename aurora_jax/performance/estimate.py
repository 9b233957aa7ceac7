"""Estimates of a compiled program: memory, bounds on time, and the devices of each expert.

Sizes of the state come from its shardings and are exact. Temporaries are the compiler's figure. Its cost model is not
used: it counts the body of a loop once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.performance import collectives as collectives_lib
from aurora_jax.performance import flop_count
from aurora_jax.performance import topology as topology_lib


class Memory(NamedTuple):
  """Memory of one run of a program on a device, in bytes, by the compiler.

  Attributes:
    arguments: arguments, in the layouts that the compiler chose.
    outputs: results that are not written over an argument.
    temporaries: the largest total of the values that are alive at one time.
    code: the program.
    aliased: results that are written over an argument.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int
  aliased: int = 0


def memory_of(compiled: jax.stages.Compiled) -> Memory:
  """`Memory` of a compiled program."""
  stats = compiled.memory_analysis()
  return Memory(
    stats.argument_size_in_bytes,
    stats.output_size_in_bytes - stats.alias_size_in_bytes,
    stats.temp_size_in_bytes,
    stats.generated_code_size_in_bytes,
    stats.alias_size_in_bytes,
  )


def bytes_per_device(tree: Any) -> int:
  """Bytes of a pytree's leaves (arrays or shapes, with shardings) on one device. All devices have the same number."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def experts(parameters: Any, label: mesh_lib.Label, devices: Sequence[Any]) -> list[dict[str, Any]]:
  """The devices that store each expert.

  Args:
    parameters: of a network, leaves with shardings. Of each module's stacked experts the first array is used.
    label: of its parameters.
    devices: of the mesh, in its order.

  Returns:
    [{"layer", "expert", "device"}]; `device` lists the positions in the mesh of all devices that have the expert.
  """
  places, entries, seen = {device: place for place, device in enumerate(devices)}, [], set()
  for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]:
    layer = "/".join(mesh_lib.names_of(path)[:-1])
    if not label(path).experts or layer in seen:
      continue
    seen.add(layer)
    homes = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
      for expert in range(*index[0].indices(leaf.shape[0])):
        homes.setdefault(expert, []).append(places[device])
    entries += [{"layer": layer, "expert": expert, "device": sorted(homes[expert])} for expert in sorted(homes)]
  return entries


def link_seconds(item: collectives_lib.Collective, chip: topology_lib.Chip, node_of: list[int]) -> float | None:
  """A lower bound on the seconds of a collective, by the chip's links.

  Data that a node lacks crosses the network once, through the ports of all members of the group on that node. The rest
  moves within the node, at the same time.

  Args:
    item: the collective.
    chip: rates.
    node_of: node of each position in the mesh.

  Returns:
    Seconds, or None where the chip's rates are unknown.
  """
  if chip.link_rate is None:
    return None
  within = item.received / chip.link_rate
  if item.kind == "collective-permute":
    crosses = any(node_of[source] != node_of[target] for source, target in item.groups)
    return item.size / chip.network_rate if crosses else within
  group = max(item.groups, key=len)
  nodes = {node_of[place] for place in group}
  if len(nodes) == 1:
    return within
  members = len(group) // len(nodes)
  if item.kind == "all-to-all":
    across = item.size * (len(group) - members) / len(group)
  else:
    across = item.size * (len(nodes) - 1) / len(nodes) / members * (2 if item.kind == "all-reduce" else 1)
  return max(within, across / chip.network_rate)


ASSUMPTIONS = (
  "arithmetic: products and convolutions at the chip's peak for their precision, nothing else takes time",
  "memory: arguments are read once, results written once, temporaries written and read once, at the data sheet's rate",
  "interconnect: every collective by the best algorithm over all of a chip's links at once, one after the other",
  "the three may overlap: the largest is the bound",
)


def step_seconds(
  chip: topology_lib.Chip, flops: Mapping[str, float], traffic: float, link: float | None
) -> dict[str, Any]:
  """The report's `step_seconds_bound`.

  Args:
    chip: rates.
    flops: per device and step, by precision (`flop_count.by_precision`).
    traffic: bytes to and from memory per device and step.
    link: seconds of all collectives of a step.

  Returns:
    {"arithmetic", "memory", "interconnect", "bound", "assumptions"}; None where a rate is unknown.
  """
  seconds = [count / peak if (peak := chip.peak(precision)) else None for precision, count in flops.items()]
  parts = {
    "arithmetic": None if None in seconds else sum(seconds),
    "memory": traffic / chip.memory_rate if chip.memory_rate else None,
    "interconnect": link,
  }
  known = [seconds for seconds in parts.values() if seconds is not None]
  return parts | {"bound": max(known, default=None), "assumptions": list(ASSUMPTIONS)}


def precision_policy(chip: topology_lib.Chip, flops: Mapping[str, float], compute_dtype: str) -> dict[str, Any]:
  """What the products at the highest precision add to the bound by arithmetic.

  Which products these are is a decision of the networks: distances of attention, router logits, losses, statistics.

  Args:
    chip: rates.
    flops: per device and step, by precision (`flop_count.by_precision`).
    compute_dtype: of most products.

  Returns:
    {"compute_dtype", "seconds": {precision: by arithmetic}, "highest_share": of the operations, "highest_seconds":
    what they take, "highest_seconds_at_default": what they would take at the device's default precision}. Seconds are
    None where a rate is unknown.
  """
  at = lambda count, rate: count / rate if rate else None
  highest, total = flops.get(flop_count.HIGHEST, 0), sum(flops.values())
  return {
    "compute_dtype": compute_dtype,
    "seconds": {precision: at(count, chip.peak(precision)) for precision, count in flops.items()},
    "highest_share": highest / total if total else 0.0,
    "highest_seconds": at(highest, chip.highest),
    "highest_seconds_at_default": at(highest, chip.float32),
  }


def summed(found: Mapping[collectives_lib.Collective, int], program: str) -> list[dict[str, Any]]:
  """The report's `collectives` of one program: by kind and axes, the most bytes first."""
  rows = {}
  for item, times in found.items():
    row = rows.setdefault((item.kind, item.axes, item.fallback), [0, 0])
    row[0] += times
    row[1] += times * item.received
  return [
    {"program": program, "kind": kind, "axes": list(axes), "count": count, "bytes": size, "fallback": fallback}
    for (kind, axes, fallback), (count, size) in sorted(rows.items(), key=lambda entry: -entry[1][1])
  ]


def nodes(devices: Sequence[Any], per_node: int) -> list[int]:
  """Node of each device, in the order of the mesh. Devices of several nodes are numbered node by node."""
  if per_node >= len(devices):
    return [0] * len(devices)
  return [device.id // per_node for device in np.asarray(devices).flat]


def lines(report: Mapping[str, Any]) -> Iterator[str]:
  """The lines of a report, for a terminal."""
  sizes, total = report["bytes_per_device"], report["bytes_per_device"]["total"]
  axes = " x ".join(f"{name} {size}" for name, size in report["mesh"].items())
  yield f"{report['name']} on {report['topology']}: {report['devices']} x {report['chip']}, mesh {axes}"
  if report["frozen"]:
    yield report["frozen"]
  if report["stage"]:
    yield f"the last and largest of the stages of progressive growing, {report['stage']}"
  yield ""
  unit, scale = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
  yield f"per device                 {unit}"
  for name, size in sizes.items():
    if name != "limit":
      yield f"  {name:20s} {size / scale:8.3f}"
  verdict = "fits" if report["fits"] else "DOES NOT FIT"
  yield f"{verdict}: {total / scale:,.2f} of {sizes['limit'] / scale:,.2f} {unit} per device"
  if report["compiler_message"]:
    yield f"the compiler: {report['compiler_message']}"
  yield ""
  every, useful = report["flops_per_device"], report["useful_flops_per_device"]
  yield (
    f"arithmetic: {every / 1e9:,.4g} GFLOP per device and step, of which {(every - useful) / 1e9:,.4g} "
    f"({(every - useful) / max(useful, 1):.1%} of the useful ones) recomputed"
  )
  shares = ", ".join(f"{kind} {count / every:.1%}" for kind, count in report["flops_per_device_by_precision"].items())
  yield f"precision of products: {shares}"
  yield from _policy_lines(report["precision_policy"])
  yield from _program_lines(report["programs"])
  bound = report["step_seconds_bound"]
  shown = lambda seconds: "unknown" if seconds is None else f"{seconds * 1e3:,.4g} ms"
  yield (
    f"a step takes at least {shown(bound['bound'])} (arithmetic {shown(bound['arithmetic'])}, memory "
    f"{shown(bound['memory'])}, interconnect {shown(bound['interconnect'])}), if:"
  )
  for assumption in bound["assumptions"]:
    yield f"  {assumption}"
  yield ""
  yield "collectives          program       along                         count   received per device"
  for row in report["collectives"]:
    mark = "  (fall-back, if the buffers of the exchange are too small)" if row["fallback"] else ""
    yield (
      f"  {row['kind']:18s} {row['program']:13s} {' x '.join(row['axes']) or '-':26s} {row['count']:8,d} "
      f"{row['bytes'] / 1e6:16,.3f} MB{mark}"
    )
  if not report["collectives"]:
    yield "  none" if not report["compiler_message"] else "  unknown: there is no program"
  if report["experts"]:
    yield ""
    yield "experts"
    yield from _expert_lines(report["experts"], report["devices"])


def _policy_lines(policy):
  highest, default = policy["highest_seconds"], policy["highest_seconds_at_default"]
  cost = "" if highest is None or default is None else f": {highest * 1e3:,.4g} ms, {default * 1e3:,.4g} by default"
  yield (
    f"precision policy: networks in {policy['compute_dtype']}; {policy['highest_share']:.1%} of the operations "
    f"(distances of attention, routers, losses, statistics) in float32 at the highest precision{cost}"
  )


def _program_lines(programs):
  yield "programs             of the steps  compiled in   GFLOP  recomputed  arguments  temporaries    results (MiB)"
  for name, program in programs.items():
    every, useful = program["flops_per_device"], program["useful_flops_per_device"]
    sizes = program.get("bytes_per_device")
    columns = [sizes[part] for part in ("arguments", "temporaries", "outputs")] if sizes else []
    yield (
      f"  {name:18s} {program['share_of_steps']:12.1%} {program['compile_seconds']:10,.0f} s {every / 1e9:9,.4g} "
      f"{(every - useful) / max(useful, 1):10.1%} " + "  ".join(f"{size / 2**20:10,.1f}" for size in columns)
    )


def _expert_lines(entries, devices):
  layers = {}
  for entry in entries:
    layers.setdefault(entry["layer"], []).append(entry["device"])
  alike = {}
  for layer, homes in layers.items():
    alike.setdefault(repr(homes), []).append(layer)
  for names in alike.values():
    homes = layers[names[0]]
    each = sum(map(len, homes)) // devices
    yield f"  {len(homes)} experts, {each} per device: {', '.join(names)}"
    for expert, places in enumerate(homes):
      shown = ", ".join(map(str, places[:8])) + (f", ... ({len(places)} devices)" if len(places) > 8 else "")
      yield f"    expert {expert:2d} on {shown}"
