"""Compiles an experiment's training programs for a machine that need not be there, and reports what they take.

The programs are those of `placed.place`, which `train` runs; data and CLIP are needed only as shapes.
"""

import dataclasses
import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aurora_jax import config as config_lib
from aurora_jax.interop import clip_hf
from aurora_jax.models import clip as clip_lib
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.performance import collectives as collectives_lib
from aurora_jax.performance import compiler_log, flop_count
from aurora_jax.performance import estimate as compile_lib
from aurora_jax.performance import topology as topology_lib
from aurora_jax.training import ahead, schedule
from aurora_jax.training import clip as clip_training
from aurora_jax.training import placed as placed_lib
from aurora_jax.training import step as step_lib

_UNCHUNKED = 1 << 30


class Compiled(NamedTuple):
  """One program.

  Attributes:
    name: one of `ahead.programs`.
    memory: `compile.memory_of` it, or None where the compiler refused (too large), or refused `generate`, which this
      program waits for.
    collectives: `collectives.of_program`, or None.
    shardings: of its arguments, or None. The program itself is not kept: a pod's takes GiB of the host.
    generated: what `ahead.generated` gives for it, or None for other programs than `ahead.GENERATE`.
    seconds: that tracing, lowering and compiling took.
    flops: of all devices, experts in balance.
    worst_flops: the same with the costliest way of each branch.
    refusal: the compiler's sum, where it refused.
    used: bytes of a device that it needs by that sum, or None.
    warnings: how often the partitioner had to copy a whole array to every device.
  """

  name: str
  memory: Any
  collectives: Any
  shardings: Any
  generated: Any
  seconds: float
  flops: int
  worst_flops: int
  refusal: str
  used: int | None
  warnings: int


def clip_config(experiment: config_lib.Experiment):
  """The sizes of an experiment's CLIP, from its folder's config.json, or guessed by its width where there is none.

  Returns:
    (ClipConfig, where that is from, in words).
  """
  folder, width = experiment.text.clip, experiment.generator.text_feature_dim
  if folder and pathlib.Path(folder).is_dir():
    return clip_hf.read_config(pathlib.Path(folder)), f"of {folder}"
  missing = f"nothing at text.clip={folder}" if folder else "text.clip is not set"
  known = {768: ("ViT-L/14", clip_lib.vit_l14), 512: ("ViT-B/32", clip_lib.vit_b32)}
  if width in known:
    name, sizes = known[width]
    return sizes(), f"taken to be {name}, whose text features are {width} wide ({missing})"
  usual = clip_training.ClipTraining()
  heads = usual.heads if width % usual.heads == 0 else 1
  text = clip_lib.TextConfig(
    width=width,
    layers=usual.text_layers,
    heads=heads,
    mlp_width=usual.mlp_ratio * width,
    vocabulary_size=usual.vocabulary_size,
    context_length=usual.context_length or 77,
  )
  image = clip_lib.ImageConfig(
    width=usual.image_width,
    layers=usual.image_layers,
    heads=usual.heads,
    mlp_width=usual.mlp_ratio * usual.image_width,
    size=usual.resolution,
    patch=usual.patch,
  )
  return (
    clip_lib.ClipConfig(text=text, image=image, embedding_width=usual.embedding_width),
    f"taken to be one of train-clip with text features {width} wide ({missing})",
  )


def abstract_frozen(experiment: config_lib.Experiment, clip: clip_lib.ClipConfig, layout: mesh_lib.Layout):
  """`step.Frozen` as shapes, the bank of captions full."""
  bank = experiment.loss.clip_bank
  frozen = step_lib.Frozen(
    clip_lib.abstract_variables(clip),
    jax.ShapeDtypeStruct((bank, clip.embedding_width), jnp.float32),
    jax.ShapeDtypeStruct((bank,), jnp.int32),
  )
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated), frozen)


