"""build-data from the formats of other programs, and inspect of the result, as commands in this process."""

import contextlib
import html
import io
import json
import os
import re
import shutil

import pytest
import source_files as made

from aurora_jax.cli import main
from aurora_jax.data import tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.reporting import data_summary, dataset_page


def here(*arguments):
  """A command: (status, stdout, stderr)."""
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    try:
      status = main.main([os.fspath(argument) for argument in arguments])
    except SystemExit as end:  # argparse
      status = end.code
  return status, out.getvalue(), error.getvalue()


def build(source, out, *arguments):
  flags = ("--source", source, "--out", out, "--resolution", "16", "--workers", "1")
  return here("build-data", *flags, *arguments)


def captions(out):
  splits = json.loads((out / "manifest.json").read_text())["splits"]
  return sorted(captions for split in splits for captions in Dataset.open(out, split).captions())


def prepared(folder):
  """What each source reads, and its flags."""
  made.write_stylegan_zip(folder / "made.zip")
  (folder / "names.txt").write_text("\n".join(made.COLORS))
  return {
    "imagefolder": ("--path", made.write_image_folder(folder / "imagefolder")),
    "webdataset": ("--path", made.write_webdataset(folder / "webdataset")),
    "parquet": ("--path", made.write_parquet(folder / "parquet")),
    "coco": ("--path", made.write_coco(folder / "coco"), "--images", folder / "coco" / "val2017"),
    "stylegan-zip": ("--path", folder / "made.zip", "--class-names", folder / "names.txt"),
  }


def test_each_source(tmp_path):
  for source, flags in prepared(tmp_path).items():
    status, out, error = build(source, tmp_path / "out" / source, *flags)
    assert status == 0, (source, error)
    assert re.search(r"^train: \d+ images, \d+ image-text pairs, \d+ files?$", out, re.MULTILINE), out
    assert "rejected: none" in out.splitlines() and "Traceback" not in error
    found = captions(tmp_path / "out" / source)
    if source == "stylegan-zip":
      assert found == sorted((color,) for color in made.COLORS for _ in range(6))
    else:
      assert sorted(some[0] for some in found) == sorted(made.caption(number) for number in range(24))
    if source == "coco":
      assert all(len(some) == 2 for some in found)


def test_filters_and_mixed_captions(tmp_path):
  scores = {"similarity": [number / 100 for number in range(24)]}
  folder = made.write_webdataset(tmp_path / "in", **scores)
  flags = ("--path", folder, "--min-similarity", "0.1", "--store-score", "similarity", "--heldout", "0")
  status, out, error = build("webdataset", tmp_path / "scored", *flags)
  assert status == 0, error
  assert out.splitlines()[:3] == [
    "train: 14 images, 14 image-text pairs, 2 files",
    "rejected: 10 (listed in manifest.json)",
    "  similarity too low: 10",
  ]
  stored = Dataset.open(tmp_path / "scored")
  assert [round(float(stored[i].features["similarity"][0]), 2) for i in range(3)] == [0.1, 0.11, 0.12]
  table = made.write_parquet(tmp_path / "table")
  flags = ("--path", table, "--caption", "text=1", "--caption", "rewritten=3", "--heldout", "0")
  assert build("parquet", tmp_path / "mixed", *flags)[0] == 0
  assert sorted(Dataset.open(tmp_path / "mixed")[0].features["caption_weight"].tolist()) == [0.25, 0.75]


