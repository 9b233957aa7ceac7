"""`python -m aurora_jax COMMAND [--flags]`."""

import os
import sys
import threading

from aurora_jax.cli import environment, main, standard_streams


def run() -> None:
  """The command as a process of its own; does not return."""
  environment.use_utf8()
  standard_streams.prepare()
  _exit(main.main())


def _exit(status: int) -> None:
  """Ends the process. After an error, threads of libraries that still wait for something do not hold it back."""
  waiting = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
  if status and waiting:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


if __name__ == "__main__":
  run()
