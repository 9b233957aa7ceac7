"""Formats of a checkpoint's state and how older ones are read.

Format 2 (current): step, networks/NAME/{params, variables, opt_state, ema}/...
Format 1 (Aurora only): step, generator, buffers, ema, discriminator, generator_opt, discriminator_opt.

Only the names of the leaves differ.
"""

from collections.abc import Mapping
from typing import Any

NEWEST = 2

# Part of format 1 -> its name in format 2.
_PARTS = {
  "step": "step",
  "generator": "networks/generator/params",
  "buffers": "networks/generator/variables/buffers",
  "ema": "networks/generator/ema",
  "generator_opt": "networks/generator/opt_state",
  "discriminator": "networks/discriminator/params",
  "discriminator_opt": "networks/discriminator/opt_state",
}


def of_tree(stored: Mapping[str, Any]) -> int:
  """The format number of a stored state, from the names of its parts."""
  return 1 if "networks" not in stored and stored.keys() <= _PARTS.keys() and len(stored) > 1 else NEWEST


def name(stored_name: str, version: int) -> str:
  """Translates a leaf's name from format `version` to format 2: "generator/x" to "networks/generator/params/x"."""
  if version == NEWEST:
    return stored_name
  part, slash, rest = stored_name.partition("/")
  return _PARTS[part] + slash + rest


def part(leaf_name: str) -> str:
  """The part that a leaf belongs to: "generator/params" for "networks/generator/params/x", "step" for "step"."""
  names = leaf_name.split("/")
  return "/".join(names[1:3]) if names[0] == "networks" else names[0]
