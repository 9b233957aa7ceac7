"""Parts, workers, restarts, filters and duplicates of a build, and that none of the former changes a byte."""

import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import source_files as made
from PIL import Image

from aurora_jax.data import (
  build,
  build_part,
  build_settings,
  duplicates,
  filters,
  images,
  run_parts,
  shaping,
  tfrecords,
)
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.sources import catalog
from aurora_jax.data.sources.base import CaptionFields, Item, PartedSource
from aurora_jax.data.sources.webdataset import webdataset
from aurora_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = build_settings.Settings(
  name="x", resolution=16, split="caption-hash", heldout_fraction=0.25, encoding=shaping.Encoding("keep")
)


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
  """Six tars of four images each, 24 x 24, with scores."""
  folder = tmp_path_factory.mktemp("tars")
  scores = {"similarity": [number / 100 for number in range(24)], "pwatermark": [None, *(n / 24 for n in range(1, 24))]}
  return made.write_webdataset(folder, tars=6, side=24, **scores)


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def reasons(manifest):
  return {kind: entry["count"] for kind, entry in manifest["rejected"].get("reasons", {}).items()}


def stored(out, split="train"):
  return [example for _, example in Dataset.open(out, split).readable()]


@dataclasses.dataclass(frozen=True)
class FakePart:
  """Items in memory."""

  found: tuple[Item, ...]

  def items(self):
    return iter(self.found)

  def files(self):
    return ()

  def read(self, item, resolution):
    return item.image


def source_of(*groups):
  return PartedSource("fake", "made up", "none", lambda: [FakePart(tuple(group)) for group in groups])


# ------------------------------------------------------------------------------------------- workers and restarts


@pytest.mark.parametrize("split", build_settings.SPLITS)
def test_the_number_of_workers_does_not_matter(tars, tmp_path, split):
  settings = dataclasses.replace(SETTINGS, split=split, shards=3, duplicates="perceptual")
  for workers in (1, 4):
    build.build_with(webdataset(tars), tmp_path / str(workers), settings, build.Execution(workers))
  assert contents(tmp_path / "1") == contents(tmp_path / "4")
  assert [path.name for path in sorted(tmp_path.iterdir())] == ["1", "4"]


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path):
  """SIGKILL of the whole command when some parts are finished: no data set, then the same bytes as of one run."""
  folder = made.write_webdataset(tmp_path / "in", count=96, tars=16, side=200)
  flags = ["--source", "webdataset", "--path", folder, "--resolution", "96", "--heldout", "0.25"]
  command = lambda out: [sys.executable, "-m", "aurora_jax", "build-data", *flags, "--out", tmp_path / out]
  process = subprocess.Popen([*command("out"), "--workers", "2"], cwd=ROOT, stderr=subprocess.DEVNULL)
  work = tmp_path / ".out.building"
  deadline = time.monotonic() + 60
  while len(list(work.glob("part-*.json"))) < 3:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / "out").exists()
  finished = {path: path.stat().st_mtime_ns for path in work.glob("part-*.json")}
  assert 3 <= len(finished) < 16
  next(work.glob("part-*.tfrecord")).touch()
  time.sleep(0.3)  # the workers notice and end
  on_items = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build_part, "write_report", counting(build_part.write_report, on_items))
    settings = build_settings.Settings(
      name="in", resolution=96, split="caption-hash", heldout_fraction=0.25, encoding=shaping.Encoding("keep")
    )
    build.build_with(webdataset(folder), tmp_path / "out", settings)
    assert len(on_items) <= 16 - len(finished)
    build.build_with(webdataset(folder), tmp_path / "again", settings)
  assert contents(tmp_path / "out") == contents(tmp_path / "again")
  assert not work.exists()


def counting(function, calls):
  def wrapper(*arguments):
    calls.append(arguments)
    return function(*arguments)

  return wrapper


