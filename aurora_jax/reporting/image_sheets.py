"""Pictures a person looks at: captioned grids, rows of latents, maps of experts; written atomically as PNG."""

import functools
import math
import pathlib
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aurora_jax import files
from aurora_jax.errors import UserError

# A generated picture is enlarged to about this many pixels a side, by a whole factor.
SHOWN_SIDE = 96

_PAGE = (240, 241, 243)
_CARD = (255, 255, 255)
INK = (48, 52, 58)
_PADDING = 7
_GAP = 8
_RADIUS = 6
_LINES = 2
_LINE_SPACING = 1.25
# Two lines hold far less; a caption of any length costs no more than this to lay out.
_LONGEST_CAPTION = 160

# Sixteen colours that stay apart from their neighbours in the list and on a light or a dark page. The first four and
# the first eight are the most distinct, since layers have 4, 8 or 16 experts.
EXPERT_COLOURS = (
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


def to_uint8(images):
  """[-1, 1] floats to bytes, by the released rule clip((x + 1) / 2 * 255 + 0.5); a value that is no number is grey.

  Args:
    images: array of any shape.

  Returns:
    uint8 array of the same shape.
  """
  values = (np.nan_to_num(np.asarray(images, np.float32), nan=0.0, posinf=1.0, neginf=-1.0) + 1.0) * 127.5 + 0.5
  return np.clip(values, 0, 255).astype(np.uint8)


def to_picture(image):
  """One image [H, W, 3] in [-1, 1] (or uint8) as a PIL picture of its own size."""
  image = np.asarray(image)
  return Image.fromarray(image if image.dtype == np.uint8 else to_uint8(image))


def default_scale(resolution):
  """The whole factor that brings a picture of this many pixels near SHOWN_SIDE, at least 1."""
  return max(1, round(SHOWN_SIDE / resolution))


def enlarge(image, scale):
  """One image [H, W, 3] as a PIL picture `scale` times the size.

  Lanczos: a small picture is a sampling of something smooth, and reads better so than as a mosaic of squares.
  """
  picture = to_picture(image)
  return picture if scale == 1 else picture.resize((picture.width * scale, picture.height * scale), Image.LANCZOS)


@functools.lru_cache(maxsize=8)
def typeface(size):
  return ImageFont.load_default(size)


@functools.lru_cache(maxsize=4096)
def _drawable(character):
  """What the bundled font can draw for a character: itself, its base letter ("é": "e"), or "?"."""
  font = typeface(12)
  missing = bytes(font.getmask("\uffff"))
  for candidate in (
    character,
    "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)),
  ):
    if candidate and all(c == " " or bytes(font.getmask(c)) != missing for c in candidate):
      return candidate
  return "?"


def wrap_caption(caption, font, width, lines=_LINES):
  """Breaks a caption into at most `lines` lines of at most `width` pixels; what does not fit ends in an ellipsis.

  Args:
    caption: str, of any length and with any white space.
    font: a PIL font.
    width: int, pixels.
    lines: int.

  Returns:
    list of str, empty for an empty caption.
  """
  text = " ".join(caption[: 8 * _LONGEST_CAPTION].split())
  cut = len(text) > _LONGEST_CAPTION
  words = "".join(_drawable(c) for c in text[:_LONGEST_CAPTION]).split()
  wrapped = []
  while words and len(wrapped) < lines:
    line = words.pop(0)
    while words and font.getlength(f"{line} {words[0]}") <= width:
      line += " " + words.pop(0)
    if font.getlength(line) > width:  # one word wider than the line
      kept = len(line)
      while kept > 1 and font.getlength(line[:kept]) > width:
        kept -= 1
      words.insert(0, line[kept:])
      line = line[:kept]
    wrapped.append(line)
  if wrapped and (words or cut):
    last = wrapped[-1]
    while last and font.getlength(last + "...") > width:
      last = last[:-1]
    wrapped[-1] = last.rstrip() + "..."
  return wrapped


@functools.lru_cache(maxsize=64)
def _card(width, height):
  """A white card with smooth round corners on the page's colour."""
  fine = 4
  mask = Image.new("L", (width * fine, height * fine), 0)
  ImageDraw.Draw(mask).rounded_rectangle((0, 0, width * fine - 1, height * fine - 1), _RADIUS * fine, fill=255)
  card = Image.new("RGB", (width, height), _PAGE)
  card.paste(_CARD, (0, 0), mask.resize((width, height), Image.LANCZOS))
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


def captioned_rows(images, captions, scale=None, text_size=13, columns=1, title=""):
  """One card per prompt: the caption on the left, the pictures of its latents beside it.

  Args:
    images: [P, L, R, R, 3], float in [-1, 1] or uint8.
    captions: P strings.
    scale: int, the factor of enlargement; None takes `default_scale`.
    text_size: int, pixels.
    columns: int, cards side by side.
    title: a line above them.

  Returns:
    A PIL picture.
  """
  images = _check(images, captions, 5)
  scale = scale or default_scale(images.shape[3])
  prompts, latents = images.shape[:2]
  height, width = images.shape[2] * scale, images.shape[3] * scale
  font, line = typeface(text_size), _line_height(text_size)
  label = 130
  lines = [wrap_caption(caption, font, label, lines=max(_LINES, height // line - 1)) for caption in captions]
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
    for n, words in enumerate(lines[index]):
      draw.text((left + 2 * _PADDING, text_top + n * line), words, INK, font, anchor="la")
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
  """Images without captions in a grid, each with the option that made it: a bar in that option's colour, and its number.

  Args:
    images: [N, R, R, 3], float in [-1, 1] or uint8.
    marks: int [N], each in [0, options), such as the generator that made each image; None for no marks.
    options: number of options.
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
  colours = expert_colours(options) if marks is not None else None
  for n, image in enumerate(images):
    left, top = _PADDING + n % columns * width, head + _PADDING + n // columns * height
    page.paste(enlarge(image, scale), (left, top))
    if marks is not None:
      colour = tuple(int(value) for value in colours[marks[n]])
      draw.rectangle((left, top + side, left + side - 1, top + side + bar - 1), fill=colour)
      ink = _CARD if sum(colour) < 400 else INK
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
  """The usual sheet of samples: a card per prompt, or a grid where there are no prompts.

  Args:
    images: [P, L, R, R, 3].
    prompts: P strings; all empty for an unconditional system.
    makers: int [P, L], as of `grid`, or None.
    maker_count: how many there are.
    columns: cards side by side; 0 takes two for many prompts.
    title: a line above.
  """
  if any(prompts):
    return captioned_rows(images, prompts, columns=columns or (2 if len(prompts) > 6 else 1), title=title)
  flat = np.asarray(images).reshape(-1, *np.shape(images)[2:])
  return grid(flat, None if makers is None else np.ravel(makers), maker_count, columns=columns or None, title=title)


def captioned_table(images, captions, headers, scale=None, text_size=13):
  """A card per prompt with a table in it: a row per latent, a column per value of something; the headers on top.

  Args:
    images: [P, L, K, R, R, 3], float in [-1, 1] or uint8.
    captions: P strings, on the left of the cards; where all are empty there is no room for them.
    headers: K strings; one may be as wide as the empty ones beside it leave it room.
    scale: int, the factor of enlargement; None takes `default_scale`.
    text_size: int, pixels.

  Returns:
    A PIL picture.
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
    for n, words in enumerate(lines):
      # Headers stand on their pictures: the last lines are level.
      draw.text((_GAP + inner + left, top - (len(lines) - n) * line - 4), words, INK, font, anchor=anchor)
  for p in range(prompts):
    page.paste(_card(card_width, card_height), (_GAP, top))
    lines = wrap_caption(captions[p], font, label, lines=max(_LINES, latents * height // line - 1))
    for n, words in enumerate(lines):
      text_top = top + (card_height - len(lines) * line) / 2 + n * line
      draw.text((_GAP + 2 * _PADDING, text_top), words, INK, font, anchor="la")
    for row in range(latents):
      for k in range(columns):
        page.paste(enlarge(images[p, row, k], scale), (_GAP + inner + k * width, top + _PADDING + row * height))
    top += card_height + _GAP
  return page


def _header_places(headers, width, side):
  """Where headers go: [(column, x of the text, room for it, PIL anchor)], in pixels from the first column's left.

  The first is flush left, the last flush right if there is free room beside it, all others centred on their column.
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


def expert_colours(experts):
  """One colour per expert, the same in every picture and page.

  Returns:
    uint8 [experts, 3]; beyond sixteen the list goes round again, each time darker.
  """
  colours = np.asarray(EXPERT_COLOURS, np.float32)
  rounds = np.arange(experts) // len(colours)
  return (colours[np.arange(experts) % len(colours)] * (0.62**rounds)[:, None]).astype(np.uint8)


def expert_map(expert_index, experts, scale=1):
  """Which expert each pixel went to, as a picture.

  Args:
    expert_index: int [r, r], each in [0, experts).
    experts: int.
    scale: int; squares of scale x scale pixels, no smoothing: an expert is a name, not a quantity.

  Returns:
    A PIL picture of r * scale pixels a side.
  """
  index = np.asarray(expert_index)
  if index.ndim != 2 or not np.issubdtype(index.dtype, np.integer):
    raise ValueError(f"an integer array [r, r] expected, not {index.dtype} {index.shape}")
  if index.size and (index.min() < 0 or index.max() >= experts):
    raise ValueError(f"expert {index.min()} to {index.max()} in a layer of {experts}")
  picture = Image.fromarray(expert_colours(experts)[index])
  return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def check_place(path, suffix):
  """Makes sure, before minutes of work, that a file can be written, and leaves nothing behind.

  Args:
    path: where it shall stand; its folder is made later if missing.
    suffix: how its name must end, e.g. ".png".

  Raises:
    UserError: another suffix, a folder in its place, or a folder that cannot be made or written to.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() != suffix:
    raise UserError(f"the name of this file must end in {suffix}, got {path}")
  files.check_folder(path.parent, path)
  if path.is_dir():
    raise UserError(f"{path} cannot be written: it is a folder")


def save_png(picture, path):
  """Writes a PIL picture as PNG, whole or not at all; UserError if the place cannot be written."""
  with files.whole_file(path) as beside:
    picture.save(beside, format="PNG", optimize=True)
  return pathlib.Path(path)
