"""Orders, mixtures and reading ahead in the loader: the same batches, fewer and earlier reads."""

import itertools
import threading
import time

import numpy as np
import pytest

from aurora_jax.data import decode, loader, orders, schema, shuffle
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import IndexSampler
from aurora_jax.data.joined import Joined
from aurora_jax.data.prefetch import Prefetch
from aurora_jax.performance import data_benchmark

RECORDS, BATCH = 300, 16


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ahead") / "data"
  images = data_benchmark.synthetic_images(20, 32)
  examples = [schema.Example(images[i % 20], (f"caption {i // 2}",), 32, 32, str(i)) for i in range(RECORDS)]
  data_benchmark.write_dataset(folder, examples, 32, 3)
  return folder


class Counting(Dataset):
  """Notes what is read."""

  def read(self, number):
    self.__dict__.setdefault("reads", []).append((number, 1))
    return super().read(number)

  def read_run(self, first, count):
    self.__dict__.setdefault("reads", []).append((first, count))
    return super().read_run(first, count)


def batches(dataset, count, kind="full", start=0, slots=None, sampler=None, **options):
  order = orders.build(kind, [len(dataset)], [1.0], 16, 4, 4)
  sampler = sampler or IndexSampler(dataset, order=order)
  options = {"resolution": 8, "batch_size": BATCH, "seed": 1, "cache_bytes": 0} | options
  with loader.train_batches(dataset, start_step=start, slots=slots, index_sampler=sampler, **options) as made:
    return list(itertools.islice(made, count))


def assert_same(left, right):
  for one, other in zip(left, right, strict=True):
    assert one["caption"] == other["caption"]
    for name in ("image", "index", "caption_id"):
      np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("kind", ["full", "blocks"])
def test_threads_reads_and_cache_change_nothing(folder, kind):
  dataset = Dataset.open(folder)
  expected = batches(dataset, 20, kind, workers=0)
  for options in ({"workers": 4}, {"reads": 7}, {"reads": 40, "workers": 3, "prefetch": 9}, {"cache_bytes": 2**20}):
    assert_same(batches(dataset, 20, kind, **options), expected)


@pytest.mark.parametrize("kind", ["full", "blocks"])
def test_hosts_and_resumed_runs_see_the_same(folder, kind):
  dataset = Dataset.open(folder)
  whole = batches(dataset, 24, kind)
  for hosts in (2, 4, 8):
    parts = [batches(dataset, 4, kind, start=20, slots=slots) for slots in np.split(np.arange(BATCH), hosts)]
    for step, some in enumerate(zip(*parts)):
      for name in ("image", "index"):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in some]), whole[20 + step][name])


