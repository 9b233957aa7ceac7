"""Exceptions of the system and of libraries that are no fault of this program, in one line each."""

import os
import re
import sys

from aurora_jax import text
from aurora_jax.errors import UserError

_LONGEST = 300
_SETTING = re.compile(r"(?i)for (environment '|JAX flag )(jax_\w+)")


def explain(error: BaseException) -> UserError | None:
  """What a person can act on, or None: a fault of the program, whose traceback is wanted.

  A full disk, a forbidden folder, too little memory, settings of JAX in the environment that mean nothing here.
  """
  if isinstance(error, OSError):
    return UserError(_of_system(error))
  if isinstance(error, MemoryError):
    return UserError(f"not enough memory{f': {_line(error)}' if str(error) else ''}")
  if "RESOURCE_EXHAUSTED" in str(error):
    return UserError(f"not enough memory on the device: {_line(error)} (a smaller batch size needs less)")
  setting = _SETTING.search(str(error)) if isinstance(error, ValueError) else None
  if setting:
    name = setting[2].upper()
    return UserError(f"{name}={os.environ.get(name, '')} in the environment: JAX takes no such value")
  return _of_platforms()


def _of_system(error: OSError) -> str:
  where = error.filename2 or error.filename
  name = f"{text.printable(text.path_text(where))}: " if isinstance(where, str | bytes | os.PathLike) else ""
  return f"{name}{error.strerror or _line(error) or type(error).__name__}"


def _of_platforms() -> UserError | None:
  """That JAX_PLATFORMS names what this machine, or this installation of JAX, does not have."""
  platforms = os.environ.get("JAX_PLATFORMS", "")
  if not platforms or "jax" not in sys.modules:
    return None
  import jax

  try:
    jax.devices()
  except Exception as error:  # an AssertionError without a message, a RuntimeError
    known = re.search(r"list of known backends: (\[[^\]]*\])", str(error))
    there = f" (this JAX knows {known[1]})" if known else ""
    return UserError(
      f"JAX_PLATFORMS={text.printable(platforms, 40)} in the environment, but JAX finds no such devices here{there}; "
      "JAX_PLATFORMS=cpu, or none, runs on the CPU; for a GPU or TPU, jax[cuda12] or jax[tpu] must be installed"
    )
  return None


def _line(error: BaseException) -> str:
  return text.printable(" ".join(str(error).split()), _LONGEST)
