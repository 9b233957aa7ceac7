"""Sources in the formats of other programs, written by these programs: the same images and captions come out."""

import dataclasses
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pytest
import source_files as made
from PIL import Image

from aurora_jax.data import build, build_settings, images, shaping
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.sources import base, catalog
from aurora_jax.errors import UserError

COUNT = 24
SETTINGS = build_settings.Settings(
  name="x", resolution=16, split="caption-hash", heldout_fraction=0.25, encoding=shaping.Encoding("keep")
)


def source_of(kind, path=None, captions=None, **options):
  return catalog.open_source(catalog.Request(kind, None if path is None else os.fspath(path), captions or {}, options))


def built(source, out, **changes):
  return build.build_with(source, out, dataclasses.replace(SETTINGS, **changes))


def examples(out):
  """{primary caption: example} of both splits."""
  found = {}
  for split in json.loads((out / "manifest.json").read_text())["splits"]:
    dataset = Dataset.open(out, split)
    for number in range(len(dataset)):
      _, example = dataset.image(number)
      assert example.captions[0] not in found
      found[example.captions[0]] = example
  return found


def reasons(manifest):
  return {kind: entry["count"] for kind, entry in manifest["rejected"].get("reasons", {}).items()}


def assert_same(found, lossless=True):
  assert found.keys() == {made.caption(number) for number in range(COUNT)}
  for number in range(COUNT):
    example = found[made.caption(number)]
    if lossless:
      np.testing.assert_array_equal(images.decode_image(example.image), made.pixels(number))
    else:
      assert example.image == made.encoded(number, "JPEG", quality=90)


@pytest.mark.parametrize("metadata", ["jsonl", "csv", "parquet"])
def test_imagefolder(tmp_path, metadata):
  folder = made.write_image_folder(tmp_path / "in", metadata)
  manifest = built(source_of("imagefolder", folder), tmp_path / "out")
  assert manifest["rejected"]["count"] == 0 and manifest["name"] == "x"
  assert_same(examples(tmp_path / "out"))


@pytest.mark.parametrize("writer", ["webdataset", "tarfile"])
def test_webdataset(tmp_path, writer):
  if writer == "webdataset":
    writer_class = pytest.importorskip("webdataset").TarWriter
  else:
    writer_class = made.PlainTarWriter
  folder = made.write_webdataset(tmp_path / "in", writer_class=writer_class)
  manifest = built(source_of("webdataset", folder), tmp_path / "out")
  found = examples(tmp_path / "out")
  assert_same(found, lossless=False)
  assert found[made.caption(13)].key == "00001/000000013"
  splits = manifest["splits"]
  assert sum(entry["examples"] for entry in splits.values()) == COUNT and splits["heldout"]["examples"]
  assert len(splits["train"]["shards"]) == 2


def test_huggingface_parquet(tmp_path):
  source = source_of("parquet", made.write_huggingface_parquet(tmp_path / "in"))
  built(source, tmp_path / "out")
  assert_same(examples(tmp_path / "out"))


def test_captions_are_mixed_by_weight(tmp_path):
  folder = made.write_huggingface_parquet(tmp_path / "in")
  manifest = built(source_of("parquet", folder, {"text": 0.25, "rewritten": 0.75}), tmp_path / "out")
  found = examples(tmp_path / "out")
  assert sum(entry["captions"] for entry in manifest["splits"].values()) == 2 * COUNT
  rewritten = 0
  for primary, example in found.items():
    is_rewritten = primary.startswith("a drawing of a ")
    rewritten += is_rewritten
    plain = primary.removeprefix("a drawing of a ")
    assert set(example.captions) == {plain, f"a drawing of a {plain}"}
    expected = [0.75, 0.25] if is_rewritten else [0.25, 0.75]
    np.testing.assert_allclose(example.features["caption_weight"], expected)
  assert COUNT / 2 < rewritten < COUNT
  built(source_of("parquet", folder, {"text": 1, "rewritten": 1e-9}), tmp_path / "plain")
  assert set(examples(tmp_path / "plain")) == {made.caption(number) for number in range(COUNT)}


