"""Grids, captions, expert maps and atomic PNGs."""

import numpy as np
import pytest
from PIL import Image

from aurora_jax.errors import UserError
from aurora_jax.reporting import captions, image_sheets


def flat(colors, side=8):
  """Images [n, side, side, 3] in [-1, 1], each of one color."""
  return np.broadcast_to(np.asarray(colors, np.float32)[:, None, None], (len(colors), side, side, 3))


def test_to_uint8_is_the_released_rule():
  values = np.array([-2.0, -1.0, 0.0, 1.0, 3.0, np.nan, np.inf, -np.inf], np.float32)
  assert image_sheets.to_uint8(values).tolist() == [0, 0, 128, 255, 255, 128, 255, 0]
  steps = np.arange(256)
  assert (image_sheets.to_uint8(steps / 127.5 - 1) == steps).all()


def test_rows_have_their_captions_and_are_deterministic():
  images = flat([[1, 1, 1], [1, 1, 1]])[:, None]
  first = np.asarray(image_sheets.captioned_rows(images, ["a cat", "a dog"], scale=12))
  again = np.asarray(image_sheets.captioned_rows(images, ["a cat", "a dog"], scale=12))
  other = np.asarray(image_sheets.captioned_rows(images, ["a cat", "a cow"], scale=12))
  without = np.asarray(image_sheets.captioned_rows(images, ["", ""], scale=12))
  assert (first == again).all() and (first != other).any()
  assert first.min() < 120 < without.min()  # dark ink only where there are captions


@pytest.mark.parametrize("resolution, scale", [(4, 24), (32, 3), (64, 2), (256, 1), (512, 1)])
def test_default_scale(resolution, scale):
  assert image_sheets.default_scale(resolution) == scale


def test_rows_hold_all_latents_of_a_prompt_on_one_line():
  colors = np.array([[[1, -1, -1], [-1, 1, -1]], [[-1, -1, 1], [1, 1, -1]], [[-1, 1, 1], [1, -1, 1]]], np.float32)
  images = np.broadcast_to(colors[:, :, None, None], (3, 2, 8, 8, 3))
  grid = np.asarray(image_sheets.captioned_rows(images, ["one", "two", "three"], scale=4, columns=2))
  center = np.array([[np.argwhere((grid == (c + 1) * 127.5).all(-1)).mean(0) for c in row] for row in colors])
  assert (center[:, 0, 0] == center[:, 1, 0]).all() and (center[:, 0, 1] < center[:, 1, 1]).all()
  assert center[0, 0, 0] == center[1, 0, 0] < center[2, 0, 0]  # two cards side by side, the third below


@pytest.mark.parametrize(
  "images, captions",
  [
    (np.zeros((2, 1, 4, 4, 3)), ["one"]),
    (np.zeros((0, 1, 4, 4, 3)), []),
    (np.zeros((2, 1, 4, 4, 1)), ["a", "b"]),
    (np.zeros((2, 4, 4, 3)), ["a", "b"]),
  ],
)
def test_rows_refuse_what_does_not_fit(images, captions):
  with pytest.raises(ValueError):
    image_sheets.captioned_rows(images, captions)


class TestWrap:
  font = captions.typeface(12)

  def wrap(self, caption, width=96):
    lines = captions.wrap_caption(caption, self.font, width)
    assert all(self.font.getlength(line) <= width for line in lines), lines
    return lines

  def test_short(self):
    assert self.wrap("red heart") == ["red heart"]

  def test_white_space_is_no_content(self):
    assert self.wrap("  red\n\theart ") == ["red heart"]
    assert self.wrap(" \n ") == []

  def test_two_lines(self):
    assert self.wrap("globe showing Americas") == ["globe showing", "Americas"]

  def test_more_than_two_lines_end_in_an_ellipsis(self):
    lines = self.wrap("a woman and a man walking hand in hand along the beach at night")
    assert len(lines) == 2 and lines[1].endswith("...")

  def test_a_word_wider_than_the_line(self):
    lines = self.wrap("W" * 15)
    assert "".join(lines) == "W" * 15 and len(lines) == 2
    assert self.wrap("W" * 60)[1].endswith("...")

  def test_ten_thousand_characters(self):
    lines = self.wrap("x" * 10_000)
    assert len(lines) == 2 and lines[1].endswith("...")

  def test_letters_that_the_font_lacks_become_their_base_letters(self):
    assert self.wrap("São Tomé", 200) == ["Sao Tome"]
    assert self.wrap("\u732b", 200) == ["?"]