def compile_program(placed: placed_lib.Placed, name: str, frozen, batch, platform: str, before=None) -> Compiled:
  """Traces, counts, lowers and compiles one program.

  Args:
    placed: the programs.
    name: one of `ahead.programs`.
    frozen, batch: shapes with shardings.
    platform: "cpu", "cuda" or "tpu".
    before: what this gave for `ahead.GENERATE`, needed for `ahead.LEARN`.
  """
  started = time.monotonic()
  made = before and before.generated
  with compiler_log.captured() as log:
    traced = ahead.trace(placed, name, frozen, batch, made if name == ahead.LEARN else None)
    flops = flop_count.of_jaxpr(traced.jaxpr.jaxpr, flop_count.usual_branch, platform)
    worst = flop_count.of_jaxpr(traced.jaxpr.jaxpr, platform=platform)
    executable, refusal, used = None, "", None
    if made or name != ahead.LEARN:
      try:
        executable = traced.lower().compile()
      except jax.errors.JaxRuntimeError as error:
        refusal, used = _refusal(error)
    warnings = log().count(compiler_log.REMATERIALIZATION)
  seconds, facts = time.monotonic() - started, (None,) * 4
  if executable:
    facts = (
      compile_lib.memory_of(executable),
      collectives_lib.of_program(executable.as_text(), dict(placed.layout.mesh.shape)),
      executable.input_shardings[0],
      ahead.generated(placed, frozen, batch, executable) if name == ahead.GENERATE else None,
    )
  return Compiled(name, *facts, seconds, flops, worst, refusal, used, warnings)


