"""Random latents of images: drawn from a seed, or read from and written to a file.

Different frameworks draw different numbers from the same seed. With a file of latents, the released PyTorch scripts
give the same image.

Axis letters: P prompts, L latents per prompt, M latents whose mean w is a prompt's own mean, Z width of z.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents_files
from aurora_jax.evaluation.latents_files import check_name, load

__all__ = ["MEAN_LATENTS", "DrawOne", "Latents", "check_name", "draw", "fit", "load", "save"]

# Latents whose mean w is a prompt's own mean (released script).
MEAN_LATENTS = 16

# What a key is drawn for.
_LATENT, _MEAN = 0, 1


@dataclasses.dataclass(frozen=True)
class Latents:
  """The latents of P prompts.

  Attributes:
    values: {name: float32 [P, L, ...]}, the latents of each image. The names are those of `System.draw_latents`, "z"
      first.
    means: {name: float32 [P, M, ...]}. Truncation moves toward their mean. If empty, or M = 0, it does not.
  """

  values: dict[str, np.ndarray]
  means: dict[str, np.ndarray]

  @property
  def prompts(self) -> int:
    """P."""
    return len(next(iter(self.values.values())))

  @property
  def latents(self) -> int:
    """L."""
    return next(iter(self.values.values())).shape[1]

  @property
  def mean_latents(self) -> int:
    """M."""
    return next(iter(self.means.values())).shape[1] if self.means else 0

  def of_prompts(self, positions: np.ndarray) -> "Latents":
    """The latents of the prompts at some positions."""
    return Latents(*({name: v[positions] for name, v in part.items()} for part in (self.values, self.means)))


DrawOne = Callable[[jax.Array], dict[str, jax.Array]]


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def _draw_all(draw_one, seed, purpose, prompts, count):
  def one(prompt, index):
    key = jax.random.key(seed)
    for part in (purpose, prompt, index):
      key = jax.random.fold_in(key, part)
    return draw_one(key)

  return jax.vmap(lambda prompt: jax.vmap(lambda index: one(prompt, index))(jnp.arange(count)))(prompts)


def draw(draw_one: DrawOne, seed: int, prompts: np.ndarray, latents: int, mean_latents: int) -> Latents:
  """Draws latents. Each depends only on the seed, the position of its prompt and its own position.

  Args:
    draw_one: `System.draw_latents`.
    seed: from 0 to 2**32 - 1.
    prompts: int [P], positions of the prompts.
    latents: L.
    mean_latents: M.
  """
  prompts = np.asarray(prompts, np.int32)

  def each(purpose, count):
    if count:
      return jax.tree.map(np.asarray, _draw_all(draw_one, np.uint32(seed), purpose, prompts, count))
    shapes = jax.eval_shape(draw_one, jax.random.key(0))
    return {name: np.zeros((len(prompts), 0, *leaf.shape), np.float32) for name, leaf in shapes.items()}

  return Latents(each(_LATENT, latents), each(_MEAN, mean_latents))


def fit(
  arrays: dict[str, np.ndarray],
  path: str,
  prompts: int,
  draw_one: DrawOne,
  *,
  mean_latents: int | None = None,
  otherwise: int = MEAN_LATENTS,
  seed: int = 0,
) -> Latents:
  """The latents of some prompts from the arrays of a file. An array without a prompt axis is used for every prompt.

  Args:
    arrays: arrays of the file, as of `load`.
    path: name of the file, for errors.
    prompts: P.
    draw_one: `System.draw_latents`, which has the shapes that the file must have.
    mean_latents: M. None takes the file's, or draws `otherwise` latents if the file has none.
    otherwise: see `mean_latents`.
    seed: seed of drawn latents.

  Raises:
    UserError: other names, another width or number of prompts, or another M than the file's.
  """
  widths = {name: leaf.shape[-1] for name, leaf in jax.eval_shape(draw_one, jax.random.key(0)).items()}
  known = [*widths, *(f"mean_{name}" for name in widths)]
  if arrays.keys() - set(known) or widths.keys() - arrays.keys():
    raise UserError(
      f"{path} must hold {', '.join(widths)} and perhaps {', '.join(known[len(widths) :])}, it holds "
      f"{', '.join(sorted(arrays))}"
    )
  spread = {}
  for name, array in arrays.items():
    width = widths[name.removeprefix("mean_")]
    if array.shape[-1] != width:
      raise UserError(f"{path}: '{name}' is {array.shape[-1]} wide, the generator's latents are {width}")
    if array.ndim == 3 and len(array) != prompts:
      raise UserError(f"{path}: '{name}' is for {len(array)} prompts, there are {prompts}")
    spread[name] = np.broadcast_to(array, (prompts, *array.shape[-2:]))
  values = {name: spread[name] for name in widths}
  if not values["z"].shape[1]:
    raise UserError(f"{path}: 'z' is empty")
  means = {name: spread[f"mean_{name}"] for name in widths if f"mean_{name}" in spread}
  if not means or mean_latents == 0:
    count = otherwise if mean_latents is None else mean_latents
    means = draw(draw_one, seed, np.arange(prompts), 0, count).means
  elif mean_latents not in (None, means["z"].shape[1]):
    raise UserError(f"{path}: 'mean_z' has {means['z'].shape[1]} latents, not the {mean_latents} asked for")
  return Latents(values, means)


def save(latents: Latents, path: str) -> pathlib.Path:
  """Writes a file that `load` reads: `z` [P, L, Z], `mean_z` [P, M, Z] and so on.

  Raises:
    UserError: it cannot be written.
  """
  arrays = latents.values | {f"mean_{name}": array for name, array in latents.means.items()}
  return latents_files.save({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, path)
