"""The order of examples and the loader's random draws: pure functions with the properties that training relies on."""

import numpy as np
import pytest

from aurora_jax.data import shuffle


@pytest.mark.parametrize("size", [*range(1, 70), 100, 1765, 4096, 4097])
def test_permutation(size):
  for epoch in range(3):
    permuted = shuffle.epoch_permutation(5, epoch, size, np.arange(size))
    assert permuted.dtype == np.int64
    np.testing.assert_array_equal(np.sort(permuted), np.arange(size))


def test_permutation_is_evaluated_pointwise():
  whole = shuffle.epoch_permutation(1, 2, 1000, np.arange(1000))
  for position in (0, 1, 499, 999):
    assert shuffle.epoch_permutation(1, 2, 1000, position).tolist() == [whole[position]]
  mixed = shuffle.epoch_permutation(1, np.array([2, 7, 2]), 1000, np.array([3, 3, 999]))
  assert mixed.tolist() == [whole[3], shuffle.epoch_permutation(1, 7, 1000, 3)[0], whole[999]]


def test_permutation_of_billions_costs_nothing():
  size = 5_000_000_011
  permuted = shuffle.epoch_permutation(0, 0, size, np.arange(size - 1000, size))
  assert len(set(permuted.tolist())) == 1000
  assert permuted.min() >= 0 and permuted.max() < size
  # Spread over the whole range, not near where they came from.
  assert abs(permuted.mean() / size - 0.5) < 0.05


def test_seeds_and_epochs_differ():
  orders = {
    tuple(shuffle.epoch_permutation(seed, epoch, 100, np.arange(100))) for seed in range(10) for epoch in range(10)
  }
  assert len(orders) == 100


def test_permutations_are_even():
  # Over many epochs each record stands at each place about equally often: 4,000 epochs, 10 x 10 cells of 400 expected.
  counts = np.zeros((10, 10))
  epochs = np.repeat(np.arange(4000), 10)
  places = np.tile(np.arange(10), 4000)
  np.add.at(counts, (places, shuffle.epoch_permutation(0, epochs, 10, places)), 1)
  chi_square = ((counts - 400) ** 2 / 400).sum()
  assert chi_square < 150  # 81 degrees of freedom: exceeded with probability 1e-5


def test_neighbours_are_separated():
  permuted = shuffle.epoch_permutation(3, 0, 10000, np.arange(10000))
  assert abs(np.corrcoef(permuted[:-1], permuted[1:])[0, 1]) < 0.05
  assert abs(np.corrcoef(permuted, np.arange(10000))[0, 1]) < 0.05
  assert (np.abs(np.diff(permuted)) == 1).sum() < 20


@pytest.mark.parametrize("size, batch_size", [(10, 3), (10, 10), (10, 25), (7, 1), (1, 4)])
def test_epochs_cover_each_record_once(size, batch_size):
  epochs = 6
  steps = -(-size * epochs // batch_size)
  stream = np.concatenate(
    [shuffle.example_index(1, size, batch_size, step, np.arange(batch_size)) for step in range(steps)]
  )
  for epoch in range(epochs):
    assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_far_steps_cost_nothing():
  indices = shuffle.example_index(0, 1765, 16, 10**15, np.arange(16))
  assert len(set(indices.tolist())) == 16


def test_stand_ins():
  walks = {
    (seed, step, slot): tuple(shuffle.replacement_index(seed, 10, step, slot, attempt) for attempt in range(10))
    for seed in range(2)
    for step in (0, 1, 10**12)
    for slot in range(3)
  }
  assert all(sorted(walk) == list(range(10)) for walk in walks.values())
  assert len(set(walks.values())) == len(walks)
  assert shuffle.replacement_index(0, 1, 5, 3, 0) == 0


def test_uniform_depends_on_each_coordinate():
  base = shuffle.uniform(1, "a", 2, np.arange(4), 3)
  assert base.shape == (4, 3)
  np.testing.assert_array_equal(base, shuffle.uniform(1, "a", 2, np.arange(4), 3))
  for other in (
    shuffle.uniform(2, "a", 2, np.arange(4), 3),
    shuffle.uniform(1, "b", 2, np.arange(4), 3),
    shuffle.uniform(1, "a", 3, np.arange(4), 3),
    shuffle.uniform(1, "a", 2, np.arange(4, 8), 3),
  ):
    assert not np.isin(base, other).any()
  np.testing.assert_array_equal(base[2:], shuffle.uniform(1, "a", 2, np.arange(2, 4), 3))
  np.testing.assert_array_equal(base[:, :2], shuffle.uniform(1, "a", 2, np.arange(4), 2))


def test_uniform_is_uniform():
  draws = shuffle.uniform(0, "test", 0, np.arange(20000), 3)
  assert draws.min() >= 0 and draws.max() < 1
  counts, _ = np.histogram(draws, bins=20, range=(0, 1))
  assert ((counts - 3000) ** 2 / 3000).sum() < 60  # 19 degrees of freedom
  assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.03
  by_step = np.concatenate([shuffle.uniform(0, "test", step, np.arange(4)) for step in range(5000)])[:, 0]
  assert abs(by_step.mean() - 0.5) < 0.01
  assert abs(np.corrcoef(by_step[:-4], by_step[4:])[0, 1]) < 0.03


def test_fold_depends_on_the_order():
  assert shuffle.fold(1, 2) != shuffle.fold(2, 1)
  assert shuffle.fold(0) != shuffle.fold(0, 0)
  assert len(set(shuffle.fold(np.arange(-500, 500)).tolist())) == 1000
