"""The captions of a shard in a file of their own."""

import os
import shutil

import pytest

from aurora_jax.data import caption_index, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import IndexSampler

CAPTIONS = [("a cat", "eine Katze"), ("ein Käfer",), ("", "x"), ("日本", "a\nb", "c")]


@pytest.fixture(name="shard")
def _shard(tmp_path):
  with tfrecords.ShardWriter(tmp_path / "x-train-00000-of-00001.tfrecord") as writer:
    for number in range(4):
      writer.write(bytes(number))
  return writer.path


def test_round_trip(shard):
  assert caption_index.read(shard, 4) is None
  caption_index.write(shard, CAPTIONS)
  assert caption_index.read(shard, 4) == CAPTIONS
  assert caption_index.caption_path(shard).name == "x-train-00000-of-00001.captions"
  assert sorted(path.suffix for path in shard.parent.iterdir()) == [".captions", ".index", ".tfrecord"]


def test_an_empty_shard(tmp_path):
  (tmp_path / "x.tfrecord").write_bytes(b"")
  caption_index.write(tmp_path / "x.tfrecord", [])
  assert caption_index.read(tmp_path / "x.tfrecord", 0) == []


def test_broken_or_of_another_shard(shard):
  caption_index.write(shard, CAPTIONS)
  path = caption_index.caption_path(shard)
  data = path.read_bytes()
  assert caption_index.read(shard, 5) is None
  for broken in (b"", data[:20], data[:-1], data + b"x", *(data[:i] + b"\xff" + data[i + 1 :] for i in (0, 9, 40, 60))):
    path.write_bytes(broken)
    assert caption_index.read(shard, 4) is None
  path.write_bytes(data)
  with open(shard, "ab") as file:
    file.write(b"x")
  assert caption_index.read(shard, 4) is None


@pytest.fixture(name="copy")
def _copy(data_folder, tmp_path):
  return shutil.copytree(data_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.captions"))


def test_it_is_made_when_missing_and_saves_reading(copy, monkeypatch):
  dataset = Dataset.open(copy)
  expected = [dataset[number].captions for number in range(16)]
  assert dataset.captions() == expected
  assert len(list(copy.glob("*-train-*.captions"))) == 3

  def refuse(*args):
    raise AssertionError("a record was read")

  monkeypatch.setattr(tfrecords, "read_record", refuse)
  monkeypatch.setattr(tfrecords, "read_records", refuse)
  again = Dataset.open(copy)
  assert again.captions() == expected
  assert again.first_captions(3) == [captions[0] for captions in expected[:3]]
  assert IndexSampler(again, pairs=2).digest == IndexSampler(dataset, pairs=2).digest


def test_a_folder_that_cannot_be_written(copy, monkeypatch):
  expected = Dataset.open(copy).captions()
  for path in copy.glob("*.captions"):
    path.unlink()
  replace = os.replace

  def refuse(source, target):
    if str(target).endswith(".captions"):
      raise PermissionError(13, "read-only")
    replace(source, target)

  monkeypatch.setattr(os, "replace", refuse)
  assert Dataset.open(copy).captions() == expected
  assert not [path for path in copy.iterdir() if ".captions" in path.name]


def test_none_is_made_of_a_corrupt_shard(copy):
  shard = sorted(copy.glob("*-train-*.tfrecord"))[1]
  expected = Dataset.open(copy)
  expected = {number: expected[number].captions for number in range(16)}
  data = bytearray(shard.read_bytes())
  data[tfrecords.load_index(shard)[2, 0] + 60] ^= 1
  shard.write_bytes(data)
  del expected[len(tfrecords.load_index(sorted(copy.glob("*-train-*.tfrecord"))[0])) + 2]
  assert dict(Dataset.open(copy).readable_captions()) == expected
  assert len(list(copy.glob("*-train-*.captions"))) == 2