def test_coco(tmp_path):
  built(source_of("coco", made.write_coco(tmp_path / "in")), tmp_path / "out")
  found = examples(tmp_path / "out")
  assert_same(found, lossless=False)
  assert found["red square"].captions == ("red square", "the red square")


def test_stylegan_zip(tmp_path):
  path = made.write_stylegan_zip(tmp_path / "set.zip")
  (tmp_path / "names.txt").write_text("red thing\ngreen thing\nblue thing\ngray thing\n")
  source = source_of("stylegan-zip", path, class_names=os.fspath(tmp_path / "names.txt"))
  built(source, tmp_path / "out", heldout_fraction=0.0)
  dataset = Dataset.open(tmp_path / "out")
  assert len(dataset) == COUNT
  for number in range(COUNT):
    picture, example = dataset.image(number)
    np.testing.assert_array_equal(np.asarray(picture), made.pixels(number))
    assert example.captions == (f"{list(made.COLORS)[number % 4]} thing",)
    assert example.features["label"].tolist() == [number % 4]


def test_folders_of_classes(tmp_path):
  for name in ("n01440764", "sea_lion"):
    (tmp_path / "in" / name).mkdir(parents=True)
    for number in range(3):
      (tmp_path / "in" / name / f"{number}.png").write_bytes(made.encoded(number))
  (tmp_path / "names").write_text("n01440764 tench\n")
  source = source_of("imagefolder", tmp_path / "in", class_names=os.fspath(tmp_path / "names"))
  built(source, tmp_path / "out", heldout_fraction=0.0)
  dataset = Dataset.open(tmp_path / "out")
  assert [example.captions for _, example in dataset.readable()] == [("tench",)] * 3 + [("sea lion",)] * 3
  assert [float(example.features["label"][0]) for _, example in dataset.readable()] == [0] * 3 + [1] * 3


def test_through_tensorflow_and_tfds(tmp_path):
  """img2dataset's records by TensorFlow, our data set by tf.data and tfds, and a data set of tfds by us."""
  tf = pytest.importorskip("tensorflow")
  tfds = pytest.importorskip("tensorflow_datasets")
  (tmp_path / "in").mkdir()
  feature = lambda value: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
  with tf.io.TFRecordWriter(str(tmp_path / "in" / "00000.tfrecord")) as writer:
    for number in range(COUNT):
      record = {
        "key": feature(f"{number:09d}".encode()),
        "jpg": feature(made.encoded(number, "JPEG", quality=90)),
        "caption": feature(made.caption(number).encode()),
        "similarity": tf.train.Feature(float_list=tf.train.FloatList(value=[number / 10])),
      }
      writer.write(tf.train.Example(features=tf.train.Features(feature=record)).SerializeToString())
  built(source_of("tfrecord", tmp_path / "in"), tmp_path / "out", name="ours-1", store_scores=("similarity",))
  ours = examples(tmp_path / "out")
  assert_same(ours, lossless=False)

  shards = sorted(str(path) for path in (tmp_path / "out").glob("*.tfrecord"))
  layout = {
    "image": tf.io.FixedLenFeature([], tf.string),
    "caption": tf.io.FixedLenSequenceFeature([], tf.string, True),
  }
  read = tf.data.TFRecordDataset(shards).map(lambda record: tf.io.parse_single_example(record, layout))
  count = 0
  for record in read.as_numpy_iterator():
    caption = record["caption"][0].decode()
    assert record["image"] == ours[caption].image
    count += 1
  assert count == COUNT

  builder = tfds.builder_from_directory(str(tmp_path / "out"))
  assert builder.info.features["image"].shape == (16, 16, 3)
  seen = 0
  for split in ("train", "heldout"):
    dataset = Dataset.open(tmp_path / "out", split)
    assert builder.info.splits[split].num_examples == len(dataset)
    for number, example in enumerate(builder.as_dataset(split=split, shuffle_files=False).as_numpy_iterator()):
      picture, mine = dataset.image(number)
      assert np.abs(np.asarray(picture, int) - example["image"]).max() <= 4  # two JPEG decoders
      assert tuple(caption.decode() for caption in example["caption"]) == mine.captions
      assert example["key"].decode() == mine.key
      np.testing.assert_allclose(example["similarity"], [int(mine.key.split("/")[1]) / 10], rtol=1e-6)
      seen += 1
  assert seen == COUNT

  info = tfds.features.FeaturesDict(
    {
      "picture": tfds.features.Image(shape=(16, 16, 3)),
      "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
    }
  )

  class Pictures(tfds.core.GeneratorBasedBuilder):
    """A data set as people write them for tfds."""

    VERSION = tfds.core.Version("1.0.0")
    name = "pictures"

    def _info(self):
      return self.dataset_info_from_configs(features=info)

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      for number in range(COUNT):
        captions = [{"text": text} for text in (made.caption(number), "another")]
        yield number, {"picture": made.pixels(number), "captions": captions}

  Pictures(data_dir=str(tmp_path / "tfds")).download_and_prepare()
  folder = tmp_path / "tfds" / "pictures" / "1.0.0"
  built(source_of("tfds:pictures", folder), tmp_path / "back")
  found = examples(tmp_path / "back")
  assert_same(found)
  assert all(example.captions[1:] == ("another",) for example in found.values())
  with pytest.raises(UserError, match="tfds:pictures has no split nope"):
    source_of("tfds:pictures", folder, source_split="nope")


