"""TFRecord files and their index, against TensorFlow's own reader and writer."""

import hashlib
import os
import pathlib

import numpy as np
import pytest

from aurora_jax.data import tfrecords
from aurora_jax.errors import UserError

PAYLOADS = [b"first", b"", bytes(range(256)) * 300, b"last"]


@pytest.fixture
def shard(tmp_path):
  path = tmp_path / tfrecords.shard_name("things", "train", 3, 128)
  with tfrecords.ShardWriter(path) as writer:
    for payload in PAYLOADS:
      writer.write(payload)
  return path


def read_all(path):
  return [tfrecords.read_record(path, offset, length) for offset, length in tfrecords.load_index(path).tolist()]


def change_byte(path, position):
  data = bytearray(path.read_bytes())
  data[position] ^= 1
  path.write_bytes(data)


def test_names(shard):
  assert shard.name == "things-train-00003-of-00128.tfrecord"
  assert tfrecords.index_path(shard).name == "things-train-00003-of-00128.index"


def test_masked_crc_of_tensorflow():
  # The record of an empty payload as TensorFlow writes it: length 0 and two checksums.
  assert tfrecords.frame(b"").hex() == "0000000000000000" + "29039807" + "d8ea82a2"


@pytest.mark.slow
def test_same_bytes_as_tensorflow(tf, shard, tmp_path):
  with tf.io.TFRecordWriter(os.fspath(tmp_path / "theirs")) as writer:
    for payload in PAYLOADS:
      writer.write(payload)
  assert (tmp_path / "theirs").read_bytes() == shard.read_bytes()


@pytest.mark.slow
def test_tensorflow_reads_ours(tf, shard):
  assert [record.numpy() for record in tf.data.TFRecordDataset(os.fspath(shard))] == PAYLOADS


def test_random_access(shard):
  assert read_all(shard) == PAYLOADS


def test_index_is_bare_pairs(shard):
  pairs = np.frombuffer(tfrecords.index_path(shard).read_bytes(), "<u8").reshape(-1, 2)
  assert pairs[:, 1].tolist() == [len(payload) for payload in PAYLOADS]
  assert pairs[:, 0].tolist() == [0, 5 + 16, 5 + 32, 5 + 48 + 76800]


def test_writer_knows_size_and_hash(tmp_path):
  with tfrecords.ShardWriter(tmp_path / "x.tfrecord") as writer:
    writer.write(b"abc")
    writer.write(b"")
  data = (tmp_path / "x.tfrecord").read_bytes()
  assert writer.size == len(data)
  assert writer.sha256 == hashlib.sha256(data).hexdigest()


def test_index_is_rebuilt_and_kept(shard):
  index = tfrecords.index_path(shard)
  original = index.read_bytes()
  index.unlink()
  assert read_all(shard) == PAYLOADS
  assert index.read_bytes() == original
  assert len(list(shard.parent.iterdir())) == 2


def test_index_is_rebuilt_where_it_cannot_be_written(shard, monkeypatch):
  tfrecords.index_path(shard).unlink()

  def refuse(self, data):
    raise PermissionError

  monkeypatch.setattr(pathlib.Path, "write_bytes", refuse)
  assert read_all(shard) == PAYLOADS
  assert not tfrecords.index_path(shard).exists()


def test_empty_shard(tmp_path):
  path = tmp_path / "empty.tfrecord"
  with tfrecords.ShardWriter(path):
    pass
  assert tfrecords.load_index(path).shape == (0, 2)
  tfrecords.index_path(path).unlink()
  assert tfrecords.load_index(path).shape == (0, 2)


@pytest.mark.parametrize(
  "position, words",
  [
    (0, "record 2 at byte 37 has a broken header"),
    (9, "record 2 at byte 37 has a broken header"),
    (12 + 70000, "record 2 at byte 37 has a wrong checksum"),
    (12 + 76800, "record 2 at byte 37 has a wrong checksum"),
  ],
)
def test_damage_is_named(shard, position, words):
  index = tfrecords.load_index(shard).tolist()
  change_byte(shard, index[2][0] + position)
  with pytest.raises(tfrecords.RecordError, match=words) as caught:
    tfrecords.read_record(shard, *index[2], number=2)
  assert os.fspath(shard) in str(caught.value)
  for number in (0, 1, 3):
    assert tfrecords.read_record(shard, *index[number]) == PAYLOADS[number]