@pytest.mark.parametrize(
  "source, flags, message",
  [
    ("webdatasets", (), "there is no source webdatasets, only"),
    ("webdataset", (), "--source webdataset needs --path PATH"),
    ("webdataset", ("--path", "empty"), "has no file *.tar"),
    ("parquet", ("--path", "nowhere"), "parquet source nowhere does not exist"),
    ("parquet", ("--path", "empty", "--images", "empty"), "--images empty is for --source coco"),
    ("coco", ("--path", "empty", "--caption", "text"), "--caption is for --source"),
    ("webdataset", ("--path", "empty", "--caption", "txt=-1"), "a weight must be a positive number"),
    ("webdataset", ("--path", "empty", "--shards", "4"), "--shards is for --split words"),
    ("folder", ("--path", "empty", "--shard-size", "4"), "--shard-size is for --split caption-hash"),
    ("webdataset", ("--path", "empty", "--runner-option=--x=1"), "--runner-option is for --runner"),
    ("webdataset", ("--path", "empty", "--workers", "0"), "workers must be 1 or more, not 0"),
  ],
)
def test_wrong_flags(tmp_path, monkeypatch, source, flags, message):
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path)
  status, out, error = build(source, "out", *flags)
  assert (status, out) == (2, "") and len(error.splitlines()) == 1 and message in error
  assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A data set with scores, filtered, part of it held out; one caption looks like HTML."""
  home = tmp_path_factory.mktemp("shown")
  table = made.write_image_folder(home / "in") / "metadata.jsonl"
  table.write_text(table.read_text().replace(made.caption(3), "<b>bold</b> \\u202e & star"))
  flags = ("--path", home / "in", "--max-caption", "24", "--min-caption", "9", "--heldout", "0.3")
  status, _, error = build("imagefolder", home / "data", *flags)
  assert status == 0, error
  return home / "data"


def test_inspect_says_settings_lengths_and_reasons(data):
  manifest = json.loads((data / "manifest.json").read_text())
  status, out, error = here("inspect", data)
  assert (status, error) == (0, "")
  lengths = [int(length) for length, count in manifest["caption_lengths"].items() for _ in range(count)]
  middle = sorted(lengths)[(len(lengths) + 1) // 2 - 1]
  assert f"captions   {min(lengths)} to {max(lengths)} characters, half up to {middle}, 9 of 10 up to" in out
  assert "filters    min_caption 9, max_caption 24" in out and "encoding   keep, quality 95" in out
  kind, entry = next(iter(manifest["rejected"]["reasons"].items()))
  assert f"             {entry['count']}: {kind}" in out.splitlines()


def test_the_page_shows_images_captions_and_reasons(data, tmp_path):
  status, _, error = here("inspect", data, "--html", tmp_path / "page.html", "--images", "10")
  assert (status, error) == (0, "")
  page = (tmp_path / "page.html").read_text(encoding="utf-8")
  assert page.count('src="data:image/png;base64,') == 10 and page.count('<span class="mark">heldout</span>') >= 2
  assert "<b>" not in page and "\u202e" not in page and "http://" not in page.replace("http://www.w3.org", "")
  shown = set(map(html.unescape, re.findall(r'alt="([^"]*)"', page)))
  known = {"<b>bold</b> \\u202e & star"} | {some[0] for some in captions(data)}
  assert len(shown) == 10 and shown <= known
  rejected = json.loads((data / "manifest.json").read_text())["rejected"]
  assert all(html.escape(kind) in page for kind in rejected["reasons"]) and "<svg" in page
  assert dataset_page.render(data, 10) == page


def test_the_sample_is_spread_over_all_records():
  for sizes in ((1000, 100), (1000, 900), (50, 1), (3, 2), (7,), (40, 10, 10)):
    for count in (1, 10, 60):
      found = dataset_page.sample(sizes, count)
      assert sum(map(len, found)) == min(count, sum(sizes)) or sum(sizes) > count or len(sizes) > 1
      for size, numbers in zip(sizes, found):
        assert len(set(numbers)) == len(numbers) and all(0 <= number < size for number in numbers)
        if len(numbers) > 1:
          assert max(b - a for a, b in zip(numbers, numbers[1:])) <= 2 * -(-size // len(numbers))
  assert len(dataset_page.sample((1000, 100), 60)[1]) == 12


def test_the_histogram_counts_every_caption():
  for counts in ({5: 3}, {2: 1, 400: 9}, {length: 1 for length in range(1, 200)}):
    titles = re.findall(r"characters: ([\d,]+)</title>", dataset_page.histogram(counts))
    assert sum(int(many.replace(",", "")) for many in titles) == sum(counts.values()) and len(titles) <= 48
  lengths = data_summary.Lengths({1: 1, 5: 2, 9: 1})
  assert [lengths.quantile(share) for share in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)] == [1, 1, 5, 5, 9, 9]


def test_a_page_of_a_damaged_data_set(data, tmp_path):
  folder = shutil.copytree(data, tmp_path / "copy")
  shard = next(iter(sorted(folder.glob("*-train-*.tfrecord"))))
  content = bytearray(shard.read_bytes())
  for offset, length in tfrecords.load_index(shard).tolist():
    content[offset + 12 + length // 2] ^= 1
  shard.write_bytes(content)
  page = dataset_page.render(folder, 30)
  assert "unreadable" in page and "has a wrong checksum" in page


@pytest.mark.parametrize(
  "flags, message",
  [
    (("--images", "3"), "--images is for --html"),
    (("--html", "page.html", "--images", "0"), "--images must be at least 1, got 0"),
  ],
)
def test_wrong_flags_of_inspect(data, flags, message):
  status, _, error = here("inspect", data, *flags)
  assert status == 2 and message in error


def test_a_page_is_for_data_sets(tmp_path):
  for flag in (("--html", "page.html"), ("--verify",)):
    status, _, error = here("inspect", tmp_path, *flag)
    assert status == 2 and f"{flag[0]} is for a data set's folder" in error
