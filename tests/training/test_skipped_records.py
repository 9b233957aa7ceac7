"""Damaged data while training: the record alone is skipped, listed and counted, up to a limit; nothing depends on a
restart.
"""

import dataclasses
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import toy
from PIL import Image

from aurora_jax.cli import main
from aurora_jax.data import build, loader, schema, sources, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.runs import checkpoint_reader, config_check, metrics, skipped_records
from aurora_jax.runs import fingerprint as fingerprint_lib
from aurora_jax.training import stopping

RECORDS, SHARDS = 40, 5


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory):
  """A data set of 40 images in 5 shards."""
  images = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for number in range(RECORDS):
    Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(images / f"{number}.png")
    (images / f"{number}.txt").write_text(f"picture {number}\n")
  out = tmp_path_factory.mktemp("data") / "data"
  build.build(sources.folder(images), out, resolution=4, shards=SHARDS, heldout_fraction=0, name="x")
  return out


@pytest.fixture(name="data")
def _data(whole, tmp_path):
  return shutil.copytree(whole, tmp_path / "data")


def shard(data, number):
  return data / tfrecords.shard_name("x", "train", number, SHARDS)


def flip(data, number, record):
  path = shard(data, number)
  content = bytearray(path.read_bytes())
  content[tfrecords.load_index(path)[record, 0] + 40] ^= 1
  path.write_bytes(content)


def break_everything(data):
  """One fault of each kind: a flipped byte, no image, an empty caption, a shard cut off, one gone. {number: reason}."""
  flip(data, 0, 3)
  path = shard(data, 1)
  payloads = [tfrecords.read_record(path, *place) for place in tfrecords.load_index(path).tolist()]
  with tfrecords.ShardWriter(path) as writer:
    for record, payload in enumerate(payloads):
      changes = {2: {"image": b"no image"}, 5: {"captions": ("",)}}.get(record, {})
      writer.write(schema.encode(dataclasses.replace(schema.decode(payload), **changes)))
  dataset = Dataset.open(data)
  os.truncate(shard(data, 2), int(tfrecords.load_index(shard(data, 2))[6, 0]) + 3)
  shard(data, 3).unlink()
  return dataset, {
    3: "wrong checksum",
    10: "not a readable image",
    13: "empty value",
    22: "is cut off",
    23: "is cut off",
    **dict.fromkeys(range(24, 32), "No such file"),
  }


class DataToy(toy.Toy):
  """The toy, fed by the real loader."""

  def __init__(self, experiment, dataset, **options):
    super().__init__(experiment, **options)
    self.dataset = dataset

  def batches(self, start_step):
    return _Batches(
      self,
      loader.train_batches(
        self.dataset, resolution=4, batch_size=8, seed=self.experiment.train.seed, start_step=start_step
      ),
    )


class _Batches:
  """The loader's batches in the toy's shapes."""

  def __init__(self, owner, batches):
    self._owner, self._batches = owner, batches

  def __iter__(self):
    return self

  def __next__(self):
    batch = next(self._batches)
    step = self._batches.step - 1
    self._owner.seen.append(batch["index"].tolist())
    if self._owner.after_batch is not None:
      self._owner.after_batch(step)
    return {"image": batch["image"][..., 0].reshape(8, 16), "index": batch["index"], "poison": np.zeros(1, np.float32)}

  @property
  def skipped(self):
    return self._batches.skipped

  def close(self):
    self._batches.close()


def train(workdir, dataset, after_batch=None, **fields):
  """Trains for 12 steps of 8: 2.4 epochs. Returns (DataToy, Outcome)."""
  fields = {"data.max_skipped": 0.5, "train.log_every": 1} | fields
  return toy.run(workdir, toy=DataToy(toy.experiment(**fields), dataset, after_batch=after_batch))


def listed(workdir):
  return [json.loads(line) for line in (workdir / "skipped_records.jsonl").read_text().splitlines()]


def logged(workdir):
  """What was logged, without the times."""
  return [
    {
      name: value
      for name, value in row.items()
      if name not in ("seconds", "images_per_second") and not name.startswith("time/")
    }
    for row in metrics.history(workdir / "metrics.jsonl")
    if row["kind"] == "train"
  ]


def fingerprint(workdir):
  return fingerprint_lib.of_checkpoint(workdir / "checkpoints")


@pytest.fixture(name="damaged")
def _damaged(data):
  return break_everything(data)


