"""An interpolation as a person looks at it: a strip of all steps, and a GIF that goes forth and back."""

import pathlib

import numpy as np
from PIL import Image, ImageDraw

from aurora_jax import files
from aurora_jax.reporting import image_sheets

# A picture in the animation is enlarged to about this many pixels a side, by a whole factor.
SHOWN_SIDE = 160

_PAD = 12
_LEAST_WIDTH = 320  # room for two captions
_TEXT_SIZE = 14
_LINE = 18
_TRACK = (205, 209, 214)
_DOT = (46, 110, 187)
# A prompt itself stays on the screen this many times as long as a step between two.
_HOLD = 7
_COLOURS = 256


def strip(images, prompts):
  """All steps side by side: a row per latent, a column per step, each prompt above its own step.

  Args:
    images: [L, S, R, R, 3] in [-1, 1]; the prompts stand at evenly spread steps, first and last among them.
    prompts: P strings, P - 1 divides S - 1.

  Returns:
    A PIL picture.
  """
  images = np.asarray(images)
  headers = [""] * images.shape[1]
  for prompt, step in zip(prompts, _stations(images.shape[1], len(prompts))):
    headers[step] = prompt
  return image_sheets.captioned_table(images[None], [""], headers)


def _stations(steps, prompts):
  """The steps at which the prompts stand."""
  if prompts < 2 or (steps - 1) % (prompts - 1):
    raise ValueError(f"{steps} steps do not run evenly through {prompts} prompts")
  return range(0, steps, (steps - 1) // (prompts - 1))


def frames(images, prompts, scale=None):
  """One picture per step: all latents side by side; below, between its two prompts, a dot that shows how far it is.

  Args:
    images, prompts: as of `strip`.
    scale: int, the factor of enlargement; None brings a picture near SHOWN_SIDE.

  Returns:
    list of S PIL pictures of one size.
  """
  images = np.asarray(images)
  latents, steps, height, width = images.shape[:4]
  scale = scale or max(1, round(SHOWN_SIDE / width))
  height, width = height * scale, width * scale
  pictures_width = latents * (width + _PAD) - _PAD
  page_width = max(pictures_width, _LEAST_WIDTH) + 2 * _PAD
  font, stations = image_sheets.typeface(_TEXT_SIZE), list(_stations(steps, len(prompts)))
  room = (page_width - 2 * _PAD) // 2 - _PAD
  captions = [image_sheets.wrap_caption(prompt, font, room) for prompt in prompts]
  track = height + 2 * _PAD + 4
  page_height = track + _PAD + _LINE * max(len(lines) for lines in captions) + _PAD
  made = []
  for step in range(steps):
    page = Image.new("RGB", (page_width, page_height), "white")
    draw = ImageDraw.Draw(page)
    for latent in range(latents):
      left = (page_width - pictures_width) // 2 + latent * (width + _PAD)
      page.paste(image_sheets.enlarge(images[latent, step], scale), (left, _PAD))
    leg = min(step // stations[1], len(prompts) - 2)
    weight = step / stations[1] - leg
    left, right = _PAD + 5, page_width - _PAD - 5
    draw.line((left, track, right, track), _TRACK, 2)
    dot = left + weight * (right - left)
    draw.ellipse((dot - 5, track - 5, dot + 5, track + 5), fill=_DOT)
    for x, anchor, lines in ((_PAD, "la", captions[leg]), (page_width - _PAD, "ra", captions[leg + 1])):
      for n, words in enumerate(lines):
        draw.text((x, track + _PAD + n * _LINE), words, image_sheets.INK, font, anchor=anchor)
    made.append(page)
  return made


def _palette(pages):
  """Colours for all pages, uint8 [n <= 256, 3]: the page's own exactly, the rest by k-means.

  A colour counts by the root of the number of its pixels: by the number itself the white around the pictures would take
  most of the palette, and by one each it would be left in visible patches.
  """
  fixed = [(255, 255, 255), image_sheets.INK, _TRACK, _DOT]
  fine = 4
  codes = np.concatenate([_codes(page, fine) for page in pages])
  codes, counts = np.unique(codes, return_counts=True)
  colours = np.repeat(_colours(codes), np.ceil(np.sqrt(counts)).astype(int), axis=0) * fine + fine // 2
  reduced = Image.fromarray(colours.astype(np.uint8)[:, None]).quantize(_COLOURS - len(fixed), kmeans=4)
  chosen = np.reshape(reduced.getpalette(), (-1, 3))[: _COLOURS - len(fixed)]
  return np.concatenate([fixed, chosen]).astype(np.uint8)


def _codes(page, divisor=1):
  """The colours of a picture's pixels as integers [pixels]; `_colours` is the inverse."""
  return (np.asarray(page, np.int32) // divisor @ np.array([1 << 16, 1 << 8, 1])).ravel()


def _colours(codes):
  return codes[:, None] >> np.array([16, 8, 0]) & 255


def _indexed(page, palette):
  """A page with the palette's colours, each pixel the nearest (Pillow's own search is coarse, and turns white grey)."""
  codes, where = np.unique(_codes(page), return_inverse=True)
  colours, entries = _colours(codes).astype(np.float32), palette.astype(np.float32)
  nearest = np.argmin(np.square(entries).sum(-1) - 2 * colours @ entries.T, axis=1).astype(np.uint8)
  image = Image.fromarray(nearest[where].reshape(page.height, page.width), "P")
  image.putpalette(palette.tobytes())
  return image


def save_gif(pages, prompts, path, step_milliseconds=120):
  """Writes an endless animation forth and back, whole or not at all.

  All frames share one palette, taken from all of them, so that no colour flickers from frame to frame.

  Args:
    pages: as of `frames`.
    prompts: how many prompts the path runs through; it rests at each.
    path: where to.
    step_milliseconds: how long a step is shown; a GIF counts in hundredths of a second.

  Raises:
    UserError: it cannot be written.
  """
  stations = set(_stations(len(pages), prompts))
  order = list(range(len(pages))) + list(range(len(pages) - 2, 0, -1))
  palette = _palette(pages)
  indexed = [_indexed(page, palette) for page in pages]
  durations = [step_milliseconds * (_HOLD if step in stations else 1) for step in order]
  with files.whole_file(path) as beside:
    indexed[0].save(
      beside,
      format="GIF",
      save_all=True,
      append_images=[indexed[step] for step in order[1:]],
      duration=durations,
      loop=0,
      optimize=False,
    )
  return pathlib.Path(path)
