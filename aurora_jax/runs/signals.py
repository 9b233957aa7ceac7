"""Ctrl-C, SIGTERM and SIGHUP as requests to stop: training finishes the current step and saves the state."""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import TracebackType
from typing import NoReturn

# SIGHUP: the terminal has gone, or the connection to it.
_NAMES = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):
  _NAMES[signal.SIGHUP] = "terminated"


class Signals:
  """A context manager in which SIGINT, SIGTERM and SIGHUP set `reason` instead of ending the process.

  The first signal prints a message at once. A later Ctrl-C ends the process at once. A later SIGTERM or SIGHUP changes
  nothing: schedulers send several, and the state is being saved. A SIGHUP that is ignored (`nohup`) stays so.

  A thread reads the signals from the wake-up descriptor. Python's own handlers would wait while the main thread
  compiles.

  Attributes:
    reason: None, "interrupt" or "terminated".
    idle: whether the process can end now without losing work: it starts, compiles its first step, or has saved and
      writes its report. The caller sets it.
  """

  def __init__(self, idle_status: int | None = None):
    """Sets no handler yet.

    Args:
      idle_status: the exit status with which a signal ends an idle process at once; None: an idle process goes on.
    """
    self.reason: str | None = None
    self.idle = True
    self._idle_status = idle_status
    self._old_handlers = None

  def __enter__(self) -> "Signals":
    if threading.current_thread() is not threading.main_thread():
      return self  # only the main thread may set handlers; elsewhere the signals keep their meaning
    self._read_end, self._write_end = socket.socketpair()
    self._write_end.setblocking(False)
    self._old_handlers = {
      number: signal.signal(number, lambda *_: None) for number in _NAMES if not _is_ignored_hangup(number)
    }
    self._old_wakeup = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
    self._thread.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._old_handlers is None:
      return
    signal.set_wakeup_fd(self._old_wakeup)
    for number, handler in self._old_handlers.items():
      signal.signal(number, handler)
    self._write_end.close()  # ends the thread
    self._thread.join()
    self._read_end.close()

  def _listen(self):
    while data := self._read_end.recv(64):
      for number in data:
        if number in _NAMES:
          self._receive(number)

  def _receive(self, number):
    if self.reason is None:
      self.reason = _NAMES[number]
      if self.idle and self._idle_status is not None:
        _leave("stopped at once; no step was done since the newest checkpoint", self._idle_status)
      message = "finishing this step, then saving"
      if number == signal.SIGINT:
        message += " (Ctrl-C again: stop at once, without saving)"
      _print(message)
    elif number == signal.SIGINT:
      _leave("stopped at once; the last complete checkpoint stands", 130)
    else:
      _print(f"another {signal.Signals(number).name}; the state is being saved (Ctrl-C: stop at once)")


def _is_ignored_hangup(number):
  return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN


def _leave(message: str, status: int) -> NoReturn:
  _print(message)
  if sys.stderr.isatty():
    with contextlib.suppress(OSError):
      os.write(sys.stderr.fileno(), b"\x1b[?25h")  # the progress bar hid the cursor
  os._exit(status)


def _print(message):
  # Not the built-in `print`: the main thread may hold the stream's lock.
  with contextlib.suppress(OSError):  # nobody reads it any more
    os.write(2, f"\naurora_jax: {message}\n".encode())
