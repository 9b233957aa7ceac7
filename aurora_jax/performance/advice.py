"""Advice for an experiment that does not fit on a topology: which config fields to change, and what each change
saves.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.performance import compile_report
from aurora_jax.performance import topology as topology_lib
from aurora_jax.systems import registry
from aurora_jax.training import step as step_lib


def lines(experiment: Experiment, topology: topology_lib.Topology, report: Mapping[str, Any]) -> list[str]:
  """Lines of advice, the surest and largest savings first. Savings of state are exact, savings of temporaries are not.

  Args:
    experiment: the configuration.
    topology: the machine.
    report: of `compile_report.report`.
  """
  sizes = report["bytes_per_device"]
  over = sizes["total"] - sizes["limit"]
  if report["fits"]:
    return [f"It fits with {_gib(-over)} GiB per device to spare.", *_when_it_fits(experiment, report)]
  first = f"It is {_gib(over)} GiB per device too large." if over > 0 else "The compiler found no place for it."
  saved = sorted(_state_savings(experiment, topology), key=lambda item: -item[0])
  advice = [f"{change} saves {_gib(saving)} GiB of parameters, optimizer and ema (exact)" for saving, change in saved]
  system = registry.system_class(experiment.system)(experiment, _abstract_layout(experiment, experiment.mesh, topology))
  advice += system.memory_advice(sizes["temporaries"])
  size, devices = experiment.train.batch_size, report["devices"]
  if size // 2 >= devices and size // 2 % devices == 0:
    halved = f"about {_gib(sizes['temporaries'] / 2)} GiB of the {_gib(sizes['temporaries'])} GiB of temporaries"
    advice.append(f"train.batch_size={size // 2} halves the images of a device: {halved}")
  return [first, *(advice or ["A larger machine: no config field is left to change."])]


def _abstract_layout(experiment, mesh, topology):
  return mesh_lib.build(mesh, experiment.train.batch_size, experiment.expert_counts, len(topology.devices))


def _gib(size):
  return f"{size / 2**30:,.{2 if abs(size) >= 2**30 / 10 else 4}f}"


def _when_it_fits(experiment, report):
  recomputed = report["flops_per_device"] / max(report["useful_flops_per_device"], 1) - 1
  if recomputed <= 0.15:
    return []
  names = [
    f"{name}.remat=False"
    for name in ("generator", "discriminator")
    if getattr(getattr(experiment, name, None), "remat", False)
  ]
  if not names:
    return []
  return [f"{recomputed:.0%} of the useful operations are done twice: {' or '.join(names)} is faster if it fits"]


def _state_savings(experiment, topology):
  """(bytes per device, change) of every change of the mesh that stores less state per device, by abstract meshes."""
  devices = len(topology.devices)

  def state(mesh):
    layout = _abstract_layout(experiment, mesh, topology)
    system = registry.system_class(experiment.system)(experiment, layout)
    return sum(compile_report.state_bytes(step_lib.abstract_state(system)).values())

  now, mesh = state(experiment.mesh), experiment.mesh
  candidates = {}
  if not mesh.fsdp:
    candidates["mesh.fsdp=True"] = dataclasses.replace(mesh, fsdp=True)
  elif mesh.fsdp_over != "all":
    candidates["mesh.fsdp_over=all"] = dataclasses.replace(mesh, fsdp_over="all")
  for expert in range(2, devices + 1):
    if devices % expert == 0 and expert != mesh.expert:
      candidates[f"mesh.expert={expert} mesh.data={devices // expert}"] = dataclasses.replace(
        mesh, expert=expert, data=devices // expert
      )
  for change, other in candidates.items():
    try:
      saving = now - state(other)
    except UserError:  # does not divide
      continue
    if saving > 0:
      yield saving, change
