"""What compilers write to stderr while they work, kept off the terminal."""

import contextlib
import os
import sys
import tempfile

# The partitioner says so when it can do no better than to copy a whole array to every device.
REMATERIALIZATION = "nvoluntary full rematerialization"


@contextlib.contextmanager
def captured():
  """Redirects the process's stderr, that of C++ included. If something goes wrong within, what was said is shown.

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
      if not isinstance(error, ValueError):  # wrong input is said in one line, without this
        print(said[-4000:], file=sys.stderr)
      raise
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
