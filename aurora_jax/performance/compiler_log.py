"""Captures what compilers write to stderr, so that it stays off the terminal."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Generator

# Part of the partitioner's warning that it copies a whole array to every device.
REMATERIALIZATION = "nvoluntary full rematerialization"


@contextlib.contextmanager
def captured() -> Generator[Callable[[], str], None, None]:
  """Redirects stderr of the process, including that of C++ code. If the body raises an error, the end of it is printed.

  A ValueError (bad input) is the exception: it is a one-line message and needs no log.

  Yields:
    A function that returns the text so far.
  """
  sys.stderr.flush()
  stderr = os.dup(2)
  with tempfile.TemporaryFile() as file:
    os.dup2(file.fileno(), 2)

    def text():
      sys.stderr.flush()
      size = os.fstat(file.fileno()).st_size
      return os.pread(file.fileno(), size, 0).decode(errors="replace")

    try:
      yield text
    except BaseException as error:
      said = text()
      os.dup2(stderr, 2)
      if not isinstance(error, ValueError):
        print(said[-4000:], file=sys.stderr)
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
