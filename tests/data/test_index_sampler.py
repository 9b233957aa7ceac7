"""IndexSampler of captions and pairs within a batch, on a data set where some captions have several images."""

import collections
import itertools

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import build, shuffle, sources, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import CAPTION, IMAGE, IndexSampler
from aurora_jax.data.loader import train_batches
from aurora_jax.errors import UserError

COUNTS = {"cat": 4, "dog": 3, "fish": 2} | {f"thing {i}": 1 for i in range(9)}
BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  home = tmp_path_factory.mktemp("several")
  for i, (caption, count) in enumerate(COUNTS.items()):
    for k in range(count):
      Image.new("RGB", (4, 4), (20 * i, 60 * k, 0)).save(home / f"{i}_{k}.png")
      (home / f"{i}_{k}.txt").write_text(caption)
  build.build(sources.folder(home), home / "data", resolution=4, shards=2, heldout_fraction=0)
  return home / "data"


@pytest.fixture(scope="module")
def captions(folder):
  return [captions[0] for captions in Dataset.open(folder).captions()]


def test_without_a_wish_the_permutation_of_records(folder):
  visits = IndexSampler(Dataset.open(folder))
  for step in range(5):
    expected = shuffle.example_index(3, 18, BATCH, step, np.arange(BATCH))
    np.testing.assert_array_equal(visits(3, BATCH, step, np.arange(BATCH)), expected)


def test_an_epoch_of_captions_has_each_once_and_in_time_every_picture(folder, captions):
  visits = IndexSampler(Dataset.open(folder), CAPTION)
  seen = collections.Counter()
  for epoch in range(60):
    numbers = np.concatenate([visits(3, 4, 3 * epoch + i, np.arange(4)) for i in range(3)])
    assert sorted(captions[n] for n in numbers) == sorted(COUNTS)
    seen.update(numbers.tolist())
  assert len(seen) == sum(COUNTS.values())
  for caption, count in COUNTS.items():  # evenly: 60 draws of one in `count`, within four standard deviations
    share = 60 / count
    for number in (n for n, c in enumerate(captions) if c == caption):
      assert abs(seen[number] - share) <= 4 * np.sqrt(share * (1 - 1 / count))


@pytest.mark.slow
@pytest.mark.parametrize("visit", [IMAGE, CAPTION])
@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_pairs(folder, captions, visit, pairs):
  dataset = Dataset.open(folder)
  plain, paired = IndexSampler(dataset, visit), IndexSampler(dataset, visit, pairs)
  partners, completed = collections.defaultdict(set), 0
  for step in range(200):
    before, numbers = plain(3, BATCH, step, np.arange(BATCH)), paired(3, BATCH, step, np.arange(BATCH))
    own = BATCH - pairs
    np.testing.assert_array_equal(numbers[:own], before[:own])
    several = [n for n in numbers[1 : own - 1] if COUNTS[captions[n]] > 1]  # no neighbor of the last slots
    for k, number in enumerate(numbers[own:]):
      if k >= len(several):
        assert number == before[own + k]
        continue
      completed += 1
      assert number != several[k] and captions[number] == captions[several[k]]
      partners[int(several[k])].add(int(number))
  assert completed > 100
  for number, found in partners.items():  # whoever is of the caption
    assert found == {n for n, c in enumerate(captions) if c == captions[number]} - {number}


@pytest.mark.slow
def test_pairs_of_warped_pictures(folder, captions):
  dataset = Dataset.open(folder)
  visits, own, alone = IndexSampler(dataset, pairs=2, warped=True), BATCH - 2, 0
  for step in range(200):
    numbers = visits(3, BATCH, step, np.arange(BATCH))
    for first, second in zip(numbers[1:], numbers[own:]):  # each of the first two that are no neighbor of a pair's slot
      assert captions[first] == captions[second]
      assert (first == second) == (COUNTS[captions[first]] == 1)
      alone += first == second
  assert alone > 100


def test_a_batch_too_small_for_pairs_has_none(folder):
  dataset = Dataset.open(folder)
  slots = np.arange(4)
  np.testing.assert_array_equal(IndexSampler(dataset, pairs=2)(3, 4, 7, slots), IndexSampler(dataset)(3, 4, 7, slots))


def test_hosts_and_resumed_runs_see_the_same(folder):
  def batches(start, slots=None):
    dataset = Dataset.open(folder)
    with train_batches(
      dataset,
      resolution=4,
      batch_size=BATCH,
      seed=3,
      start_step=start,
      slots=slots,
      index_sampler=IndexSampler(dataset, CAPTION, 2),
    ) as found:
      return list(itertools.islice(found, 6))

  whole = batches(0)
  parts = [batches(2, slots) for slots in np.split(np.arange(BATCH), 4)]
  for step in range(2, 6):
    for name in ("index", "image", "caption_id"):
      np.testing.assert_array_equal(np.concatenate([part[step - 2][name] for part in parts]), whole[step][name])


def test_what_cannot_be_read_has_no_caption(folder, tmp_path, captions):
  data = tmp_path / "data"
  data.mkdir()
  for file in folder.iterdir():
    if file.suffix != ".captions":
      (data / file.name).write_bytes(file.read_bytes())
  shard = min(data.glob("*.tfrecord"))
  offset, length = tfrecords.load_index(shard)[2]
  content = bytearray(shard.read_bytes())
  content[offset + length // 2] ^= 1
  shard.write_bytes(content)
  visits = IndexSampler(Dataset.open(data), CAPTION, 2)
  assert visits.digest != IndexSampler(Dataset.open(folder), CAPTION, 2).digest
  assert 2 not in np.concatenate([visits(3, BATCH, step, np.arange(BATCH)) for step in range(100)])
  for captions_file in data.glob("*.captions"):
    captions_file.unlink()
  for shard in data.glob("*.tfrecord"):
    shard.write_bytes(bytes(len(shard.read_bytes())))
  with pytest.raises(UserError, match=f"no record of data set {data} can be read; .*record 0 at byte 0 has a broken"):
    IndexSampler(Dataset.open(data), CAPTION)