def test_every_fault_is_skipped_listed_counted_and_warned_of(damaged, tmp_path, capsys):
  dataset, faults = damaged
  trained, outcome = train(tmp_path / "run", dataset)
  assert (outcome.step, outcome.reason) == (12, stopping.DONE)
  assert not set(faults) & {number for batch in trained.seen for number in batch}
  assert {number for batch in trained.seen for number in batch} == set(range(RECORDS)) - set(faults)

  rows = listed(tmp_path / "run")
  assert sorted(row["number"] for row in rows) == sorted(faults)
  for row in rows:
    assert faults[row["number"]] in row["reason"]
    assert row["shard"] == shard(tmp_path, row["number"] // 8).name and row["record"] == row["number"] % 8
    assert row["offset"] == dataset.place(row["number"])[2]
    assert bool(row["key"]) == (row["number"] in (10, 13))
  assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)

  counts = [row["data/skipped"] for row in logged(tmp_path / "run")]
  assert counts == [sum(row["step"] < done for row in rows) for done in range(1, 13)] and counts[-1] == len(faults)
  (board,) = (tmp_path / "run/tensorboard").iterdir()
  assert b"data/skipped" in board.read_bytes()
  error = capsys.readouterr().err
  warned = [int(line.split("WARNING: ")[1].split()[0]) for line in error.splitlines() if "WARNING" in line]
  assert {count.bit_length() for count in warned} == set(range(warned[0].bit_length(), 5)) and len(warned) > 1
  assert "others took their places (more than 20 stop the run)" in error

  assert main.main(["inspect", str(tmp_path / "run")]) == 0
  said = capsys.readouterr().out
  assert f"skipped    no step, 13 records (listed in {tmp_path}/run/skipped_records.jsonl)" in said
  assert f"{rows[-1]['shard']}: record {rows[-1]['record']}" in said


@pytest.mark.slow
def test_a_restart_changes_nothing(damaged, tmp_path, capsys):
  dataset, _ = damaged
  train(tmp_path / "whole", dataset)

  def stop(step):
    if step == 5:
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.05)

  _, outcome = train(tmp_path / "run", dataset, stop)
  assert outcome.reason == stopping.TERMINATED
  # As after a kill: the newest checkpoint is gone, the list runs ahead of the one before and ends within a line.
  shutil.rmtree(tmp_path / f"run/checkpoints/{outcome.step}")
  path = tmp_path / "run/skipped_records.jsonl"
  assert max(row["step"] for row in listed(tmp_path / "run")) >= 4
  path.write_text(path.read_text() + path.read_text()[:30])
  capsys.readouterr()
  _, outcome = train(tmp_path / "run", dataset)
  assert "going on from the checkpoint of step 4" in capsys.readouterr().out and outcome.reason == stopping.DONE
  assert path.read_text() == (tmp_path / "whole/skipped_records.jsonl").read_text()
  assert logged(tmp_path / "run") == logged(tmp_path / "whole")
  assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_too_much_damage_stops_and_mended_data_go_on(whole, data, damaged, tmp_path, capsys):
  dataset, faults = damaged
  limit = {"data.max_skipped": 0.2}  # 8 of 40
  trained, outcome = train(tmp_path / "run", dataset, **limit)
  assert (outcome.reason, outcome.status) == (stopping.CORRUPT_RECORDS, 2) and 0 < outcome.step < 12
  assert len(trained.seen) == outcome.step + 1  # The batch that was too much is not trained on.
  assert checkpoint_reader.newest(tmp_path / "run/checkpoints") == outcome.step
  count = len(listed(tmp_path / "run"))
  assert 8 < count <= len(faults)
  line = capsys.readouterr().err.strip().splitlines()[-1]
  for words in (
    f"{count} of 40 records of data set {data} cannot be read, more than data.max_skipped allows (8)",
    f"listed in {tmp_path}/run/skipped_records.jsonl",
    f"training stopped at step {outcome.step}",
    f"saved in {tmp_path}/run/checkpoints/{outcome.step}",
  ):
    assert words in line
  assert main.main(["inspect", str(tmp_path / "run")]) == 0
  assert "too many records could not be read" in capsys.readouterr().out

  # Again: it stops where it is. With the data mended, or with a higher limit, it goes on.
  _, again = train(tmp_path / "run", dataset, **limit)
  assert (again.reason, again.step) == (stopping.CORRUPT_RECORDS, outcome.step) and len(
    listed(tmp_path / "run")
  ) == count
  shutil.copy(shard(whole, 3), shard(data, 3))
  capsys.readouterr()
  _, mended = train(tmp_path / "run", Dataset.open(data, "train", True), **limit)
  assert (mended.reason, mended.step) == (stopping.DONE, 12)
  assert f"of the {count} records in {tmp_path}/run/skipped_records.jsonl can be read again" in capsys.readouterr().out
  assert {row["number"] for row in listed(tmp_path / "run")} == {number for number in faults if number < 24}


