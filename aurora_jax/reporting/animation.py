"""Images of an interpolation: a strip of all steps, and a GIF that runs forward and backward."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from aurora_jax import files
from aurora_jax.reporting import captions, image_sheets

# Images in the animation are enlarged by a whole factor to about this many pixels a side.
SHOWN_SIDE = 160

_PAD = 12
_LEAST_WIDTH = 320  # room for two captions
_TEXT_SIZE = 14
_LINE = 18
_TRACK = (205, 209, 214)
_DOT = (46, 110, 187)
# A prompt is shown this many times as long as a step between two prompts.
_HOLD = 7
_COLORS = 256


def strip(images: np.ndarray, prompts: Sequence[str]) -> Image.Image:
  """All steps side by side: a row per latent, a column per step, each prompt above its step.

  Args:
    images: [L, S, R, R, 3] in [-1, 1]. The prompts are at evenly spaced steps from the first to the last.
    prompts: P strings; P - 1 divides S - 1.

  Raises:
    ValueError: P - 1 does not divide S - 1.
  """
  images = np.asarray(images)
  headers = [""] * images.shape[1]
  for prompt, step in zip(prompts, _stations(images.shape[1], len(prompts))):
    headers[step] = prompt
  return image_sheets.captioned_table(images[None], [""], headers)


def _stations(steps, prompts):
  """The steps of the prompts."""
  if prompts < 2 or (steps - 1) % (prompts - 1):
    raise ValueError(f"{steps} steps do not run evenly through {prompts} prompts")
  return range(0, steps, (steps - 1) // (prompts - 1))


def frames(images: np.ndarray, prompts: Sequence[str], scale: int | None = None) -> list[Image.Image]:
  """One frame per step: the images of all latents side by side. A dot below shows the position between two prompts.

  Args:
    images: as of `strip`.
    prompts: as of `strip`.
    scale: whole factor of enlargement; None enlarges to about SHOWN_SIDE.

  Returns:
    S images of one size.

  Raises:
    ValueError: P - 1 does not divide S - 1.
  """
  images = np.asarray(images)
  latents, steps, height, width = images.shape[:4]
  scale = scale or max(1, round(SHOWN_SIDE / width))
  height, width = height * scale, width * scale
  images_width = latents * (width + _PAD) - _PAD
  page_width = max(images_width, _LEAST_WIDTH) + 2 * _PAD
  font, stations = captions.typeface(_TEXT_SIZE), list(_stations(steps, len(prompts)))
  room = (page_width - 2 * _PAD) // 2 - _PAD
  wrapped = [captions.wrap_caption(prompt, font, room) for prompt in prompts]
  track = height + 2 * _PAD + 4
  page_height = track + _PAD + _LINE * max(len(lines) for lines in wrapped) + _PAD
  made = []
  for step in range(steps):
    page = Image.new("RGB", (page_width, page_height), "white")
    draw = ImageDraw.Draw(page)
    for latent in range(latents):
      left = (page_width - images_width) // 2 + latent * (width + _PAD)
      page.paste(image_sheets.enlarge(images[latent, step], scale), (left, _PAD))
    leg = min(step // stations[1], len(prompts) - 2)
    weight = step / stations[1] - leg
    left, right = _PAD + 5, page_width - _PAD - 5
    draw.line((left, track, right, track), _TRACK, 2)
    dot = left + weight * (right - left)
    draw.ellipse((dot - 5, track - 5, dot + 5, track + 5), fill=_DOT)
    for x, anchor, lines in ((_PAD, "la", wrapped[leg]), (page_width - _PAD, "ra", wrapped[leg + 1])):
      for n, text in enumerate(lines):
        draw.text((x, track + _PAD + n * _LINE), text, image_sheets.INK, font, anchor=anchor)
    made.append(page)
  return made


def _palette(pages):
  """A palette for all frames, uint8 [n <= 256, 3]: the colors of the layout exactly, the others by k-means.

  Each color is weighted by the square root of its number of pixels. Weighted by the number, the white around the images
  would take most of the palette. Unweighted, large areas would get visibly wrong colors.
  """
  fixed = [(255, 255, 255), image_sheets.INK, _TRACK, _DOT]
  fine = 4
  codes = np.concatenate([_codes(page, fine) for page in pages])
  codes, counts = np.unique(codes, return_counts=True)
  colors = np.repeat(_decode(codes), np.ceil(np.sqrt(counts)).astype(int), axis=0) * fine + fine // 2
  reduced = Image.fromarray(colors.astype(np.uint8)[:, None]).quantize(_COLORS - len(fixed), kmeans=4)
  chosen = np.reshape(reduced.getpalette() or [], (-1, 3))[: _COLORS - len(fixed)]
  return np.concatenate([fixed, chosen]).astype(np.uint8)


def _codes(page, divisor=1):
  """The colors of an image's pixels as integers [pixels]; `_decode` is the inverse."""
  return (np.asarray(page, np.int32) // divisor @ np.array([1 << 16, 1 << 8, 1])).ravel()


def _decode(codes):
  return codes[:, None] >> np.array([16, 8, 0]) & 255


def _indexed(page, palette):
  """A frame in the palette's nearest colors. Pillow's own search is coarse and turns white gray."""
  codes, where = np.unique(_codes(page), return_inverse=True)
  colors, entries = _decode(codes).astype(np.float32), palette.astype(np.float32)
  nearest = np.argmin(np.square(entries).sum(-1) - 2 * colors @ entries.T, axis=1).astype(np.uint8)
  image = Image.fromarray(nearest[where].reshape(page.height, page.width), "P")
  image.putpalette(palette.tobytes())
  return image


def save_gif(
  pages: Sequence[Image.Image], prompts: int, path: str | os.PathLike, step_milliseconds: int = 120
) -> pathlib.Path:
  """Writes an endless animation that runs forward and backward. The file appears complete or not at all.

  All frames share one palette, so that no color flickers.

  Args:
    pages: as of `frames`.
    prompts: number of prompts. The animation pauses at each.
    path: of the file.
    step_milliseconds: duration of a step. GIF rounds it to hundredths of a second.

  Returns:
    The path.

  Raises:
    UserError: the file cannot be written.
  """
  stations = set(_stations(len(pages), prompts))
  order = list(range(len(pages))) + list(range(len(pages) - 2, 0, -1))
  palette = _palette(pages)
  indexed = [_indexed(page, palette) for page in pages]
  durations = [step_milliseconds * (_HOLD if step in stations else 1) for step in order]
  with files.atomic_file(path) as tmp_path:
    indexed[0].save(
      tmp_path,
      format="GIF",
      save_all=True,
      append_images=[indexed[step] for step in order[1:]],
      duration=durations,
      loop=0,
      optimize=False,
    )
  return pathlib.Path(path)
