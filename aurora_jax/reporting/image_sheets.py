"""Sheets of images for people: captioned rows, tables and grids, expert maps. Written atomically as PNG."""

import functools
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from aurora_jax import files
from aurora_jax.errors import UserError
from aurora_jax.reporting.captions import DEFAULT_LINES, typeface, wrap_caption

# Generated images are enlarged by a whole factor to about this many pixels a side.
SHOWN_SIDE = 96

_PAGE = (240, 241, 243)
_CARD = (255, 255, 255)
INK = (48, 52, 58)
_PADDING = 7
_GAP = 8
_RADIUS = 6
_LINE_SPACING = 1.25

# Sixteen colors that differ from their neighbors in the list and are visible on a light and a dark page. The first four
# and the first eight are the most distinct, since layers have 4, 8 or 16 experts.
EXPERT_COLORS = (
  (46, 110, 187),
  (240, 160, 48),
  (60, 160, 90),
  (205, 62, 70),
  (137, 92, 176),
  (72, 190, 196),
  (236, 124, 170),
  (138, 98, 66),
  (150, 190, 240),
  (250, 214, 110),
  (160, 214, 150),
  (245, 160, 145),
  (200, 176, 226),
  (24, 100, 110),
  (150, 40, 104),
  (140, 148, 156),
)


def to_uint8(images: Any) -> np.ndarray:
  """Floats in [-1, 1] as bytes by the rule of the released code, clip((x + 1) / 2 * 255 + 0.5). NaN becomes gray.

  Args:
    images: array of any shape.

  Returns:
    uint8 array of the same shape.
  """
  values = (np.nan_to_num(np.asarray(images, np.float32), nan=0.0, posinf=1.0, neginf=-1.0) + 1.0) * 127.5 + 0.5
  return np.clip(values, 0, 255).astype(np.uint8)


def to_pil(image: Any) -> Image.Image:
  """One image [H, W, 3], float in [-1, 1] or uint8, as a PIL image of the same size."""
  image = np.asarray(image)
  return Image.fromarray(image if image.dtype == np.uint8 else to_uint8(image))


def default_scale(resolution: int) -> int:
  """The whole factor, at least 1, that enlarges a side of `resolution` pixels to about SHOWN_SIDE."""
  return max(1, round(SHOWN_SIDE / resolution))


def enlarge(image: Any, scale: int) -> Image.Image:
  """One image [H, W, 3] as a PIL image of `scale` times the size, by Lanczos interpolation."""
  shown = to_pil(image)
  return shown if scale == 1 else shown.resize((shown.width * scale, shown.height * scale), Image.Resampling.LANCZOS)


@functools.lru_cache(maxsize=64)
def _card(width, height):
  """A white card with smooth round corners on the page's color."""
  fine = 4
  mask = Image.new("L", (width * fine, height * fine), 0)
  ImageDraw.Draw(mask).rounded_rectangle((0, 0, width * fine - 1, height * fine - 1), _RADIUS * fine, fill=255)
  card = Image.new("RGB", (width, height), _PAGE)
  card.paste(_CARD, (0, 0), mask.resize((width, height), Image.Resampling.LANCZOS))
  return card


def _line_height(size):
  return round(size * _LINE_SPACING)


def _check(images, captions, dimensions):
  images = np.asarray(images)
  if images.ndim != dimensions or images.shape[-1] != 3:
    raise ValueError(f"{dimensions} dimensions ending in 3 channels expected, not {images.shape}")
  if len(images) == 0 or len(images) != len(captions):
    raise ValueError(f"{len(images)} images for {len(captions)} captions")
  return images


