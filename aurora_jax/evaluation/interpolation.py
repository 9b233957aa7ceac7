"""Interpolates between prompts, or between latents.

Between prompts: in linear steps of a system's condition, as the released Aurora script does. Some parts of a condition
stay fixed by default (`System.fixed_text`). In Aurora only the local tokens move, which cross-attention reads; the
global text, and with it w, stays that of the first prompt.

Between latents: along great circles of z, while the prompt stays.

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


def latent_path(points: np.ndarray, steps: int) -> np.ndarray:
  """Spherical steps through latents (slerp), including both ends of each pair.

  The lengths of normal latents are nearly equal. Linear steps would be shorter half-way than any latent of training.

  Args:
    points: [L, ..., Z], L >= 2.
    steps: as of `path`.

  Returns:
    float32 [S, ..., Z], S = (L - 1) * (steps - 1) + 1.

  Raises:
    UserError: fewer than two latents or steps.
  """
  if len(points) < 2:
    raise UserError(f"a walk between latents needs at least two of them, got {len(points)}")
  if steps < 2:
    raise UserError(f"an interpolation needs at least 2 steps (its ends), got {steps}")
  points = np.asarray(points, np.float64)
  weights = np.linspace(0.0, 1.0, steps)[1:]
  walked = [points[0]]
  for start, end in zip(points[:-1], points[1:]):
    lengths = np.linalg.norm(start, axis=-1, keepdims=True) * np.linalg.norm(end, axis=-1, keepdims=True)
    cosine = np.sum(start * end, -1, keepdims=True) / np.maximum(lengths, np.finfo(float).tiny)
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    # Between parallel latents, opposite ones, and from zero, there is no single great circle.
    curved = (np.sin(angle) > 1e-6) & (lengths > 0)
    angle = np.where(curved, angle, np.pi / 2)
    for weight in weights:
      circle = (np.sin((1 - weight) * angle) * start + np.sin(weight * angle) * end) / np.sin(angle)
      walked.append(np.where(curved, circle, (1 - weight) * start + weight * end))
  walked[:: steps - 1] = list(points)  # the ends without rounding errors
  return np.stack(walked).astype(np.float32)


def between_latents(
  sampler: sampling.Sampler,
  weights: sampling.Weights,
  prompts: Sequence[str],
  latents: latents_lib.Latents,
  *,
  steps: int = 9,
  psi: float = 1.0,
  on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """Images between latents. Every prompt takes the same walk.

  Args:
    sampler: sampler of the system.
    weights: networks to sample from.
    prompts: P; [""] for an unconditional system.
    latents: those of one prompt: values [1, L, ...] with L >= 2, means [1, M, ...]. z moves; other values, such as
      those that choose a generator, stay the first latent's.
    steps: images from a latent to the next, both ends counted.
    psi: truncation, 0 to 1.
    on_batch: as of `Sampler`.

  Returns:
    float32 [P, S, R, R, 3], S as of `latent_path`.

  Raises:
    UserError: fewer than two latents or steps, or a psi outside [0, 1].
  """
  z = latent_path(latents.values["z"][0], steps)
  stay = lambda values: np.broadcast_to(values[:, :1], (len(prompts), len(z), *values.shape[2:]))
  values = {name: stay(array) for name, array in latents.values.items()}
  values["z"] = np.broadcast_to(z, (len(prompts), *z.shape))
  means = {name: np.broadcast_to(array, (len(prompts), *array.shape[1:])) for name, array in latents.means.items()}
  return sampler(weights, prompts, latents=latents_lib.Latents(values, means), psi=psi, on_batch=on_batch).images
