"""What to change in an experiment that does not fit on a machine's devices, and what each change saves."""

import dataclasses

import jax

from aurora_jax import config as config_lib
from aurora_jax.errors import UserError
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.performance import compile_report as compile_lib
from aurora_jax.performance import topology as topology_lib
from aurora_jax.training import step as step_lib


def lines(experiment: config_lib.Experiment, topology: topology_lib.Topology, report):
  """Advice, the surest and largest saving first. What concerns the state is exact; the rest says what it is a part of.

  Args:
    experiment: the configuration.
    topology: the machine.
    report: of `compile.report`.

  Returns:
    list of lines; a single one if all is well.
  """
  sizes = report["bytes_per_device"]
  over = sizes["total"] - sizes["limit"]
  if report["fits"]:
    return [f"It fits with {_gib(-over)} GiB per device to spare.", *_when_it_fits(experiment, report)]
  first = f"It is {_gib(over)} GiB per device too large." if over > 0 else "The compiler found no place for it."
  saved = sorted(_state_savings(experiment, topology), key=lambda item: -item[0])
  advice = [f"{change} saves {_gib(saving)} GiB of parameters, optimizer and ema (exact)" for saving, change in saved]
  return [
    first,
    *(advice + _temporaries(experiment, report) or ["A larger machine: no config field is left to change."]),
  ]


def _gib(size):
  return f"{size / 2**30:,.{2 if abs(size) >= 2**30 / 10 else 4}f}"


def _when_it_fits(experiment, report):
  recomputed = report["flops_per_device"] / max(report["useful_flops_per_device"], 1) - 1
  if recomputed <= 0.15:
    return []
  names = [f"{name}.remat=False" for name in ("generator", "discriminator") if getattr(experiment, name).remat]
  if not names:
    return []
  return [f"{recomputed:.0%} of the useful operations are done twice: {' or '.join(names)} is faster if it fits"]


def _state_savings(experiment, topology):
  """(bytes per device, the change) of everything that stores less of the state on a device; on abstract meshes."""
  devices = len(topology.devices)
  abstract = jax.eval_shape(step_lib.build(experiment, None).init, jax.random.key(0))

  def state(mesh):
    layout = mesh_lib.build(dataclasses.replace(experiment, mesh=mesh), devices)
    return sum(compile_lib.state_bytes(layout.abstract(abstract)).values())

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


def _temporaries(experiment, report):
  """What makes the temporaries smaller; how much only the compiler can tell."""
  rest, advice = report["bytes_per_device"]["temporaries"], []
  of_them = f"of the {_gib(rest)} GiB of temporaries"
  for name in ("generator", "discriminator"):
    cfg = getattr(experiment, name)
    if not cfg.remat:
      advice.append(
        f"{name}.remat=True keeps a block's input instead of all within it: most of its part {of_them}, for a "
        "second forward pass"
      )
  for name in ("generator", "discriminator"):
    cfg = getattr(experiment, name)
    if cfg.compute_dtype == "float32":
      advice.append(f"{name}.compute_dtype=bfloat16 halves its activations: up to {_gib(rest / 2)} GiB {of_them}")
  advice += _attention(experiment, report["devices"])
  size, devices = experiment.train.batch_size, report["devices"]
  if size // 2 >= devices and size // 2 % devices == 0:
    advice.append(f"train.batch_size={size // 2} halves the images of a device: about {_gib(rest / 2)} GiB {of_them}")
  return advice


def _attention(experiment, devices):
  """The logits of a layer whose attention is not cut into chunks."""
  cfg, images = experiment.generator, experiment.train.batch_size // devices
  longest = max((r for r in cfg.attention_depth if cfg.attention_depth[r]), default=0)
  tokens = longest * longest
  chunk = min(cfg.attention_chunk, tokens)
  smaller = chunk // 4
  if smaller < 64:
    return []
  logits = lambda queries: images * cfg.heads * queries * tokens * 4
  return [
    f"generator.attention_chunk={smaller} saves {_gib(logits(chunk) - logits(smaller))} GiB for each live array of "
    f"attention logits at {longest} px ({images} images x {cfg.heads} heads x {chunk} of {tokens} queries x {tokens})"
  ]
