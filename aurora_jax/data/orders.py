"""The orders in which records are visited: a full shuffle, a shuffle of blocks, and a mixture of several data sets.

An order gives the record at a slot of a step. It is a pure function of (its fields, seed, batch size, step, slot), is
computed in constant time at any step, and visits each record once per epoch. It does not know of hosts.

`BlockOrder` is for storage with slow single reads. Records that are neighbors in the files form blocks. A keyed
permutation orders the blocks, and consecutive blocks of that order form windows. The slots of a batch are divided into
groups of neighboring slots; each group has its own blocks of a window, whose records it visits in the order of another
keyed permutation. If every group of slots belongs to one host, a block is read by one host, once.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from aurora_jax.data import shuffle
from aurora_jax.errors import UserError

# The pattern in which a mixture takes from its data sets has this length: weights are multiples of its inverse.
_PERIOD = 10_000


class Order(Protocol):
  """An order of records. `size` is their number."""

  @property
  def size(self) -> int: ...

  def __call__(self, seed: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The records at some slots.

    Args:
      seed: seed of the order.
      batch_size: global batch size.
      step: global step, or int64 [b] with one step per slot.
      slots: int64 [b] in range(batch_size).

    Returns:
      int64 [b] in range(size).
    """
    ...

  def runs(self, seed: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray, records: np.ndarray) -> "Runs":
    """What to read at once for the records that the order gives: `records` is its result for the other arguments."""
    ...

  def held_runs(self, batch_size: int) -> int:
    """Runs of several records that are in use at a time, about; 0 if records are read one by one."""
    ...


@dataclasses.dataclass(frozen=True)
class Runs:
  """Neighboring records that are read at once and kept for a while.

  Attributes:
    window: int64 [b]. A run is read once in each window that it occurs in.
    first: int64 [b], the first record of the run that holds the record of each slot.
    count: int64 [b], records in the run.
  """

  window: np.ndarray
  first: np.ndarray
  count: np.ndarray


@dataclasses.dataclass(frozen=True)
class FullOrder:
  """A permutation of all records per epoch: `shuffle.example_index`."""

  size: int

  def __call__(self, seed: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray) -> np.ndarray:
    return shuffle.example_index(seed, self.size, batch_size, step, slots)

  def runs(self, seed: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray, records: np.ndarray) -> Runs:
    """Each record on its own."""
    del seed, batch_size, step, slots
    return Runs(np.zeros_like(records), records, np.ones_like(records))

  def held_runs(self, batch_size: int) -> int:
    """None."""
    del batch_size
    return 0


@dataclasses.dataclass(frozen=True)
class _Geometry:
  """A `BlockOrder` at one batch size.

  Attributes:
    groups: groups of slots, a divisor of the batch size.
    width: slots per group.
    window_blocks: blocks per window: the wanted number, raised so that a window consists of whole batches and of as
      many blocks for each group.
    window_records: records per window.
    windows: full windows per epoch. The remaining records are permuted as a whole.
    blocks: blocks per epoch that are full.
  """

  groups: int
  width: int
  window_blocks: int
  window_records: int
  windows: int
  blocks: int


