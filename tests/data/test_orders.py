"""Orders of records: every record once per epoch, whatever the sizes, hosts and steps."""

import itertools

import numpy as np
import pytest

from aurora_jax.config import Data
from aurora_jax.data import orders, shuffle
from aurora_jax.data.orders import BlockOrder, FullOrder, MixedOrder
from aurora_jax.errors import UserError


def stream(order, batch_size, steps, seed=3, start=0):
  """The records of whole steps, [steps * batch_size]."""
  at = np.repeat(np.arange(start, start + steps), batch_size)
  return order(seed, batch_size, at, np.tile(np.arange(batch_size), steps))


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 1000, 4096, 5003])
@pytest.mark.parametrize("block, window, groups", [(64, 8, 8), (7, 3, 4), (16, 5, 2), (1, 1, 1)])
def test_each_record_once_per_epoch(size, block, window, groups):
  for batch_size in (1, 7, 8, 32, 40):
    order = BlockOrder(size, block, window, groups)
    records = stream(order, batch_size, -(-3 * size // batch_size))
    epochs = records[: 3 * size].reshape(3, size)
    for epoch in epochs:
      np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    if size > 60:
      assert len({tuple(epoch) for epoch in epochs}) == 3


def test_it_is_evaluated_pointwise():
  order = BlockOrder(5003, 16, 8, 4)
  whole = stream(order, 32, 400).reshape(400, 32)
  for step in (0, 5, 156, 157, 399):  # an epoch ends in step 156
    np.testing.assert_array_equal(order(3, 32, step, np.arange(32)), whole[step])
    np.testing.assert_array_equal(order(3, 32, step, np.array([9, 2])), whole[step, [9, 2]])
  assert (stream(order, 32, 10, seed=4) != whole[:10].ravel()).any()


@pytest.mark.parametrize(
  "order", [FullOrder(10**9), BlockOrder(10**9), MixedOrder((FullOrder(10**9), BlockOrder(77)), (9000, 1000), 8)]
)
def test_a_far_step_takes_as_many_operations(order, monkeypatch):
  counts = []
  mix = shuffle._mix

  def counting(values):
    counts[-1] += values.size
    return mix(values)

  monkeypatch.setattr(shuffle, "_mix", counting)
  for step in (0, 1, 999_999, 1_000_000, 10**10):
    counts.append(0)
    order(1, 64, step, np.arange(64))
  assert max(counts[1:]) < 2 * counts[0]  # they differ by the results outside the range that are permuted again


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_a_block_is_read_by_one_host_once(hosts):
  size, batch_size = 64 * 64, 64
  order = BlockOrder(size, 64, 16, 8)
  assert order.geometry(batch_size).windows * order.geometry(batch_size).window_records == size
  readers = {}
  for step in range(size // batch_size):
    slots = np.arange(batch_size)
    runs = order.runs(3, batch_size, step, slots, order(3, batch_size, step, slots))
    for slot, window, first in zip(slots, runs.window.tolist(), runs.first.tolist()):
      readers.setdefault(first, set()).add((slot * hosts // batch_size, window))
  assert len(readers) == 64 and all(len(found) == 1 for found in readers.values())


def test_runs_hold_the_records():
  for order in (
    FullOrder(999),
    BlockOrder(999, 16, 4, 4),
    MixedOrder((BlockOrder(999, 16, 4), FullOrder(50)), (1, 9999)),
  ):
    for step in range(0, 90, 7):
      records = order(3, 8, step, np.arange(8))
      runs = order.runs(3, 8, step, np.arange(8), records)
      assert (runs.first <= records).all() and (records < runs.first + runs.count).all()
      assert (runs.first + runs.count <= order.size).all()


def test_how_far_records_travel():
  """Blocks lose nothing over the epoch. Records of a block stay within a window, and within a batch they are few."""
  size, batch_size = 64 * 64 * 8, 64
  place = np.empty(size, np.int64)
  order = BlockOrder(size, 64, 64, 8)
  records = stream(order, batch_size, size // batch_size)
  place[records] = np.arange(size)
  travel = np.abs(place - np.arange(size)).mean() / size
  assert abs(travel - 1 / 3) < 0.05  # of a full shuffle: 1/3
  neighbors = np.abs(np.diff(place.reshape(-1, 64), axis=1))  # of the same block
  assert neighbors.max() < order.geometry(batch_size).window_records
  assert 0.25 < neighbors.mean() / order.geometry(batch_size).window_records < 0.42
  distinct = [len(set(batch // 64)) for batch in records.reshape(-1, batch_size)]
  assert np.mean(distinct) > 0.6 * batch_size  # blocks in a batch of 64; a full shuffle has 60 of 512


def test_a_mixture_has_its_weights_and_all_records():
  order = orders.build("full", [100, 40], [0.7, 0.3])
  records = stream(order, 32, 5000)  # 16 periods
  own = records >= 100
  assert own.sum() == 48_000
  first = np.bincount(records[~own], minlength=100)
  assert first.min() >= 1110 and first.max() <= 1130  # 112,000 over 100 records; the last periods' order may overlap
  second = records[own] - 100
  np.testing.assert_array_equal(np.bincount(second, minlength=40), 1200)
  shares = own.reshape(-1, 32).mean(axis=1)
  assert 0 <= shares.min() and shares.max() < 0.75 and shares.std() < 0.1


def test_a_mixture_of_blocks_keeps_hosts_apart():
  order = orders.build("blocks", [64 * 64, 64 * 32], [0.5, 0.5], 64, 8, 8)
  readers = {}
  for step in range(64):
    runs = order.runs(3, 64, step, np.arange(64), order(3, 64, step, np.arange(64)))
    for slot, key in enumerate(zip(runs.window.tolist(), runs.first.tolist())):
      readers.setdefault(key, set()).add(slot // 8)
  assert all(len(found) == 1 for found in readers.values())


def test_weights():
  assert orders.counts_of((0.7, 0.3)) == (7000, 3000)
  assert orders.counts_of((1, 1, 1)) == (3334, 3333, 3333)
  with pytest.raises(UserError, match="a weight of 1e-05 of 1.00001 is less than one image in 10,000"):
    orders.counts_of((1, 1e-5))


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"mixture": ("0.3",)}, r"'WEIGHT:FOLDER' .* got '0.3'"),
    ({"mixture": ("a:b",)}, "got 'a:b'"),
    ({"mixture": ("1.5:b",)}, "got '1.5:b'"),
    ({"mixture": ("0.6:b", "0.5:c")}, "leaves -0.1 of the images to data.path"),
    ({"shuffle": "some"}, "data.shuffle must be 'full' or 'blocks', got 'some'"),
    ({"decode": "fast"}, "data.decode must be 'auto', 'full' or 'shrink', got 'fast'"),
    ({"window_blocks": 0}, "data.window_blocks must be positive, got 0"),
    ({"reads": -1}, "data.reads must not be negative, got -1"),
    ({"shuffle": "blocks", "epoch_unit": "caption"}, "data.epoch_unit='caption' has an order of its own"),
  ],
)
def test_bad_settings(fields, words):
  with pytest.raises(UserError, match=words):
    Data(**fields)


def test_sources_of_a_config():
  weights, paths = zip(*Data(path="a", mixture=("0.25:gs://bucket/b", "0.25:c")).sources)
  assert paths == ("a", "gs://bucket/b", "c") and weights == (0.5, 0.25, 0.25)


def test_hosts_and_slots_agree():
  order = orders.build("blocks", [999, 300], [0.8, 0.2], 16, 4, 4)
  for step, hosts in itertools.product((0, 40, 10**6), (2, 4, 8)):
    whole = order(3, 32, step, np.arange(32))
    parts = [order(3, 32, step, slots) for slots in np.split(np.arange(32), hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
