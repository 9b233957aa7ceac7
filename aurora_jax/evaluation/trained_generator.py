"""A trained generator from a run's folder, or an exported one: weights, frozen networks and a sampler."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.evaluation import interpolation, sampling
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.runs import checkpoint_reader
from aurora_jax.systems import base, hub, registry, stages
from aurora_jax.systems.model_folder import ModelFolder


@dataclasses.dataclass(frozen=True)
class TrainedGenerator:
  """A generator, ready to sample.

  Attributes:
    folder: the run's folder, or the exported one.
    system: the system; for a run that grows, at the stage of the checkpoint.
    step: step of the checkpoint.
    weights: averaged (unless asked otherwise) and frozen networks.
    sampler: compiled sampling programs.
  """

  folder: pathlib.Path
  system: base.System
  step: int
  weights: sampling.Weights
  sampler: sampling.Sampler

  @property
  def experiment(self) -> Experiment:
    """The configuration; for a run that grows, at the stage of the checkpoint."""
    return self.system.experiment

  def sample(self, prompts: Sequence[str], **options: Any) -> sampling.Samples:
    """Samples prompts. The options are those of `sampling.Sampler`."""
    return self.sampler(self.weights, list(prompts), **options)

  def interpolate(self, prompts: Sequence[str], latents: latents_lib.Latents, **options: Any) -> np.ndarray:
    """Interpolates between prompts: images [L, S, R, R, 3]. The options are those of `interpolation.interpolate`."""
    return interpolation.interpolate(self.sampler, self.weights, list(prompts), latents, **options)

  def between_latents(self, prompts: Sequence[str], latents: latents_lib.Latents, **options: Any) -> np.ndarray:
    """Interpolates between latents: [P, S, R, R, 3]. The options are those of `interpolation.between_latents`."""
    return interpolation.between_latents(self.sampler, self.weights, list(prompts), latents, **options)


def load(
  workdir: str | pathlib.Path,
  step: int | None = None,
  batch_size: int | None = None,
  *,
  images: int | None = None,
  prompts_at_once: int | None = None,
  clip: str | None = None,
  dtype: str | None = None,
  weights: str = "ema",
) -> TrainedGenerator:
  """Reads a run, or a folder that a run was exported to.

  Args:
    workdir: the folder, or "hf:OWNER/NAME" for one on the Hub.
    step: step of the checkpoint; None takes the newest.
    batch_size: images per call of the sampler; None takes the system's default.
    images: number of images to be sampled in all, if known. It limits the batch size.
    prompts_at_once: as of `sampling.Sampler`.
    clip: a CLIP folder in place of the one in the run's configuration.
    dtype: type of the weights and the arithmetic: "float32", or "bfloat16" for half the memory. None: weights in
      float32, arithmetic as in training.
    weights: "ema", or "generator" for the parameters themselves; an exported folder has one of them.

  Raises:
    UserError: no such folder, no checkpoint, no CLIP folder, a CLIP of another width, or weights that do not fit.
  """
  place = ModelFolder.open(workdir)
  if not place.path.is_dir():
    raise UserError(f"run folder not found: {workdir}")
  place.check_step(step)
  if place.exported:
    experiment = place.experiment  # says what is missing where there is none
    imported = hub.read_folder(place.path, experiment.system)
    experiment = imported.trained or experiment
    read = lambda system: (imported.step, {name: _placed(imported.networks[name], dtype) for name in system.sampled})
  else:
    experiment = stages.at_checkpoint(place.experiment, place.run.checkpoints, step)
    read = lambda system: _read_networks(system, place.run.checkpoints, step, dtype, weights)
  system = registry.system_class(experiment.system)(_adjusted(experiment, clip, dtype), mesh_lib.single_device())
  frozen = _load_frozen(system, clip)  # first, because it is small and may be missing
  step, networks = read(system)
  batch_size = batch_size or system.sampling_batch_size
  sampler = sampling.Sampler(system, batch_size if images is None else min(batch_size, images), prompts_at_once)
  return TrainedGenerator(place.path, system, step, sampling.Weights(networks, jax.device_put(frozen)), sampler)


def _adjusted(experiment, clip, dtype):
  """The stored configuration with the command's CLIP folder and compute type."""
  if clip:
    experiment = dataclasses.replace(experiment, text=dataclasses.replace(experiment.text, clip=clip))
  if dtype and hasattr(getattr(experiment, "generator", None), "compute_dtype"):
    generator = dataclasses.replace(experiment.generator, compute_dtype=dtype)
    experiment = dataclasses.replace(experiment, generator=generator)
  return experiment


def _load_frozen(system, clip):
  """The frozen networks. An error says that the path comes from the run's configuration, and which flag replaces it."""
  try:
    return system.load_sampling_frozen()
  except UserError as error:
    if clip:
      raise
    if not system.experiment.text.clip:
      raise UserError("the run's config names no CLIP: --clip DIR says which") from error
    raise UserError(f"{error} (as the run's config has it; --clip DIR names another)") from error


def _placed(variables, dtype):
  """An exported network's variables on the device."""
  params = _cast(variables.pop("params"), jnp.bfloat16 if dtype == "bfloat16" else None)
  return {"params": params, **jax.device_put(variables)}


def _read_networks(system, folder, step, dtype, weights):
  """(step, {network: variables}): averages, or parameters where a network has none."""
  averaged = lambda network: weights == "ema" and network.ema is not None
  source = {name: "ema" if averaged(network) else "params" for name, network in system.networks.items()}
  prefixes = [f"networks/{name}/{part}" for name in system.sampled for part in (source[name], "variables")]
  step, found = checkpoint_reader.read_parts(folder, prefixes, step)
  networks = {}
  for name in system.sampled:
    prefix = f"networks/{name}/{source[name]}"
    if prefix not in found:
      raise UserError(f"checkpoint {folder / str(step)} has no {prefix}")
    params = _cast(found.pop(prefix), jnp.bfloat16) if dtype == "bfloat16" else found.pop(prefix)
    networks[name] = {"params": params, **found.get(f"networks/{name}/variables", {})}
  return step, networks


def _cast(params, dtype):
  """Casts all parameters (None: leaves them as they are) on the device, leaf by leaf.

  `params` is emptied, so that no second copy exists.
  """
  leaves, structure = jax.tree.flatten(params)
  params.clear()
  for i, leaf in enumerate(leaves):
    # At once: copies that wait would keep their sources.
    leaves[i] = jax.block_until_ready(jax.device_put(leaf if dtype is None else leaf.astype(dtype)))
    del leaf
  return jax.tree.unflatten(structure, leaves)
