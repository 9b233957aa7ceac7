"""Training batches: the same whatever the host, the worker or the step a run resumed at."""

import dataclasses
import errno
import itertools
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import build, images, loader, schema, shuffle, sources, tfrecords
from aurora_jax.data.augment import Augment
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.loader import train_batches
from aurora_jax.errors import UserError

WILD = Augment(shift=0.2, scale=0.3, rotate=20, flip=True)


@pytest.fixture
def dataset(data_folder):
  return Dataset.open(data_folder)


def first(dataset, count, **options):
  """The first `count` batches."""
  options = {"resolution": 8, "batch_size": 4, "seed": 1} | options
  with train_batches(dataset, **options) as batches:
    return list(itertools.islice(batches, count))


def assert_same(left, right):
  assert len(left) == len(right)
  for one, other in zip(left, right):
    assert one.keys() == other.keys()
    assert one["caption"] == other["caption"]
    for name in one.keys() - {"caption"}:
      np.testing.assert_array_equal(one[name], other[name])


def damage(folder, shard, record):
  """Flips a bit of a record; returns its number in the split."""
  shards = sorted(folder.glob("*-train-*.tfrecord"))
  _flip(shards[shard], record)
  return sum(len(tfrecords.load_index(path)) for path in shards[:shard]) + record


def test_what_a_batch_is(dataset):
  (batch,) = first(dataset, 1, resolution=16)
  assert batch.keys() == {"image", "caption", "index", "caption_id"}
  assert batch["image"].shape == (4, 16, 16, 3) and batch["image"].dtype == np.float32
  assert batch["index"].dtype == np.int64 and batch["caption_id"].dtype == np.int32
  for image, caption, number in zip(batch["image"], batch["caption"], batch["index"]):
    example = dataset[int(number)]
    assert caption == example.captions[0]
    np.testing.assert_allclose(image, images.decode_image(example.image) / 127.5 - 1, atol=1e-6)


def test_range_of_pixels():
  np.testing.assert_array_equal(loader.to_float(np.array([[0, 255]], np.uint8)), [[-1, 1]])
  assert loader.to_float(np.zeros((1, 3), np.uint8)).dtype == np.float32


def test_smaller_pictures_are_averages(dataset):
  (batch,) = first(dataset, 1, resolution=8)
  for image, number in zip(batch["image"], batch["index"]):
    pixels = images.decode_image(dataset[int(number)].image).astype(float)
    means = pixels.reshape(8, 2, 8, 2, 3).mean((1, 3))
    np.testing.assert_allclose((image + 1) * 127.5, means, atol=0.51)


def test_tokens(dataset):
  def tokenizer(captions):
    assert isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
    return np.array([[len(caption), 7] for caption in captions])

  (batch,) = first(dataset, 1, tokenizer=tokenizer)
  assert batch["tokens"].dtype == np.int32
  assert batch["tokens"].tolist() == [[len(caption), 7] for caption in batch["caption"]]