# ------------------------------------------------------------------------------------------- bad input


def add(tar, name, data=b"", **attributes):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for attribute, value in attributes.items():
    setattr(info, attribute, value)
  tar.addfile(info, io.BytesIO(data))


def test_bad_members_of_tars(tmp_path):
  (tmp_path / "in").mkdir()
  good = made.encoded(0)
  with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
    add(tar, "../../evil.png", good)
    add(tar, "../../evil.txt", b"out")
    add(tar, "/etc/evil.png", good)
    add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    add(tar, "folder", type=tarfile.DIRTYPE)
    add(tar, "good.png", good)
    add(tar, "good.txt", b"red square")
    add(tar, "nul.png", good)
    add(tar, "nul.txt", b"red\0square")
    add(tar, "utf8.png", good)
    add(tar, "utf8.txt", b"caf\xe9")
    add(tar, "alone.txt", b"no image")
    add(tar, "mute.png", good)
    add(tar, "bad_json.png", good)
    add(tar, "bad_json.json", b"{")
    add(tar, "cut.png", good[:50])
    add(tar, "cut.txt", b"a cut image")
    add(tar, "twice.png", good)
    add(tar, "twice.png", good)
    add(tar, "good.png", good)
    add(tar, "good.txt", b"the same key")
  manifest = built(source_of("webdataset", tmp_path / "in"), tmp_path / "out")
  assert set(examples(tmp_path / "out")) == {"red square"}
  assert reasons(manifest) == {
    "names that are not allowed": 4,
    "captions that cannot be used": 2,
    "no image": 1,
    "no caption": 1,
    "damaged parts of the source": 1,
    "images that cannot be read": 1,
    "keys that occur twice": 2,
  }
  assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("cut", [0, 100, 512, 1500, 2048, 20_000])
def test_cut_tars(tmp_path, cut):
  folder = made.write_webdataset(tmp_path / "in")
  data = (folder / "00001.tar").read_bytes()
  (folder / "00001.tar").write_bytes(data[:cut])
  manifest = built(source_of("webdataset", folder), tmp_path / "out")
  assert sum(entry["examples"] for entry in manifest["splits"].values()) >= COUNT // 2
  assert reasons(manifest)["damaged parts of the source"] >= 1