def captioned_rows(
  images: np.ndarray,
  captions: Sequence[str],
  scale: int | None = None,
  text_size: int = 13,
  columns: int = 1,
  title: str = "",
) -> Image.Image:
  """One card per prompt: the caption on the left, the images of all latents to the right.

  Args:
    images: [P, L, R, R, 3], float in [-1, 1] or uint8.
    captions: P strings.
    scale: whole factor of enlargement; None takes `default_scale`.
    text_size: pixels.
    columns: cards side by side.
    title: a line above the cards.

  Raises:
    ValueError: the shapes do not fit.
  """
  images = _check(images, captions, 5)
  scale = scale or default_scale(images.shape[3])
  prompts, latents = images.shape[:2]
  height, width = images.shape[2] * scale, images.shape[3] * scale
  font, line = typeface(text_size), _line_height(text_size)
  label = 130
  lines = [wrap_caption(caption, font, label, lines=max(DEFAULT_LINES, height // line - 1)) for caption in captions]
  columns = min(columns, prompts)
  rows = -(-prompts // columns)
  card_width = label + 3 * _PADDING + latents * (width + _PADDING)
  card_height = height + 2 * _PADDING
  head = line + _GAP if title else 0
  page = Image.new("RGB", (columns * (card_width + _GAP) + _GAP, head + rows * (card_height + _GAP) + _GAP), _PAGE)
  draw = ImageDraw.Draw(page)
  draw.text((_GAP, _GAP), title, INK, font, anchor="la")
  for index in range(prompts):
    left = _GAP + (index % columns) * (card_width + _GAP)
    top = head + _GAP + (index // columns) * (card_height + _GAP)
    page.paste(_card(card_width, card_height), (left, top))
    text_top = top + (card_height - len(lines[index]) * line) / 2
    for n, text in enumerate(lines[index]):
      draw.text((left + 2 * _PADDING, text_top + n * line), text, INK, font, anchor="la")
    for latent in range(latents):
      page.paste(
        enlarge(images[index, latent], scale),
        (left + label + 3 * _PADDING + latent * (width + _PADDING), top + _PADDING),
      )
  return page


def grid(
  images: np.ndarray,
  marks: np.ndarray | None = None,
  options: int = 0,
  *,
  columns: int | None = None,
  scale: int | None = None,
  title: str = "",
) -> Image.Image:
  """Images without captions in a grid. Below each, a bar in the color of its mark with the mark's number.

  Args:
    images: [N, R, R, 3], float in [-1, 1] or uint8.
    marks: int [N] in [0, options), such as the generator of each image; None for no marks.
    options: number of different marks.
    columns: images side by side; None makes the grid about square.
    scale: whole factor of enlargement; None takes `default_scale`.
    title: a line above.
  """
  images = np.asarray(images)
  columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
  scale = scale or default_scale(images.shape[1])
  side, line, font = images.shape[1] * scale, _line_height(11), typeface(11)
  bar = line if marks is not None else 0
  width, height = side + _PADDING, side + bar + _PADDING
  head = _line_height(13) + _GAP if title else 0
  rows = -(-len(images) // columns)
  page = Image.new("RGB", (columns * width + _PADDING, head + rows * height + _PADDING), _PAGE)
  draw = ImageDraw.Draw(page)
  draw.text((_PADDING, _PADDING), title, INK, typeface(13), anchor="la")
  colors = expert_colors(options)
  for n, image in enumerate(images):
    left, top = _PADDING + n % columns * width, head + _PADDING + n // columns * height
    page.paste(enlarge(image, scale), (left, top))
    if marks is not None:
      color = tuple(int(value) for value in colors[marks[n]])
      draw.rectangle((left, top + side, left + side - 1, top + side + bar - 1), fill=color)
      ink = _CARD if sum(color) < 400 else INK
      draw.text((left + side / 2, top + side + bar / 2), str(int(marks[n])), ink, font, anchor="mm")
  return page


def sample_sheet(
  images: np.ndarray,
  prompts: Sequence[str],
  makers: np.ndarray | None = None,
  maker_count: int = 0,
  *,
  columns: int = 0,
  title: str = "",
) -> Image.Image:
  """A sheet of samples: a card per prompt, or a grid for an unconditional system.

  Args:
    images: [P, L, R, R, 3], float in [-1, 1] or uint8.
    prompts: P strings; all empty for an unconditional system.
    makers: int [P, L], the generator of each image, or None.
    maker_count: number of generators.
    columns: cards (or images of the grid) side by side; 0 chooses.
    title: a line above.
  """
  if any(prompts):
    return captioned_rows(images, prompts, columns=columns or (2 if len(prompts) > 6 else 1), title=title)
  flat = np.asarray(images).reshape(-1, *np.shape(images)[2:])
  return grid(flat, None if makers is None else np.ravel(makers), maker_count, columns=columns or None, title=title)


def captioned_table(
  images: np.ndarray,
  captions: Sequence[str],
  headers: Sequence[str],
  scale: int | None = None,
  text_size: int = 13,
) -> Image.Image:
  """A card per prompt with a table of images: a row per latent, a column per header.

  Args:
    images: [P, L, K, R, R, 3], float in [-1, 1] or uint8.
    captions: P strings, on the left of the cards; if all are empty, the cards have no room for them.
    headers: K strings. A header extends over empty ones next to it.
    scale: whole factor of enlargement; None takes `default_scale`.
    text_size: pixels.

  Raises:
    ValueError: the shapes do not fit.
  """
  images = _check(images, captions, 6)
  prompts, latents, columns = images.shape[:3]
  if len(headers) != columns:
    raise ValueError(f"{len(headers)} headers for {columns} columns")
  scale = scale or default_scale(images.shape[4])
  height, width = images.shape[3] * scale + _PADDING, images.shape[4] * scale + _PADDING
  font, line = typeface(text_size), _line_height(text_size)
  label = 130 if any(captions) else -_PADDING
  inner = label + 3 * _PADDING  # of the first column, from the card's left edge
  card_width, card_height = inner + columns * width, latents * height + _PADDING
  head = [
    (left, wrap_caption(headers[k], font, room), anchor)
    for k, left, room, anchor in _header_places(headers, width, width - _PADDING)
  ]
  top = _GAP + max(len(lines) for _, lines, _ in head) * line + 4
  page = Image.new("RGB", (card_width + 2 * _GAP, top + prompts * (card_height + _GAP)), _PAGE)
  draw = ImageDraw.Draw(page)
  for left, lines, anchor in head:
    for n, text in enumerate(lines):
      # The last lines of all headers are level, right above the images.
      draw.text((_GAP + inner + left, top - (len(lines) - n) * line - 4), text, INK, font, anchor=anchor)
  for p in range(prompts):
    page.paste(_card(card_width, card_height), (_GAP, top))
    lines = wrap_caption(captions[p], font, label, lines=max(DEFAULT_LINES, latents * height // line - 1))
    for n, text in enumerate(lines):
      text_top = top + (card_height - len(lines) * line) / 2 + n * line
      draw.text((_GAP + 2 * _PADDING, text_top), text, INK, font, anchor="la")
    for row in range(latents):
      for k in range(columns):
        page.paste(enlarge(images[p, row, k], scale), (_GAP + inner + k * width, top + _PADDING + row * height))
    top += card_height + _GAP
  return page


def _header_places(headers, width, side):
  """Positions of headers: [(column, x of the text, its largest width, PIL anchor)], in pixels from the first column.

  The first header is flush left and the last flush right, if the column next to it is free. All others are centered.
  """
  used = [k for k, header in enumerate(headers) if header.strip()] or [0]
  places = []
  for n, k in enumerate(used):
    before = k - used[n - 1] if n else k + 1
    after = used[n + 1] - k if n + 1 < len(used) else len(headers) - k
    if k == 0 and after > 1:
      places.append((k, 0, (after - 1) * width / 2 + side / 2, "la"))
    elif k == len(headers) - 1 and before > 1:
      places.append((k, k * width + side, (before - 1) * width / 2 + side / 2, "ra"))
    else:
      places.append((k, k * width + side / 2, max(side, (min(before, after) - 1) * width), "ma"))
  return places


def expert_colors(experts: int) -> np.ndarray:
  """One color per expert, the same in every image and page.

  Returns:
    uint8 [experts, 3]. After sixteen colors the list repeats, each time darker.
  """
  colors = np.asarray(EXPERT_COLORS, np.float32)
  rounds = np.arange(experts) // len(colors)
  return (colors[np.arange(experts) % len(colors)] * (0.62**rounds)[:, None]).astype(np.uint8)


def expert_map(expert_index: Any, experts: int, scale: int = 1) -> Image.Image:
  """The expert of each pixel as an image, a color per expert.

  Args:
    expert_index: int [r, r] in [0, experts).
    experts: number of experts.
    scale: side of the square of each pixel. Nothing is interpolated: an expert is a name, not a quantity.

  Returns:
    An image of r * scale pixels a side.

  Raises:
    ValueError: another shape or type, or an index out of range.
  """
  index = np.asarray(expert_index)
  if index.ndim != 2 or not np.issubdtype(index.dtype, np.integer):
    raise ValueError(f"an integer array [r, r] expected, not {index.dtype} {index.shape}")
  if index.size and (index.min() < 0 or index.max() >= experts):
    raise ValueError(f"expert {index.min()} to {index.max()} in a layer of {experts}")
  image = Image.fromarray(expert_colors(experts)[index])
  return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def check_place(path: str | os.PathLike, suffix: str) -> None:
  """Checks before long work that a file can be written. Leaves nothing behind.

  Args:
    path: of the file. Its folder may be missing.
    suffix: required end of its name, such as ".png".

  Raises:
    UserError: the suffix differs, `path` is a folder, or its folder cannot be made or written to.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() != suffix:
    raise UserError(f"the name of this file must end in {suffix}, got {path}")
  files.check_folder(path.parent, path)
  if path.is_dir():
    raise UserError(f"{path} cannot be written: it is a folder")


def save_png(image: Image.Image, path: str | os.PathLike) -> pathlib.Path:
  """Writes a PNG atomically. Returns its path. Raises UserError if it cannot be written."""
  with files.atomic_file(path) as tmp_path:
    image.save(tmp_path, format="PNG", optimize=True)
  return pathlib.Path(path)
