"""Records that cannot be read: a description of one, and the search for all of them in a data set."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator

from aurora_jax import text
from aurora_jax.data import tfrecords
from aurora_jax.data.dataset import Dataset

# Records per chunk of `verify`. Few, so that progress is reported often.
_CHUNK = 256
_KEY_SHOWN = 100  # characters


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
  """Reads every record of a split and decodes every image.

  Args:
    dataset: the split, opened with `tolerate_corruption`.
    on_progress: called with (records done, records in all).

  Yields:
    A `Skip` with step 0 for each corrupt record, in order.
  """

  def look(number):
    try:
      dataset.image(number)
    except tfrecords.RecordError as error:
      return skip_of(dataset, number, error, 0)
    return None

  numbers = iter(range(len(dataset)))
  done = 0
  with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL.
    while chunk := list(itertools.islice(numbers, _CHUNK)):
      yield from filter(None, pool.map(look, chunk))
      done += len(chunk)
      on_progress(done, len(dataset))


def changed_shards(dataset: Dataset) -> Iterator[str]:
  """Yields the names of the shards whose SHA-256 is not that of the manifest. Missing shards are left out.

  All records of such a shard may be readable: it may have been replaced by another one.
  """
  for entry in dataset.manifest["splits"][dataset.split]["shards"]:
    try:
      with open(dataset.path / entry["file"], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
      continue
    if digest != entry.get("sha256", digest):
      yield entry["file"]
