"""Versions of a checkpoint's state, and how older ones are read.

Format 2 (now): step, networks/NAME/{params, variables, opt_state, ema}/...
Format 1: step, generator, buffers, ema, discriminator, generator_opt, discriminator_opt, all of Aurora.

Only names differ, so a leaf of an old checkpoint is found by its new name.
"""

from collections.abc import Mapping
from typing import Any

NEWEST = 2

# Format 1's parts and where they are in format 2.
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
  """The format of a stored state, from the names of its parts."""
  return 1 if "networks" not in stored and stored.keys() <= _PARTS.keys() and len(stored) > 1 else NEWEST


def name(stored_name: str, version: int) -> str:
  """A leaf's name in format 2, from its name in another one: "generator/x" is "networks/generator/params/x"."""
  if version == NEWEST:
    return stored_name
  part, slash, rest = stored_name.partition("/")
  return _PARTS[part] + slash + rest


def part(leaf_name: str) -> str:
  """The part of a state that a leaf belongs to: "generator/params" for "networks/generator/params/...", else its root."""
  names = leaf_name.split("/")
  return "/".join(names[1:3]) if names[0] == "networks" else names[0]
