"""HTML building blocks of report.html. Every text from outside the program is escaped."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from aurora_jax.reporting import image_sheets


def escape(value: Any) -> str:
  """A value as text, escaped for HTML content and attributes."""
  return html.escape(str(value), quote=True)


def number(value: float, digits: int = 3) -> str:
  """Formats a number in few characters: "1,234", "0.123", "1.2e-05"; "-" for NaN."""
  if value != value:
    return "-"
  if float(value).is_integer() and abs(value) < 1e15:
    return f"{int(value):,}"
  if abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
  """Formats seconds: "2 d 3 h", "3 h 5 min", "4 min 10 s", "9 s"."""
  seconds = int(round(seconds))
  hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
  if hours >= 48:
    return f"{hours // 24} d {hours % 24} h"
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def data_uri(image: Image.Image, quality: int | None = 90) -> str:
  """An image as a data URI: WebP, or for `quality` None lossless PNG."""
  buffer = io.BytesIO()
  if quality is None:
    image.save(buffer, "PNG", optimize=True)
    kind = "png"
  else:
    image.save(buffer, "WEBP", quality=quality, method=4, use_sharp_yuv=True)
    kind = "webp"
  return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def tile(image: np.ndarray, alt: str) -> str:
  """An <img> of one image [R, R, 3] in [-1, 1], enlarged by a whole factor."""
  scale = max(1, 2 * image_sheets.SHOWN_SIDE // np.shape(image)[1])  # twice the shown size: sharp on fine screens
  source = data_uri(image_sheets.enlarge(image, scale))
  return f'<img class="tile" loading="lazy" alt="{escape(alt)}" src="{source}">'


def figure(image: str, caption: str, css: str = "") -> str:
  """A <figure> of the HTML of an image with a caption below."""
  return f'<figure class="{css}">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def row(real: np.ndarray, generated: Sequence[np.ndarray] | np.ndarray, caption: str) -> str:
  """A real image [R, R, 3] next to generated ones [L, R, R, 3], all of one caption."""
  tiles = "".join(figure(tile(image, f"generated: {caption}"), "generated") for image in generated)
  return f'<div class="row">{figure(tile(real, f"real: {caption}"), "real", "real")}{tiles}</div>'


def section(title: str, about: str, body: str, missing: str = "") -> str:
  """A <section>.

  Args:
    title: plain text.
    about: HTML of an introduction; "" for none.
    body: HTML; if it is "", the section shows `missing` alone.
    missing: plain text.
  """
  inner = body or f'<p class="missing">{escape(missing)}</p>'
  introduction = f'<p class="about">{about}</p>' if about and body else ""
  return f"<section><h2>{escape(title)}</h2>{introduction}{inner}</section>"


def hex_color(rgb: Sequence[int] | np.ndarray) -> str:
  """Three bytes as "#rrggbb"."""
  return f"#{rgb[0]:02x}{rgb[1]:02x}{rgb[2]:02x}"