def test_read_in_pieces(shard, monkeypatch):
  pread = os.pread
  monkeypatch.setattr(tfrecords.os, "pread", lambda file, count, offset: pread(file, min(count, 9999), offset))
  assert read_all(shard) == PAYLOADS
  offset, length = tfrecords.load_index(shard).tolist()[2]
  os.truncate(shard, offset + 20_000)
  with pytest.raises(tfrecords.RecordError, match="is cut off: 20000 of 76816 bytes"):
    tfrecords.read_record(shard, offset, length)


def test_read_past_the_end(shard):
  with pytest.raises(tfrecords.RecordError, match=r"at byte 5 is cut off: \d+ of 100000016 bytes"):
    tfrecords.read_record(shard, 5, 100_000_000)


def test_read_of_a_missing_file(tmp_path):
  with pytest.raises(tfrecords.RecordError, match="gone.tfrecord: No such file"):
    tfrecords.read_record(tmp_path / "gone.tfrecord", 0, 1)


@pytest.mark.parametrize("cut", [1, 4, 17, 21, 70000])
@pytest.mark.parametrize("with_index", [True, False])
def test_truncated_shard(shard, cut, with_index):
  if not with_index:
    tfrecords.index_path(shard).unlink()
  os.truncate(shard, shard.stat().st_size - cut)
  with pytest.raises(UserError, match="truncated" if with_index else "cut off") as caught:
    tfrecords.load_index(shard)
  assert os.fspath(shard) in str(caught.value)
  assert tfrecords.index_path(shard).exists() == with_index


def test_grown_shard(shard):
  with open(shard, "ab") as file:
    file.write(tfrecords.frame(b"more"))
  with pytest.raises(UserError, match="was changed"):
    tfrecords.load_index(shard)


def test_scan_of_something_else(tmp_path):
  path = tmp_path / "text.tfrecord"
  path.write_text("this is no tfrecord file at all")
  with pytest.raises(UserError, match="text.tfrecord: record 0 at byte 0 has a broken header"):
    tfrecords.load_index(path)


def test_missing_shard(tmp_path):
  with pytest.raises(UserError, match="gone.tfrecord is missing"):
    tfrecords.load_index(tmp_path / "gone.tfrecord")


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda data: data[:-3], "not whole pairs"),
    (lambda data: data[16:], "do not follow each other"),
    (lambda data: data[:8] + b"\xff" * 8 + data[16:], "do not follow each other"),
    (lambda data: data[:-16], "truncated or was changed"),
    # Sums that run over would follow each other and even end where the file ends.
    (lambda data: np.array([[0, 2**64 - 10], [6, 2**64 - 20]], "<u8").tobytes(), "do not follow each other"),
    (lambda data: data[:-8] + b"\xff" * 7 + b"\x7f", "do not follow each other"),
  ],
)
def test_broken_index(shard, change, words):
  index = tfrecords.index_path(shard)
  index.write_bytes(change(index.read_bytes()))
  with pytest.raises(UserError, match=words):
    tfrecords.load_index(shard)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GZIP", "ZLIB"])
@pytest.mark.parametrize("with_index", [True, False])
def test_compressed_shard(tf, shard, kind, with_index):
  with tf.io.TFRecordWriter(os.fspath(shard), tf.io.TFRecordOptions(compression_type=kind)) as writer:
    for payload in PAYLOADS:
      writer.write(payload)
  if not with_index:
    tfrecords.index_path(shard).unlink()
  with pytest.raises(UserError, match=rf"it is compressed \({kind}\), and shards are read as they are") as caught:
    tfrecords.load_index(shard)
  assert os.fspath(shard) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0x9C78, 0x8B1F])
def test_a_shard_that_begins_like_a_compressed_one(tmp_path, length):
  """The first two bytes are those of a length."""
  with tfrecords.ShardWriter(tmp_path / "x.tfrecord") as writer:
    writer.write(bytes(length))
  os.truncate(tmp_path / "x.tfrecord", 100)
  for _ in range(2):
    with pytest.raises(UserError) as caught:
      tfrecords.load_index(tmp_path / "x.tfrecord")
    assert "compressed" not in str(caught.value)
    tfrecords.index_path(tmp_path / "x.tfrecord").unlink(missing_ok=True)