def test_an_interrupted_build_keeps_finished_parts(tars, tmp_path, monkeypatch):
  class Stop(Exception):
    pass

  def stop(done, total):
    if done > 12:
      raise Stop

  expected = build.build_with(webdataset(tars), tmp_path / "whole", SETTINGS)
  with pytest.raises(Stop):
    build.build_with(webdataset(tars), tmp_path / "out", SETTINGS, on_progress=stop)
  work = tmp_path / ".out.building"
  assert not (tmp_path / "out").exists() and len(list(work.glob("part-*.json"))) == 3
  cut = next(work.glob("part-000001-*.tfrecord"))  # a shard that lost its end does not count as finished
  cut.write_bytes(cut.read_bytes()[:-1])
  calls = []
  monkeypatch.setattr(build_part, "write_report", counting(build_part.write_report, calls))
  assert build.build_with(webdataset(tars), tmp_path / "out", SETTINGS) == expected
  assert sorted(call[1] for call in calls) == [1, 3, 4, 5]
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_other_settings_or_sources_start_anew(tars, tmp_path):
  work = tmp_path / ".out.building"
  work.mkdir()
  with build._work_folder(tmp_path / "out", SETTINGS) as folder:
    run_parts.run(webdataset(tars).parts(), folder, SETTINGS, 1)
  smaller = dataclasses.replace(SETTINGS, resolution=8)
  with pytest.raises(RuntimeError), build._work_folder(tmp_path / "out", SETTINGS) as folder:
    run_parts.run(webdataset(tars).parts(), folder, SETTINGS, 1)
    raise RuntimeError
  assert any(work.glob("part-*.json"))
  build.build_with(webdataset(tars), tmp_path / "out", smaller)
  assert stored(tmp_path / "out")[0].width == 8
  with pytest.raises(RuntimeError), build._work_folder(tmp_path / "two", SETTINGS) as folder:
    run_parts.run(webdataset(tars).parts(), folder, SETTINGS, 1)
    raise RuntimeError
  other = webdataset(tars, CaptionFields({"url": 1.0}))
  build.build_with(other, tmp_path / "two", SETTINGS)
  assert all(example.captions[0].startswith("http://") for example in stored(tmp_path / "two"))


@pytest.mark.parametrize("kind", ["webdataset", "folder", "imagefolder"])
def test_a_file_that_changed_is_read_again(tmp_path, kind):
  """Between an interrupted build and the next run, under the same name and with the same size."""
  folder = tmp_path / "in"
  if kind == "webdataset":
    made.write_webdataset(folder, count=4, tars=1, side=24)
  else:
    (folder / "red").mkdir(parents=True)
    for name in ("a", "b"):
      Image.new("RGB", (16, 16), (200, 10, 10)).save(folder / "red" / f"{name}.bmp")
      (folder / "red" / f"{name}.txt").write_text("a red square")
  parts = lambda: catalog.open_source(catalog.Request(kind, str(folder))).parts()
  before = [run_parts.identity(part) for part in parts()]
  assert before == [run_parts.identity(part) for part in parts()]
  changed = next(path for path in sorted(folder.rglob("*")) if path.suffix in (".tar", ".bmp"))
  status = changed.stat()
  content = bytearray(changed.read_bytes())
  content[-1] ^= 1
  changed.write_bytes(content)
  os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
  assert changed.stat().st_size == status.st_size
  assert before != [run_parts.identity(part) for part in parts()]


def test_two_builds_of_one_folder(tars, tmp_path):
  with build._work_folder(tmp_path / "out", SETTINGS):
    with pytest.raises(UserError, match="out is being built by another process"):
      build.build_with(webdataset(tars), tmp_path / "out", SETTINGS)
  (tmp_path / ".out.building").mkdir()
  (tmp_path / ".out.building" / "letters").write_text("not ours")
  with pytest.raises(UserError, match="is in the way: it is no unfinished build"):
    build.build_with(webdataset(tars), tmp_path / "out", SETTINGS)
  assert (tmp_path / ".out.building" / "letters").read_text() == "not ours"


def test_long_parts_give_several_shards(tars, tmp_path):
  manifest = build.build_with(webdataset(tars), tmp_path / "out", dataclasses.replace(SETTINGS, shard_bytes=1))
  sizes = [shard["examples"] for entry in manifest["splits"].values() for shard in entry["shards"]]
  assert sizes == [1] * 24


def test_parts_are_listed_as_they_are_needed(tmp_path):
  """A source of many parts is never listed as a whole."""
  listed, built = [], []

  def parts():
    for number in range(30):
      assert number - len(built) <= 2
      listed.append(number)
      yield FakePart((Item(str(number), (f"image {number}",), image=made.encoded(number)),))

  folder = tmp_path / "work"
  folder.mkdir()
  assert run_parts.run(parts(), folder, SETTINGS, 1, built.append) == len(listed) == 30


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed")
def test_beam_gives_the_same_bytes(tars, tmp_path):
  build.build_with(webdataset(tars), tmp_path / "here", SETTINGS)
  build.build_with(webdataset(tars), tmp_path / "beam", SETTINGS, build.Execution(runner="DirectRunner"))
  assert contents(tmp_path / "here") == contents(tmp_path / "beam")
  with pytest.raises(UserError, match="--runner NoRunner"):
    build.build_with(webdataset(tars), tmp_path / "no", SETTINGS, build.Execution(runner="NoRunner"))


