"""Records that cannot be read: what is known of one, and the search for all of them in a data set."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import os

from aurora_jax import text
from aurora_jax.data import tfrecords

# Records that the threads of `verify` are given at once: few enough that a shard's end is not long in coming.
_CHUNK = 256
_KEY_SHOWN = 100  # characters


@dataclasses.dataclass(frozen=True)
class Skip:
  """A record that could not be read, and when that was found out.

  Attributes:
    number: of the example in its split.
    shard: file name of its shard.
    record: its number in the shard.
    offset: byte at which it begins; -1 where that is unknown.
    key: of the example, "" where that much could not be read.
    reason: why, such as "has a wrong checksum".
    step: the global step whose batch first wanted it.
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


def skip_of(dataset, number, error, step):
  """The `Skip` for a record.

  Args:
    dataset: a `Dataset`.
    number: of the example.
    error: the `tfrecords.RecordError` that it gave.
    step: int.
  """
  shard, record, offset = dataset.place(number)
  return Skip(number, shard, record, offset, error.key, error.reason, step)


def verify(dataset, on_progress=lambda done, total: None):
  """Reads every record of a split and decodes every picture.

  Args:
    dataset: a `Dataset`, opened with `tolerate_damage`.
    on_progress: called with (records done, records in all).

  Yields:
    A `Skip` (of step 0) for each damaged record, in order.
  """

  def look(number):
    try:
      dataset.picture(number)
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


def changed_shards(dataset):
  """Names of the shards whose bytes are not those that the manifest has the SHA-256 of; a missing one is left out.

  Every record may be whole in such a shard, when somebody has put another one in its place.
  """
  for entry in dataset.manifest["splits"][dataset.split]["shards"]:
    try:
      with open(dataset.path / entry["file"], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
      continue
    if digest != entry.get("sha256", digest):
      yield entry["file"]
