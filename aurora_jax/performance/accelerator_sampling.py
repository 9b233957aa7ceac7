"""The parts of `bench accelerator` that sample: the generator with random weights, and its PyTorch twin.

The text is random too: a sampling call begins with the generator's own text features, as `bench sample` has it.
"""

import concurrent.futures
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.performance import accelerator_inputs as inputs
from aurora_jax.performance import accelerator_profile as profile
from aurora_jax.performance import benchmarks
from aurora_jax.systems import base, registry

_BATCHES = {False: (1, 16, 64), True: (1, 2)}
_DTYPES = ("bfloat16", "float32")
# The peer takes the matmul precision that JAX's default has.
_TF32 = "high"
# Images of the smallest batch in float32, which the twin is compared with.
_CHECK = "sampling_check.npy"


class _Generator:
  """A sampling program with its arguments.

  Attributes:
    system: of one arithmetic.
  """

  def __init__(self, run: inputs.Run, dtype: str):
    self.system = run.system(run.experiment(compute_dtype=dtype))
    sample = lambda networks, condition, latents: self.system.sample(networks, {}, condition, latents)
    self._sample = jax.jit(sample)

  @functools.cached_property
  def flops(self) -> Mapping[str, int]:
    """Useful operations of one image, {precision: operations}."""
    return benchmarks.useful_flops_by_precision(self.system.experiment)

  def arguments(self, batch: int) -> tuple[Any, Any]:
    """Conditions and latents of a batch; matrices are as large as trained ones."""
    shapes = benchmarks.sampling_shapes(self.system, batch)
    draw = lambda leaf, seed: inputs.normals(leaf.size, seed).reshape(leaf.shape)
    return tuple(jax.tree.map(lambda leaf: draw(leaf, seed), tree) for seed, tree in enumerate(shapes[1:], 1))

  def compile(self, networks: Any, batch: int) -> Any:
    """The program for a batch."""
    shapes = benchmarks.sampling_shapes(self.system, batch)
    return self._sample.lower(networks, *shapes[1:]).compile()


def networks_of(system: base.System) -> dict[str, Any]:
  """Random weights of the networks that sampling needs, as host arrays."""
  return inputs.filled(benchmarks.sampling_shapes(system, 1).networks, seed=0)


def measure(run: inputs.Run) -> dict[str, Any]:
  """Times one call for each batch and arithmetic; then profiles the last."""
  sheet, batches = inputs.chip(), _BATCHES[run.toy]
  results: dict[str, Any] = {"rows": [], "kernels": []}
  generators = {dtype: _Generator(run, dtype) for dtype in _DTYPES}
  networks = jax.device_put(networks_of(generators["bfloat16"].system))
  # Without buffers, as PyTorch counts.
  results["parameters"] = sum(leaf.size for values in networks.values() for leaf in jax.tree.leaves(values["params"]))
  run.save(results)
  # Compiled side by side, since a compilation uses one core, and all before the first call is timed.
  cases = [(dtype, batch) for dtype in _DTYPES for batch in batches]
  run.doing("compiling", results)
  with concurrent.futures.ThreadPoolExecutor(len(cases)) as pool:
    programs = {case: pool.submit(generators[case[0]].compile, networks, case[1]) for case in cases}
    concurrent.futures.wait(programs.values(), timeout=max(1.0, run.time_left() - 10))
    for future in programs.values():
      future.cancel()
  for dtype, batch in cases:
    with inputs.attempts(results["rows"], {"arithmetic": dtype, "batch": batch}) as row:
      run.require_time(3, f"batch {batch} in {dtype}")
      program, generator = programs[dtype, batch].result(timeout=1), generators[dtype]
      arguments = jax.device_put(generator.arguments(batch))
      sampled = program(networks, *arguments)
      image = np.asarray(sampled.image)
      if not np.isfinite(image).all():
        raise UserError("images are not finite")
      if (dtype, batch) == ("float32", batches[0]):
        np.save(run.out / _CHECK, image)
      row["temporaries_bytes"] = program.memory_analysis().temp_size_in_bytes
      seconds = inputs.seconds_of(lambda: program(networks, *arguments).image)
      row["seconds"], row["images_per_second"] = seconds, batch / seconds
      row |= inputs.shares({name: count * batch for name, count in generator.flops.items()}, seconds, sheet)
      row["fullest_expert"] = _fullest(generator.system, sampled.choices)
    run.save(results)
  last = programs[_DTYPES[0], batches[-1]]
  if run.time_left() > 10 and last.done() and not last.cancelled() and last.exception() is None:
    folder = run.out / "profile_sampling"
    arguments = jax.device_put(generators[_DTYPES[0]].arguments(batches[-1]))
    with profile.recorded(folder):
      jax.block_until_ready(last.result()(networks, *arguments))
    results["profile"] = str(folder)
    results["kernels"] = profile.kernels(folder)
  inputs.raise_failures(results["rows"])
  return results


