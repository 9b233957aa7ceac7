"""A thousand tfrecord files with random damage: only the documented errors occur, and only intact records are read."""

import json
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import corrupt_records, images, schema, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.errors import UserError

RECORDS = 6
SECONDS = 60  # for a thousand files; they take about two


def _flip(rng, data, start, length, to):
  data[start] ^= 1 << int(rng.integers(8))


def _truncate(rng, data, start, length, to):
  del data[start:]


def _insert(rng, data, start, length, to):
  data[start:start] = rng.bytes(length)


def _delete(rng, data, start, length, to):
  del data[start : start + length]


def _duplicate(rng, data, start, length, to):
  data[to:to] = data[start : start + length]


def _overwrite(rng, data, start, length, to):
  chunk = data[start : start + length][: len(data) - to]
  data[to : to + len(chunk)] = chunk


def _zero(rng, data, start, length, to):
  data[start : start + length] = bytes(len(data[start : start + length]))


KINDS = (_flip, _truncate, _insert, _delete, _duplicate, _overwrite, _zero)


def _damaged(rng, data, times, cuts=()):
  """A copy of bytes with so much done to it; one time in three to what lies between two of the `cuts` exactly."""
  data = bytearray(data)
  for _ in range(times):
    if data:
      start, to = (int(place) for place in rng.integers(len(data), size=2))
      length = int(rng.integers(1, max(2, len(data) // 3)))
      if cuts and rng.integers(3) == 0:
        start, end, to = sorted(int(place) for place in rng.choice(cuts, 3))
        start, length = min(start, len(data) - 1), max(1, end - start)
      KINDS[rng.integers(len(KINDS))](rng, data, start, length, min(to, len(data)))
  return bytes(data)


@pytest.fixture(name="folder")
def _folder(tmp_path):
  """A data set of one shard with small images."""
  rng = np.random.default_rng(0)
  pictures = [images.encode_png(Image.fromarray(rng.integers(0, 255, (2, 2, 3), np.uint8))) for _ in range(RECORDS)]
  folder = tmp_path / "data"
  folder.mkdir()
  # Two of the same length, so that one may stand exactly in the other's place.
  with tfrecords.ShardWriter(folder / "x-train-00000-of-00001.tfrecord") as writer:
    for number, picture in enumerate(pictures):
      writer.write(
        schema.encode(schema.Example(picture, (f"number {number % 3}",) * (1 + number // 3), 2, 2, str(number)))
      )
  (folder / "manifest.json").write_text(
    json.dumps(
      {
        "schema_version": schema.SCHEMA_VERSION,
        "name": "x",
        "resolution": 2,
        "splits": {
          "train": {
            "examples": RECORDS,
            "captions": RECORDS,
            "shards": [{"file": writer.path.name, "examples": RECORDS, "sha256": writer.sha256}],
          }
        },
      }
    )
  )
  return folder


@pytest.fixture(name="in_time")
def _in_time():
  """Whatever hangs is interrupted."""

  def stop(*_):
    raise TimeoutError(f"not done after {SECONDS} s")

  before = signal.signal(signal.SIGALRM, stop)
  signal.alarm(SECONDS)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def _read(dataset, number):
  """A record's bytes, None where it cannot be read; anything but the documented error is a failure."""
  try:
    data = dataset.read(number)
  except tfrecords.RecordError as error:
    assert dataset.where(number).split(": ")[0] in str(error) and "\n" not in str(error)
    return None
  return data


@pytest.mark.slow
def test_a_thousand_damaged_files(folder, in_time):
  shard = folder / "x-train-00000-of-00001.tfrecord"
  index = tfrecords.index_path(shard)
  whole, whole_index = shard.read_bytes(), index.read_bytes()
  places = tfrecords.load_index(shard).tolist()
  payloads = [tfrecords.read_record(shard, *place) for place in places]
  frames = [whole[offset : offset + length + tfrecords.FRAME_BYTES] for offset, length in places]
  seen = dict.fromkeys(("whole record", "lost record", "refused at start", "opened as whole", "not to be opened"), 0)
  for case in range(1000):
    rng = np.random.default_rng(case)
    shard.write_bytes(whole)
    index.write_bytes(whole_index)
    opened = Dataset.open(folder)  # Before the damage: as of a training run that goes on for days.
    opened.read(0)
    data, stored = whole, whole_index
    what = case % 8
    if what != 7:
      data = _damaged(rng, whole, rng.integers(1, 4), [offset for offset, _ in places])
      shard.write_bytes(data)
    if what >= 6:
      stored = _damaged(rng, whole_index, rng.integers(1, 4), range(0, len(whole_index), 16))
      index.write_bytes(stored)
    if what == 5:
      stored = None
      index.unlink()
    if case % 50 == 0:
      shard.unlink()  # Whoever has it open may go on reading.

    try:
      Dataset.open(folder)
      seen["opened as whole"] += 1
    except UserError as error:
      assert "\n" not in str(error)
      seen["refused at start"] += 1
    if stored is None:
      index.unlink(missing_ok=True)  # Of a shard that seemed whole one was made.
    try:
      readers = [opened, Dataset.open(folder, tolerate_corruption=True)]
      assert len(readers[1]) == RECORDS
    except UserError as error:  # More records than ever were: another shard.
      assert "the manifest says 6" in str(error)
      seen["not to be opened"] += 1
      readers = [opened]
    for reader in readers:
      for number, (offset, _) in enumerate(places):
        got = _read(reader, number)
        seen["lost record" if got is None else "whole record"] += 1
        assert got is None or got in payloads
        # With the index at hand, only what is damaged is lost.
        untouched = data[offset : offset + len(frames[number])] == frames[number]
        untouched &= shard.exists() or reader is opened
        if reader is opened or stored == whole_index:
          assert (got == payloads[number]) if untouched else got != payloads[number]
    if case % 100 < 2 and len(readers) == 2:
      assert len(list(corrupt_records.verify(readers[1]))) == sum(_read(readers[1], n) is None for n in range(RECORDS))
  assert all(count > 20 for name, count in seen.items() if name != "not to be opened"), seen
  assert seen["not to be opened"], seen


def test_damage_beneath_a_right_checksum(folder, in_time):
  """Records that were written broken: the reader says so, whatever they hold."""
  shard = folder / "x-train-00000-of-00001.tfrecord"
  payloads = [tfrecords.read_record(shard, *place) for place in tfrecords.load_index(shard).tolist()]
  reasons = set()
  for case in range(200):
    rng = np.random.default_rng(case)
    with tfrecords.ShardWriter(shard) as writer:
      for payload in payloads:
        writer.write(_damaged(rng, payload, 1))
    dataset = Dataset.open(folder)
    for number in range(RECORDS):
      try:
        picture, example = dataset.image(number)
        assert picture.mode == "RGB" and all(caption.strip() for caption in example.captions)
      except tfrecords.RecordError as error:
        reasons.add(error.reason.split(" (")[0].split(":")[0])
  assert {"not a tf.train.Example", "not a readable image", "no feature 'image' with one value"} <= reasons


def test_every_record_is_looked_at(data_folder, tmp_path):
  folder = shutil.copytree(data_folder, tmp_path / "copy")
  assert not list(corrupt_records.verify(Dataset.open(folder))) and not list(
    corrupt_records.changed_shards(Dataset.open(folder))
  )
  shards = sorted(folder.glob("*-train-*.tfrecord"))
  last = tfrecords.load_index(shards[0])[-1]
  data = bytearray(shards[0].read_bytes())
  data[-1] ^= 1
  shards[0].write_bytes(data)
  shards[1].unlink()
  tfrecords.index_path(shards[1]).unlink()
  told = []
  opened = Dataset.open(folder, tolerate_corruption=True)
  assert opened.problems == [f"shard {shards[1]} is missing"] and len(opened) == 16
  found = list(corrupt_records.verify(opened, lambda done, total: told.append((done, total))))
  counts = [entry["examples"] for entry in opened.manifest["splits"]["train"]["shards"]]
  assert [skip.number for skip in found] == [counts[0] - 1, *range(counts[0], counts[0] + counts[1])]
  assert (found[0].offset, found[0].reason) == (int(last[0]), "has a wrong checksum")
  assert (found[1].offset, found[1].reason) == (-1, "is lost: nothing says where it begins")
  assert list(corrupt_records.changed_shards(opened)) == [shards[0].name] and told == [(16, 16)]


def test_manifests_that_are_damaged(data_folder, tmp_path):
  folder = shutil.copytree(data_folder, tmp_path / "copy")
  manifest = (folder / "manifest.json").read_bytes()
  for case in range(200):
    rng = np.random.default_rng(case)
    (folder / "manifest.json").write_bytes(_damaged(rng, manifest, 1))
    for tolerate in (False, True):
      try:
        Dataset.open(folder, tolerate_corruption=tolerate)
      except UserError as error:
        assert "\n" not in str(error)
