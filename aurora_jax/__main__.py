"""Entry point of `python -m aurora_jax COMMAND`."""

import sys

from aurora_jax.cli.main import main

if __name__ == "__main__":
  sys.exit(main())
