"""The records that a run could not read: its list, their number, the warnings, the limit.

skipped_records.jsonl has one line per record, in the order in which training first wanted them: `step` (number of the
batch: the step's, where a step reads one batch), `number` (in the split), `shard`, `record` (its number there), `offset`
(in bytes, -1: unknown), `key`, `reason`.
The loader tells of them (data/loader.py); process 0 writes, and each of several processes knows those of all.

The list is a function of data set, seed and step alone: a run that is resumed meets what it had met again and lists it
once, and another number of processes comes to the same list.
"""

import dataclasses
import json
import os
import sys

from aurora_jax import files
from aurora_jax.data import corrupt_records, tfrecords
from aurora_jax.errors import UserError
from aurora_jax.parallel import hosts


class SkippedRecords:
  """What was skipped so far, by all processes, over all restarts.

  Attributes:
    size: records in the split.
    most: of them may be skipped before training stops.
  """

  def __init__(self, path, dataset, share, resumed):
    """Takes up the list of a run that goes on: its records are tried again, and those that were mended leave it.

    Args:
      path: of skipped_records.jsonl.
      dataset: the `Dataset`.
      share: `data.max_skipped`.
      resumed: whether the run goes on; a new one begins with an empty list.

    Raises:
      UserError: the file cannot be read or written.
    """
    self._path, self._data = path, dataset.path
    self.size = len(dataset)
    self.most = int(share * self.size)
    self._known = {}  # number -> Skip, the same in all processes
    self._own = []  # of this process, not yet told to the others
    self._taken = 0  # of the loader's
    if hosts.is_first():
      listed = read(path) if resumed else []
      left = [skip for skip in listed if _is_unreadable(dataset, skip)]
      if left != listed or not resumed or _is_torn(path):
        _write_whole(path, left)
      if len(left) < len(listed):
        print(f"{len(listed) - len(left)} of the {len(listed)} records in {path} can be read again", flush=True)
      self._own = left

  def begin(self):
    """Tells the other processes what stands listed. Several processes must come here at the same point."""
    self._take_up(self._gather())

  def met(self, skipped):
    """Takes what the loader could not read so far, its `Batches.skipped`."""
    if len(skipped) > self._taken:
      self._own += list(skipped.values())[self._taken :]
      self._taken = len(skipped)
      if hosts.is_alone():
        self.share()

  def share(self):
    """Tells the other processes, and lists what is new. Several processes must come here at the same point."""
    new = self._take_up(self._gather())
    if new and hosts.is_first():
      self._append(new)
      self._warn(new)

  def count(self, batches):
    """How many records the first so many batches skipped; of several processes, as far as `share` has told."""
    return sum(skip.step < batches for skip in self._known.values())

  @property
  def too_many(self):
    """Whether there are more than the limit; the same in all processes."""
    return len(self._known) > self.most

  def in_words(self):
    """Why training stops."""
    return (
      f"{len(self._known):,} of {self.size:,} records of data set {self._data} cannot be read, more than data.max_skipped allows "
      f"({self.most:,}); they are listed in {self._path}"
    )

  def _gather(self):
    """What any process has to tell, in an order that does not depend on which one."""
    own, self._own = self._own, []
    told = own if hosts.is_alone() else [skip for text in hosts.from_all(_lines(own)) for skip in _parse(text)]
    return sorted(told, key=lambda skip: (skip.step, skip.number))

  def _take_up(self, told):
    new = []
    for skip in told:
      if skip.number not in self._known:
        self._known[skip.number] = skip
        new.append(skip)
    return new

  def _append(self, new):
    try:
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(_lines(new))
        file.flush()
        os.fsync(file.fileno())  # rare, and a checkpoint may soon stand for it
    except OSError as error:
      raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error

  def _warn(self, new):
    """At the first record, and whenever their number has doubled."""
    now = len(self._known)
    if now.bit_length() == (now - len(new)).bit_length():
      return
    print(
      f"aurora_jax train: WARNING: {now:,} of {self.size:,} records could not be read and others took their places "
      f"(more than {self.most:,} stop the run); the newest is {new[-1]}; all are in {self._path}",
      file=sys.stderr,
      flush=True,
    )


class NothingSkipped:
  """The twin of `SkippedRecords` for a problem that reads no data set."""

  too_many = False

  def begin(self):
    pass

  def met(self, skipped):
    pass

  def share(self):
    pass

  def count(self, batches):
    return 0


def follow(path, dataset, share, resumed):
  """`SkippedRecords`, or `NothingSkipped` where there is no data set."""
  return NothingSkipped() if dataset is None else SkippedRecords(path, dataset, share, resumed)


def read(path):
  """The list of a run. A line that is cut off (by a kill) is left out.

  Returns:
    list of `corrupt_records.Skip`; [] where there is no file.

  Raises:
    UserError: it cannot be read.
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
  """Whether a listed record is one of this data set and still cannot be read."""
  if skip.number >= len(dataset) or dataset.place(skip.number)[:2] != (skip.shard, skip.record):
    return False
  try:
    dataset.picture(skip.number)
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
