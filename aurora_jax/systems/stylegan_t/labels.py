"""What the code needs to know of StyleGAN-T's parameters, by their names: the one place that reads them."""

import re
from collections.abc import Callable
from typing import Any

import jax

from aurora_jax.parallel.mesh import KeyPath, ParamLabel, names_of
from aurora_jax.systems import feature_critic
from aurora_jax.systems.stylegan_t import config as config_lib

TEXT_TOWER = "text_tower"
_FROZEN_RESOLUTION = 64  # of mode "freeze64"


def resolution_of(path: KeyPath) -> int:
  """The resolution of the generator's block that a parameter or buffer belongs to; 0: to none."""
  return next((int(name[1:]) for name in names_of(path) if re.fullmatch(r"b\d+", name)), 0)


def label(path: KeyPath) -> ParamLabel:
  """The label of a parameter or buffer of either network.

  Args:
    path: its key path.
  """
  names, resolution = names_of(path), resolution_of(path)
  own = [name for name in names[:-1] if name not in ("params", "buffers", "spectral", "synthesis")]
  if "heads" in names:
    return feature_critic.label(path)
  module = "/".join(own[:2]) if resolution else own[0] if own else names[-1]
  group = re.sub(r"/conv.*", "_conv", module).replace("/", "_")
  return ParamLabel(
    stage=resolution if resolution > config_lib.FIRST_RESOLUTION else 0,
    matrix=names[-1] in ("weight", "kernel"),
    bias=_is_bias(names),
    module=module,
    group=group,
  )


def _is_bias(names):
  return names[-1] == "bias"


def trains(mode: str, path: KeyPath) -> bool:
  """Whether a parameter of the generator trains in a mode (`config.MODES`)."""
  names = names_of(path)
  if TEXT_TOWER in names or mode == "text_encoder":
    return TEXT_TOWER in names and mode == "text_encoder"
  return mode == "all" or "torgb" in names or resolution_of(path) > _FROZEN_RESOLUTION


def split(params: Any, chosen: Callable[[KeyPath], bool]) -> tuple[Any, Any]:
  """A tree as two of its structure: the chosen leaves, and the others; None takes the place of what is in the other."""
  part = lambda wanted: jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf if chosen(path) is wanted else None, params
  )
  return part(True), part(False)


def join(first: Any, second: Any) -> Any:
  """The inverse of `split`."""
  return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)
