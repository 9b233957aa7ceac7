"""Calls a function of the step ahead of its consumer, in threads. The results come in the order of the steps."""

import collections
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class _Call(Generic[Result]):
  """One call: its argument, and its result or exception once `done` is set."""

  def __init__(self, step: int):
    self.step = step
    self.done = threading.Event()
    self.result: Result | None = None
    self.error: BaseException | None = None


class Prefetch(Generic[Result]):
  """Iterator over `function(step)` for all steps from a first one on. It never ends.

  The threads end with `close`. They are daemons, because Python waits for other threads before it runs the exit
  handlers that could close them.
  """

  def __init__(self, function: Callable[[int], Result], start: int, threads: int, ahead: int):
    """Starts the threads.

    Args:
      function: called from several threads.
      start: the first step.
      threads: number of threads.
      ahead: calls that are begun before their results are asked for.
    """
    self._function, self._next_step = function, start
    self._calls: collections.deque[_Call[Result]] = collections.deque()
    self._queue: queue.SimpleQueue[_Call[Result] | None] = queue.SimpleQueue()
    self._closed = False
    self._threads = [
      threading.Thread(target=self._work, name=f"loader {number}", daemon=True) for number in range(threads)
    ]
    for thread in self._threads:
      thread.start()
    for _ in range(max(ahead, threads)):
      self._begin()

  def __iter__(self) -> "Prefetch[Result]":
    return self

  def __next__(self) -> Result:
    """The next result. Raises what the function raised."""
    if self._closed:
      raise ValueError("closed")
    call = self._calls.popleft()
    self._begin()
    call.done.wait()
    if call.error is not None:
      raise call.error
    return call.result  # pyrefly: ignore

  def close(self) -> None:
    """Ends the threads, after the calls that are running."""
    self._closed = True
    for _ in self._threads:
      self._queue.put(None)
    for thread in self._threads:
      thread.join()

  def _begin(self):
    call = _Call(self._next_step)
    self._next_step += 1
    self._calls.append(call)
    self._queue.put(call)

  def _work(self):
    while (call := self._queue.get()) is not None and not self._closed:
      try:
        call.result = self._function(call.step)
      except BaseException as error:
        call.error = error
      call.done.set()
