"""The systems by name. A new system is one line here; nothing is imported before it is asked for."""

import difflib
import importlib
import types
from typing import TYPE_CHECKING

from aurora_jax.config import Experiment
from aurora_jax.errors import UserError

if TYPE_CHECKING:
  from aurora_jax.systems import base  # imports JAX, which commands that only read a configuration do not wait for

# Name -> package. Its `config.Experiment` is the configuration, its `system.System` implements `base.System`.
SYSTEMS = {
  "aurora": "aurora_jax.systems.aurora",
  "megan": "aurora_jax.systems.megan",
  "stylegan_t": "aurora_jax.systems.stylegan_t",
}


def _module(name: str, part: str) -> types.ModuleType:
  if name not in SYSTEMS:
    close = difflib.get_close_matches(name, SYSTEMS, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(SYSTEMS)}"
    raise UserError(f"config: no system {name!r}{hint}")
  return importlib.import_module(f"{SYSTEMS[name]}.{part}")


def experiment_class(name: str) -> type[Experiment]:
  """The configuration dataclass of a system, a subclass of `config.Experiment`; UserError if there is no such
  system.
  """
  return _module(name, "config").Experiment


def system_class(name: str) -> "type[base.System]":
  """The implementation of `base.System`; UserError if there is no such system."""
  return _module(name, "system").System


def released(name: str) -> types.ModuleType:
  """The module that exchanges weights with a system's PyTorch release."""
  return _module(name, "released")


def converter(name: str) -> types.ModuleType:
  """The module that converts a system's weight files to run folders and back; UserError if it has none."""
  try:
    return _module(name, "convert")
  except ModuleNotFoundError as error:
    if error.name != f"{SYSTEMS[name]}.convert":
      raise
    raise UserError(f"weights of system '{name}' cannot be converted") from error
