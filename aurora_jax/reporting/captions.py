"""Captions on images: the typeface, and lines of limited width."""

import functools
import unicodedata

from PIL import ImageFont

DEFAULT_LINES = 2
# More characters than two lines hold. It limits the work for a caption of any length.
_LONGEST_CAPTION = 160


@functools.lru_cache(maxsize=8)
def typeface(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
  """The bundled font at a size in pixels."""
  return ImageFont.load_default(size)


@functools.lru_cache(maxsize=4096)
def _drawable(character):
  """The character, or its base letter ("e" for "é"), or "?": the first one that the bundled font has."""
  font = typeface(12)
  missing = bytes(font.getmask("\uffff"))
  for candidate in (
    character,
    "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c)),
  ):
    if candidate and all(c == " " or bytes(font.getmask(c)) != missing for c in candidate):
      return candidate
  return "?"


def wrap_caption(
  caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int = DEFAULT_LINES
) -> list[str]:
  """Breaks a caption into lines. A caption that is too long ends in an ellipsis.

  Args:
    caption: any length, any white space.
    font: a PIL font.
    width: largest width of a line, pixels.
    lines: largest number of lines.

  Returns:
    The lines; [] for an empty caption.
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
      end = len(line)
      while end > 1 and font.getlength(line[:end]) > width:
        end -= 1
      words.insert(0, line[end:])
      line = line[:end]
    wrapped.append(line)
  if wrapped and (words or cut):
    last = wrapped[-1]
    while last and font.getlength(last + "...") > width:
      last = last[:-1]
    wrapped[-1] = last.rstrip() + "..."
  return wrapped