def test_broken_header_within_a_tar(tmp_path):
  folder = made.write_webdataset(tmp_path / "in")
  data = bytearray((folder / "00001.tar").read_bytes())
  place = next(at for at in range(4096, len(data), 512) if data[at + 257 : at + 262] == b"ustar")
  data[place : place + 8] = b"\xff" * 8
  (folder / "00001.tar").write_bytes(data)
  manifest = built(source_of("webdataset", folder), tmp_path / "out")
  listed = [entry["reason"] for entry in manifest["rejected"]["listed"]]
  assert any("a header is broken" in reason for reason in listed)


def test_bad_rows_of_metadata(tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  (tmp_path / "secret.png").write_bytes(made.encoded(1))
  (folder / "a.png").write_bytes(made.encoded(0))
  rows = [
    {"file_name": "a.png", "text": "red square"},
    {"file_name": "../secret.png", "text": "a secret"},
    {"file_name": str(tmp_path / "secret.png"), "text": "a secret"},
    {"file_name": "gone.png", "text": "gone"},
    {"file_name": "a.png", "text": "the same file again"},
    {"text": "nameless"},
    {"file_name": "b.png"},
    ["no object"],
  ]
  lines = [json.dumps(row).encode() for row in rows] + [b"{broken", b'{"file_name": "c.png", "text": "caf\xe9"}']
  (folder / "metadata.jsonl").write_bytes(b"\n".join(lines))
  manifest = built(source_of("imagefolder", folder), tmp_path / "out")
  assert set(examples(tmp_path / "out")) == {"red square"}
  assert reasons(manifest) == {
    "names that are not allowed": 3,
    "images that cannot be read": 1,
    "keys that occur twice": 1,
    "no caption": 1,
    "damaged parts of the source": 2,
    "captions that cannot be used": 1,
  }


def test_bad_parquet(tmp_path):
  import pandas

  folder = made.write_huggingface_parquet(tmp_path / "in")
  pandas.DataFrame({"url": ["x"]}).to_parquet(folder / "x_other.parquet")
  (folder / "y_noise.parquet").write_bytes(b"PAR1 this is no table PAR1")
  manifest = built(source_of("parquet", folder), tmp_path / "out")
  assert_same(examples(tmp_path / "out"))
  assert reasons(manifest) == {"damaged parts of the source": 2}
  for name, words in (
    ("x_other", r"no column of images \(image, jpg, .*\); its columns: url"),
    ("y_noise", "cannot be read"),
  ):
    with pytest.raises(UserError, match=words) as caught:
      source_of("parquet", folder / f"{name}.parquet")
    assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match=r"no column of captions \(alt\)"):
    source_of("parquet", folder / "train-00000.parquet", {"alt": 1.0})


def test_bad_zips(tmp_path, monkeypatch):
  monkeypatch.setattr(base, "MAXIMAL_IMAGE_BYTES", 2**16)
  path = tmp_path / "set.zip"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("a.png", made.encoded(0))
    archive.writestr("bomb.png", b"\0" * (2**16 + 1))
    labels = [["a.png", 0], ["bomb.png", 1], ["../a.png", 1], ["gone.png", 1], ["a.png", "x"]]
    archive.writestr("dataset.json", json.dumps({"labels": labels}))
  manifest = built(source_of("stylegan-zip", path), tmp_path / "out")
  assert set(examples(tmp_path / "out")) == {"class 0"} and manifest["rejected"]["count"] == 4
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(UserError, match="is no StyleGAN data set"):
    source_of("stylegan-zip", path)


