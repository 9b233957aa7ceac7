"""Compiles the training programs of an experiment ahead of time, for hardware that need not be present, and reports on
them.

The programs are those that `train` runs. Data and frozen weights are needed only as shapes.
"""

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.performance import collectives as collectives_lib
from aurora_jax.performance import compiler_log, estimate, flop_count
from aurora_jax.performance import topology as topology_lib
from aurora_jax.systems import base, registry, stages
from aurora_jax.training import step as step_lib


class Compiled(NamedTuple):
  """The facts of one compiled program. The program itself is not kept: that of a pod takes GiB of the host's memory.

  Attributes:
    name: of its phase.
    memory: of `estimate.memory_of`; None if the compiler refused the program as too large.
    collectives: of `collectives.of_program`, or None.
    shardings: of its arguments, or None.
    seconds: of tracing, lowering and compiling.
    flops: of all devices, with balanced experts.
    precision: the same operations by precision (`flop_count.by_precision`).
    worst_flops: of all devices, with the costliest branch of each conditional.
    refusal: the compiler's message about memory, if it refused.
    used: bytes per device in that message, or None.
    warnings: how often the partitioner copied a whole array to every device.
  """

  name: str
  memory: estimate.Memory | None
  collectives: Any
  shardings: Any
  seconds: float
  flops: int
  precision: Mapping[str, int]
  worst_flops: int
  refusal: str
  used: int | None
  warnings: int


def compile_program(step: step_lib.Step, index: int, frozen: Any, platform: str) -> Compiled:
  """Traces, counts, lowers and compiles one program.

  Args:
    step: the programs.
    index: of the program.
    frozen: shapes of the frozen networks.
    platform: "cpu", "cuda" or "tpu".

  Raises:
    UserError: the operations of the program cannot be counted (a library's kernels with loops).
    jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
  """
  started = time.monotonic()
  device = step.system.layout.mesh.devices.flat[0]
  # The default device: libraries of kernels choose theirs by it.
  with compiler_log.captured() as log, jax.default_device(device):
    traced = step.trace(index, frozen)
    try:
      precision = flop_count.by_precision(traced.jaxpr.jaxpr, flop_count.usual_branch, platform)
    except ValueError as error:
      raise UserError(f"program {step.programs[index].name}: its operations cannot be counted: {error}") from None
    worst = flop_count.of_jaxpr(traced.jaxpr.jaxpr, platform=platform)
    executable, refusal, used = None, "", None
    try:
      executable = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      refusal, used = _refusal(error)
    warnings = log().count(compiler_log.REMATERIALIZATION)
  seconds, facts = time.monotonic() - started, (None,) * 3
  if executable:
    mesh = dict(step.system.layout.mesh.shape)
    facts = (
      estimate.memory_of(executable),
      collectives_lib.of_program(executable.as_text(), mesh),
      executable.input_shardings[0],
    )
  return Compiled(
    step.programs[index].name, *facts, seconds, precision.total(), precision, worst, refusal, used, warnings
  )


