"""A data set on disk: random access, and what is said when something is wrong with it."""

import concurrent.futures
import errno
import json
import os
import pathlib
import pickle
import re
import shutil
import tracemalloc

import numpy as np
import pytest

from aurora_jax.data import dataset as dataset_module
from aurora_jax.data import images, orders, schema, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import IndexSampler
from aurora_jax.errors import UserError


@pytest.fixture
def copy(data_folder, tmp_path):
  # Without the caption indices, which readers of the data set may have written.
  return shutil.copytree(data_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.captions"))


def change_manifest(folder, change):
  path = folder / "manifest.json"
  manifest = json.loads(path.read_text())
  change(manifest)
  path.write_text(json.dumps(manifest))


def shards(folder, split="train"):
  return sorted(folder.glob(f"*-{split}-*.tfrecord"))


def test_random_access(data_folder, picture_folder):
  dataset = Dataset.open(data_folder)
  assert len(dataset) == 16
  assert (dataset.name, dataset.resolution, dataset.split) == ("shapes", 16, "train")
  assert dataset.manifest["splits"]["train"]["examples"] == 16
  keys = set()
  for number in np.random.default_rng(0).permutation(len(dataset)):
    example = dataset[number]
    keys.add(example.key)
    assert (example.width, example.height) == (16, 16)
    assert example.captions[0] == example.key.removesuffix(".png").replace("_", " ")
    original = (picture_folder / example.key).read_bytes()
    np.testing.assert_array_equal(images.decode_image(example.image), images.decode_image(original))
  heldout = Dataset.open(data_folder, "heldout")
  assert len(heldout) == 4
  assert len(keys | {heldout[number].key for number in range(4)}) == 20


def test_numbers_out_of_range(data_folder):
  dataset = Dataset.open(data_folder)
  assert dataset[-1].key == dataset[15].key
  for number in (16, -17):
    with pytest.raises(IndexError, match=f"example {number} of 16"):
      dataset[number]


def test_captions(data_folder):
  dataset = Dataset.open(data_folder)
  assert dataset.captions() == [dataset[number].captions for number in range(16)]
  assert all(len(captions) == 3 for captions in dataset.captions())


@pytest.mark.slow
def test_tensorflow_reads_the_folder(tf, data_folder):
  dataset = Dataset.open(data_folder)
  files = [os.fspath(path) for path in shards(data_folder)]
  features = {"key": tf.io.FixedLenFeature([], tf.string), "image": tf.io.FixedLenFeature([], tf.string)}
  read = [tf.io.parse_single_example(record, features) for record in tf.data.TFRecordDataset(files)]
  assert [entry["key"].numpy().decode() for entry in read] == [dataset[number].key for number in range(16)]
  np.testing.assert_array_equal(tf.io.decode_image(read[5]["image"]).numpy(), images.decode_image(dataset[5].image))


def test_another_process_may_have_it(data_folder):
  dataset = Dataset.open(data_folder)
  expected = dataset[3]
  assert pickle.loads(pickle.dumps(dataset))[3] == expected


def test_threads_may_share_it(data_folder):
  dataset = Dataset.open(data_folder)
  expected = [dataset[number].key for number in range(16)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    read = list(pool.map(lambda number: dataset[number % 16].key, range(800)))
  assert read == expected * 50


def test_more_shards_than_kept_open(data_folder, monkeypatch):
  expected = [Dataset.open(data_folder)[number] for number in range(16)]
  monkeypatch.setattr(dataset_module, "_KEPT_OPEN", 1)
  before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
  dataset = Dataset.open(data_folder)
  assert [dataset[number] for number in range(16)] == expected
  if before is not None:
    assert len(os.listdir("/proc/self/fd")) == before


def test_damaged_record_is_named(copy):
  dataset = Dataset.open(copy)
  path = shards(copy)[1]
  offset, length = tfrecords.load_index(path)[2]
  data = bytearray(path.read_bytes())
  data[offset + 12 + length // 2] ^= 1
  path.write_bytes(data)
  damaged = len(tfrecords.load_index(shards(copy)[0])) + 2
  with pytest.raises(tfrecords.RecordError, match=f"{path.name}: record 2 at byte {offset} has a wrong checksum"):
    dataset[damaged]
  dataset[damaged - 1], dataset[damaged + 1]


def test_record_that_is_no_example_is_named(copy):
  path = shards(copy)[0]
  count = len(tfrecords.load_index(path))
  with tfrecords.ShardWriter(path) as writer:
    for _ in range(count):
      writer.write(b"\xff\xff")
  with pytest.raises(tfrecords.RecordError, match=f"{path.name}: record 1: not a tf.train.Example"):
    Dataset.open(copy)[1]


def test_missing_folder(tmp_path):
  with pytest.raises(UserError, match="nowhere does not exist"):
    Dataset.open(tmp_path / "nowhere")


def test_file_instead_of_folder(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(UserError, match="file is not a folder"):
    Dataset.open(tmp_path / "file")


def test_empty_folder(tmp_path):
  with pytest.raises(UserError, match="has no manifest.json"):
    Dataset.open(tmp_path)


def test_unknown_split(data_folder):
  with pytest.raises(UserError, match=r"no split 'test' \(it has train, heldout\)"):
    Dataset.open(data_folder, "test")


@pytest.mark.parametrize(
  "text, words",
  [
    ("{", "manifest.json cannot be read"),
    ("[]", "schema version None"),
    ('{"schema_version": 99}', "schema version 99, this program reads 1"),
    ('{"schema_version": 1, "name": "x"}', "lacks resolution, splits"),
  ],
)
def test_bad_manifest(copy, text, words):
  (copy / "manifest.json").write_text(text)
  with pytest.raises(UserError, match=words):
    Dataset.open(copy)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_manifest_that_an_editor_has_saved(copy, encoding):
  path = copy / "manifest.json"
  text = path.read_text(encoding="utf-8").replace('"folder pictures', '"folder Äpfel pictures')
  path.write_bytes(text.encode(encoding))
  assert "Äpfel" in Dataset.open(copy).manifest["source"]


@pytest.mark.parametrize(
  "data, words",
  [
    (b"\xe9", "manifest.json cannot be read: it is not UTF-8"),
    (b"[" * 100_000, "manifest.json cannot be read: it is nested too deeply"),
  ],
)
def test_manifest_that_is_no_text(copy, data, words):
  (copy / "manifest.json").write_bytes(data)
  with pytest.raises(UserError, match=words):
    Dataset.open(copy)


@pytest.mark.parametrize("resolution", ["16", 0, -1, None, 16.5])
def test_manifest_with_another_resolution(copy, resolution):
  change_manifest(copy, lambda manifest: manifest.update(resolution=resolution))
  with pytest.raises(UserError, match=f"manifest.json is damaged: its resolution is {re.escape(repr(resolution))}"):
    Dataset.open(copy)


def test_tfrecords_without_a_manifest(copy):
  (copy / "manifest.json").unlink()
  with pytest.raises(
    UserError, match="no manifest.json: it was not made by build-data, and shapes.*tfrecord alone does not"
  ):
    Dataset.open(copy)


def test_missing_shard(copy):
  shards(copy)[1].unlink()
  with pytest.raises(UserError, match="shapes-train-00001-of-00003.tfrecord is missing"):
    Dataset.open(copy)
  assert len(Dataset.open(copy, "heldout")) == 4


def test_truncated_shard(copy):
  path = shards(copy)[2]
  os.truncate(path, path.stat().st_size - 1)
  with pytest.raises(UserError, match="shapes-train-00002-of-00003.tfrecord has .* truncated"):
    Dataset.open(copy)


def test_what_can_be_had_of_damaged_shards(copy, data_folder):
  whole = Dataset.open(data_folder)
  expected = [whole[number] for number in range(16)]
  counts = [len(tfrecords.load_index(path)) for path in shards(copy)]
  starts = np.cumsum([0, *counts])
  cut = tfrecords.load_index(shards(copy)[0])
  os.truncate(shards(copy)[0], int(cut[1, 0]) + 5)
  shards(copy)[1].unlink()
  path = shards(copy)[1]  # the third; no index, and damage at its record 2
  tfrecords.index_path(path).unlink()
  data = bytearray(path.read_bytes())
  data[tfrecords.scan(path)[2, 0]] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match="truncated"):
    Dataset.open(copy)
  dataset = Dataset.open(copy, tolerate_corruption=True)
  assert len(dataset) == 16 and len(dataset.problems) == 3
  for words, problem in zip(
    ("it is truncated", "is missing", "record 2 at byte .* has a broken header"), dataset.problems
  ):
    assert re.search(words, problem)
  good = {0, starts[2], starts[2] + 1}
  for number in range(16):
    if number in good:
      assert dataset[number] == expected[number]
    else:
      with pytest.raises(tfrecords.RecordError):
        dataset[number]
  captions = [expected[number].captions[0] for number in sorted(good)]
  assert len(set(captions)) == 3
  assert dataset.first_captions(2) == captions[:2] and dataset.first_captions(9) == captions
  assert not tfrecords.index_path(path).exists()  # none is made of what is damaged
  with pytest.raises(UserError, match="record 1 at byte .* is cut off"):
    dataset.captions()


def test_missing_index_is_no_harm(copy):
  expected = [example.key for example in map(Dataset.open(copy).__getitem__, range(16))]
  for path in copy.glob("*.index"):
    path.unlink()
  assert [example.key for example in map(Dataset.open(copy).__getitem__, range(16))] == expected


def test_missing_index_of_a_read_only_data_set(copy, monkeypatch):
  """The shards are scanned, nothing is written, and other threads read as usual."""
  expected = [example.key for example in map(Dataset.open(copy).__getitem__, range(16))]
  for path in copy.glob("*.index"):
    path.unlink()
  files = sorted(copy.iterdir())
  write = pathlib.Path.write_bytes

  def refuse(path, data):  # permissions do not bind root
    if path.is_relative_to(copy):
      raise OSError(errno.EROFS, "Read-only file system")
    return write(path, data)

  monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
  for held in (dataset_module._HELD_RECORDS, 0):
    monkeypatch.setattr(dataset_module, "_HELD_RECORDS", held)
    dataset = Dataset.open(copy)
    assert [dataset[number].key for number in range(16)] == expected
    assert len(dataset.captions()) == 16
  assert sorted(copy.iterdir()) == files


def test_indices_that_are_not_held(copy, monkeypatch):
  dataset = Dataset.open(copy)
  expected = [dataset[number] for number in range(16)]
  monkeypatch.setattr(dataset_module, "_HELD_RECORDS", 0)
  for kept_open in (256, 1):
    monkeypatch.setattr(dataset_module, "_KEPT_OPEN", kept_open)
    dataset = Dataset.open(copy)
    assert [dataset[number] for number in range(16)] == expected
    assert [schema.decode(record) for record in dataset.read_run(2, 13)] == expected[2:15]
    assert dataset.place(15) == Dataset.open(copy).place(15)
  path = tfrecords.index_path(shards(copy)[0])
  os.truncate(path, 16)
  assert dataset[0] == expected[0]
  with pytest.raises(tfrecords.RecordError, match=f"{shards(copy)[0].name}: record 1: its index has become shorter"):
    dataset[1]
  assert isinstance(dataset.read_run(0, 3)[2], tfrecords.RecordError)
  with pytest.raises(UserError, match="its index says"):
    Dataset.open(copy)


def _headers(folder, records):
  """A data set of that many records of 100 bytes in one sparse shard, of which only the index has content."""
  folder.mkdir()
  shard = folder / "x-train-00000-of-00001.tfrecord"
  size = 100 + tfrecords.FRAME_BYTES
  with open(shard, "wb") as file:
    file.truncate(size * records)
  rows = np.stack([size * np.arange(records), np.full(records, 100)], axis=1)
  tfrecords.index_path(shard).write_bytes(rows.astype("<u8").tobytes())
  split = {"shards": [{"file": shard.name, "examples": records}]}
  manifest = {"schema_version": 1, "name": "x", "resolution": 8, "splits": {"train": split}}
  (folder / "manifest.json").write_text(json.dumps(manifest))
  return folder


def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
  held, peaks = [], []
  for records in (10_000, 1_000_000):
    folder = _headers(tmp_path / str(records), records)
    Dataset.open(folder)  # what is imported and cached once
    tracemalloc.start()
    try:
      dataset = Dataset.open(folder)
      sampler = IndexSampler(dataset, order=orders.BlockOrder(records))
      for step in (0, 1, 10**6):
        sampler.plan(0, 64, step, np.arange(64))
      assert dataset.place(records - 1)[1] == records - 1
      current, peak = tracemalloc.get_traced_memory()
    finally:
      tracemalloc.stop()
    held.append(current)
    peaks.append(peak)
  assert held[1] < held[0] + 10_000  # bytes; an index in memory would take 16 MB
  assert peaks[1] < 4e6


def test_exchanged_shard(copy):
  with tfrecords.ShardWriter(shards(copy)[0]) as writer:
    writer.write(b"one")
  with pytest.raises(UserError, match="holds 1 examples, the manifest says"):
    Dataset.open(copy)


def test_empty_split(copy):
  change_manifest(copy, lambda manifest: manifest["splits"].update(heldout={"shards": []}))
  with pytest.raises(UserError, match="split 'heldout' of data set .* is empty"):
    Dataset.open(copy, "heldout")