@pytest.mark.parametrize(
  "kind, content, words",
  [
    ("coco", b"{", "is no JSON"),
    ("coco", b"[" * 100_000, "cannot be read: it is nested too deeply"),
    ("coco", b"[]", "has no COCO captions"),
    ("coco", b'{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "give --images FOLDER"),
    ("stylegan-zip", b"no zip", "is no StyleGAN data set"),
    ("parquet", b"", "cannot be read"),
    ("webdataset", None, "webdataset source .* does not exist"),
    ("imagefolder", b"x", "is not a folder"),
  ],
)
def test_unusable_sources(tmp_path, kind, content, words):
  if content is not None:
    (tmp_path / "file").write_bytes(content)
  with pytest.raises(UserError, match=words) as caught:
    source_of(kind, tmp_path / "file")
  assert "\n" not in str(caught.value)


def test_options_of_other_sources(tmp_path):
  with pytest.raises(UserError, match="--images .* is for --source coco"):
    source_of("parquet", tmp_path, images="x")
  with pytest.raises(UserError, match="--caption is for --source imagefolder"):
    source_of("coco", tmp_path, {"text": 1.0})
  with pytest.raises(UserError, match="there is no source imagenet, only folder"):
    source_of("imagenet", tmp_path)


def test_images_of_all_modes_keep_their_bytes_or_become_rgb(tmp_path):
  """What needs no change is stored as it is; everything else is decoded as for any other source."""
  folder = tmp_path / "in"
  folder.mkdir()
  plain = Image.fromarray(made.pixels(3))
  exif = Image.Exif()
  exif[0x0112] = 6
  animation = io.BytesIO()
  plain.save(animation, "WEBP", save_all=True, append_images=[plain.rotate(90)], lossless=True)
  files = {
    "rgb.png": (plain, "PNG", {}, True),
    "gray.png": (plain.convert("L"), "PNG", {}, True),
    "palette.png": (plain.quantize(8), "PNG", {}, False),
    "alpha.png": (plain.convert("RGBA"), "PNG", {}, False),
    "deep.png": (Image.fromarray(made.pixels(3)[..., 0].astype(np.uint16) * 257), "PNG", {}, False),
    "rgb.jpg": (plain, "JPEG", {"quality": 90}, True),
    "turned.jpg": (plain, "JPEG", {"exif": exif.tobytes()}, False),
    "cmyk.jpg": (plain.convert("CMYK"), "JPEG", {}, False),
    "lossless.webp": (plain, "WEBP", {"lossless": True}, True),
    "rgb.bmp": (plain, "BMP", {}, False),
    "wide.jpg": (Image.fromarray(made.pixels(3, 40)[:20]), "JPEG", {}, False),
  }
  rows = []
  for name, (image, kind, options, _) in files.items():
    image.save(folder / name, kind, **options)
    rows.append({"file_name": name, "text": name})
  (folder / "frames.webp").write_bytes(animation.getvalue())
  rows.append({"file_name": "frames.webp", "text": "frames.webp"})
  (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
  built(source_of("imagefolder", folder), tmp_path / "out", heldout_fraction=0.0)
  found = examples(tmp_path / "out")
  assert len(found) == len(files) + 1
  for name, (_, _, _, keeps) in files.items():
    data = (folder / name).read_bytes()
    assert (found[name].image == data) == keeps, name
    stored = images.open_image(found[name].image)
    expected = images.square(images.open_image(data), 16)
    tolerance = 12 if name.endswith(".jpg") and not keeps else 0
    assert np.abs(np.asarray(stored, int) - np.asarray(expected, int)).max() <= tolerance, name
  kinds = {name: images.header(found[name].image).format for name in found}
  assert kinds["wide.jpg"] == kinds["turned.jpg"] == "JPEG" and kinds["rgb.bmp"] == kinds["alpha.png"] == "PNG"
  filters = dataclasses.replace(SETTINGS.filters, skip_animated=True)
  manifest = built(source_of("imagefolder", folder), tmp_path / "still", filters=filters)
  assert reasons(manifest) == {"animated images": 1}
