"""From prompt to prompt in linear steps on the text head's outputs, as the released script does it.

By default only the local tokens move, which the cross-attention looks at; the global text, and with it w, stays the
first prompt's. Axis letters as in `sampling.py`, and S: all steps of a path.
"""

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.evaluation import sampling


def path(texts, steps, move_global=False):
  """Linear steps through texts, each pair's both ends among them.

  Args:
    texts: `sampling.Texts` of P >= 2 prompts.
    steps: steps per pair, at least 2: the prompt itself, `steps` - 2 between, the next prompt.
    move_global: the global text moves too; else it stays the first prompt's.

  Returns:
    `sampling.Texts` of S = (P - 1) * (steps - 1) + 1; prompt p is step p * (steps - 1).

  Raises:
    UserError: fewer than two prompts or steps.
  """
  count = len(texts.global_text)
  if count < 2:
    raise UserError(f"an interpolation needs at least two prompts, got {count}")
  if steps < 2:
    raise UserError(f"an interpolation needs at least 2 steps (its ends), got {steps}")

  def walk(points):
    points = np.asarray(points, np.float32)
    weight = np.linspace(0.0, 1.0, steps).astype(np.float32).reshape((-1,) + (1,) * (points.ndim - 1))
    legs = [start + weight * (end - start) for start, end in zip(points[:-1], points[1:])]
    return np.concatenate([points[:1]] + [leg[1:] for leg in legs])

  local_text = walk(texts.local_text)
  first = np.asarray(texts.global_text[:1])
  global_text = walk(texts.global_text) if move_global else np.broadcast_to(first, (len(local_text),) + first.shape[1:])
  return sampling.Texts(global_text, local_text)


def interpolate(sampler, variables, prompts, given, *, steps=9, move_global=False, psi=0.2, on_batch=None):
  """Pictures on the way through prompts, the same latents at every step.

  Args:
    sampler: `sampling.Sampler`.
    variables: the generator's.
    prompts: `sampling.Prompts` of P >= 2.
    given: `latents.Latents` of one prompt: z [1, L, Z], mean_z [1, M, Z].
    steps, move_global: as of `path`.
    psi: truncation, 0 to 1, toward the global mean, and toward the mean of `mean_z` (under the step's own global text)
      if there are any.
    on_batch: as of `Sampler`.

  Returns:
    images float32 [L, S, R, R, 3].

  Raises:
    UserError: fewer than two prompts or steps, or a psi outside [0, 1].
  """
  texts = path(sampler.read(variables, prompts), steps, move_global)
  everywhere = lambda array: np.broadcast_to(array, (len(texts.local_text),) + array.shape[1:])
  noise = latents_lib.Latents(everywhere(given.z), everywhere(given.mean_z))
  return sampler.sample_texts(variables, texts, noise, psi=psi, on_batch=on_batch).images.swapaxes(0, 1)
