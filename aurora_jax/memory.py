"""Memory of this process."""

import ctypes
import sys


def return_freed() -> None:
  """Gives freed memory back to the operating system, after work that allocated much for a short time.

  A compilation frees hundreds of megabytes in small pieces. The C library of most Linux systems keeps them for this
  process: a third to a half of the memory of the quickstart's training.
  """
  if sys.platform == "linux":
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
      trim(0)
