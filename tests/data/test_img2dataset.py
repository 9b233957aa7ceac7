"""Files that img2dataset itself wrote, in each of its output formats: the same images, captions and scores come out."""

import dataclasses
import io
import json
import pathlib
import re
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from aurora_jax.data import build, build_settings, loader
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.filters import Filters, scores_of
from aurora_jax.data.sources import base, catalog

FIXTURES = pathlib.Path(__file__).parents[1] / "goldens" / "img2dataset"
SOURCES = {"webdataset": "webdataset", "files": "folder", "parquet": "parquet", "tfrecord": "tfrecord"}
SETTINGS = build_settings.Settings(name="x", resolution=16, split="caption-hash", heldout_fraction=0.0)
# By the number of the row. Row 6 was not downloaded, row 7 has no caption.
CAPTIONS = {
  0: "a red boat, a blue sea",
  1: 'a "turned" image',
  2: "first line second line",
  3: "Ärger im Café 灰色 🍎",
  4: "a tab and spaces",
  5: "1984",
}
every_format = pytest.mark.parametrize("output", SOURCES)


def built(output, out, captions=None, **changes):
  source = catalog.open_source(catalog.Request(SOURCES[output], str(FIXTURES / output), captions or {}))
  return build.build_with(source, out, dataclasses.replace(SETTINGS, **changes))


def stored(out):
  """{number of the row: (pixels, example)}."""
  dataset = Dataset.open(out)
  loaded = loader.load_images(dataset, 16)
  found = {}
  for index in range(len(dataset)):
    image, example = dataset.image(index)
    stem, name = example.key.split("/")
    assert stem == "00000"
    found[int(name.split(".")[0])] = np.asarray(image), example
    np.testing.assert_array_equal(loaded[index], image)
  return found


def encoded_images(output):
  """{number of the row: image file}, read without the code under test."""
  folder = FIXTURES / output
  if output == "webdataset":
    with tarfile.open(folder / "00000.tar") as tar:
      return {int(name[:-4]): tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".jpg")}
  if output == "files":
    return {int(path.stem): path.read_bytes() for path in (folder / "00000").glob("*.webp")}
  if output == "parquet":
    from pyarrow import parquet

    rows = parquet.read_table(folder / "00000.parquet", columns=["key", "png"]).to_pylist()
    return {int(row["key"]): row["png"] for row in rows if row["png"]}
  # A marker does not occur within the data of a JPEG.
  jpegs = re.findall(rb"\xff\xd8\xff.*?\xff\xd9", (folder / "00000.tfrecord").read_bytes(), re.DOTALL)
  return dict(zip((*CAPTIONS, 7), jpegs, strict=True))


def by_pillow(data):
  """The center square, [16, 16, 3], upright, on white."""
  image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  assert not image.has_transparency_data  # img2dataset puts images on white
  image = image.convert("RGB")
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  return np.asarray(image if side == 16 else image.resize((16, 16), Image.Resampling.LANCZOS))


@every_format
def test_images_and_captions(tmp_path, output):
  manifest = built(output, tmp_path / "out")
  found, files = stored(tmp_path / "out"), encoded_images(output)
  assert {number: example.captions for number, (_, example) in found.items()} == {
    number: (caption,) for number, caption in CAPTIONS.items()
  }
  assert files.keys() == {*CAPTIONS, 7}
  for number, (pixels, _) in found.items():
    np.testing.assert_array_equal(pixels, by_pillow(files[number]))
  listed = {entry["key"]: entry["reason"] for entry in manifest["rejected"]["listed"]}
  if output == "files":
    assert listed == {"00000/000000007.webp": "caption file 000000007.txt is empty"}
    assert manifest["files"]["counts"] == {
      "images stored": 6,
      "images whose captions cannot be used": 1,
      "caption files read": 7,
      "metadata files read": 7,
      "files of other kinds": 2,
    }
  else:
    failed = {"00000/000000006": "no image: HTTP Error 404: File not found"} if output == "parquet" else {}
    assert listed == {"00000/000000007": "no caption", **failed}
    counts = {kind: entry["count"] for kind, entry in manifest["rejected"]["reasons"].items()}
    assert counts == {"no caption": 1} | ({"no image": 1} if failed else {})


@every_format
def test_filters_by_its_columns(tmp_path, output):
  """All formats pass the same scores, also those at a limit, which tfrecords round to float32."""
  limits = Filters(min_similarity=0.2, max_unsafe=0.1, max_watermark=0.5, min_aesthetic=5.5, require_scores=True)
  manifest = built(output, tmp_path / "out", filters=limits, store_scores=("similarity",))
  found = {number: example.features["similarity"].item() for number, (_, example) in stored(tmp_path / "out").items()}
  assert found == pytest.approx({2: 0.3, 3: 0.4, 4: 0.5})
  reasons = {kind: [key[:15] for key in entry["examples"]] for kind, entry in manifest["rejected"]["reasons"].items()}
  assert reasons["similarity too low"] == ["00000/000000000"]
  assert reasons["watermark too high"] == ["00000/000000001"]
  assert reasons["no similarity score"] == ["00000/000000005"]


@pytest.mark.parametrize("output", [output for output in SOURCES if output != "files"])
def test_captions_of_numbers(tmp_path, output):
  built(output, tmp_path / "out", {"year": 1.0})
  found = {number: example.captions for number, (_, example) in stored(tmp_path / "out").items()}
  assert found == {number: (str(1990 + number),) for number in (0, 1, 2, 3, 4, 5, 7)}


def test_values_that_are_no_captions_or_scores():
  assert base.caption_lines([7, 1.5, True, None, float("nan"), float("inf"), "x"]) == (("7", "1.5", "x"), None)
  huge = json.loads("1" + "0" * 400)
  assert scores_of({"similarity": huge, "aesthetic": b"", "punsafe": b"0.25", "pwatermark": [True]}) == {"unsafe": 0.25}
