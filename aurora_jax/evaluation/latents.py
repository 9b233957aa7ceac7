"""The random latents behind pictures: drawn from a seed, or read from and written to a file.

With such a file a picture can be made again elsewhere: the released PyTorch scripts give the same picture for the same
latents, whereas no two frameworks draw the same numbers from the same seed.

Axis letters: P prompts, L latents per prompt, M latents whose mean w is a prompt's own mean, Z width of z.
"""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from aurora_jax import files
from aurora_jax.errors import UserError

# Latents whose mean w is a prompt's own mean (released script).
MEAN_LATENTS = 16

# What a key is drawn for.
_LATENT, _MEAN = 0, 1

_SUFFIXES = (".npz", ".safetensors")


@dataclasses.dataclass(frozen=True)
class Latents:
  """The latents of P prompts.

  Attributes:
    values: {name: float32 [P, L, ...]}, one image each; names as of `System.draw_latents`, "z" first of all.
    means: {name: float32 [P, M, ...]}: truncation moves toward their mean. Empty, or M = 0: no such move.
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
    """Those of some prompts."""
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
  """Draws latents; each depends on the seed, its prompt's position and its own position, and on nothing else.

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


def check_name(path):
  """Raises UserError if the name of a latents file says no format that there is."""
  if pathlib.Path(path).suffix.lower() not in _SUFFIXES:
    raise UserError(f"a file of latents ends in {' or '.join(_SUFFIXES)}, not {path}")


def load(path: str) -> dict[str, np.ndarray]:
  """Reads a file of latents as it is; `fit` checks it against what is wanted.

  Args:
    path: .npz or .safetensors with `z` [L, Z] or [P, L, Z] and perhaps `mean_z` [M, Z] or [P, M, Z]; a system with further
      latents has them under their names too.

  Raises:
    UserError: not such a file, no `z`, or values that are no finite numbers.
  """
  check_name(path)
  if not pathlib.Path(path).is_file():
    raise UserError(f"file of latents not found: {path}")
  try:
    if pathlib.Path(path).suffix.lower() == ".npz":
      with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    else:
      arrays = safetensors.numpy.load_file(path)
  except Exception as error:  # each library has its own exceptions for a damaged file
    raise UserError(f"cannot read the latents in {path}: {error}") from error
  if "z" not in arrays:
    raise UserError(f"{path} must hold an array 'z', it holds {', '.join(sorted(arrays)) or 'nothing'}")
  for name, array in arrays.items():
    if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
      raise UserError(
        f"{path}: '{name}' must be finite floats [count, width] or [prompts, count, width], it is "
        f"{array.dtype} {list(array.shape)}"
      )
  return {name: array.astype(np.float32) for name, array in arrays.items()}


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
  """Makes the arrays of a file the latents of some prompts. An array without an axis of prompts is used for every one.

  Args:
    arrays: as of `load`.
    path: its name, for errors.
    prompts: P.
    draw_one: `System.draw_latents`; its shapes are what the file must have.
    mean_latents: M; None takes the file's, or draws `otherwise` ones where the file has none.
    otherwise: see there.
    seed: of drawn ones.

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
  check_name(path)
  arrays = latents.values | {f"mean_{name}": array for name, array in latents.means.items()}
  arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
  if pathlib.Path(path).suffix.lower() == ".npz":
    content = io.BytesIO()
    np.savez(content, **arrays)
    content = content.getvalue()
  else:
    content = safetensors.numpy.save(arrays)
  with files.whole_file(path) as tmp_path:
    tmp_path.write_bytes(content)
  return pathlib.Path(path)
