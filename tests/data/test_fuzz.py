"""Five hundred damaged images and captions of all formats: each is reported by our own messages alone."""

import io
import json
import os
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from aurora_jax.data.dataset import Dataset

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
FILES = 500
SEED = 26

# (suffix, Pillow's format, modes, options)
FORMATS = (
  (".png", "PNG", ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), {}),
  (".jpg", "JPEG", ("RGB", "L", "CMYK"), {}),
  (".jpeg", "JPEG", ("RGB",), {"progressive": True}),
  (".webp", "WEBP", ("RGB", "RGBA"), {}),
  (".gif", "GIF", ("P", "L", "RGB"), {}),
  (".bmp", "BMP", ("RGB", "L", "1", "P"), {}),
  (".tif", "TIFF", ("RGB", "L", "CMYK", "I;16", "F", "LAB", "1"), {}),
  (".tiff", "TIFF", ("RGB", "L", "RGBA"), {"compression": "tiff_lzw"}),
  (".tif", "TIFF", ("RGB", "YCbCr"), {"compression": "jpeg"}),
  (".TIF", "TIFF", ("RGB", "I;16"), {"compression": "tiff_adobe_deflate"}),
  (".tif", "TIFF", ("1",), {"compression": "group4"}),
  (".avif", "AVIF", ("RGB", "RGBA"), {"speed": 10}),
  (".jp2", "JPEG2000", ("RGB", "L", "RGBA"), {}),
  (".ppm", "PPM", ("RGB", "L", "1"), {}),
  (".tga", "TGA", ("RGB", "L", "P"), {}),
  (".qoi", "QOI", ("RGB", "RGBA"), {}),
  (".ico", "ICO", ("RGBA",), {}),
  (".pcx", "PCX", ("RGB", "P"), {}),
  (".dds", "DDS", ("RGB", "RGBA"), {}),
  (".sgi", "SGI", ("RGB", "L"), {}),
  ("", "PNG", ("RGB",), {}),
  (".jpg_large", "JPEG", ("RGB",), {}),
)

# All that may be said: lines on the terminal, and reasons in the manifest.
LINES = (
  r"(train|heldout): \d+ images, \d+ image-text pairs, \d+ files?",
  r"held out \d+ of the \d+ images asked for: the captions share too few words for more",
  r"enlarged: \d+ images? of less than 16 pixels, the smallest \d+x\d+ \(.*\)",
  r"(rejected|passed over|captions left out): \d+ \(listed in manifest.json\)",
  r"files seen: \d+",
  r"  [a-z ]+: \d+",
  r"  \.\.\. and \d+ more",
  r".*: written in [0-9.]+ s",
)
REASONS = (
  r"no caption file .*",
  r"caption file .* (is empty|is not (UTF-8|UTF-16|UTF-32)|is not text \(it has null bytes\))",
  r"caption file .* looks like UTF-16 without a byte-order mark \(save it as UTF-8\)",
  r"caption file .* has (the control character \\x[0-9a-f]{2}|no visible character): .*",
  r"a caption has (the control character \\x[0-9a-f]{2}|no visible character): .*",
  r"not a readable image: (an empty file|\d+ bytes of no known format|it needs too much memory)",
  r"not a readable image: ([A-Z0-9]+|its) data are (damaged|cut off)",
  r"not a readable image: [0-9,]+ pixels, at most 178,956,970 are read",
  r"not a readable image: (some of its values are not finite|its values go from .* to .*)",
  r"not a readable image: the format is none that is read \(.*\)",
  r"hidden|not an image|no image of this name|a link that leads nowhere",
)


def _image(rng, mode):
  shape = (int(rng.integers(1, 25)), int(rng.integers(1, 25)))
  if mode == "I;16":
    return Image.fromarray(rng.integers(0, 65536, shape, np.uint16))
  if mode == "F":
    return Image.fromarray(rng.normal(size=shape).astype(np.float32))
  base = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
  if mode in ("LA", "RGBA"):
    base.putalpha(Image.fromarray(rng.integers(0, 256, shape, np.uint8)))
  if mode == "LAB":
    return ImageCms.applyTransform(
      base, ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    )
  return base.convert(mode)


def _encoded(rng, kind, mode, options):
  """A whole file, sometimes with a profile, EXIF and text, which may be noise."""
  options = dict(options)
  if rng.integers(3) == 0:
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options["icc_profile"] = [whole, whole[: int(rng.integers(len(whole)))], rng.bytes(60)][rng.integers(3)]
  if rng.integers(3) == 0 and kind in ("JPEG", "PNG", "WEBP", "AVIF"):
    exif = Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))
    options["exif"] = [exif.tobytes(), b"Exif\0\0MM\0\x2a" + rng.bytes(20)][rng.integers(2)]
  if rng.integers(3) == 0 and kind == "PNG":
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * int(rng.integers(1, 2**21)), zip=True)
    options["pnginfo"] = info
  buffer = io.BytesIO()
  _image(rng, mode).save(buffer, kind, **options)
  return buffer.getvalue()


