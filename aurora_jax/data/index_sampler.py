"""Which example goes to which slot of a step, where some captions have several pictures.

An epoch visits every example once, or every caption once, with one of its pictures. Some slots of a batch may be kept
for pairs: a second picture of a caption that is in the batch anyway, or another warp of the same picture, so that the
discriminator can compare the two.

As in `order`, nothing has a state: every choice is a pure function of (data set, seed, step, slot), where the data set is
what can be read of it at the start.
"""

import zlib

import numpy as np

from aurora_jax.data import shuffle, tfrecords
from aurora_jax.errors import UserError

IMAGE, CAPTION = "image", "caption"


class IndexSampler:
  """What an epoch visits; called, the examples of any step.

  Attributes:
    digest: int32, of what is drawn from: all hosts must have the same.
  """

  def __init__(self, dataset, epoch_unit=IMAGE, pairs=0, warped=False):
    """Reads all captions of the data set once, unless pictures are visited one by one without pairs.

    Args:
      dataset: a `Dataset`. Examples that cannot be read are of no caption; with `CAPTION` they are not visited.
      epoch_unit: what an epoch has once, `IMAGE` or `CAPTION` (primary ones).
      pairs: the last so many slots of a batch show another picture of captions of earlier slots, of the first that have
        several; where there are fewer of these, a slot is like any other. At most half the batch.
      warped: pictures are warped (`augment`), in every slot in another way: two slots with the same picture make a pair
        too, so that every caption has several.

    Raises:
      UserError: no example can be read.
    """
    self._size, self._epoch_unit, self._pairs = len(dataset), epoch_unit, pairs
    self._least = 1 if warped else 2  # pictures that a caption must have for a pair
    self.digest = self._size % 2**31
    if epoch_unit == CAPTION or pairs:
      self._group(dataset)

  def _group(self, dataset):
    """Notes the examples of every caption, one caption after the other, and where those of each begin."""
    groups = {}
    for number, example in dataset.readable():
      groups.setdefault(example.captions[0], []).append(number)
    if not groups:
      raise UserError(f"no record of data set {dataset.path} can be read; {_why_not(dataset)}")
    self._members = np.concatenate([np.asarray(group, np.int64) for group in groups.values()])
    self._counts = np.array([len(group) for group in groups.values()], np.int64)
    self._begins = np.cumsum(self._counts) - self._counts
    self._places = np.full(self._size, -1, np.int64)  # of every example among the members
    self._places[self._members] = np.arange(len(self._members))
    self._captions = np.repeat(np.arange(len(groups)), self._counts)  # of every member
    self.digest = zlib.crc32(self._members.tobytes() + self._counts.tobytes()) >> 1

  def __call__(self, seed, batch_size, step, slots):
    """The examples at slots [b] of a global step of `batch_size`, int64 [b]."""
    slots = np.atleast_1d(np.asarray(slots, np.int64))
    numbers = self._drawn(seed, batch_size, step, slots)
    second = slots - (batch_size - self._pairs)  # which pair a slot completes
    if (second >= 0).any():
      # Neighbours lend each other mismatched captions (training/step.py): none of these slots is a neighbour of a pair's.
      first = self._drawn(seed, batch_size, step, np.arange(1, batch_size - self._pairs - 1))
      places = self._places[first]
      several = places[places >= 0]
      several = several[self._counts[self._captions[several]] >= self._least]
      for at in np.flatnonzero((second >= 0) & (second < len(several))):
        numbers[at] = self._other(several[second[at]], *shuffle.uniform(seed, "pair", step, slots[at])[0])
    return numbers

  def _drawn(self, seed, batch_size, step, slots):
    """As if there were no pairs."""
    if self._epoch_unit == IMAGE:
      return shuffle.example_index(seed, self._size, batch_size, step, slots)
    captions = shuffle.example_index(seed, len(self._counts), batch_size, step, slots)
    draws = shuffle.uniform(seed, "picture", step, slots)[:, 0]
    return self._members[self._begins[captions] + (draws * self._counts[captions]).astype(np.int64)]

  def _other(self, place, draw):
    """Another example of the caption of the one at a place, by a number in [0, 1); the same where there is no other."""
    caption = self._captions[place]
    begin, count = self._begins[caption], self._counts[caption]
    further = 1 + int(draw * (count - 1))
    return self._members[begin + (place - begin + further) % count]


def _why_not(dataset):
  """What is wrong with the first record."""
  try:
    dataset[0]
  except tfrecords.RecordError as error:
    return str(error)
  return "the first one can by now"
