"""The random latents behind pictures: drawn from a seed, or read from and written to a file.

With such a file a picture can be made again elsewhere: the released PyTorch scripts give the same picture for the same
latents, whereas no two frameworks draw the same numbers from the same seed.

Axis letters: P prompts, L latents per prompt, M latents whose mean w is a prompt's own mean, Z width of z.
"""

import functools
import io
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy

from aurora_jax import files
from aurora_jax.errors import UserError

# Latents whose mean w is a prompt's own mean (released script).
MEAN_LATENTS = 16

# What a key is drawn for.
_LATENT, _MEAN = 0, 1

_SUFFIXES = (".npz", ".safetensors")


class Latents(NamedTuple):
  """The latents of P prompts.

  Attributes:
    z: float32 [P, L, Z], one picture each.
    mean_z: float32 [P, M, Z]; the mean of their w is what truncation pulls the prompt to. M = 0: no such pull.
  """

  z: np.ndarray
  mean_z: np.ndarray


def _draw(seed, purpose, prompt, index, width):
  """The standard normal z of one (seed, purpose, prompt position, latent position), so of no batch and no order."""
  key = jax.random.key(seed)
  for part in (purpose, prompt, index):
    key = jax.random.fold_in(key, part)
  return jax.random.normal(key, (width,))


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _draw_all(seed, purpose, prompts, count, width):
  one = lambda p, n: _draw(seed, purpose, p, n, width)
  return jax.vmap(lambda p: jax.vmap(lambda n: one(p, n))(jax.numpy.arange(count)))(prompts)


def draw(seed, prompts, latents, mean_latents, width):
  """Draws latents; each depends on the seed, its prompt's position and its own position, and on nothing else.

  Args:
    seed: int.
    prompts: int [P], positions of the prompts.
    latents, mean_latents: L and M.
    width: Z.

  Returns:
    `Latents`.
  """
  prompts = np.asarray(prompts, np.int32)
  each = lambda purpose, count: (
    np.asarray(_draw_all(np.uint32(seed % 2**32), purpose, prompts, count, width))
    if count
    else np.zeros((len(prompts), 0, width), np.float32)
  )
  return Latents(each(_LATENT, latents), each(_MEAN, mean_latents))


def check_name(path):
  """Raises UserError if the name of a latents file says no format that there is."""
  if pathlib.Path(path).suffix.lower() not in _SUFFIXES:
    raise UserError(f"a file of latents ends in {' or '.join(_SUFFIXES)}, not {path}")


def load(path):
  """Reads a file of latents as it is; `fit` checks it against what is wanted.

  Args:
    path: .npz or .safetensors with `z` [L, Z] or [P, L, Z] and perhaps `mean_z` [M, Z] or [P, M, Z].

  Returns:
    {"z": float32 array, "mean_z": float32 array if it has one}.

  Raises:
    UserError: not such a file, no `z`, other arrays, or values that are no finite numbers.
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
  if "z" not in arrays or arrays.keys() - {"z", "mean_z"}:
    raise UserError(
      f"{path} must hold an array 'z' and perhaps 'mean_z', it holds {', '.join(sorted(arrays)) or 'nothing'}"
    )
  for name, array in arrays.items():
    if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
      raise UserError(
        f"{path}: '{name}' must be finite floats [count, width] or [prompts, count, width], it is "
        f"{array.dtype} {list(array.shape)}"
      )
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def fit(arrays, path, prompts, width, *, mean_latents=None, otherwise=MEAN_LATENTS, seed=0):
  """Makes the arrays of a file the latents of some prompts. What has no axis of prompts is used for every one.

  Args:
    arrays: as of `load`.
    path: its name, for errors.
    prompts: P.
    width: Z, the generator's.
    mean_latents: M; None takes the file's, or draws `otherwise` ones where the file has none.
    otherwise: see there.
    seed: of drawn ones.

  Returns:
    `Latents`.

  Raises:
    UserError: another width or number of prompts, or another M than the file's.
  """
  spread = {}
  for name, array in arrays.items():
    if array.shape[-1] != width:
      raise UserError(f"{path}: '{name}' is {array.shape[-1]} wide, the generator's latents are {width}")
    if array.ndim == 3 and len(array) != prompts:
      raise UserError(f"{path}: '{name}' is for {len(array)} prompts, there are {prompts}")
    spread[name] = np.broadcast_to(array, (prompts,) + array.shape[-2:])
  if not spread["z"].shape[1]:
    raise UserError(f"{path}: 'z' is empty")
  mean_z = spread.get("mean_z")
  if mean_z is None or mean_latents == 0:
    count = otherwise if mean_latents is None else mean_latents
    mean_z = draw(seed, np.arange(prompts), 0, count, width).mean_z
  elif mean_latents not in (None, mean_z.shape[1]):
    raise UserError(f"{path}: 'mean_z' has {mean_z.shape[1]} latents, not the {mean_latents} asked for")
  return Latents(spread["z"], mean_z)


def save(latents, path):
  """Writes a file that `load` reads: `z` [P, L, Z] and `mean_z` [P, M, Z].

  Raises:
    UserError: it cannot be written.
  """
  check_name(path)
  arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in latents._asdict().items()}
  if pathlib.Path(path).suffix.lower() == ".npz":
    content = io.BytesIO()
    np.savez(content, **arrays)
    content = content.getvalue()
  else:
    content = safetensors.numpy.save(arrays)
  with files.whole_file(path) as beside:
    beside.write_bytes(content)
  return pathlib.Path(path)