def test_without_beam(tars, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  with pytest.raises(UserError, match=r"--runner DirectRunner needs Apache Beam .*pip install 'aurora_jax\[beam\]'"):
    build.build_with(webdataset(tars), tmp_path / "out", SETTINGS, build.Execution(runner="DirectRunner"))


# ------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
  "limits, left, kinds",
  [
    ({"min_side": 24}, 24, {}),
    ({"min_side": 25}, 0, {"images that are too small": 24}),
    ({"min_similarity": 0.2}, 4, {"similarity too low": 20}),
    ({"max_watermark": 0.5}, 13, {"watermark too high": 11}),
    ({"max_watermark": 0.5, "require_scores": True}, 12, {"watermark too high": 11, "no watermark score": 1}),
    ({"min_caption": 10}, 16, {"captions that are too short": 8}),
    ({"max_caption": 9}, 8, {"captions that are too long": 16}),
  ],
)
def test_filters(tars, tmp_path, limits, left, kinds):
  lengths = [len(made.caption(number)) for number in range(24)]
  if "min_caption" in limits or "max_caption" in limits:  # what the expectations above are computed from
    short = sum(length < 10 for length in lengths)
    left, kinds = (24 - short if "min_caption" in limits else short), {next(iter(kinds)): 0}
    kinds = {next(iter(kinds)): 24 - left}
  settings = dataclasses.replace(SETTINGS, filters=filters.Filters(**limits))
  if not left:
    with pytest.raises(
      UserError, match="has no readable image: 24 rejected, the first is 00000/000000000: 24x24 pixels"
    ):
      build.build_with(webdataset(tars), tmp_path / "out", settings)
    return
  manifest = build.build_with(webdataset(tars), tmp_path / "out", settings)
  assert sum(entry["examples"] for entry in manifest["splits"].values()) == left
  assert reasons(manifest) == kinds and manifest["filters"] == limits
  assert all(1 <= len(entry["examples"]) <= 3 for entry in manifest["rejected"].get("reasons", {}).values())
  assert sum(manifest["caption_lengths"].values()) == left


def test_aspect(tmp_path):
  def item(key, size):
    buffer = io.BytesIO()
    Image.new("RGB", size, (10, 200, 10)).save(buffer, "PNG")
    return Item(key, (f"image {key}",), image=buffer.getvalue())

  source = source_of([item("a", (40, 20)), item("b", (20, 41)), item("c", (20, 20))])
  settings = dataclasses.replace(SETTINGS, filters=filters.Filters(max_aspect=2.0), heldout_fraction=0)
  manifest = build.build_with(source, tmp_path / "out", settings)
  assert [example.key for example in stored(tmp_path / "out")] == ["a", "c"]
  assert manifest["rejected"]["listed"] == [
    {"key": "b", "reason": "20x41 pixels, one side is more than 2 times the other"}
  ]


@pytest.mark.parametrize(
  "make",
  [
    lambda: filters.Filters(max_aspect=0.5),
    lambda: filters.Filters(min_similarity=float("nan")),
    lambda: shaping.Encoding("gif"),
    lambda: shaping.Encoding("jpeg", 0),
    lambda: dataclasses.replace(SETTINGS, split="random"),
    lambda: dataclasses.replace(SETTINGS, duplicates="fuzzy"),
    lambda: dataclasses.replace(SETTINGS, shard_bytes=0),
    lambda: dataclasses.replace(SETTINGS, store_scores=("beauty",)),
    lambda: build.Execution(0),
  ],
)
def test_bad_settings(make):
  with pytest.raises(UserError):
    make()


# ------------------------------------------------------------------------------------------- split and duplicates


def test_split_by_hash_of_the_caption():
  captions = [f"word{number} of image{number % 7}" for number in range(4000)]
  settings = dataclasses.replace(SETTINGS, heldout_fraction=0.1)
  held = [caption for caption in captions if settings.split_of(caption) == "heldout"]
  assert 320 < len(held) < 480
  assert all(settings.split_of(" ".join(reversed(caption.upper().split()))) == "heldout" for caption in held)
  assert settings.split_of("red circle") == "train"
  assert {settings.split_of(caption) for caption in ("!?", "...", "赤い心")} <= {"train", "heldout"}
  other = dataclasses.replace(settings, seed=1)
  assert held != [caption for caption in captions if other.split_of(caption) == "heldout"]
  assert all(dataclasses.replace(settings, heldout_fraction=0.0).split_of(caption) == "train" for caption in held)


