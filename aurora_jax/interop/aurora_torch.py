"""Aurora's exchange with its PyTorch release under its former name; see systems/aurora/released.py."""

from aurora_jax.systems.aurora.released import (
  config_from_released,
  config_to_released,
  entries,
  export_generator,
  import_generator,
)

__all__ = ["config_from_released", "config_to_released", "entries", "export_generator", "import_generator"]