def _damaged(rng, data):
  """Half of the files stay intact. The others are cut, partly overwritten with noise, or have bytes appended."""
  if rng.integers(2):
    return data
  data = bytearray(data)
  for _ in range(int(rng.integers(1, 4))):
    if not data:
      break
    # Two in three times near the begin, where the headers are.
    start = int(rng.integers(min(len(data), 100) if rng.integers(3) else len(data)))
    length = int(rng.integers(1, 9))
    match rng.integers(6):
      case 0:
        data[start : start + length] = rng.bytes(min(length, len(data) - start))
      case 1:
        data[start] ^= 1 << int(rng.integers(8))
      case 2:
        del data[start:]
      case 3:
        del data[start : start + length]
      case 4:
        data[start:start] = rng.bytes(length)
      case 5:
        data[start : start + length] = b"\xff" * min(length, len(data) - start)
  return bytes(data)


def _caption(rng, number):
  words = f"number {number} of äpfel"
  return [
    words.encode(),
    f"\ufeff{words}\r\nanother one\r\n".encode(),
    words.encode("utf-16"),
    words.encode("utf-16-be"),
    words.encode("latin-1"),
    f"{words}\n\x1b[31mred\x07\n\u200b\u200d\n".encode(),
    b"\x1b[2J\x00"[: int(rng.integers(5))],
    "\u200b\ufeff".encode(),
    rng.bytes(20),
    ("very " * 5000 + words).encode(),
    "赤い心\u2028青い心".encode(),
    f"{words} \u202e\udce9".encode("utf-8", "surrogateescape"),
  ][max(0, int(rng.integers(-14, 12)))]


def _names(rng, number, suffix):
  """(the image's, its caption's) name as bytes; rarely one that does not fit."""
  stem = f"{number:03d}"
  image = [stem, f"{stem} \x1b[31m\n'\"", f"{stem}é", f"{stem}\udce9\udcff", stem.zfill(200), f"{stem}.tar"][
    max(0, int(rng.integers(-5, 6)))
  ]
  caption = [
    f"{image}.txt",
    f"{image}{suffix}.txt",
    f"{unicodedata.normalize('NFD', image)}.TXT",
    f"other{image}.txt",
    f".{image}.txt",
    f"{image}.json",
  ][max(0, int(rng.integers(-12, 6)))]
  return (f"{image}{suffix}").encode("utf-8", "surrogateescape"), caption.encode("utf-8", "surrogateescape")


def _make(folder, seed):
  """Fills a folder, and one that is linked into it; returns the number of entries that are no folders."""
  rng = np.random.default_rng(seed)
  places = [folder, folder + b"/sub folder", folder + b"/sub folder/deep\xe9", folder + b"-elsewhere"]
  for place in places:
    os.makedirs(place)
  os.symlink(places[3], folder + b"/linked")
  for number in range(FILES):
    suffix, kind, modes, options = FORMATS[number % len(FORMATS)]
    image, caption = _names(rng, number, suffix)
    place = places[rng.integers(len(places))] + b"/"
    with open(place + image, "wb") as file:
      file.write(_damaged(rng, _encoded(rng, kind, modes[rng.integers(len(modes))], options)))
    with open(place + caption, "wb") as file:
      file.write(_caption(rng, number))
  return sum(len(files) for place in (folder, folder + b"-elsewhere") for _, _, files in os.walk(place))


def _said(line, patterns):
  return any(re.fullmatch(pattern, line) for pattern in patterns)


@pytest.mark.slow
def test_five_hundred_damaged_files(tmp_path):
  entries = _make(os.fsencode(tmp_path / "in"), SEED)
  done = subprocess.run(
    [sys.executable, "-m", "aurora_jax", "build-data", "--source", "folder", "--path", tmp_path / "in"]
    + ["--out", tmp_path / "out", "--resolution", "16", "--shards", "2"],
    cwd=ROOT,
    capture_output=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  for line in done.stderr.decode().splitlines():
    assert re.fullmatch(r"folder: images: \d+ of \d+", line), line
  said = done.stdout.decode()
  assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", said)
  for line in said.splitlines():
    assert _said(line, LINES) or _said(line.split(": ", 1)[1], REASONS) or line.endswith("..."), line

  text = (tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")
  assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
  manifest = json.loads(text)
  files = manifest["files"]
  assert files["seen"] == sum(files["counts"].values()) == entries
  for group in (manifest["rejected"], files["passed_over"], files["captions_left_out"]):
    assert group["count"] == len(group["listed"]) > 0
    for entry in group["listed"]:
      assert _said(entry["reason"], REASONS), entry
  keys = []
  for split, entry in manifest["splits"].items():
    dataset = Dataset.open(tmp_path / "out", split)
    assert len(dataset) == entry["examples"]
    for number in range(len(dataset)):
      picture, example = dataset.image(number)
      assert picture.size == (16, 16) and picture.mode == "RGB"
      assert not any(re.search(r"[\x00-\x1f\x7f-\x9f]", caption) for caption in example.captions)
      keys.append(example.key)
  rejected = [entry["key"] for entry in manifest["rejected"]["listed"]]
  passed_over = [entry["key"] for entry in files["passed_over"]["listed"]]
  assert files["counts"]["images stored"] == len(keys) > FILES / 4
  assert files["seen"] == len(keys) + len(rejected) + len(passed_over) + files["counts"]["caption files read"]
  assert len({*keys, *rejected, *passed_over}) == len(keys) + len(rejected) + len(passed_over)
