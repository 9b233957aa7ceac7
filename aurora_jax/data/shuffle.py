"""The order of the records and every random draw of the loader, as pure functions of (seed, step, slot).

Nothing has a state. A value is a hash of its coordinates, so any step can be evaluated at any time, on any host, at the
same cost. Integers are uint64 and wrap around.
"""

import math
import zlib
from collections.abc import Sequence

import numpy as np

_ROUNDS = 8


def _mix(values):
  """A bijection of uint64 values (the finalizer of SplitMix64). Every input bit influences every output bit."""
  values = values + np.uint64(0x9E3779B97F4A7C15)
  values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return values ^ (values >> np.uint64(31))


def fold(*coordinates: np.ndarray | Sequence[int] | int) -> np.ndarray:
  """Hashes integers to uint64. Arrays of integers are broadcast against each other.

  The result has at least one axis.
  """
  key = np.zeros(1, np.uint64)
  for coordinate in coordinates:
    key = _mix(key ^ _mix(np.atleast_1d(np.asarray(coordinate, np.int64)).astype(np.uint64)))
  return key


def uniform(seed: int, purpose: str, step: int, slots: np.ndarray | Sequence[int] | int, count: int = 1) -> np.ndarray:
  """Independent uniform numbers for slots of a step.

  Args:
    seed: seed of all draws.
    purpose: draws for different purposes are independent.
    step: global step.
    slots: int [b].
    count: numbers per slot.

  Returns:
    float64 [b, count] in [0, 1).
  """
  key = fold(seed, zlib.crc32(purpose.encode()), step, slots)
  bits = _mix(key[:, None] ^ _mix(np.arange(count, dtype=np.uint64)))
  return (bits >> np.uint64(11)) * 2.0**-53


def epoch_permutation(
  seed: int, epoch: int | np.ndarray, size: int, positions: np.ndarray | Sequence[int] | int
) -> np.ndarray:
  """A keyed permutation of range(size), evaluated at some positions: constant memory, constant time per position.

  The permutation is a Feistel network over pairs of digits, of which the left has `columns` values and the right
  `rows`; rows * columns is at least `size`. A result outside the range is permuted again until it lies inside, so the
  map stays one to one.

  Args:
    seed: seed of the order.
    epoch: int, or int [b] with one epoch per position. Every epoch has its own permutation.
    size: number of records, at least 1.
    positions: int [b] in range(size).

  Returns:
    int64 [b]: the record at each position.
  """
  keys = fold(seed, zlib.crc32(b"epoch"), epoch)
  return keyed_permutation(keys, size, positions)


def keyed_permutation(keys: np.ndarray, size: int, positions: np.ndarray | Sequence[int] | int) -> np.ndarray:
  """`epoch_permutation` under any keys.

  Args:
    keys: uint64 [1] or [b], of `fold`. Every key has its own permutation.
    size: number of values, at least 1.
    positions: int [b] in range(size).

  Returns:
    int64 [b]: the value at each position.
  """
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


def example_index(
  seed: int, size: int, batch_size: int, step: int | np.ndarray, slots: np.ndarray | Sequence[int] | int
) -> np.ndarray:
  """The record at slots of a global step.

  An epoch covers each record exactly once. It may end within a batch, where the next one begins.

  Args:
    seed: seed of the order.
    size: number of records.
    batch_size: global batch size.
    step: global step, from 0, or int [b] with one step per slot.
    slots: int [b] in range(batch_size).

  Returns:
    int64 [b] in range(size).
  """
  place = step * batch_size + np.atleast_1d(np.asarray(slots, np.int64))
  return epoch_permutation(seed, place // size, size, place % size)


def replacement_index(seed: int, size: int, step: int, slot: int, attempt: int) -> int:
  """The record to try in place of one that cannot be read.

  Every slot of every step has its own permutation of all records. The replacement therefore depends only on (data set,
  seed, step, slot), not on the host or on earlier skips. Each record is tried once.

  Args:
    seed: seed of the order.
    size: number of records.
    step: global step.
    slot: slot of the global batch.
    attempt: number of the attempt, from 0, below `size`.

  Returns:
    int in range(size).
  """
  return int(keyed_permutation(fold(seed, zlib.crc32(b"stand-in"), step, slot), size, attempt)[0])
