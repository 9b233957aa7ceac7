"""Reads the records of later steps in threads, so that the latency of storage is hidden.

Records that are read at once (a block of `orders.BlockOrder`) are read when the first of them is needed and held until
the last of them has been taken.
"""

import collections
import queue
import threading
from collections.abc import Callable, Sequence

import numpy as np

from aurora_jax.data import tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.orders import Runs


class _Run:
  """Neighboring records. `records` is set before `ready`; an entry is the error that reading it raised."""

  def __init__(self, first: int, count: int):
    self.first, self.count = first, count
    self.left = count  # records that no step has asked for
    self.ready = threading.Event()
    self.records: Sequence[bytes | BaseException] = ()


class StepRecords:
  """The records of one step.

  Attributes:
    numbers: int64 [b], numbers of the examples.
  """

  def __init__(self, numbers: np.ndarray, runs: Sequence[_Run | None]):
    self.numbers = numbers
    self._runs = runs

  def record(self, at: int) -> bytes | None:
    """Waits for the record of a slot. None: it is not read ahead. Raises `tfrecords.RecordError` if it is corrupt."""
    run = self._runs[at]
    if run is None:
      return None
    run.ready.wait()
    record = run.records[int(self.numbers[at]) - run.first]
    if isinstance(record, BaseException):
      raise record
    return record


class ReadAhead:
  """The records of any step, of which those of the next steps are already being read."""

  def __init__(
    self,
    dataset: Dataset,
    plan: Callable[[int], tuple[np.ndarray, Runs]],
    start: int,
    *,
    threads: int,
    steps: int,
    held: int = 0,
    skip: Callable[[int], bool] = lambda number: False,
  ):
    """Starts the threads, but reads nothing yet.

    Args:
      dataset: the data set.
      plan: step -> (numbers of its examples, int64 [b]; the runs that hold them).
      start: the first step.
      threads: reads at a time.
      steps: steps whose reads are begun before they are taken.
      held: runs that are held at most. If more are in use, the least recently used ones are read again when needed.
      skip: examples that need not be read.
    """
    self._dataset, self._plan, self._next_step = dataset, plan, start
    self._ahead, self._held, self._skip = steps, held, skip
    self._lock = threading.Lock()
    self._closed = False
    self._planned: dict[int, StepRecords] = {}
    self._runs: collections.OrderedDict[tuple[int, int], _Run] = collections.OrderedDict()
    self._queue: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
    self._threads = [threading.Thread(target=self._work, name=f"reader {i}", daemon=True) for i in range(threads)]
    for thread in self._threads:
      thread.start()

  def take(self, step: int) -> StepRecords:
    """The records of a step, and begins to read those of the following ones. A step can be taken once."""
    with self._lock:
      while self._next_step <= step + self._ahead:
        self._planned[self._next_step] = self._begin(self._next_step)
        self._next_step += 1
      return self._planned.pop(step)

  def close(self) -> None:
    """Ends the threads. Reads that are under way end first, others are dropped."""
    with self._lock:
      self._closed = True
    while True:
      try:
        self._fail(self._queue.get_nowait(), ValueError("closed"))
      except queue.Empty:
        break
    for _ in self._threads:
      self._queue.put(None)
    for thread in self._threads:
      thread.join()

  def _begin(self, step):
    numbers, runs = self._plan(step)
    columns = numbers.tolist(), runs.window.tolist(), runs.first.tolist(), runs.count.tolist()
    taken = [self._run(*row) for row in zip(*columns)]
    return StepRecords(numbers, taken)

  def _run(self, number, window, first, count):
    """The run that holds a record, whose reading has begun."""
    if self._skip(number):
      return None
    if count == 1:
      return self._submit(_Run(first, count))
    run = self._runs.get((window, first))
    if run is None:
      run = self._runs[window, first] = self._submit(_Run(first, count))
      while len(self._runs) > self._held:
        self._runs.popitem(last=False)
    else:
      self._runs.move_to_end((window, first))
    run.left -= 1
    if not run.left:
      self._runs.pop((window, first), None)
    return run

  def _submit(self, run):
    if self._closed:  # no thread would read it
      self._fail(run, ValueError("closed"))
    else:
      self._queue.put(run)
    return run

  def _work(self):
    while (run := self._queue.get()) is not None:
      try:
        run.records = self._read(run)
        run.ready.set()
      except BaseException as error:
        self._fail(run, error)

  def _read(self, run):
    if run.count > 1:
      return self._dataset.read_run(run.first, run.count)
    try:
      return [self._dataset.read(run.first)]
    except tfrecords.RecordError as error:
      return [error]

  def _fail(self, run, error):
    if run is not None:
      run.records = [error] * run.count
      run.ready.set()
