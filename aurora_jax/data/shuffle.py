"""Which record goes where, and every random draw of the loader, as pure functions of (seed, step, slot).

Nothing here has a state: a value is computed from its coordinates by hashing, so any step can be asked for at any time,
on any host, at the same cost. Integers are uint64 and wrap around.
"""

import math
import zlib

import numpy as np

_ROUNDS = 8


def _mix(values):
  """Scrambles uint64 values bijectively (the finaliser of SplitMix64); every input bit moves every output bit."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def fold(*coordinates):
  """Hashes integers (or arrays of them, broadcast against each other) in order to one uint64 array of at least 1-D."""
  key = np.zeros(1, np.uint64)
  for coordinate in coordinates:
    key = _mix(key ^ _mix(np.atleast_1d(np.asarray(coordinate, np.int64)).astype(np.uint64)))
  return key


def uniform(seed, purpose, step, slots, count=1):
  """Independent uniform numbers for slots of a step.

  Args:
    seed: int.
    purpose: str; draws for different purposes are independent.
    step: int.
    slots: int [b].
    count: numbers per slot.

  Returns:
    float64 [b, count] in [0, 1).
  """
  key = fold(seed, zlib.crc32(purpose.encode()), step, slots)
  bits = _mix(key[:, None] ^ _mix(np.arange(count, dtype=np.uint64)))
  return (bits >> np.uint64(11)) * 2.0**-53


def epoch_permutation(seed, epoch, size, positions):
  """A keyed permutation of range(size), evaluated only where asked: constant memory, constant time per position.

  A Feistel network over pairs of digits (left of `columns`, right of `rows` values, rows * columns just over `size`);
  what falls outside is sent through again until it falls inside, which keeps the map one to one.

  Args:
    seed: int.
    epoch: int, or int [b] beside `positions`: every epoch has its own permutation.
    size: number of records, at least 1.
    positions: int [b] in range(size).

  Returns:
    int64 [b]: the record at each position.
  """
  keys = fold(seed, zlib.crc32(b"epoch"), epoch)
  return _permutation(keys, size, positions)


def _permutation(keys, size, positions):
  """`epoch_permutation` under uint64 keys [1] or [b]."""
  columns = math.isqrt(size - 1) + 1
  rows = -(-size // columns)
  values = np.atleast_1d(np.asarray(positions, np.int64)).astype(np.uint64)
  keys = np.broadcast_to(keys, values.shape)

  def permute(values, keys):
    left, right = values // np.uint64(rows), values % np.uint64(rows)
    for number in range(0, _ROUNDS, 2):
      left = (left + _mix(keys ^ _mix(right + np.uint64(number << 48))) % np.uint64(columns)) % np.uint64(columns)
      right = (right + _mix(keys ^ _mix(left + np.uint64(number + 1 << 48))) % np.uint64(rows)) % np.uint64(rows)
    return left * np.uint64(rows) + right

  result = permute(values, keys)
  while (outside := result >= np.uint64(size)).any():
    result[outside] = permute(result[outside], keys[outside])
  return result.astype(np.int64)


def example_index(seed, size, batch_size, step, slots):
  """The record at slots of a global step.

  Steps follow each other without a gap, so an epoch may end within a batch; it covers each record exactly once.

  Args:
    seed: int.
    size: number of records.
    batch_size: global.
    step: global step, from 0.
    slots: int [b] in range(batch_size).

  Returns:
    int64 [b] in range(size).
  """
  place = step * batch_size + np.atleast_1d(np.asarray(slots, np.int64))
  return epoch_permutation(seed, place // size, size, place % size)


def stand_in(seed, size, step, slot, attempt):
  """The record to try in the place of one that cannot be read.

  Every slot of every step has a permutation of its own over all records. So what stands in depends on nothing but
  (data set, seed, step, slot), whoever reads and whatever was skipped before, and each record is tried once.

  Args:
    seed: int.
    size: number of records.
    step: global step.
    slot: of the global batch.
    attempt: from 0, below `size`.

  Returns:
    int in range(size).
  """
  return int(_permutation(fold(seed, zlib.crc32(b"stand-in"), step, slot), size, attempt)[0])
