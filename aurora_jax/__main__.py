"""`python -m aurora_jax COMMAND [--flags]`."""

import os
import sys
import threading

from aurora_jax.cli import main


def _leave(status):
  """Ends the process. After an error, threads of libraries that still wait for something do not hold it back."""
  waiting = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
  if status and waiting:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


if __name__ == "__main__":
  _leave(main.main())
