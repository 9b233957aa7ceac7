"""A folder of images and captions: which belong together, what is left out, and that nothing is left out in silence."""

import json
import os
import unicodedata

import pytest
from PIL import Image

from aurora_jax import text
from aurora_jax.data import image_folder, sources


def fill(folder, *names):
  """Files by name: captions of one line, else small images. A name may be bytes; "/" makes folders."""
  for name in names:
    path = os.path.join(os.fsencode(folder), os.fsencode(name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
      if path.lower().endswith(b".txt"):
        file.write(f"caption of {text.printable(text.path_text(name))}".encode())
      else:
        Image.new("RGB", (4, 4)).save(file, "PNG")


def pairs(found):
  return {pair.key: pair.captions[0].removeprefix("caption of ") for pair in found.pairs}


def seen(found):
  return len(found.pairs) + sum(found.counts.values())


# ----------------------------------------------------------------------------------------------------------------------
# Which caption is whose


NFC, NFD = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
  "image, caption",
  [
    ("UPPER.PNG", "UPPER.TXT"),
    ("UPPER.PNG", "upper.txt"),
    ("photo.jpg", "Photo.Txt"),
    ("a.jpg", "a.jpg.txt"),
    ("A.JPG", "a.jpg.txt"),
    (f"{NFD}.png", f"{NFC}.txt"),
    (f"{NFC}.png", f"{NFD}.png.TXT"),
    (f"{NFC.upper()}.png", f"{NFD}.txt"),
    ("STRASSE.png", "straße.txt"),
    ("a.b.c.png", "a.b.c.txt"),
    ("no_suffix", "no_suffix.txt"),
    ("photo.jpg_large", "photo.txt"),
    ("photo.jpg_large", "photo.jpg_large.txt"),
    ("scan.0001", "scan.0001.txt"),
  ],
)
def test_nothing_else_can_be_meant(tmp_path, image, caption):
  fill(tmp_path, image, caption)
  found = image_folder.scan(tmp_path)
  assert pairs(found) == {image: caption} and found.rejected == found.passed_over == []
  assert found.counts == {image_folder.CAPTIONS: 1}


@pytest.mark.parametrize(
  "names, expected",
  [
    # What is spelled alike goes first; the rest is not guessed.
    (["a.png", "A.png", "a.txt", "A.txt"], {"a.png": "a.txt", "A.png": "A.txt"}),
    (["a.png", "A.png", "a.txt"], {"a.png": "a.txt"}),
    (["a.png", "A.png", "á.txt"], {}),
    (["Ab.png", "aB.png", "ab.txt"], {}),
    (["ab.png", "Ab.txt", "aB.txt"], {}),
    (["ab.png", "ab.TXT", "ab.txt"], {"ab.png": "ab.txt"}),
    (["ab.png", "ab.TXT", "ab.Txt"], {}),
    ([f"{NFC}.png", f"{NFD}.png", f"{NFC}.txt", f"{NFD}.txt"], {f"{form}.png": f"{form}.txt" for form in (NFC, NFD)}),
    # One caption for two formats of one image; a caption of its own for one of them.
    (["a.png", "a.jpg", "a.txt"], {"a.png": "a.txt", "a.jpg": "a.txt"}),
    (["a.png", "a.jpg", "a.png.txt", "a.jpg.txt"], {"a.png": "a.png.txt", "a.jpg": "a.jpg.txt"}),
    (["a.png", "a.jpg", "a.jpg.txt"], {"a.jpg": "a.jpg.txt"}),
    (["a.jpg", "a.txt", "a.jpg.txt"], {"a.jpg": "a.txt"}),
    # In other folders it is another name.
    (["x/a.png", "y/a.txt"], {}),
  ],
)
def test_what_can_be_meant(tmp_path, names, expected):
  fill(tmp_path, *names)
  found = image_folder.scan(tmp_path)
  assert pairs(found) == expected
  assert seen(found) == len(names)


def test_names_that_are_not_utf8(tmp_path):
  fill(
    tmp_path, b"caf\xe9.png", b"caf\xe9.txt", b"\xff\xfe/x.png", b"\xff\xfe/X.TXT", b"caf\xe9\xe9.png", "ordinary.png"
  )
  (tmp_path / "ordinary.txt").write_text("a caption")
  found = image_folder.scan(tmp_path)
  assert [pair.key for pair in found.pairs] == [r"caf\xe9.png", "ordinary.png", r"\xff\xfe/x.png"]
  assert found.rejected == [(r"caf\xe9\xe9.png", r"no caption file caf\xe9\xe9.txt")]
  rendered = sources.folder(tmp_path)
  assert all(rendered.render(item, 2).size == (2, 2) for item in rendered.items)


def test_names_with_control_characters(tmp_path):
  fill(tmp_path, "a\x1b[31m.png", "a\x1b[31m.txt", "two\nlines.png", "\u202egnp.txt")
  found = image_folder.scan(tmp_path)
  assert [pair.key for pair in found.pairs] == [r"a\x1b[31m.png"]
  assert found.rejected == [(r"two\nlines.png", r"no caption file two\nlines.txt")]
  assert found.passed_over == [(r"\u202egnp.txt", "no image of this name")]


def test_keys_are_unique(tmp_path):
  fill(tmp_path, b"caf\xe9.png", b"caf\xe9.txt", r"caf\xe9.png", r"caf\xe9.txt")
  assert len({pair.key for pair in image_folder.scan(tmp_path).pairs}) == 2


# ----------------------------------------------------------------------------------------------------------------------
# What captions hold


@pytest.mark.parametrize(
  "data, captions",
  [
    ("\ufeffred heart\r\n".encode(), ("red heart",)),
    ("red heart\nrotes Herz 🍎".encode("utf-16"), ("red heart", "rotes Herz 🍎")),
    (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", ("one", "two")),  # two files joined
    ("a\n\u200b\nb\x1b[0m\nc".encode(), ("a", "c")),
    ("שָׁלוֹם \u200fעולם".encode(), ("שָׁלוֹם \u200fעולם",)),
    (("very " * 5000).encode(), ((" ".join(["very"] * 5000)),)),
  ],
)
def test_captions(tmp_path, data, captions):
  fill(tmp_path, "a.png")
  (tmp_path / "a.txt").write_bytes(data)
  assert image_folder.scan(tmp_path).pairs[0].captions == captions


@pytest.mark.parametrize(
  "data, reason",
  [
    ("rot".encode("utf-16-le") * 9, "looks like UTF-16 without a byte-order mark (save it as UTF-8)"),
    (b"caf\xe9", "is not UTF-8"),
    (b"red\0heart\0\0\0", "is not text (it has null bytes)"),
    (b"red \x1b[31mheart\x07", r"has the control character \x1b: red \x1b[31mheart\x07"),
    ("\u200b\u200d\n\ufeff".encode(), "has no visible character: \u200d"),
    (b"\xef\xbb\xbf \n", "is empty"),
  ],
)
def test_captions_that_cannot_be_used(tmp_path, data, reason):
  fill(tmp_path, "a.png")
  (tmp_path / "a.txt").write_bytes(data)
  found = image_folder.scan(tmp_path)
  assert found.rejected == [("a.png", f"caption file a.txt {reason}")]
  assert found.counts == {image_folder.BAD_CAPTION: 1, image_folder.CAPTIONS: 1}


def test_lines_that_are_no_captions_are_listed(tmp_path):
  fill(tmp_path, "a.png", "a.jpg")
  (tmp_path / "a.txt").write_text("red\n\x1b[31m" + "x" * 100 + "\n\u200b\n")
  found = image_folder.scan(tmp_path)
  assert [pair.captions for pair in found.pairs] == [("red",)] * 2
  (first, why), second = found.captions_left_out
  assert (
    first == "a.txt" and why.startswith(r"a caption has the control character \x1b: \x1b[31mxxx") and len(why) < 110
  )
  assert second == ("a.txt", r"a caption has no visible character: \u200b")


def test_a_caption_file_of_gigabytes_is_not_read(tmp_path):
  fill(tmp_path, "a.png", "a.txt")
  os.truncate(tmp_path / "a.txt", 2**34)
  assert image_folder.scan(tmp_path).rejected == [("a.png", "caption file a.txt has more than 16,777,216 bytes")]


# ----------------------------------------------------------------------------------------------------------------------
# Folders, and files that are neither


def test_linked_folders_are_searched(tmp_path):
  fill(tmp_path / "in", "a.png", "a.txt", "sub/b.png", "sub/b.txt")
  fill(tmp_path / "elsewhere", "c.png", "c.txt", "deep/d.png", "deep/d.txt")
  (tmp_path / "in" / "0linked").symlink_to("../elsewhere")
  (tmp_path / "in" / "sub" / "again").symlink_to(tmp_path / "elsewhere" / "deep")
  found = image_folder.scan(tmp_path / "in")
  assert [pair.key for pair in found.pairs] == ["a.png", "sub/b.png", "0linked/c.png", "0linked/deep/d.png"]
  assert found.passed_over == [("sub/again", "linked folder, which is searched under another name")]
  assert found.rejected == []


def test_each_folder_is_searched_once_under_its_own_name(tmp_path):
  fill(tmp_path, "real/a.png", "real/a.txt")
  (tmp_path / "0before").symlink_to("real")
  found = image_folder.scan(tmp_path)
  assert [pair.key for pair in found.pairs] == ["real/a.png"]
  assert found.passed_over == [("0before", "linked folder, which is searched under another name")]


def test_cycles(tmp_path):
  fill(tmp_path / "in", "a.png", "a.txt", "sub/b.png", "sub/b.txt")
  fill(tmp_path / "elsewhere", "c.png", "c.txt")
  for link, target in (
    ("in/sub/up", ".."),
    ("in/self", "."),
    ("in/root", "/"),
    ("in/parent", ".."),
    ("in/elsewhere", "../elsewhere"),
    ("elsewhere/back", "../in"),
  ):
    (tmp_path / link).symlink_to(target)
  found = image_folder.scan(tmp_path / "in")
  assert [pair.key for pair in found.pairs] == ["a.png", "sub/b.png", "elsewhere/c.png"]
  assert found.counts[image_folder.CYCLE] == 4 and found.counts[image_folder.KNOWN_FOLDER] == 1
  assert sorted(key for key, _ in found.passed_over) == ["elsewhere/back", "parent", "root", "self", "sub/up"]


def test_the_folder_itself_may_be_a_link(tmp_path):
  fill(tmp_path / "in", "a.png", "a.txt")
  (tmp_path / "link").symlink_to("in")
  assert pairs(image_folder.scan(tmp_path / "link")) == {"a.png": "a.txt"}


def test_linked_files(tmp_path):
  fill(tmp_path / "in", "a.png", "b.txt")
  fill(tmp_path / "elsewhere", "x.png", "x.txt")
  (tmp_path / "in" / "b.png").symlink_to("../elsewhere/x.png")
  (tmp_path / "in" / "a.txt").symlink_to("../elsewhere/x.txt")
  (tmp_path / "in" / "gone.png").symlink_to("../nowhere.png")
  (tmp_path / "in" / "loop.png").symlink_to("loop.png")
  found = image_folder.scan(tmp_path / "in")
  assert pairs(found) == {"a.png": "x.txt", "b.png": "b.txt"}
  assert found.passed_over == [(f"{name}.png", "a link that leads nowhere") for name in ("gone", "loop")]


def test_pipes_are_not_waited_for(tmp_path):
  fill(tmp_path, "a.png", "a.txt")
  os.mkfifo(tmp_path / "b.png")
  os.mkfifo(tmp_path / "b.txt")
  found = image_folder.scan(tmp_path)
  assert pairs(found) == {"a.png": "a.txt"}
  assert found.passed_over == [("b.png", "no regular file"), ("b.txt", "no regular file")]


@pytest.mark.parametrize(
  "kind, suffix", [("TIFF", "tif"), ("AVIF", "avif"), ("QOI", "qoi"), ("TGA", "tga"), ("PPM", "pnm")]
)
def test_whatever_can_be_read_is_read(tmp_path, kind, suffix):
  Image.new("RGB", (4, 4), (255, 0, 0)).save(
    tmp_path / f"a.{suffix}", kind, **({"quality": 95} if kind == "AVIF" else {})
  )
  (tmp_path / "a.txt").write_text("red")
  source = sources.folder(tmp_path)
  red, green, blue = source.render(source.items[0], 2).getpixel((0, 0))
  assert red > 250 and green < 5 and blue < 5


def test_every_file_is_counted(tmp_path):
  fill(tmp_path, "a.png", "a.txt", "b.png", "c.txt", "README.txt", "sub/d.png", "sub/d.txt", ".hidden.png", ".h/e.png")
  for name in ("data.csv", "meta.json", "Thumbs.db", "f.heic", "f.txt", "g.svg", "h.ico"):
    (tmp_path / name).write_bytes(b"whatever it is")
  fill(tmp_path, "disguised")
  found = image_folder.scan(tmp_path)
  assert pairs(found).keys() == {"a.png", "sub/d.png"}
  assert dict(found.rejected) == {
    "b.png": "no caption file b.txt",
    "disguised": "no caption file disguised.txt",
    "f.heic": "not a readable image: the format is none that is read (.heic)",
  }
  assert dict(found.passed_over) == {
    ".h": "hidden",
    ".hidden.png": "hidden",
    "README.txt": "no image of this name",
    "Thumbs.db": "not an image",
    "c.txt": "no image of this name",
    "data.csv": "not an image",
    "f.txt": "no image of this name",
    "g.svg": "not an image",
    "h.ico": "not an image",
    "meta.json": "not an image",
  }
  assert found.counts == {
    image_folder.CAPTIONS: 2,
    image_folder.NO_CAPTION: 2,
    image_folder.UNKNOWN_FORMAT: 1,
    image_folder.STRAY_CAPTION: 3,
    image_folder.OTHER: 5,
    image_folder.HIDDEN: 2,
  }
  entries = sum(len(files) for folder, _, files in os.walk(tmp_path) if os.path.basename(folder) != ".h")
  assert seen(found) == entries + 1  # the hidden folder is one


def test_sidecars_of_other_programs_leave_the_captions_alone(tmp_path):
  fill(tmp_path, "1.jpg", "1.txt")
  (tmp_path / "1.json").write_text("{}")
  found = image_folder.scan(tmp_path)
  assert pairs(found) == {"1.jpg": "1.txt"} and found.rejected == []


def test_metadata_files(tmp_path):
  """They give scores, and say whether several lines are one caption."""
  fill(tmp_path, *(f"{name}.png" for name in "abcdef"))
  for name in "abcdef":
    (tmp_path / f"{name}.txt").write_text("one\ntwo \x07\n" if name == "f" else "one\n\ntwo\n")
  (tmp_path / "a.json").write_text(json.dumps({"caption": " one\ntwo", "similarity": 0.3, "punsafe": None}))
  (tmp_path / "b.png.json").write_text(json.dumps({"caption": "another", "AESTHETIC_SCORE": "5.5"}))
  (tmp_path / "c.json").write_text("[1]")
  (tmp_path / "d.json").write_text("{")
  (tmp_path / "e.json").write_text('{"similarity": 1' + "0" * 400 + ', "caption": ["one"]}')
  (tmp_path / "f.json").write_text(json.dumps({"caption": "one\ntwo \x07"}))
  found = image_folder.scan(tmp_path)
  assert {pair.key: (pair.captions, pair.scores) for pair in found.pairs} == {
    "a.png": (("one two",), {"similarity": 0.3}),
    "b.png": (("one", "two"), {"aesthetic": 5.5}),
    "c.png": (("one", "two"), {}),
    "d.png": (("one", "two"), {}),
    "e.png": (("one", "two"), {}),
  }
  assert found.rejected == [("f.png", r"caption file f.txt has the control character \x07: one two \x07")]
  assert found.passed_over == [("c.json", "not an image"), ("d.json", "not an image")]
  assert found.counts[image_folder.METADATA] == 4 and seen(found) == 18