def test_blocks_are_read_once(folder):
  dataset = Counting.open(folder)
  steps = RECORDS // BATCH  # nearly an epoch
  batches(dataset, steps, "blocks", prefetch=1, workers=1)
  counts = [count for _, count in dataset.reads]
  assert set(counts) <= {16, RECORDS % 16} and len(dataset.reads) <= 2 * (RECORDS // 16 + 1)
  first = dataset.reads[: RECORDS // 16 - 3]
  assert len(set(first)) == len(first)


def test_other_records_of_pairs_are_read_too(folder):
  dataset = Dataset.open(folder)
  order = orders.build("blocks", [RECORDS], [1.0], 16, 4, 4)
  sampler = IndexSampler(dataset, pairs=3, order=order)
  plain = [sampler(1, BATCH, step, np.arange(BATCH)) for step in range(20)]
  made = batches(dataset, 20, sampler=sampler)
  np.testing.assert_array_equal([batch["index"] for batch in made], plain)
  pairs = [batch["caption_id"][np.arange(1, 4)] == batch["caption_id"][BATCH - 3 :] for batch in made]
  assert np.mean(pairs) == 1 and (plain != order(1, BATCH, np.arange(20)[:, None], np.arange(BATCH))).any()


@pytest.mark.parametrize("kind", ["full", "blocks"])
def test_corrupt_records_are_replaced(folder, tmp_path, kind):
  copy = tmp_path / "copy"
  copy.mkdir()
  for path in folder.iterdir():
    (copy / path.name).write_bytes(path.read_bytes())
  shard = sorted(copy.glob("*.tfrecord"))[1]
  data = bytearray(shard.read_bytes())
  data[200] ^= 1  # record 100
  shard.write_bytes(data)
  expected = batches(Dataset.open(folder), 19, kind, reads=4)
  order = orders.build(kind, [RECORDS], [1.0], 16, 4, 4)
  dataset = Dataset.open(copy)
  options = {"resolution": 8, "batch_size": BATCH, "seed": 1, "cache_bytes": 0, "reads": 4}
  with loader.train_batches(dataset, index_sampler=IndexSampler(dataset, order=order), **options) as made:
    got = list(itertools.islice(made, 19))
    assert list(made.skipped) == [100] and "wrong checksum" in made.skipped[100].reason
  for step, (one, other) in enumerate(zip(got, expected)):
    for slot in range(BATCH):
      number = other["index"][slot]
      wanted = shuffle.replacement_index(1, RECORDS, step, slot, 0) if number == 100 else number
      assert one["index"][slot] == wanted


def test_latency_is_hidden(folder):
  """No more rounds of waiting than records divided by reads at a time, counted by how many wait together."""
  waiting, most = 0, 0
  lock = threading.Lock()

  class Waiting(Dataset):
    def read(self, number):
      nonlocal waiting, most
      with lock:
        waiting += 1
        most = max(most, waiting)
      time.sleep(0.01)
      with lock:
        waiting -= 1
      return super().read(number)

  dataset = Waiting.open(folder)
  batches(dataset, 8, reads=32, workers=1, prefetch=1)
  assert most == 32


def test_mixture(folder, tmp_path):
  examples = [schema.Example(data_benchmark.synthetic_images(1, 16)[0], (f"other {i}",), 16, 16, "") for i in range(40)]
  data_benchmark.write_dataset(tmp_path / "other", examples, 16, 1)
  joined = Joined(Dataset.open(folder), Dataset.open(tmp_path / "other"))
  assert joined.resolution == 16 and len(joined) == RECORDS + 40
  order = orders.build("blocks", [RECORDS, 40], [0.5, 0.5], 16, 4, 4)
  made = batches(joined, 24, sampler=IndexSampler(joined, order=order))
  captions = [caption for batch in made for caption in batch["caption"]]
  share = np.mean([caption.startswith("other") for caption in captions])
  assert abs(share - 0.5) < 0.1
  assert joined[RECORDS + 3].captions == ("other 3",) and joined.captions()[RECORDS + 3] == ("other 3",)
  parts = [
    batches(joined, 5, start=19, slots=slots, sampler=IndexSampler(joined, order=order), reads=3)
    for slots in np.split(np.arange(BATCH), 2)
  ]
  for step, pair in enumerate(zip(*parts)):
    np.testing.assert_array_equal(np.concatenate([part["index"] for part in pair]), made[19 + step]["index"])


def test_decoding_and_bytes(folder):
  dataset = Dataset.open(folder)
  (whole,) = batches(dataset, 1)
  (small,) = batches(dataset, 1, normalize=False)
  assert small["image"].dtype == np.uint8
  np.testing.assert_array_equal(loader.to_float(small["image"]), whole["image"])
  (shrunk,) = batches(dataset, 1, decoding=decode.SHRINK)
  assert 0 < np.abs(shrunk["image"] - whole["image"]).mean() < 0.05
  (auto,) = batches(dataset, 1, decoding=decode.AUTO)
  np.testing.assert_array_equal(auto["image"], whole["image"])  # the manifest says nothing
  dataset.decoding = decode.SHRINK
  (auto,) = batches(dataset, 1, decoding=decode.AUTO)
  np.testing.assert_array_equal(auto["image"], shrunk["image"])


def test_prefetch_gives_results_and_errors_in_order():
  def function(step):
    if step == 7:
      raise RuntimeError("seven")
    time.sleep(0.002 * (step % 3))
    return step

  made = Prefetch(function, 3, threads=4, ahead=6)
  assert [next(made) for _ in range(4)] == [3, 4, 5, 6]
  with pytest.raises(RuntimeError, match="seven"):
    next(made)
  assert next(made) == 8
  made.close()
  with pytest.raises(ValueError):
    next(made)