@dataclasses.dataclass(frozen=True)
class BlockOrder:
  """A permutation of blocks of neighboring records, and permutations within windows of blocks.

  Attributes:
    size: number of records.
    block: records per block.
    window: least number of blocks per window. It is raised where batches do not fill such windows evenly. The records
      of a window are held in memory.
    groups: groups of slots with their own blocks; their greatest common divisor with the batch size is taken.
  """

  size: int
  block: int = 64
  window: int = 64
  groups: int = 8

  def geometry(self, batch_size: int) -> _Geometry:
    """Sizes at a batch size."""
    groups = math.gcd(self.groups, batch_size)
    unit = math.lcm(groups, batch_size // math.gcd(batch_size, self.block))
    window_blocks = -(-self.window // unit) * unit
    blocks = self.size // self.block
    return _Geometry(
      groups,
      batch_size // groups,
      window_blocks,
      window_blocks * self.block,
      blocks // window_blocks,
      blocks,
    )

  def __call__(self, seed: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray) -> np.ndarray:
    sizes = self.geometry(batch_size)
    place, epoch, window, inside = self._windows(sizes, batch_size, step, slots)
    records = np.empty_like(place)
    full = window < sizes.windows
    if full.any():
      records[full] = self._of_window(seed, sizes, batch_size, place[full], epoch[full], window[full])
    if not full.all():
      records[~full] = self._of_tail(seed, sizes, epoch[~full], inside[~full])
    return records

  def runs(self, seed: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray, records: np.ndarray) -> Runs:
    """The block of each record."""
    del seed
    sizes = self.geometry(batch_size)
    _, epoch, window, _ = self._windows(sizes, batch_size, step, slots)
    first = records // self.block * self.block
    return Runs(epoch * (sizes.windows + 1) + window, first, np.minimum(self.block, self.size - first))

  def held_runs(self, batch_size: int) -> int:
    """The blocks of two windows: reading ahead may reach into the next one."""
    return 2 * (self.geometry(batch_size).window_blocks + 1)

  def _windows(self, sizes, batch_size, step, slots):
    """(place in the whole sequence, epoch, window, place in the window), int64 [b] each. The tail is a window too."""
    place = np.asarray(step, np.int64) * batch_size + np.atleast_1d(np.asarray(slots, np.int64))
    epoch, inside = np.divmod(place, self.size)
    window = np.minimum(inside // sizes.window_records, sizes.windows)
    return place, epoch, window, inside - window * sizes.window_records

  def _of_window(self, seed, sizes, batch_size, place, epoch, window):
    # A window has a multiple of `batch_size` places. Each group therefore has equally many of them, wherever in a batch
    # the window begins.
    group = place % batch_size // sizes.width
    begin = epoch * self.size + window * sizes.window_records
    rank = _places_before(place, group, sizes, batch_size) - _places_before(begin, group, sizes, batch_size)
    keys = shuffle.fold(seed, zlib.crc32(b"window"), epoch, window, group)
    per_group = sizes.window_blocks // sizes.groups
    chosen = shuffle.keyed_permutation(keys, per_group * self.block, rank)
    block = window * sizes.window_blocks + group * per_group + chosen // self.block
    return self._block(seed, sizes, epoch, block) * self.block + chosen % self.block

  def _of_tail(self, seed, sizes, epoch, inside):
    begin = sizes.windows * sizes.window_records
    keys = shuffle.fold(seed, zlib.crc32(b"tail"), epoch)
    place = begin + shuffle.keyed_permutation(keys, self.size - begin, inside)
    block = place // self.block
    whole = block < sizes.blocks  # the records after the last full block keep their place
    block[whole] = self._block(seed, sizes, epoch[whole], block[whole])
    return block * self.block + place % self.block

  def _block(self, seed, sizes, epoch, place):
    """The block at each place of an epoch's order of blocks."""
    keys = shuffle.fold(seed, zlib.crc32(b"block"), epoch)
    return shuffle.keyed_permutation(keys, sizes.blocks, place) if len(place) else place


def _places_before(place, group, sizes, batch_size):
  """How many places of a group of slots come before each place."""
  return place // batch_size * sizes.width + np.clip(place % batch_size - group * sizes.width, 0, sizes.width)


@dataclasses.dataclass(frozen=True)
class MixedOrder:
  """An order over several data sets that follow each other in one numbering.

  In each period of 10,000 slots (per group of slots) every data set has its share of the slots, to a slot. A keyed
  permutation distributes them. Each data set is visited in its own order, each of its records once per its own epoch.

  Attributes:
    orders: the order of each data set.
    counts: slots of each data set in a period; their sum is the period.
    groups: groups of slots that are distributed separately. With `BlockOrder`s it is their number of groups.
  """

  orders: tuple[Order, ...]
  counts: tuple[int, ...]
  groups: int = 1

  @property
  def size(self) -> int:
    """Number of records of all data sets."""
    return sum(order.size for order in self.orders)

  def __call__(self, seed: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray) -> np.ndarray:
    records = np.empty(len(np.atleast_1d(slots)), np.int64)
    for start, order, own_seed, at, own_step, own_slots in self._split(seed, batch_size, step, slots):
      records[at] = start + order(own_seed, batch_size, own_step, own_slots)
    return records

  def runs(self, seed: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray, records: np.ndarray) -> Runs:
    """The runs of each data set. Windows of different data sets have nothing in common but their use."""
    window, first, count = (np.zeros(len(records), np.int64) for _ in range(3))
    for number, part in enumerate(self._split(seed, batch_size, step, slots)):
      start, order, own_seed, at, own_step, own_slots = part
      runs = order.runs(own_seed, batch_size, own_step, own_slots, records[at] - start)
      window[at], first[at], count[at] = runs.window * len(self.orders) + number, start + runs.first, runs.count
    return Runs(window, first, count)

  def held_runs(self, batch_size: int) -> int:
    """Those of all data sets, twice: groups of slots may be in different windows."""
    return 2 * sum(order.held_runs(batch_size) for order in self.orders)

  def _split(self, seed, batch_size, step, slots):
    """Yields (first record, order, seed, bool [b] which slots, their steps and slots within the data set) per data set.

    The slots of a data set are numbered through, separately in each group, as if they were those of its own batches.
    """
    slots = np.atleast_1d(np.asarray(slots, np.int64))
    width = batch_size // math.gcd(self.groups, batch_size)
    group = slots // width
    period, inside = np.divmod(np.asarray(step, np.int64) * width + slots % width, _PERIOD)
    chosen = shuffle.keyed_permutation(
      shuffle.fold(seed, zlib.crc32(b"mixture"), group, period), sum(self.counts), inside
    )
    begin = start = 0
    for number, (order, count) in enumerate(zip(self.orders, self.counts)):
      at = (chosen >= begin) & (chosen < begin + count)
      own = period[at] * count + chosen[at] - begin
      own_seed = int(shuffle.fold(seed, zlib.crc32(b"data set"), number)[0] >> np.uint64(1))
      yield start, order, own_seed, at, own // width, group[at] * width + own % width
      begin, start = begin + count, start + order.size


def counts_of(weights: Sequence[float]) -> tuple[int, ...]:
  """Slots of each data set in a period of a `MixedOrder`.

  Args:
    weights: positive, of any sum.

  Raises:
    UserError: a share below 1/10,000.
  """
  shares = np.asarray(weights, np.float64) / np.sum(weights) * _PERIOD
  counts = np.floor(shares).astype(int)
  for number in np.argsort(counts - shares, kind="stable")[: _PERIOD - counts.sum()]:  # the largest remainders
    counts[number] += 1
  if (counts < 1).any():
    raise UserError(f"a weight of {min(weights):g} of {np.sum(weights):g} is less than one image in {_PERIOD:,}")
  return tuple(counts.tolist())


def build(
  kind: str, sizes: Sequence[int], weights: Sequence[float], block: int = 64, window: int = 64, groups: int = 8
) -> Order:
  """The order of one or several data sets.

  Args:
    kind: "full" or "blocks".
    sizes: number of records of each data set.
    weights: share of each data set, for several.
    block: see `BlockOrder`.
    window: see `BlockOrder`.
    groups: see `BlockOrder`.

  Raises:
    UserError: a share that is too small.
  """
  blocks = kind == "blocks"
  orders = tuple(BlockOrder(size, block, window, groups) if blocks else FullOrder(size) for size in sizes)
  return orders[0] if len(orders) == 1 else MixedOrder(orders, counts_of(weights), groups if blocks else 1)
