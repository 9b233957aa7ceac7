"""Files of latents, .npz or .safetensors, as named arrays. Imports no JAX, so that a wrong file is reported at once."""

import io
import os
import pathlib
from collections.abc import Mapping

import numpy as np

from aurora_jax import files
from aurora_jax.errors import UserError

_SUFFIXES = (".npz", ".safetensors")


def check_name(path: str | os.PathLike) -> None:
  """Raises `UserError` unless the name of a latents file ends in a known suffix."""
  if pathlib.Path(path).suffix.lower() not in _SUFFIXES:
    raise UserError(f"a file of latents ends in {' or '.join(_SUFFIXES)}, not {path}")


def load(path: str) -> dict[str, np.ndarray]:
  """Reads a file of latents. `latents.fit` compares it with a system.

  Args:
    path: .npz or .safetensors with `z` [L, Z] or [P, L, Z], optionally `mean_z` [M, Z] or [P, M, Z], and the additional
      latents of the system under their names.

  Returns:
    {name: float32 array}.

  Raises:
    UserError: not such a file, no `z`, or values that are not finite.
  """
  check_name(path)
  if not pathlib.Path(path).is_file():
    raise UserError(f"file of latents not found: {path}")
  try:
    if pathlib.Path(path).suffix.lower() == ".npz":
      with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    else:
      import safetensors.numpy

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


def save(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> pathlib.Path:
  """Writes a file that `load` reads.

  Raises:
    UserError: it cannot be written.
  """
  check_name(path)
  if pathlib.Path(path).suffix.lower() == ".npz":
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    content = buffer.getvalue()
  else:
    import safetensors.numpy

    content = safetensors.numpy.save(dict(arrays))
  with files.atomic_file(path) as tmp_path:
    tmp_path.write_bytes(content)
  return pathlib.Path(path)
