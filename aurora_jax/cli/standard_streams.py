"""Standard streams that never end a command: closed descriptors are opened, and what nobody reads is dropped.

A log reader may end (`| head`, a container's log driver), a terminal may go away, a disk with a log file may be full.
The command goes on, and its result is what it writes to files. A command whose result is its output asks `lost`.
"""

import errno
import io
import os
import select
import sys
from typing import TextIO

_NAMES = {1: "stdout", 2: "stderr"}
# The reader has gone: a pipe, a socket, a terminal that was hung up. Anything else (a full disk) is a failure.
_READER_GONE = (errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.ENXIO)


class _Output(io.FileIO):
  """A descriptor that takes whatever is written; after the first failure it drops it.

  Attributes:
    error: the first failure, or None.
  """

  error: OSError | None = None

  def write(self, data, /) -> int:
    size = memoryview(data).nbytes
    if self.error is not None:
      return size
    try:
      while (written := super().write(data)) is None:  # somebody made the terminal non-blocking
        select.select((), (self,), ())
      return written
    except OSError as error:
      self.error = error
      return size


def prepare() -> None:
  """Makes the process's three standard streams safe to use; to be called once, before anything else opens a file."""
  for number in range(3):
    _open_missing(number)
  if sys.stdin is None:
    sys.stdin = open(0, closefd=False, encoding="utf-8", errors="replace")
  for number, name in _NAMES.items():
    stream = getattr(sys, name)
    if stream is not None and not isinstance(stream, io.TextIOWrapper):
      continue  # somebody put another object there
    raw = _Output(number, "w", closefd=False)
    replacement = io.TextIOWrapper(
      io.BufferedWriter(raw),
      encoding=stream.encoding if stream is not None else "utf-8",
      errors="backslashreplace",
      line_buffering=number == 2 or raw.isatty(),
    )
    setattr(sys, name, replacement)
    setattr(sys, f"__{name}__", replacement)


def _open_missing(number: int) -> None:
  """Opens /dev/null in place of a closed descriptor: the next file that is opened would get its number, and its
  output.
  """
  try:
    os.fstat(number)
  except OSError:
    descriptor = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    if descriptor == number:
      os.set_inheritable(number, True)
    else:
      os.dup2(descriptor, number)
      os.close(descriptor)


def lost(stream: TextIO) -> OSError | None:
  """Why nothing more can be written to a stream, or None. Flushes it."""
  stream.flush()
  return getattr(getattr(getattr(stream, "buffer", None), "raw", None), "error", None)


def is_reader_gone(error: OSError) -> bool:
  """Whether the failure of `lost` means that somebody has seen enough, as opposed to a full disk."""
  return error.errno in _READER_GONE