@pytest.mark.parametrize("method, workers", [("exact", 1), ("perceptual", 1)])
@pytest.mark.parametrize("split", build_settings.SPLITS)
def test_duplicates(tmp_path, method, workers, split):
  """The first of each image stays, across parts; the shards without duplicates are not touched."""
  items = [Item(f"a{n}", (f"image {n}",), image=made.encoded(n, side=64)) for n in range(8)]
  again = [Item(f"b{n}", (f"again {n}",), image=made.encoded(n, side=64)) for n in (2, 5)]
  other = [Item(f"c{n}", (f"jpeg {n}",), image=made.encoded(n, "JPEG", side=96, quality=80)) for n in (1,)]
  late = [Item("d8", ("image 8",), image=made.encoded(8, side=64))]
  settings = dataclasses.replace(SETTINGS, split=split, duplicates=method, heldout_fraction=0.0, resolution=32)
  manifest = build.build_with(source_of(items, [*again, *other, *late], again), tmp_path / "out", settings)
  kept = {example.key for example in stored(tmp_path / "out")}
  assert kept == {*(f"a{n}" for n in range(8)), "c1", "d8"}
  assert reasons(manifest) == {"duplicates": 4} and manifest["duplicates"] == method
  assert manifest["rejected"]["reasons"]["duplicates"]["examples"] == ["b2", "b5", "b2"]
  assert sum(manifest["caption_lengths"].values()) == 10
  for shard in manifest["splits"]["train"]["shards"]:
    assert len(tfrecords.load_index(tmp_path / "out" / shard["file"])) == shard["examples"]


def test_perceptual_hash_ignores_size_and_format():
  generator = np.random.default_rng(0)
  hashes, found = set(), 0
  for _ in range(40):
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), np.uint8))
    image = coarse.resize((256, 256), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.resize((200, 200), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=75)
    first = duplicates.perceptual_hash(image)
    found += first == duplicates.perceptual_hash(images.open_image(buffer.getvalue()))
    hashes.add(first)
  assert len(hashes) == 40 and found >= 28
  plain = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "white")]
  assert len({duplicates.perceptual_hash(image) for image in plain}) == 3


def test_repeated():
  assert duplicates.repeated(np.array([3, 1, 3, 3, 2, 1], np.uint64)).tolist() == [
    False,
    False,
    True,
    True,
    False,
    True,
  ]
  assert duplicates.repeated(np.zeros(0, np.uint64)).shape == (0,)


# ------------------------------------------------------------------------------------------- shaping


def test_encodings(tmp_path):
  data = made.encoded(5, "JPEG", side=64, quality=90)
  for method, kind in (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP"), ("keep", "JPEG")):
    for quality in (60, 95):
      rendered = shaping.render(data, 32)
      result = shaping.encode(rendered, data, shaping.Encoding(method, quality))
      assert images.header(result).format == kind and images.header(result).size == (32, 32)
      error = np.abs(np.asarray(images.open_image(result), int) - np.asarray(rendered.image, int)).mean()
      assert error == 0 if method == "png" else error < (8 if quality == 60 else 3)
  assert shaping.encode(shaping.render(data, 64), data, shaping.Encoding("keep")) is data
  assert shaping.encode(shaping.render(data, 64), data, shaping.Encoding("jpeg")) != data


@pytest.mark.slow
def test_memory_does_not_grow_with_the_items(tmp_path, monkeypatch):
  """20 times the items of a part, synthetic and rejected: the peak of Python's allocations stays."""
  import tracemalloc

  @dataclasses.dataclass(frozen=True)
  class Endless:
    count: int

    def items(self):
      return (Item(str(number), ("x",), scores={"similarity": 0.0}) for number in range(self.count))

    def read(self, item, resolution):
      raise AssertionError

  settings = dataclasses.replace(SETTINGS, filters=filters.Filters(min_similarity=0.1))
  monkeypatch.setattr(build_part, "LISTED", 100)
  peaks = []
  for count in (500, 10_000):
    folder = tmp_path / str(count)
    folder.mkdir()
    tracemalloc.start()
    report = build_part.build_part(Endless(count), 0, folder, settings)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert report.rejected["count"] == count and len(report.rejected["listed"]) == build_part.LISTED
    assert json.loads(build_part.report_path(folder, 0).read_text())["rejected"]["count"] == count
  assert peaks[1] < 1.5 * peaks[0]


def test_catalog_has_the_sources_of_the_command():
  from aurora_jax.cli import build_data

  assert all(f"\n  {kind}" in build_data.__doc__ for kind in (*catalog.KINDS, "tfds:NAME"))
  assert build_data.SPLITS == build_settings.SPLITS and build_data.ENCODINGS == shaping.METHODS
  assert build_data.DUPLICATES == duplicates.METHODS and build_data.SCORES == tuple(filters.SCORES)
