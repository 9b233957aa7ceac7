"""Chooses the example of each slot of a step, for data sets in which captions have several images.

An epoch visits every example once, or every caption once with one of its images. Some slots of a batch may be reserved
for pairs: a second image of a caption in the batch, or another warp of the same image. The discriminator then compares
the two.

As in `shuffle`, nothing has a state. Every choice is a pure function of (data set, seed, step, slot), where the data
set consists of the records that are readable at the start.
"""

import zlib
from collections.abc import Sequence

import numpy as np

from aurora_jax.data import shuffle, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.joined import Joined
from aurora_jax.data.orders import FullOrder, Order, Runs
from aurora_jax.errors import UserError

IMAGE, CAPTION = "image", "caption"


class IndexSampler:
  """Gives the examples of any step.

  Attributes:
    digest: int32, a checksum of what is sampled. It must be equal on all hosts.
  """

  def __init__(
    self,
    dataset: Dataset | Joined,
    epoch_unit: str = IMAGE,
    pairs: int = 0,
    warped: bool = False,
    order: Order | None = None,
  ):
    """Reads all captions of the data set once, unless the unit is `IMAGE` and there are no pairs.

    Args:
      dataset: the split. Unreadable examples belong to no caption; with `CAPTION` they are not visited.
      epoch_unit: `IMAGE` or `CAPTION` (the primary caption): visited once per epoch.
      pairs: number of slots at the end of a batch that show another image of a caption of an earlier slot. The first
        captions with several images are taken; if there are too few, the remaining slots are ordinary ones. At most
        half the batch.
      warped: whether each slot is warped in its own way (`augment`). Two slots with the same image are then a pair too.
      order: order of the examples, if the unit is `IMAGE`; None is a full shuffle.

    Raises:
      UserError: no example can be read.
    """
    self._order = FullOrder(len(dataset)) if order is None else order
    self._size, self._epoch_unit, self._pairs = len(dataset), epoch_unit, pairs
    self._least = 1 if warped else 2  # images that a caption must have for a pair
    self.digest = self._size % 2**31
    if epoch_unit == CAPTION or pairs:
      self._group(dataset)

  def _group(self, dataset):
    """Lists the examples caption by caption, and where those of each caption begin."""
    groups = {}
    for number, captions in dataset.readable_captions():
      groups.setdefault(captions[0], []).append(number)
    if not groups:
      raise UserError(f"no record of data set {dataset.path} can be read; {_why_not(dataset)}")
    self._members = np.concatenate([np.asarray(group, np.int64) for group in groups.values()])
    self._counts = np.array([len(group) for group in groups.values()], np.int64)
    self._begins = np.cumsum(self._counts) - self._counts
    self._places = np.full(self._size, -1, np.int64)  # of every example among the members
    self._places[self._members] = np.arange(len(self._members))
    self._captions = np.repeat(np.arange(len(groups)), self._counts)  # of every member
    self.digest = zlib.crc32(self._members.tobytes() + self._counts.tobytes()) >> 1

  def __call__(self, seed: int, batch_size: int, step: int, slots: np.ndarray | Sequence[int] | int) -> np.ndarray:
    """Gives the examples of some slots of a step.

    Args:
      seed: seed of the order and of the draws.
      batch_size: global batch size.
      step: global step.
      slots: int [b] in range(batch_size).

    Returns:
      int64 [b], numbers of the examples.
    """
    slots = np.atleast_1d(np.asarray(slots, np.int64))
    return self._paired(seed, batch_size, step, slots, self._drawn(seed, batch_size, step, slots))

  def plan(
    self, seed: int, batch_size: int, step: int, slots: np.ndarray | Sequence[int] | int
  ) -> tuple[np.ndarray, Runs]:
    """(the examples of some slots of a step, int64 [b]; the runs of neighboring records to read for them)."""
    slots = np.atleast_1d(np.asarray(slots, np.int64))
    drawn = self._drawn(seed, batch_size, step, slots)
    numbers = self._paired(seed, batch_size, step, slots, drawn.copy())
    if self._epoch_unit == CAPTION:
      return numbers, Runs(numbers, numbers, np.ones_like(numbers))
    runs = self._order.runs(seed, batch_size, step, slots, drawn)
    paired = numbers != drawn
    first, count = np.where(paired, numbers, runs.first), np.where(paired, 1, runs.count)
    return numbers, Runs(runs.window, first, count)

  def held_runs(self, batch_size: int) -> int:
    """Runs of several records that are in use at a time; 0 if records are read one by one."""
    return self._order.held_runs(batch_size) if self._epoch_unit == IMAGE else 0

  def _paired(self, seed, batch_size, step, slots, numbers):
    """`numbers` [b] of the slots, with those of pairs in the slots for them."""
    second = slots - (batch_size - self._pairs)  # which pair a slot completes
    if (second >= 0).any():
      # Neighbors lend each other mismatched captions (training/step.py): none of these slots is a neighbor of a pair's.
      first = self._drawn(seed, batch_size, step, np.arange(1, batch_size - self._pairs - 1))
      places = self._places[first]
      several = places[places >= 0]
      several = several[self._counts[self._captions[several]] >= self._least]
      for at in np.flatnonzero((second >= 0) & (second < len(several))):
        numbers[at] = self._other(several[second[at]], *shuffle.uniform(seed, "pair", step, slots[at])[0])
    return numbers

  def _drawn(self, seed, batch_size, step, slots):
    """The examples of slots [b] without pairs."""
    if self._epoch_unit == IMAGE:
      return self._order(seed, batch_size, step, slots)
    captions = shuffle.example_index(seed, len(self._counts), batch_size, step, slots)
    draws = shuffle.uniform(seed, "picture", step, slots)[:, 0]
    return self._members[self._begins[captions] + (draws * self._counts[captions]).astype(np.int64)]

  def _other(self, place, draw):
    """Another example of the same caption, chosen by a number in [0, 1); the same example if there is no other."""
    caption = self._captions[place]
    begin, count = self._begins[caption], self._counts[caption]
    further = 1 + int(draw * (count - 1))
    return self._members[begin + (place - begin + further) % count]


def _why_not(dataset):
  """Describes what is wrong with the first record."""
  try:
    dataset[0]
  except tfrecords.RecordError as error:
    return str(error)
  return "the first one can by now"