def test_data_that_are_gone_stop_the_run(data, tmp_path, capsys):
  dataset = Dataset.open(data)

  def vanish(step):
    if step == 2:
      for number in range(SHARDS):
        os.truncate(shard(data, number), 0)

  # One batch is made ahead, and nothing is kept in memory.
  trained = DataToy(toy.experiment(**{"data.max_skipped": 1.0}), dataset, after_batch=vanish)
  trained.batches = lambda start: _Batches(
    trained,
    loader.train_batches(
      dataset, resolution=4, batch_size=8, seed=0, start_step=start, workers=0, prefetch=1, cache_bytes=0
    ),
  )
  _, outcome = toy.run(tmp_path / "run", toy=trained)
  assert (outcome.reason, outcome.status) == (stopping.CORRUPT_RECORDS, 2) and 3 <= outcome.step < 12
  assert checkpoint_reader.newest(tmp_path / "run/checkpoints") == outcome.step
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert "no record of data set" in line and "is cut off: 0 of" in line and f"stopped at step {outcome.step};" in line
  assert len(listed(tmp_path / "run")) == RECORDS


def test_a_new_run_begins_with_an_empty_list(data, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run/skipped_records.jsonl").write_text('{"from": "before"}\n')
  train(tmp_path / "run", Dataset.open(data), **{"train.total_steps": 2})
  assert (tmp_path / "run/skipped_records.jsonl").read_text() == ""
  train(tmp_path / "other", Dataset.open(data), **{"train.total_steps": 2})
  assert not (tmp_path / "other/skipped_records.jsonl").exists()


class TwoBatches(DataToy):
  """Each step reads two batches and trains on the second one."""

  batches_per_step = 2

  def batches(self, start_step):
    return super().batches(2 * start_step)

  def step(self, step, state, batches):
    first, second = batches
    assert sorted(first) == sorted(second)
    return super().step(step, state, [second])


def test_a_step_of_several_batches_counts_the_records_of_all_of_them(damaged, tmp_path):
  dataset, _ = damaged
  fields = {"data.max_skipped": 0.5, "train.log_every": 1, "train.checkpoint_every": 2}
  whole = TwoBatches(toy.experiment(**fields, **{"train.total_steps": 6}), dataset)
  assert toy.run(tmp_path / "whole", toy=whole)[1].reason == stopping.DONE
  rows = listed(tmp_path / "whole")
  counts = [row["data/skipped"] for row in logged(tmp_path / "whole")]
  assert counts == [sum(row["step"] < 2 * done for row in rows) for done in range(1, 7)] and counts[-1] == len(rows) > 0
  parts = [TwoBatches(toy.experiment(**fields, **{"train.total_steps": steps}), dataset) for steps in (3, 6)]
  for part in parts:
    toy.run(tmp_path / "parts", toy=part)
  assert parts[0].seen[:6] + parts[1].seen[:6] == whole.seen[:12]
  assert logged(tmp_path / "parts") == logged(tmp_path / "whole") and listed(tmp_path / "parts") == rows
  assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_several_processes_know_the_same(damaged, tmp_path, monkeypatch):
  """Two processes, one after the other here, with what each would hear from the other."""
  dataset, _ = damaged
  batches = [loader.BatchMaker(dataset, 4, 8, 0, slots=slots) for slots in (np.arange(4), np.arange(4, 8))]
  skips = [{}, {}]
  for step in range(6):
    for mine, maker in zip(skips, batches):
      for skip in maker(step)["skipped"]:
        mine.setdefault(skip.number, skip)
  texts = [skipped_records._lines(mine.values()) for mine in skips]
  monkeypatch.setattr(skipped_records.hosts, "is_alone", lambda: False)
  followers = []
  for process in (1, 0):
    monkeypatch.setattr(skipped_records.hosts, "is_primary", lambda process=process: process == 0)
    monkeypatch.setattr(skipped_records.hosts, "from_all", lambda text: ["", ""])
    follower = skipped_records.follow(tmp_path / "list.jsonl", dataset, 0.2, resumed=False)
    follower.begin()
    follower.add(skips[process])
    assert not follower.count(99)  # not before all have told
    monkeypatch.setattr(
      skipped_records.hosts,
      "from_all",
      lambda text, process=process: [(text if process == 0 else texts[0]), (text if process == 1 else texts[1])],
    )
    follower.share()
    assert (tmp_path / "list.jsonl").exists() == (process == 0)
    followers.append(follower)
  union = {**skips[1], **skips[0]}
  assert [follower.count(99) for follower in followers] == [len(union)] * 2
  assert [follower.too_many for follower in followers] == [len(union) > 8] * 2
  assert [skip.step for skip in skipped_records.read(tmp_path / "list.jsonl")] == sorted(
    min(mine[number].step for mine in skips if number in mine) for number in union
  )


def test_free_to_change():
  before = toy.experiment()
  after = toy.experiment(**{"data.max_skipped": 0.5, "data.tolerate_corruption": True})
  changes = config_check.config_changes(json.loads(json.dumps(dataclasses.asdict(before))), after)
  assert set(changes) == {"data.max_skipped", "data.tolerate_corruption"}
  assert all(config_check.is_allowed(name, ()) for name in changes)
