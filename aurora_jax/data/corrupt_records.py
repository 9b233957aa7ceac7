"""Records that cannot be read: a description of one, and the search for all of them in a data set."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from aurora_jax import text
from aurora_jax.data import remote_shards, tfrecords
from aurora_jax.data.dataset import Dataset

_RUN = 64  # records that are read at once
_AHEAD = 4  # tasks per thread that wait
_KEY_SHOWN = 100  # characters
_PART_BYTES = 1 << 20
_Task, _Result = TypeVar("_Task"), TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Skip:
  """A record that could not be read.

  Attributes:
    number: number of the example in its split.
    shard: file name of its shard.
    record: number of the record in the shard.
    offset: byte at which it begins; -1 if unknown.
    key: key of the example; "" if it could not be read.
    reason: the reason, such as "has a wrong checksum".
    step: the first global step whose batch needed the record.
  """

  number: int
  shard: str
  record: int
  offset: int
  key: str
  reason: str
  step: int

  def __str__(self):
    key = f" ({text.printable(self.key, _KEY_SHOWN)})" if self.key else ""
    return f"{self.shard}: record {self.record}{key}: {self.reason}"


def skip_of(dataset: Dataset, number: int, error: tfrecords.RecordError, step: int) -> Skip:
  """Describes a record that could not be read.

  Args:
    dataset: the split.
    number: number of the example.
    error: the error that reading it raised.
    step: the global step that needed it.
  """
  shard, record, offset = dataset.place(number)
  return Skip(number, shard, record, offset, error.key, error.reason, step)


def verify(dataset: Dataset, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Skip]:
  """Reads every record of a split and decodes every image, in threads.

  Args:
    dataset: the split, opened with `tolerate_corruption`.
    on_progress: called with (records done, records in all).

  Yields:
    A `Skip` with step 0 for each corrupt record, in order.
  """

  def look(first):
    found = []
    for number, record in enumerate(dataset.read_run(first, min(_RUN, len(dataset) - first)), first):
      try:
        if isinstance(record, tfrecords.RecordError):
          raise record
        dataset.image(number, record)
      except tfrecords.RecordError as error:
        found.append(skip_of(dataset, number, error, 0))
    return found

  for i, found in enumerate(_in_threads(look, range(0, len(dataset), _RUN)), 1):
    yield from found
    on_progress(min(i * _RUN, len(dataset)), len(dataset))


def _in_threads(function: Callable[[_Task], _Result], tasks: Iterable[_Task]) -> Iterator[_Result]:
  """The results of a function for each task, in order. Reading, hashing and decoding release Python's lock."""
  threads = min(16, os.cpu_count() or 1)
  waiting = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    try:
      for task in tasks:
        waiting.append(pool.submit(function, task))
        if len(waiting) > _AHEAD * threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()


def changed_shards(
  dataset: Dataset, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[str]:
  """Yields the names of the shards whose SHA-256 is not that of the manifest. Missing shards are left out.

  All records of such a shard may be readable: it may have been replaced by another one.

  Args:
    dataset: the split.
    on_progress: called with (shards done, shards in all).
  """

  def look(entry):
    digest = hashlib.sha256()
    try:
      with remote_shards.stream(dataset.path / entry["file"]) as file:
        while part := file.read(_PART_BYTES):
          digest.update(part)
    except OSError:
      return False
    return digest.hexdigest() != entry.get("sha256", digest.hexdigest())

  entries = dataset.manifest["splits"][dataset.split]["shards"]
  for i, (entry, changed) in enumerate(zip(entries, _in_threads(look, entries)), 1):
    if changed:
      yield entry["file"]
    on_progress(i, len(entries))
