"""The base class of all networks and layers."""

from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import numpy as np


class Module(nn.Module):
  """A Flax module that is quick to trace.

  Flax traces the initializer of every parameter that a network is given, for its shape. That took 38 % of the time for
  tracing a small training step (jax 0.10.2, flax 0.12). Here the shape is compared with the initializer's argument.
  """

  @nn.nowrap
  def param(
    self, name: str, init_fn: Callable[..., Any], *init_args: Any, unbox: bool = True, **init_kwargs: Any
  ) -> Any:
    """As `flax.linen.Module.param`.

    Args:
      name: of the parameter.
      init_fn: (key, *init_args, **init_kwargs) -> its first value. The first of `init_args`, if any, is its shape.
      *init_args: see `init_fn`.
      unbox: as of Flax.
      **init_kwargs: see `init_fn`.

    Raises:
      flax.errors.ScopeParamShapeError: the parameter that the network was given has another shape.
    """
    if not self.has_variable("params", name):
      return super().param(name, init_fn, *init_args, unbox=unbox, **init_kwargs)
    value = self.get_variable("params", name)
    if init_args and np.shape(value) != tuple(init_args[0]):
      raise flax.errors.ScopeParamShapeError(name, "/".join(self.path), tuple(init_args[0]), np.shape(value))
    return value
