"""A stand-in for `ml_collections.ConfigDict` where that package is not installed.

The files in configs/ read and set fields by name. They need no more than this. Overrides on the command line do need
ml_collections.
"""

from collections.abc import Mapping
from typing import Any


class PlainConfig(dict):
  """A mapping whose values are attributes too; mappings in it become `PlainConfig`s."""

  def __init__(self, values: Mapping[Any, Any] | None = None):
    super().__init__()
    for name, value in (values or {}).items():
      self[name] = value

  def __setitem__(self, name: Any, value: Any) -> None:
    super().__setitem__(name, PlainConfig(value) if isinstance(value, Mapping) else value)

  def __getattr__(self, name: str) -> Any:
    try:
      return self[name]
    except KeyError as error:
      raise AttributeError(f"no field {name}") from error

  def __setattr__(self, name: str, value: Any) -> None:
    self[name] = value

  def to_dict(self) -> dict[Any, Any]:
    """Nested plain dicts."""
    return {name: value.to_dict() if isinstance(value, PlainConfig) else value for name, value in self.items()}


def config_class() -> type:
  """`ml_collections.ConfigDict`, or `PlainConfig` where ml_collections is not installed."""
  try:
    import ml_collections
  except ModuleNotFoundError:
    return PlainConfig
  return ml_collections.ConfigDict
