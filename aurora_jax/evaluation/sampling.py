"""Sampling from any system, on one device or a whole mesh: sample grids, `sample`, `interpolate` and `evaluate`.

P prompts, L latents per prompt, M latents of a prompt's mean, K values of psi, C prompts at once, B rows of a batch
(one row is one prompt with one latent and one psi), R resolution
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aurora_jax import xla_flags
from aurora_jax.errors import UserError
from aurora_jax.evaluation import arguments
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.parallel import hosts
from aurora_jax.systems import base

MEAN_LATENTS = latents_lib.MEAN_LATENTS


class Samples(NamedTuple):
  """Images of P prompts with L latents each, as numpy arrays. The axis K exists if psi is a sequence.

  Attributes:
    images: float32 [P, L, (K,) R, R, 3], about [-1, 1]; generators do not clip them.
    choices: {name: int32 [P, L, (K,) ...]} as of `base.Sample`; empty unless requested.
  """

  images: np.ndarray
  choices: dict[str, np.ndarray]


class Weights(NamedTuple):
  """The networks of a sampler: {network: variables}, and the frozen networks."""

  networks: Mapping[str, base.Variables]
  frozen: base.Frozen


class Sampler:
  """The compiled sampling programs of a system. A new sampler compiles anew.

  Attributes:
    system: the system.
    batch_size: B, images per call, a multiple of the devices.
    prompts_at_once: C. Prompts are processed in groups of this size; only the condition of one group is in memory.
  """

  def __init__(
    self,
    system: base.System,
    batch_size: int | None = None,
    prompts_at_once: int | None = None,
    *,
    compile_quickly: bool = False,
  ):
    """Compiles nothing yet.

    Args:
      system: the system.
      batch_size: None takes the system's default.
      prompts_at_once: None takes `batch_size`.
      compile_quickly: on a CPU, prefer short compilation to fast programs.
    """
    self.system, layout = system, system.layout
    batch_size = batch_size or system.sampling_batch_size
    self.batch_size = -(-batch_size // layout.devices) * layout.devices
    self.prompts_at_once = prompts_at_once or self.batch_size
    platform = layout.mesh.devices.flat[0].platform
    options = xla_flags.compiler_options(platform) if compile_quickly else None

    def gathered(networks):
      return {
        name: {**variables, "params": system.unshard(name, variables["params"])} for name, variables in networks.items()
      }

    def condition(weights, inputs):
      return system.condition(gathered(weights.networks), weights.frozen, inputs)

    def center(weights, condition, latents):
      return system.center(gathered(weights.networks), condition, latents)

    def sample(weights, condition, latents, prompt, psi):
      rows = jax.tree.map(lambda values: values[prompt], condition), latents, psi
      condition, latents, psi = jax.lax.with_sharding_constraint(rows, layout.batch)
      with jax.named_scope("sample"):
        return system.sample(gathered(weights.networks), weights.frozen, condition, latents, psi)

    jit = lambda function: jax.jit(function, out_shardings=layout.replicated, compiler_options=options)
    self._condition, self._center, self._sample_rows = jit(condition), jit(center), jit(sample)

  def __call__(
    self,
    weights: Weights,
    prompts: Sequence[str],
    *,
    latents_per_prompt: int = 1,
    seed: int = 0,
    psi: float | Sequence[float] = 1.0,
    mean_latents: int = MEAN_LATENTS,
    latents: latents_lib.Latents | None = None,
    choices: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
  ) -> Samples:
    """Samples every prompt with L latents, each at every psi.

    Args:
      weights: `Weights`.
      prompts: P strings; for an unconditional system their number counts.
      latents_per_prompt: L.
      seed: the same seed, prompt position and latent position give the same latents in any batch size.
      psi: truncation in [0, 1], 1 for none; or a sequence of K values.
      mean_latents: M; with 0 truncation does not move toward the prompt's mean.
      latents: those of these prompts, in place of `latents_per_prompt`, `seed` and `mean_latents`.
      choices: whether to return `Samples.choices`.
      on_batch: called with (rows done, rows in all) after every batch, for a progress bar.

    Raises:
      UserError: no prompts or no latents, or a psi outside [0, 1].
    """
    count = len(prompts)
    if latents is None:
      if count < 1 or latents_per_prompt < 1:
        raise UserError(f"nothing to sample: {count} prompts, {latents_per_prompt} latents")
      mean_latents = mean_latents if _moves(psi) else 0
      draw = lambda group: latents_lib.draw(self.system.draw_latents, seed, group, latents_per_prompt, mean_latents)
    else:
      draw = latents.of_prompts
    return self._run(weights, count, self._reader(weights, prompts), draw, psi, choices, on_batch)

  def read(self, weights: Weights, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The conditions of prompts, numpy arrays [P, ...]."""
    count, read = len(prompts), self._reader(weights, prompts)
    groups = [read(self._group(start, count)) for start in range(0, count, self.prompts_at_once)]
    return jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts])[:count], *groups)

  def sample_conditions(
    self,
    weights: Weights,
    conditions: Mapping[str, np.ndarray],
    latents: latents_lib.Latents,
    *,
    psi: float | Sequence[float] = 1.0,
    choices: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
  ) -> Samples:
    """Samples from conditions [P, ...], such as interpolated ones. The other arguments are those of a call."""
    read = lambda group: {name: values[group] for name, values in conditions.items()}
    return self._run(weights, latents.prompts, read, latents.of_prompts, psi, choices, on_batch)

  def _group(self, start, count):
    """Positions of the prompts of a group.

    The last group is filled with its last prompt, so that all have one shape.
    """
    return np.minimum(np.arange(start, start + self.prompts_at_once, dtype=np.int32), count - 1)

  def _reader(self, weights, prompts):
    inputs = self.system.inputs(prompts)
    on_mesh = lambda values: hosts.replicate(self.system.layout.replicated, values)
    return lambda group: self._condition(weights, on_mesh(jax.tree.map(lambda values: values[group], inputs)))

  def _run(self, weights, count, read, draw, psi, choices, on_batch):
    """Group by group: `read(positions)` gives the conditions of a group of prompts, `draw(positions)` its latents."""
    sweep = np.atleast_1d(np.asarray(psi, np.float32))
    for value in np.atleast_1d(psi):
      arguments.check_psi(float(value))
    if not count:
      raise UserError("nothing to sample: no prompts")
    if _moves(psi) and not self.system.truncates:
      raise UserError(f"system '{self.system.experiment.system}' has no truncation: psi must be 1, got {psi}")
    on_mesh = lambda values: hosts.replicate(self.system.layout.replicated, values)
    done, total, rows_done, waiting = 0, None, [], None
    for start in range(0, count, self.prompts_at_once):
      group = self._group(start, count)
      condition, drawn = read(group), draw(group)
      if drawn.means and drawn.mean_latents and _moves(psi):
        condition = self._center(weights, condition, on_mesh(drawn.means))
      flat = {name: values.reshape(-1, *values.shape[2:]) for name, values in drawn.values.items()}
      latents = drawn.latents
      total = count * latents * len(sweep)
      rows = np.arange(min(self.prompts_at_once, count - start) * latents * len(sweep), dtype=np.int32)
      for first in range(0, len(rows), self.batch_size):
        # The last batch is filled with other rows. Copies of one row would change statistics over the batch.
        row = np.arange(first, first + self.batch_size, dtype=np.int32) % len(rows)
        which, value = row // len(sweep), sweep[row % len(sweep)]
        drawn_rows = {name: values[which] for name, values in flat.items()}
        running = self._sample_rows(weights, condition, *on_mesh((drawn_rows, which // latents, value)))
        if waiting is not None:  # fetched while the devices compute the next batch
          done += _collect(*waiting, rows_done, choices)
          _report(on_batch, done, total)
        waiting = running, min(self.batch_size, len(rows) - first)
    _collect(*waiting, rows_done, choices)
    _report(on_batch, total, total)
    leading = (count, latents) + ((len(sweep),) if np.ndim(psi) else ())
    stack = lambda *parts: np.concatenate(parts).reshape(leading + parts[0].shape[1:])
    return Samples(*jax.tree.map(stack, *rows_done))


def _moves(psi):
  """Whether any psi moves a sample toward a mean."""
  return bool(np.any(np.asarray(psi) != 1.0))


def _collect(sample, count, rows, choices):
  """Appends the first `count` rows of a batch; the others are padding. Returns `count`."""
  image = np.asarray(sample.image, np.float32)[:count]
  chosen = {name: np.asarray(values, np.int32)[:count] for name, values in sample.choices.items()} if choices else {}
  rows.append((image, chosen))
  return count


def _report(on_batch, done, total):
  if on_batch is not None:
    on_batch(done, total)


def makers(system: base.System, samples: Samples) -> tuple[np.ndarray | None, int]:
  """The generator that made each image, for systems with several.

  Args:
    system: the system.
    samples: images with choices.

  Returns:
    (int [P, L, (K)], number of generators); (None, 0) for a system with one generator.
  """
  for name, chosen in samples.choices.items():
    if chosen.ndim == samples.images.ndim - 3:
      return chosen, system.choice_count(name)
  return None, 0


def weights_of(system: base.System, state: base.TrainState, frozen: Any) -> Weights:
  """The averaged weights of a training state's sampled networks."""
  return Weights({name: state.variables(name, ema=True) for name in system.sampled}, frozen)