@pytest.mark.parametrize("batch_size", [3, 8, 16, 40])
def test_epochs_cover_each_record_once(dataset, batch_size):
  steps = -(-3 * 16 // batch_size)
  stream = np.concatenate([batch["index"] for batch in first(dataset, steps, batch_size=batch_size)])
  epochs = stream[:48].reshape(3, 16)
  for epoch in epochs:
    assert sorted(epoch) == list(range(16))
  assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seeds_differ(dataset):
  one, other = (first(dataset, 4, seed=seed) for seed in (1, 2))
  assert [batch["index"].tolist() for batch in one] != [batch["index"].tolist() for batch in other]


@pytest.mark.parametrize("augment", [Augment(), WILD])
def test_hosts_share_one_global_batch(dataset, augment):
  options = {"batch_size": 8, "augment": augment, "primary_caption_probability": 0.5}
  whole = first(dataset, 5, **options)
  for hosts in (2, 4):
    parts = [first(dataset, 5, slots=slots, **options) for slots in np.split(np.arange(8), hosts)]
    assert all(len(part[0]["index"]) == 8 // hosts for part in parts)
    joined = [
      {name: np.concatenate([batch[name] for batch in batches]) for name in whole[0] if name != "caption"}
      | {"caption": [caption for batch in batches for caption in batch["caption"]]}
      for batches in zip(*parts)
    ]
    assert_same(joined, whole)


@pytest.mark.parametrize("start", [1, 5, 9])
def test_resumed_equals_uninterrupted(dataset, start):
  options = {"augment": WILD, "primary_caption_probability": 0.5}
  assert_same(first(dataset, 3, start_step=start, **options), first(dataset, start + 3, **options)[start:])


def test_resume_at_a_far_step(dataset):
  step = 10**12
  (batch,) = first(dataset, 1, start_step=step)
  assert batch["index"].tolist() == shuffle.example_index(1, 16, 4, step, np.arange(4)).tolist()


def test_step_is_counted(dataset):
  with train_batches(dataset, resolution=8, batch_size=4, seed=0, start_step=7) as batches:
    assert batches.step == 7
    next(batches)
    assert batches.step == 8


@pytest.mark.parametrize(
  "options",
  [
    {"workers": 0},
    {"workers": 4},
    {"workers": 0, "cache_bytes": 0},
    {"prefetch": 1},
    {"prefetch": 50},
  ],
)
def test_threads_and_cache_change_nothing(dataset, options):
  shared = {"augment": WILD, "primary_caption_probability": 0.5}
  assert_same(first(dataset, 12, **shared, **options), first(dataset, 12, **shared))


@pytest.mark.slow
def test_processes_change_nothing(data_folder, tmp_path):
  folder = shutil.copytree(data_folder, tmp_path / "copy")
  damaged = damage(folder, 1, 2)
  dataset = Dataset.open(folder)
  shared = {"augment": WILD, "tokenizer": lambda captions: np.array([[len(caption)] for caption in captions])}
  expected = first(dataset, 9, **shared)
  with train_batches(dataset, resolution=8, batch_size=4, seed=1, workers=2, cache_bytes=0, **shared) as batches:
    assert_same(list(itertools.islice(batches, 9)), expected)
    assert list(batches.skipped) == [damaged]  # it came back from the other process
    assert batches.skipped[damaged].shard == "shapes-train-00001-of-00003.tfrecord"


def test_pictures_of_one_caption_are_known_by_it(dataset):
  """The number that stands for the primary caption is the same whichever caption was chosen, and no other's."""
  ids = {}
  for batch in first(dataset, 40, batch_size=16, primary_caption_probability=0.3):
    for number, found in zip(batch["index"], batch["caption_id"]):
      ids.setdefault(dataset[int(number)].captions[0], set()).add(int(found))
  assert all(len(found) == 1 for found in ids.values())
  assert len(set.union(*ids.values())) == len(ids) == len(dataset)


def test_which_caption(dataset):
  def captions(probability):
    return [
      (caption, dataset[int(number)].captions)
      for batch in first(dataset, 40, batch_size=16, primary_caption_probability=probability)
      for caption, number in zip(batch["caption"], batch["index"])
    ]

  assert all(caption == known[0] for caption, known in captions(1.0))
  places = [known.index(caption) for caption, known in captions(0.0)]
  assert set(places) == {1, 2} and abs(places.count(1) / 640 - 0.5) < 0.1
  places = [known.index(caption) for caption, known in captions(0.7)]
  assert abs(places.count(0) / 640 - 0.7) < 0.1


def test_augmentation_differs_at_each_visit(dataset):
  seen = {}
  for batch in first(dataset, 3, batch_size=16, augment=WILD):
    for image, number in zip(batch["image"], batch["index"]):
      assert image.min() >= -1 and image.max() <= 1
      seen.setdefault(int(number), []).append(image)
  for visits in seen.values():
    for one, other in itertools.combinations(visits, 2):
      assert np.abs(one - other).max() > 0.1


def test_mild_augmentation_is_mild(tmp_path):
  # From images at the asked resolution and at twice that; a gradient, which a small shift changes a little.
  for path in ("a", "b"):
    Image.linear_gradient("L").convert("RGB").save(tmp_path / f"{path}.png")
    (tmp_path / f"{path}.txt").write_text(path)
  for stored in (8, 16):
    build.build(sources.folder(tmp_path), tmp_path / "out", resolution=stored, shards=1, overwrite=True)
    dataset = Dataset.open(tmp_path / "out")
    (plain,) = first(dataset, 1, batch_size=2)
    (moved,) = first(dataset, 1, batch_size=2, augment=Augment(shift=0.03))
    inner = np.abs(plain["image"] - moved["image"])[:, 1:-1, 1:-1]
    assert 0 < inner.max() < 0.1


# ------------------------------------------------------------------------------------------- unreadable records


def _rewrite(path, record, change):
  """Writes a shard anew, its checksums right, with one payload replaced by `change(payload)`."""
  payloads = [tfrecords.read_record(path, offset, length) for offset, length in tfrecords.load_index(path).tolist()]
  payloads[record] = change(payloads[record])
  with tfrecords.ShardWriter(path) as writer:
    for payload in payloads:
      writer.write(payload)


def _flip(path, record):
  data = bytearray(path.read_bytes())
  data[tfrecords.load_index(path)[record, 0] + 100] ^= 1
  path.write_bytes(data)


def _example(**changes):
  return lambda payload: schema.encode(dataclasses.replace(schema.decode(payload), **changes))


def _small_picture():
  return images.encode_png(Image.new("RGB", (8, 8)))


# What is done to record 2 of shard 1 after the data set was opened, why it is skipped, and whether its key is known.
_FAULTS = {
  "flipped byte": (_flip, "has a wrong checksum", False),
  "no Example": (
    lambda path, record: _rewrite(path, record, lambda payload: b"\xff" * len(payload)),
    "not a tf.train.Example",
    False,
  ),
  "no picture": (
    lambda path, record: _rewrite(path, record, lambda payload: payload.replace(b"\x89PNG", b"\x89JPG")),
    "not a readable image",
    True,
  ),
  "cut picture": (
    lambda path, record: _rewrite(path, record, lambda payload: payload.replace(b"IDAT", b"IDAX")),
    "not a readable image",
    True,
  ),
  "wrong size": (
    lambda path, record: _rewrite(path, record, _example(image=_small_picture())),
    "8x8 pixels instead of 16x16",
    True,
  ),
  "empty caption": (
    lambda path, record: _rewrite(path, record, _example(captions=(" ",))),
    "feature 'caption' has an empty value",
    True,
  ),
  "no caption": (
    lambda path, record: _rewrite(path, record, lambda payload: payload.replace(b"caption", b"aption_")),
    "no feature 'caption'",
    True,
  ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_unreadable_records_are_replaced_and_told(data_folder, tmp_path, fault):
  change, reason, keyed = _FAULTS[fault]
  folder = shutil.copytree(data_folder, tmp_path / "copy")
  path = sorted(folder.glob("*-train-*.tfrecord"))[1]
  damaged = len(tfrecords.load_index(sorted(folder.glob("*-train-*.tfrecord"))[0])) + 2
  key = Dataset.open(folder)[damaged].key
  change(path, 2)
  expected = first(Dataset.open(data_folder), 12)
  with train_batches(Dataset.open(folder), resolution=8, batch_size=4, seed=1) as batches:
    got = list(itertools.islice(batches, 12))
  stream = np.concatenate([batch["index"] for batch in expected])
  wanted = np.flatnonzero(stream == damaged)
  assert len(wanted) == 3  # epochs; told once
  (skip,) = batches.skipped.values()
  assert (skip.number, skip.shard, skip.record) == (damaged, path.name, 2)
  assert skip.offset == tfrecords.load_index(path)[2, 0] and reason in skip.reason
  assert skip.key == (key if keyed else "") and skip.step == wanted[0] // 4
  # Only that record, and in its places the first readable one of the permutation of that step and slot.
  for place, number in enumerate(np.concatenate([batch["index"] for batch in got])):
    if place in wanted:
      candidates = [shuffle.replacement_index(1, 16, place // 4, place % 4, attempt) for attempt in range(16)]
      assert number == next(other for other in candidates if other != damaged)
    else:
      assert number == stream[place]


def _damaged_copy(data_folder, tmp_path):
  """(Dataset, good) of a copy in which a third of the records has a flipped byte, one shard is cut and one is gone."""
  folder = shutil.copytree(data_folder, tmp_path / "copy")
  shards = sorted(folder.glob("*-train-*.tfrecord"))
  opened = Dataset.open(folder)
  for record in (0, 3):
    _flip(shards[0], record)
  cut = tfrecords.load_index(shards[1])
  os.truncate(shards[1], int(cut[2, 0]) + 30)
  shards[2].unlink()
  first_shard = len(tfrecords.load_index(shards[0]))
  return opened, sorted(set(range(first_shard)) - {0, 3}) + [first_shard, first_shard + 1]


def test_replacements_depend_on_step_and_slot_alone(data_folder, tmp_path):
  opened, good = _damaged_copy(data_folder, tmp_path)
  options = {"batch_size": 8, "augment": WILD, "primary_caption_probability": 0.5}
  whole = first(opened, 12, **options)
  stream = np.concatenate([batch["index"] for batch in whole])
  # All the good ones go on being seen, those after the damage of their shard too; nothing else is.
  assert sorted(set(stream.tolist())) == good
  wanted = np.concatenate([shuffle.example_index(1, 16, 8, step, np.arange(8)) for step in range(12)])
  kept = np.isin(wanted, good)
  np.testing.assert_array_equal(stream[kept], wanted[kept])
  assert len({tuple(stream[step * 8 : step * 8 + 8][~kept[step * 8 : step * 8 + 8]]) for step in range(12)}) == 12
  # Two hosts, a resume, the steps in another order: the same.
  parts = [first(opened, 12, slots=slots, **options) for slots in (np.arange(0, 8, 2), np.arange(1, 8, 2))]
  for slots, part in zip((slice(0, 8, 2), slice(1, 8, 2)), parts):
    np.testing.assert_array_equal(np.stack([b["image"] for b in part]), np.stack([b["image"] for b in whole])[:, slots])
    assert [b["caption"] for b in part] == [b["caption"][slots] for b in whole]
  assert_same(first(opened, 4, start_step=8, **options), whole[8:])
  maker = loader.BatchMaker(opened, 8, 8, 1)
  backwards = [maker(step)["index"] for step in reversed(range(12))]
  np.testing.assert_array_equal(np.stack(backwards)[::-1].ravel(), stream)


def test_hosts_come_to_the_same_list(data_folder, tmp_path):
  opened, good = _damaged_copy(data_folder, tmp_path)

  def skipped(slots):
    with train_batches(opened, resolution=8, batch_size=8, seed=1, slots=slots) as batches:
      for _ in range(12):
        next(batches)
      return batches.skipped

  whole = skipped(None)
  assert sorted(whole) == sorted(set(range(16)) - set(good))
  one, other = (skipped(slots) for slots in (np.arange(4), np.arange(4, 8)))
  earliest = {number: min(part[number].step for part in (one, other) if number in part) for number in whole}
  assert earliest == {number: skip.step for number, skip in whole.items()}
  assert {skip.reason.split(":")[0] for skip in whole.values()} == {
    "has a wrong checksum",
    "is cut off",
    "No such file or directory",
  }


def test_what_the_process_lacks_is_no_damage(dataset, monkeypatch):
  def refuse(path, flags):
    raise OSError(errno.EMFILE, "Too many open files")

  monkeypatch.setattr(tfrecords.os, "open", refuse)
  with pytest.raises(UserError, match="tfrecord cannot be read: Too many open files"):
    loader.BatchMaker(dataset, 8, 4, 1)(0)


def test_nothing_readable(data_folder, tmp_path):
  folder = shutil.copytree(data_folder, tmp_path / "copy")
  for shard, path in enumerate(sorted(folder.glob("*-train-*.tfrecord"))):
    for record in range(len(tfrecords.load_index(path))):
      damage(folder, shard, record)
  for options in ({}, {"workers": 0, "cache_bytes": 0}):
    with pytest.raises(
      loader.NothingReadable,
      match="no record of data set .* can be read for slot 0 of step 0, the last one: .*wrong checksum",
    ):
      first(Dataset.open(folder), 1, **options)


# ------------------------------------------------------------------------------------------- ends and errors


def test_closed(dataset):
  batches = train_batches(dataset, resolution=8, batch_size=4, seed=0)
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(ValueError, match="closed"):
    next(batches)


def test_an_error_in_a_worker_arrives(dataset):
  def tokenizer(captions):
    raise RuntimeError("no such word")

  with pytest.raises(RuntimeError, match="no such word"):
    first(dataset, 1, tokenizer=tokenizer)


@pytest.mark.parametrize(
  "options, words",
  [
    ({"resolution": 32}, "resolution 32 cannot be had from data set .*shapes, which was built at 16"),
    ({"resolution": 0}, "resolution 0"),
    ({"slots": [1, 4]}, "slot 4 is none of a batch of 4"),
    ({"batch_size": 0}, "batch size must be positive, got 0"),
    ({"primary_caption_probability": 1.5}, "primary caption probability must be between 0 and 1, not 1.5"),
  ],
)
def test_bad_values(dataset, options, words):
  with pytest.raises(UserError, match=words):
    first(dataset, 1, **options)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "batches.close()", "del batches"])
def test_a_program_ends_quietly(data_folder, end):
  code = (
    f"from aurora_jax.data import dataset, loader\n"
    f"opened = dataset.Dataset.open({str(data_folder)!r})\n"
    f"batches = loader.train_batches(opened, resolution=8, batch_size=4, seed=0)\n"
    f"next(batches)\n{end}\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
  assert done.stderr == "" and done.stdout == ""


# ------------------------------------------------------------------------------------------- whole splits


def test_load_images(dataset):
  whole = loader.load_images(dataset, 16)
  assert whole.shape == (16, 16, 16, 3) and whole.dtype == np.uint8
  np.testing.assert_array_equal(whole[5], images.decode_image(dataset[5].image))
  np.testing.assert_array_equal(loader.load_images(dataset, 16, [5, 2]), whole[[5, 2]])
  assert loader.load_images(dataset, 8, []).shape == (0, 8, 8, 3)
  (batch,) = first(dataset, 1)
  np.testing.assert_array_equal(loader.to_float(loader.load_images(dataset, 8, batch["index"])), batch["image"])


def test_load_images_that_cannot_be_read(data_folder, tmp_path):
  folder = shutil.copytree(data_folder, tmp_path / "copy")
  damage(folder, 0, 1)
  with pytest.raises(UserError, match="shapes-train-00000-of-00003.tfrecord: record 1 .* wrong checksum"):
    loader.load_images(Dataset.open(folder), 8)
  with pytest.raises(UserError, match="resolution 17"):
    loader.load_images(Dataset.open(folder), 17)


def test_foreign_pictures_are_made_square(tmp_path, data_folder):
  folder = shutil.copytree(data_folder, tmp_path / "copy")
  path = sorted(folder.glob("*-train-*.tfrecord"))[0]
  count = len(tfrecords.load_index(path))
  wide = np.full((8, 24, 3), 255, np.uint8)
  wide[:, 8:16] = 0
  picture = images.encode_png(Image.fromarray(wide))
  with tfrecords.ShardWriter(path) as writer:
    for number in range(count):
      writer.write(schema.encode(schema.Example(picture, ("wide",), 24, 8, str(number))))
  pixels = loader.load_images(Dataset.open(folder), 16, [0])
  assert pixels.shape == (1, 16, 16, 3) and pixels.max() == 0