def test_expert_map_uses_one_color_per_expert():
  index = np.array([[0, 1], [3, 0]])
  image = np.asarray(image_sheets.expert_map(index, 4, scale=3))
  assert image.shape == (6, 6, 3)
  assert (image[::3, ::3] == image_sheets.expert_colors(4)[index]).all()
  assert (image[:3, :3] == image[0, 0]).all()


@pytest.mark.parametrize("experts, apart", [(4, 150), (8, 100), (16, 60), (40, 5)])
def test_expert_colors_differ(experts, apart):
  colors = image_sheets.expert_colors(experts).astype(int)
  distance = np.abs(colors[:, None] - colors[None]).sum(-1) + 999 * np.eye(experts, dtype=int)
  assert distance.min() >= apart


@pytest.mark.parametrize("index", [np.array([[4]]), np.array([[-1]]), np.array([0]), np.array([[0.0]])])
def test_expert_map_refuses_what_is_no_expert(index):
  with pytest.raises(ValueError):
    image_sheets.expert_map(index, 4)


def test_save_png_makes_folders_and_replaces(tmp_path):
  path = tmp_path / "new" / "grid.png"
  image_sheets.save_png(Image.new("RGB", (2, 2), "red"), path)
  image_sheets.save_png(Image.new("RGB", (3, 2), "blue"), path)
  with Image.open(path) as image:
    assert image.size == (3, 2) and image.getpixel((0, 0)) == (0, 0, 255)
  assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_an_unwritable_place_is_named(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match="file/grid.png"):
    image_sheets.save_png(Image.new("RGB", (2, 2)), tmp_path / "file" / "grid.png")


def test_table_has_a_row_per_latent_and_a_column_per_value():
  images = np.full((2, 3, 4, 8, 8, 3), -1.0, np.float32)
  images[..., 0] += np.arange(2)[:, None, None, None, None]
  images[..., 1] += np.arange(3)[:, None, None, None] / 2
  images[..., 2] += np.arange(4)[:, None, None] / 2
  table = np.asarray(image_sheets.captioned_table(images, ["one", "two"], ["a", "b", "c", "d"], scale=4))
  shown = image_sheets.to_uint8(images)
  center = np.array([np.argwhere((table == shown[index][0, 0]).all(-1)).mean(0) for index in np.ndindex(2, 3, 4)])
  rows, columns = center.reshape(6, 4, 2)[..., 0], center.reshape(6, 4, 2)[..., 1]
  assert (rows == rows[:, :1]).all() and (np.diff(rows[:, 0]) > 0).all()
  assert (columns == columns[:1]).all() and (np.diff(columns[0]) > 0).all()
  with pytest.raises(ValueError, match="3 headers for 4 columns"):
    image_sheets.captioned_table(images, ["one", "two"], ["a", "b", "c"])


def test_headers_use_the_room_of_empty_ones_beside_them():
  places = image_sheets._header_places(["a", "", "", "", "b", "", "", "c"], 100, 96)
  assert [(k, anchor) for k, _, _, anchor in places] == [(0, "la"), (4, "ma"), (7, "ra")]
  spans = [
    {"la": (x, x + room), "ma": (x - room / 2, x + room / 2), "ra": (x - room, x)}[anchor]
    for _, x, room, anchor in places
  ]
  assert spans[0][0] == 0 and spans[-1][1] == 796
  assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))
  assert [room for _, _, room, _ in image_sheets._header_places(["a", "b"], 100, 96)] == [96, 96]


def test_a_place_is_checked_before_the_work(tmp_path):
  (tmp_path / "file").write_text("in the way")
  (tmp_path / "folder.png").mkdir()
  image_sheets.check_place(tmp_path / "new" / "deep" / "x.PNG", ".png")
  for path, message in (
    ("x.jpg", "must end in .png"),
    ("file/x.png", "not a folder"),
    ("folder.png", "it is a folder"),
  ):
    with pytest.raises(UserError, match=message):
      image_sheets.check_place(tmp_path / path, ".png")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