def _fullest(system, choices: Mapping[str, Any]) -> float:
  """The load of the fullest expert of any layer, relative to the mean load of its layer."""
  found = [1.0]
  for name, chosen in choices.items():
    experts = system.choice_count(name)
    load = np.bincount(np.asarray(chosen).ravel(), minlength=experts)
    found.append(float(load.max() * experts / max(load.sum(), 1)))
  return max(found)


def measure_pytorch(run: inputs.Run) -> dict[str, Any]:
  """Times this project's PyTorch twin of the generator, eagerly, with the same weights and inputs.

  The twin computes what the released PyTorch code computes; it is not that code.

  Raises:
    UserError: no torch, no GPU that torch can use, or the system has no twin.
  """
  try:
    import torch
  except ModuleNotFoundError as error:
    raise UserError("torch is not installed") from error
  if not run.toy and not torch.cuda.is_available():
    raise UserError("torch sees no CUDA device")
  device = torch.device("cpu" if run.toy else "cuda")
  results: dict[str, Any] = {"torch": torch.__version__, "compiled": False, "rows": []}
  generator = _Generator(run, "float32")
  experiment = generator.system.experiment
  package = registry.SYSTEMS[experiment.system]
  run.doing("loading the weights", results)
  names = importlib.import_module(f"{package}.torch_names")
  cfg = names.for_sampling(experiment.generator)
  with jax.default_device(jax.devices("cpu")[0]):
    networks = networks_of(generator.system)
    described = names.hub_model(names.joined(networks), cfg)
  modeling = importlib.import_module(f"{package}.{described.modeling.stem}")
  values = dict(described.config)
  twin = getattr(modeling, values["architectures"][0])
  config = getattr(modeling, values["architectures"][0].removesuffix("Generator") + "Config").from_dict(values)
  with device:
    model = twin(config).eval()
  model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in described.arrays})
  del networks
  results["parameters"] = sum(parameter.numel() for parameter in model.parameters())
  run.save(results)
  for dtype in ("float32", "bfloat16"):  # the weights are rounded for the second
    torch.set_float32_matmul_precision("highest" if run.toy else _TF32)
    model = model.to(torch.bfloat16) if dtype == "bfloat16" else model
    for batch in _BATCHES[run.toy]:
      with inputs.attempts(results["rows"], {"arithmetic": dtype, "batch": batch}) as row:
        run.require_time(3, f"batch {batch} in {dtype}")
        condition, latents = (
          {name: torch.from_numpy(value).to(device) for name, value in tree.items()}
          for tree in generator.arguments(batch)
        )
        seconds = inputs.seconds_of(lambda: _synthesize(torch, model, condition, latents))
        row["seconds"], row["images_per_second"] = seconds, batch / seconds
        if (dtype, batch) == ("float32", _BATCHES[run.toy][0]) and (run.out / _CHECK).is_file():
          theirs = np.load(run.out / _CHECK).transpose(0, 3, 1, 2)
          ours = _synthesize(torch, model, condition, latents).float().cpu().numpy()
          row["relative_difference_from_jax"] = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
      run.save(results)
  inputs.raise_failures(results["rows"])
  return results


def _synthesize(torch, model, condition, latents):
  with torch.inference_mode():
    w = model.map_latents(latents["z"], condition["global_text"])
    pyramid, _ = model.synthesis(w, condition["local_text"])
    image = pyramid[max(pyramid)]
  if torch.cuda.is_available():
    torch.cuda.synchronize()
  return image