def _refusal(error):
  """(message, bytes or None) of a compiler error about a device's memory. Any other error is raised again."""
  text = " ".join(str(error).split())
  if "RESOURCE_EXHAUSTED" not in text:
    raise error
  match = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) \w+", text)
  used = round(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else None
  return (match[0] if match else text[:300]), used


def useful_flops(system: base.System, platform: str) -> dict[str, int]:
  """{program: floating-point operations of all devices without recomputation}."""
  return {name: sum(flops.values()) for name, flops in useful_flops_by_precision(system, platform).items()}


def useful_flops_by_precision(system: base.System, platform: str) -> dict[str, Mapping[str, int]]:
  """`useful_flops` of each program by precision, see `flop_count.by_precision`."""
  step = step_lib.build(system.without_recomputation())
  frozen = system.abstract_frozen()
  jaxpr = lambda index: step.trace(index, frozen).jaxpr.jaxpr
  count = lambda index: flop_count.by_precision(jaxpr(index), flop_count.usual_branch, platform)
  return {program.name: count(index) for index, program in enumerate(step.programs)}


def report(
  experiment: Experiment, topology: topology_lib.Topology, progress: Callable[[str], None] = lambda message: None
) -> dict[str, Any]:
  """Compiles all programs of an experiment for a topology.

  Args:
    experiment: the configuration.
    topology: of `topology.load`.
    progress: called with a message before and after each program.

  Returns:
    The report, of plain values: the documented fields (`fits`, `chip`, `devices`, `mesh`, `bytes_per_device`,
    `flops_per_device`, `useful_flops_per_device`, `collectives`, `experts`, `step_seconds_bound`) and some more.
    Numbers per step are means: a lazy phase counts by its share of the steps.

  Raises:
    UserError: the mesh does not divide the devices, the batch or the experts.
  """
  layout = mesh_lib.build(experiment.mesh, experiment.train.batch_size, experiment.expert_counts, topology.devices)
  system = registry.system_class(experiment.system)(experiment, layout)
  platform, devices = topology.name.platform, list(layout.mesh.devices.flat)
  step, frozen = step_lib.build(system), system.abstract_frozen()
  progress("counting useful operations")
  useful, compiled = useful_flops(system, platform), {}
  shares = {program.name: program.runs_per_step for program in step.programs}
  for index, name in enumerate(shares):  # in turn: the programs of a pod take many GiB of the host's memory
    progress(f"compiling {name} for {len(devices)} x {topology.chip.name}")
    compiled[name] = compile_program(step, index, frozen, platform)
    jax.clear_caches()  # the caches would keep the program
    progress(f"  {compiled[name].seconds:.0f} s{': ' + compiled[name].refusal if compiled[name].refusal else ''}")
  arguments = step.abstract_arguments(frozen)
  size = estimate.bytes_per_device
  resident = state_bytes(step.state) | {"frozen": size(arguments[1]), "batch": size(arguments[2])}
  sizes = memory(resident, compiled, size(arguments), topology.chip.memory)
  found = {name: program.collectives for name, program in compiled.items() if program.collectives}
  mean = lambda values: sum(shares[name] * value for name, value in values.items())
  refusals = [program.refusal for program in compiled.values() if program.refusal]
  flops = mean({name: program.flops for name, program in compiled.items()}) / len(devices)
  by_precision = {
    kind: mean({name: program.precision.get(kind, 0) for name, program in compiled.items()}) / len(devices)
    for kind in sorted({kind for program in compiled.values() for kind in program.precision})
  }
  schedule = experiment.schedule
  return {
    "name": experiment.name,
    "stage": stages.description(schedule, schedule.resolutions[-1]) if schedule.resolutions else "",
    "topology": topology.name.text,
    "fits": not refusals and sizes["total"] <= sizes["limit"],
    "chip": topology.chip.name,
    "devices": len(devices),
    "mesh": dict(layout.mesh.shape),
    "batch_size": experiment.train.batch_size,
    "frozen": system.frozen_note,
    "bytes_per_device": sizes,
    "flops_per_device": flops,
    "useful_flops_per_device": mean(useful) / len(devices),
    "flops_per_device_by_precision": by_precision,
    "precision_policy": estimate.precision_policy(topology.chip, by_precision, system.compute_dtype),
    "worst_routing_flops_per_device": mean({n: program.worst_flops for n, program in compiled.items()}) / len(devices),
    "collectives": [row for name in found for row in estimate.summed(found[name][0], name)],
    "loops_of_unknown_length": sum(unknown for _, unknown in found.values()),
    "experts": _experts(step, compiled, devices),
    "step_seconds_bound": estimate.step_seconds(
      topology.chip,
      by_precision,
      mean(_traffic(compiled, size(arguments))),
      _link_seconds(found, topology, devices, mean),
    ),
    "compiler_message": "; ".join(refusals),
    "whole_array_copies": sum(program.warnings for program in compiled.values()),
    "programs": {
      name: {
        "compile_seconds": round(program.seconds, 1),
        "share_of_steps": shares[name],
        "flops_per_device": program.flops / len(devices),
        "useful_flops_per_device": useful[name] / len(devices),
      }
      | ({"bytes_per_device": program.memory._asdict()} if program.memory else {})
      for name, program in compiled.items()
    },
    "jax": jax.__version__,
  }


def _experts(step, compiled, devices):
  """The devices of each expert, by the shardings of the first program's parameters."""
  state = step.state
  first = next(iter(compiled.values()))
  if first.shardings:
    state = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, first.shardings[0]
    )
  return [
    entry
    for name, network in step.system.networks.items()
    for entry in estimate.experts(state.networks[name].params, network.label, devices)
  ]


def state_bytes(state: base.TrainState) -> dict[str, int]:
  """Bytes per device of a training state (shapes with shardings), by part."""
  size, networks = estimate.bytes_per_device, state.networks.values()
  return {
    "parameters": size([network.params for network in networks]),
    "optimizer": size([network.opt_state for network in networks]),
    "ema": size([network.ema for network in networks if network.ema is not None]),
    "buffers": size((state.step, [network.variables for network in networks])),
  }


def memory(resident: dict[str, int], compiled: dict[str, Compiled], exact: int, limit: int) -> dict[str, int]:
  """The report's `bytes_per_device`: the bytes between steps, and what the program that needs most adds to them.

  If the compiler refused a program, `temporaries` is what remains of the compiler's own total.

  Args:
    resident: {part: bytes} between steps.
    compiled: {name: `Compiled`}.
    exact: bytes of the programs' arguments, by their shardings.
    limit: memory of a device.
  """
  taken = [program.memory for program in compiled.values() if program.memory]
  sizes = dict(resident) | {"code": sum(item.code for item in taken)}
  adds = [{"padding": 0, "outputs": 0, "temporaries": 0}]
  adds += [
    {"padding": max(0, item.arguments - exact), "outputs": item.outputs, "temporaries": item.temporaries}
    for item in taken
  ]
  sizes |= max(adds, key=lambda parts: sum(parts.values()))
  refused = [program for program in compiled.values() if program.refusal]
  if refused:
    total = max(program.used or 0 for program in refused)
    others = sum(size for name, size in sizes.items() if name != "temporaries")
    sizes["temporaries"] = max(total - others, sizes["temporaries"])
  return sizes | {"total": sum(sizes.values()), "limit": limit}


def _traffic(compiled, exact):
  """{program: bytes to and from a device's memory, at least}."""
  traffic = dict.fromkeys(compiled, exact)
  for name, program in compiled.items():
    item = program.memory
    if item:
      # Updated values are written over the old ones.
      traffic[name] = item.arguments + item.aliased + item.outputs + 2 * item.temporaries
  return traffic


def _link_seconds(found, topology, devices, mean):
  node_of = estimate.nodes(devices, topology.per_node)
  seconds = {}
  for name, (collectives, _) in found.items():
    each = [
      (estimate.link_seconds(item, topology.chip, node_of), times)
      for item, times in collectives.items()
      if not item.fallback
    ]
    if any(item is None for item, _ in each):
      return None
    seconds[name] = sum(item * times for item, times in each)
  return mean(seconds)
