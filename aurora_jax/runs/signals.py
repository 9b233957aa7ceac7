"""Ctrl-C and SIGTERM as a wish to stop: the step in progress is finished and the state is saved."""

import os
import signal
import socket
import sys
import threading

_NAMES = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminated"}


class Interrupts:
  """A context manager in which the two signals set `reason` instead of ending the process.

  The first one says so at once; a Ctrl-C after it ends the process at once, even while the main thread compiles (when
  Python's own handlers have to wait): a thread of ours reads the signals from the wake-up descriptor. A SIGTERM after it
  changes nothing: schedulers send several, and the save is under way.

  Attributes:
    reason: None, "interrupt" or "terminated".
    idle: whether nothing would be lost if the process ended now: it starts up, compiles its first step, or has saved
      and writes its report.
  """

  def __init__(self, idle_status=None):
    """Args: idle_status: the exit status with which a signal ends an idle process at once; None: it never does."""
    self.reason = None
    self.idle = True
    self._idle_status = idle_status
    self._old_handlers = None

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self  # only the main thread may set handlers; elsewhere the signals keep their meaning
    self._read_end, self._write_end = socket.socketpair()
    self._write_end.setblocking(False)
    self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in _NAMES}
    self._old_wakeup = signal.set_wakeup_fd(self._write_end.fileno(), warn_on_full_buffer=False)
    self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
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
      words = "finishing this step, then saving"
      if number == signal.SIGINT:
        words += " (Ctrl-C again: stop at once, without saving)"
      _say(words)
    elif number == signal.SIGINT:
      _leave("stopped at once; the last complete checkpoint stands", 130)
    else:
      _say("another SIGTERM; the state is being saved (Ctrl-C: stop at once)")


def _leave(words, status):
  _say(words)
  if sys.stderr.isatty():
    os.write(sys.stderr.fileno(), b"\x1b[?25h")  # the progress bar hid the cursor
  os._exit(status)


def _say(words):
  # Not print: the main thread may hold the lock of the stream.
  os.write(2, f"\naurora_jax: {words}\n".encode())
