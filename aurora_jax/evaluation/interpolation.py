"""Interpolates between prompts in linear steps of a system's condition, as the released Aurora script does.

Some parts of a condition stay fixed by default (`System.fixed_text`). In Aurora only the local tokens move, which
cross-attention reads; the global text, and with it w, stays that of the first prompt.

  P prompts, L latents, M latents of a mean, S all steps of a path, R resolution
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.evaluation import sampling


def path(conditions: Mapping[str, np.ndarray], steps: int, fixed: Collection[str] = ()) -> dict[str, np.ndarray]:
  """Linear steps through conditions, including both ends of each pair.

  Args:
    conditions: {name: [P, ...]} of P >= 2 prompts.
    steps: steps per pair, at least 2: the prompt, `steps` - 2 between, the next prompt.
    fixed: names of parts that keep the first prompt's value.

  Returns:
    {name: [S, ...]}, S = (P - 1) * (steps - 1) + 1; prompt p is step p * (steps - 1).

  Raises:
    UserError: fewer than two prompts or steps, or nothing to interpolate (an unconditional system).
  """
  if not conditions:
    raise UserError("this system has no text to interpolate")
  count = len(next(iter(conditions.values())))
  if count < 2:
    raise UserError(f"an interpolation needs at least two prompts, got {count}")
  if steps < 2:
    raise UserError(f"an interpolation needs at least 2 steps (its ends), got {steps}")

  def walk(points):
    points = np.asarray(points, np.float32)
    weight = np.linspace(0.0, 1.0, steps).astype(np.float32).reshape((-1,) + (1,) * (points.ndim - 1))
    legs = [start + weight * (end - start) for start, end in zip(points[:-1], points[1:])]
    return np.concatenate([points[:1]] + [leg[1:] for leg in legs])

  walked = {name: walk(values) for name, values in conditions.items()}
  stay = lambda values, length: np.broadcast_to(np.asarray(values[:1]), (length, *values.shape[1:]))
  return {name: stay(conditions[name], len(values)) if name in fixed else values for name, values in walked.items()}


def interpolate(
  sampler: sampling.Sampler,
  weights: sampling.Weights,
  prompts: Sequence[str],
  latents: latents_lib.Latents,
  *,
  steps: int = 9,
  move_all: bool = False,
  psi: float = 0.2,
  on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """Images between prompts, with the same latents at every step.

  Args:
    sampler: sampler of the system.
    weights: networks to sample from.
    prompts: P >= 2.
    latents: those of one prompt: values [1, L, ...], means [1, M, ...].
    steps: as of `path`.
    move_all: whether every part of the condition moves.
    psi: truncation, 0 to 1.
    on_batch: as of `Sampler`.

  Returns:
    float32 [L, S, R, R, 3].

  Raises:
    UserError: fewer than two prompts or steps, or a psi outside [0, 1].
  """
  fixed = () if move_all else sampler.system.fixed_text
  conditions = path(sampler.read(weights, prompts), steps, fixed)
  length = len(next(iter(conditions.values())))
  everywhere = lambda part: {name: np.broadcast_to(v, (length, *v.shape[1:])) for name, v in part.items()}
  noise = latents_lib.Latents(everywhere(latents.values), everywhere(latents.means))
  return sampler.sample_conditions(weights, conditions, noise, psi=psi, on_batch=on_batch).images.swapaxes(0, 1)