def _refusal(error):
  """The line with the sum of a compiler that ran out of a device's memory. Any other error is not ours to explain."""
  text = " ".join(str(error).split())
  if "RESOURCE_EXHAUSTED" not in text:
    raise error
  match = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) \w+", text)
  used = round(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else None
  return (match[0] if match else text[:300]), used


def useful_flops(experiment: config_lib.Experiment, clip: clip_lib.ClipConfig, layout: mesh_lib.Layout, platform: str):
  """{program: operations of all devices if nothing were computed twice}."""
  replace = dataclasses.replace
  plain = replace(
    experiment,
    generator=replace(experiment.generator, remat=False, attention_chunk=_UNCHUNKED),
    discriminator=replace(experiment.discriminator, remat=False, attention_chunk=_UNCHUNKED),
  )
  placed = placed_lib.place(plain, clip_lib.Clip(clip), layout)
  shapes = abstract_frozen(plain, clip, layout), ahead.abstract_batch(plain, clip, layout)
  jaxpr = lambda name: ahead.trace(placed, name, *shapes).jaxpr.jaxpr
  return {name: flop_count.of_jaxpr(jaxpr(name), flop_count.usual_branch, platform) for name in ahead.programs(plain)}


def report(
  experiment: config_lib.Experiment, topology: topology_lib.Topology, progress=lambda words: None
) -> dict[str, Any]:
  """Compiles all programs of an experiment for a topology.

  Args:
    experiment: the configuration.
    topology: of `topology.load`.
    progress: is told what is being done.

  Returns:
    The report, of plain values: the fields of the documented contract (`fits`, `chip`, `devices`, `mesh`,
    `bytes_per_device`, `flops_per_device`, `useful_flops_per_device`, `collectives`, `experts`, `step_seconds_bound`) and
    some more. Numbers per step are means: the lazy R1 counts by its share of the steps.

  Raises:
    UserError: the mesh does not divide the devices, the batch or the experts.
  """
  layout = mesh_lib.build(experiment, topology.devices)
  clip, clip_words = clip_config(experiment)
  platform, devices = topology.name.platform, list(layout.mesh.devices.flat)
  placed = placed_lib.place(experiment, clip_lib.Clip(clip), layout)
  frozen, batch = abstract_frozen(experiment, clip, layout), ahead.abstract_batch(experiment, clip, layout)
  progress("counting useful operations")
  useful, compiled = useful_flops(experiment, clip, layout, platform), {}
  shares = ahead.programs(experiment)
  for name in shares:  # one after the other: the compilers of a pod's programs take many GiB of the host's memory
    progress(f"compiling {name} for {len(devices)} x {topology.chip.name}")
    compiled[name] = compile_program(placed, name, frozen, batch, platform, compiled.get(ahead.GENERATE))
    jax.clear_caches()  # they would keep the program
    progress(f"  {compiled[name].seconds:.0f} s{': ' + compiled[name].refusal if compiled[name].refusal else ''}")
  size, made = compile_lib.bytes_per_device, compiled[ahead.GENERATE].generated
  exact = {
    name: size(ahead.arguments(placed, name, frozen, batch, made))
    for name in shares
    if made or name not in ahead.STEP[1:]
  }
  resident = state_bytes(placed.abstract_state) | {"frozen": size(frozen), "batch": size(batch)}
  if ahead.SNAPSHOT in shares:
    resident["snapshot"] = resident["parameters"]
  sizes = memory(resident, compiled, exact, topology.chip.memory)
  found = {name: program.collectives for name, program in compiled.items() if program.collectives}
  mean = lambda values: sum(shares[name] * value for name, value in values.items())
  refusals = [program.refusal for program in compiled.values() if program.refusal]
  flops = mean({name: program.flops for name, program in compiled.items()}) / len(devices)
  return {
    "name": experiment.name,
    "stage": (
      schedule.words(experiment.schedule, experiment.schedule.resolutions[-1])
      if experiment.schedule.resolutions
      else ""
    ),
    "topology": topology.name.text,
    "fits": not refusals and sizes["total"] <= sizes["limit"],
    "chip": topology.chip.name,
    "devices": len(devices),
    "mesh": dict(layout.mesh.shape),
    "batch_size": experiment.train.batch_size,
    "clip": clip_words,
    "bytes_per_device": sizes,
    "flops_per_device": flops,
    "useful_flops_per_device": mean(useful) / len(devices),
    "worst_routing_flops_per_device": mean({n: program.worst_flops for n, program in compiled.items()}) / len(devices),
    "collectives": [row for name in found for row in compile_lib.summed(found[name][0], name)],
    "loops_of_unknown_length": sum(unknown for _, unknown in found.values()),
    "experts": compile_lib.experts(_as_compiled(placed, compiled[ahead.GENERATE]), devices),
    "step_seconds_bound": compile_lib.step_seconds(
      topology.chip,
      experiment.generator.compute_dtype,
      flops,
      _traffic(compiled, exact, mean),
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


def _as_compiled(placed, program):
  """The generator's parameters with the shardings that the compiled program takes them in."""
  parameters = placed.abstract_state.generator
  if not program.shardings:
    return parameters
  shardings = program.shardings[0]
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), parameters, shardings
  )


def state_bytes(state) -> dict[str, int]:
  """Bytes of a TrainState (shapes with shardings) on each device, by part."""
  size = compile_lib.bytes_per_device
  return {
    "parameters": size((state.generator, state.discriminator)),
    "optimizer": size((state.generator_opt, state.discriminator_opt)),
    "ema": size(state.ema),
    "buffers": size((state.step, state.buffers)),
  }


def memory(resident, compiled, exact, limit: int) -> dict[str, int]:
  """The report's `bytes_per_device`: what lies there between steps, and what the program that needs most adds to it.

  Args:
    resident: {part: bytes} of what lies there between steps.
    compiled: {name: `Compiled`}.
    exact: {name: bytes of the program's arguments}, as the shardings tell.
    limit: bytes of a device.

  Where the compiler refused, `temporaries` is what its own sum leaves.
  """
  taken = {name: program.memory for name, program in compiled.items() if program.memory}
  sizes = dict(resident) | {"code": sum(item.code for item in taken.values())}
  adds = [{"residuals": 0, "padding": 0, "outputs": 0, "temporaries": 0}]
  crossing = taken[ahead.GENERATE].outputs if ahead.GENERATE in taken else 0
  for name, item in taken.items():
    adds.append(
      {
        "residuals": crossing if name in ahead.STEP[1:] else 0,
        "padding": max(0, item.arguments - exact[name]),
        "outputs": item.outputs,
        "temporaries": item.temporaries,
      }
    )
  sizes |= max(adds, key=lambda parts: sum(parts.values()))
  refused = [program for program in compiled.values() if program.refusal]
  if refused:
    total = max(program.used or 0 for program in refused)
    others = sum(size for name, size in sizes.items() if name != "temporaries")
    sizes["temporaries"] = max(total - others, sizes["temporaries"])
  return sizes | {"total": sum(sizes.values()), "limit": limit}


def _traffic(compiled, exact, mean):
  """Bytes to and from a device's memory in a step, at the least."""
  traffic = dict(exact)
  for name, program in compiled.items():
    item = program.memory
    if not item:
      continue
    # What is updated is written over the old values.
    traffic[name] = item.arguments + item.aliased + item.outputs + 2 * item.temporaries
  return mean(traffic)


def _link_seconds(found, topology, devices, mean):
  node_of = compile_lib.nodes(devices, topology.per_node)
  seconds = {}
  for name, (collectives, _) in found.items():
    each = [
      (compile_lib.link_seconds(item, topology.chip, node_of), times)
      for item, times in collectives.items()
      if not item.fallback
    ]
    if any(item is None for item, _ in each):
      return None
    seconds[name] = sum(item * times for item, times in each)
  return mean(seconds)
