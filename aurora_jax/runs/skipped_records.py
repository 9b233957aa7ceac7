"""Records that a run could not read: the list on disk, their number, the warnings, the limit.

skipped_records.jsonl has one line per record, in the order in which training first needed them:

    step      number of the batch that needed the record (the step's number, if a step reads one batch)
    number    of the example in its split
    shard     file name
    record    number in the shard
    offset    in bytes, -1 if unknown
    key       of the example
    reason    why it cannot be read

The loader (data/loader.py) reports the records. Process 0 writes the file; every process knows the records of all.

The list depends on data set, seed and step only. A resumed run lists a record once, and another number of processes
gives the same list.
"""

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping

from aurora_jax import files
from aurora_jax.data import corrupt_records, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.errors import UserError
from aurora_jax.parallel import hosts


class NothingSkipped:
  """Does nothing: for training without a data set. `SkippedRecords` has the same methods."""

  @property
  def too_many(self) -> bool:
    """Whether more records than the limit were skipped; the same in all processes."""
    return False

  def begin(self) -> None:
    """Shares the stored list with all processes. Every process must call it at the same point."""

  def add(self, skipped: Mapping[int, corrupt_records.Skip]) -> None:
    """Takes all records that this process could not read so far: the loader's `Batches.skipped`."""

  def share(self) -> None:
    """Shares new records with all processes and writes them. Every process must call it at the same point."""

  def count(self, batches: int) -> int:
    """Number of records that the first `batches` batches skipped, as far as they are shared."""
    del batches
    return 0

  def message(self) -> str:
    """Why training stops when there are too many."""
    return ""


class SkippedRecords(NothingSkipped):
  """The records that all processes skipped so far, over all restarts.

  Attributes:
    size: records in the split.
    most: how many of them may be skipped before training stops.
  """

  def __init__(self, path: pathlib.Path, dataset: Dataset, share: float, resumed: bool):
    """Starts with an empty list, or with the stored one of a resumed run.

    Stored records are tried again; those that can be read by now leave the list.

    Args:
      path: of skipped_records.jsonl.
      dataset: the data set that the run reads.
      share: `data.max_skipped`.
      resumed: whether the run is resumed.

    Raises:
      UserError: the file cannot be read or written.
    """
    self._path, self._data = path, dataset.path
    self.size = len(dataset)
    self.most = int(share * self.size)
    self._known: dict[int, corrupt_records.Skip] = {}  # number -> record, the same in all processes
    self._local: list[corrupt_records.Skip] = []  # of this process, not yet shared
    self._taken = 0  # how many of the loader's
    if hosts.is_primary():
      listed = read(path) if resumed else []
      left = [skip for skip in listed if _is_unreadable(dataset, skip)]
      if left != listed or not resumed or _is_torn(path):
        _write_whole(path, left)
      if len(left) < len(listed):
        print(f"{len(listed) - len(left)} of the {len(listed)} records in {path} can be read again", flush=True)
      self._local = left

  def begin(self) -> None:
    self._add_known(self._collect())

  def add(self, skipped: Mapping[int, corrupt_records.Skip]) -> None:
    if len(skipped) > self._taken:
      self._local += list(skipped.values())[self._taken :]
      self._taken = len(skipped)
      if hosts.is_alone():
        self.share()

  def share(self) -> None:
    new = self._add_known(self._collect())
    if new and hosts.is_primary():
      self._append(new)
      self._warn(new)

  def count(self, batches: int) -> int:
    return sum(skip.step < batches for skip in self._known.values())

  @property
  def too_many(self) -> bool:
    return len(self._known) > self.most

  def message(self) -> str:
    return (
      f"{len(self._known):,} of {self.size:,} records of data set {self._data} cannot be read, more than "
      f"data.max_skipped allows ({self.most:,}); they are listed in {self._path}"
    )

  def _collect(self):
    """The unshared records of all processes, in an order that does not depend on the processes."""
    local, self._local = self._local, []
    everywhere = (
      local if hosts.is_alone() else [skip for text in hosts.from_all(_lines(local)) for skip in _parse(text)]
    )
    return sorted(everywhere, key=lambda skip: (skip.step, skip.number))

  def _add_known(self, skips):
    """Returns those that are new."""
    new = []
    for skip in skips:
      if skip.number not in self._known:
        self._known[skip.number] = skip
        new.append(skip)
    return new

  def _append(self, new):
    try:
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(_lines(new))
        file.flush()
        os.fsync(file.fileno())  # rare, and the next checkpoint relies on it
    except OSError as error:
      raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error

  def _warn(self, new):
    """Warns at the first record and whenever their number has doubled."""
    now = len(self._known)
    if now.bit_length() == (now - len(new)).bit_length():
      return
    print(
      f"aurora_jax train: WARNING: {now:,} of {self.size:,} records could not be read and others took their places "
      f"(more than {self.most:,} stop the run); the newest is {new[-1]}; all are in {self._path}",
      file=sys.stderr,
      flush=True,
    )


def follow(path: pathlib.Path, dataset: Dataset | None, share: float, resumed: bool) -> NothingSkipped:
  """`SkippedRecords`, or `NothingSkipped` if there is no data set."""
  return NothingSkipped() if dataset is None else SkippedRecords(path, dataset, share, resumed)


def read(path: pathlib.Path) -> list[corrupt_records.Skip]:
  """Reads the list of a run. A line that a kill cut off is left out.

  Returns:
    The records; [] if there is no file.

  Raises:
    UserError: the file cannot be read.
  """
  try:
    text = path.read_text(encoding="utf-8", errors="replace")
  except FileNotFoundError:
    return []
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
  return _parse(text)


def _is_torn(path):
  return path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0


def _write_whole(path, skips):
  if skips or path.exists():
    files.write_text(path, _lines(skips))


def _is_unreadable(dataset, skip):
  """Whether a stored record belongs to this data set and still cannot be read."""
  if skip.number >= len(dataset) or dataset.place(skip.number)[:2] != (skip.shard, skip.record):
    return False
  try:
    dataset.image(skip.number)
  except tfrecords.RecordError:
    return True
  return False


def _lines(skips):
  return "".join(json.dumps(dataclasses.asdict(skip)) + "\n" for skip in skips)


def _parse(text):
  skips = []
  for line in text.splitlines():
    try:
      skip = corrupt_records.Skip(**json.loads(line))
    except (ValueError, TypeError):
      continue
    if isinstance(skip.number, int) and isinstance(skip.step, int) and skip.number >= 0:
      skips.append(skip)
  return skips
