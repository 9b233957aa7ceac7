"""A page about a data set: counts, a sample of its images with captions, caption lengths, and what was left out.

The page is one HTML file that needs no network. The same data set gives the same page.
"""

import importlib.resources
import os
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from aurora_jax import files, text
from aurora_jax.data import dataset, decode, tfrecords
from aurora_jax.reporting import data_summary, run_summary
from aurora_jax.reporting.page_elements import data_uri, escape, number, section

_SIDE = 256  # of a thumbnail at most, in pixels
_COARSE = 64  # images of this side or less are enlarged without smoothing, so that their pixels can be seen
_HELDOUT_SHARE = 0.2  # of the sample at least, as far as there are such images
_CAPTION_SHOWN, _KEY_SHOWN = 160, 80  # characters
_CHART_WIDTH, _CHART_HEIGHT, _BARS = 720, 150, 48
_LISTED = 20
_ORIGIN = {"source": "source", "license": "licence"}  # labels, and their entries of the manifest


def write(path: str | os.PathLike, out: str | os.PathLike, count: int) -> None:
  """Writes the page about a data set.

  Args:
    path: the data set's folder.
    out: path of the page.
    count: number of images to show.

  Raises:
    UserError: the data set cannot be opened, or the page cannot be written.
  """
  files.write_text(out, render(path, count))


def render(path: str | os.PathLike, count: int) -> str:
  """The page as HTML; see `write`."""
  manifest = dataset.read_manifest(path)
  opened = [dataset.Dataset.open(path, split, tolerate_corruption=True) for split in manifest["splits"]]
  page = importlib.resources.files("aurora_jax.reporting") / "page"
  style = "".join((page / name).read_text(encoding="utf-8") for name in ("report.css", "dataset.css"))
  title = text.printable(manifest["name"], _KEY_SHOWN)
  sections = (_header(manifest, opened, title), _sheet(opened, count), _lengths(manifest, opened), _left_out(manifest))
  return string.Template((page / "dataset.html").read_text(encoding="utf-8")).substitute(
    title=escape(title), style=style, sections="\n".join(sections)
  )


def sample(sizes: Sequence[int], count: int) -> list[list[int]]:
  """Chooses records that are spread over all shards.

  A split is divided into as many ranges of the same size as it gets images, and one record of each range is drawn.

  Args:
    sizes: number of records of each split, the first one being the largest share.
    count: number of records to choose, at least 1.

  Returns:
    For each split the numbers of its records, ascending. All splits but the first have at least a fifth of the records
    together, as far as they have so many.
  """
  others = sum(sizes[1:])
  wanted = min(others, max(round(count * others / max(1, sum(sizes))), round(count * _HELDOUT_SHARE)))
  shares = [max(0, count - wanted), *(round(wanted * size / max(1, others)) for size in sizes[1:])]
  generator = np.random.default_rng(0)
  found = []
  for size, share in zip(sizes, shares):
    ends = np.linspace(0, size, min(size, share) + 1).astype(np.int64)
    found.append(generator.integers(ends[:-1], ends[1:]).tolist() if size and share else [])
  return found


def _header(manifest, opened, title):
  facts = [("images", number(sum(map(len, opened))))]
  for split in opened:
    facts.append((split.split, number(len(split))))
  captions = [manifest["splits"][split.split].get("captions") for split in opened]
  if all(isinstance(some, int) for some in captions):
    facts.append(("captions", number(sum(captions))))
  facts.append(("resolution", f"{manifest['resolution']} px"))
  facts.append(("on disk", run_summary.format_bytes(sum(map(_size_bytes, opened)))))
  facts.append(("left out", number((manifest.get("rejected") or {"count": 0})["count"])))
  about = [(label, manifest[name]) for label, name in _ORIGIN.items() if manifest.get(name)]
  about += data_summary.settings_lines(manifest)
  about = [(name, text.printable(value, 2 * _CAPTION_SHOWN)) for name, value in about]
  return (
    f'<header><p class="eyebrow">Data set</p><h1>{escape(title)}</h1><dl class="facts">{_pairs(facts)}</dl>'
    f'<div class="config"><dl>{_pairs(about)}</dl></div></header>'
  )


def _pairs(values):
  return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in values)


def _size_bytes(opened):
  try:
    return data_summary.size_bytes(opened)
  except OSError:  # a missing shard
    return 0


def _sheet(opened, count):
  numbers = sample([len(split) for split in opened], count)
  tiles = [_tile(split, i, bool(which)) for which, split in enumerate(opened) for i in numbers[which]]
  shown = " and ".join(
    f"{len(some)} of {len(split):,} in {split.split}" for split, some in zip(opened, numbers) if some
  )
  return section("Images", f"A sample over all files: {escape(shown)}.", f'<div class="sheet">{"".join(tiles)}</div>')


def _tile(opened, record, marked):
  """A <figure> of one record."""
  mark = f'<span class="mark">{escape(opened.split)}</span> ' if marked else ""
  try:
    pixels, example = opened.pixels(record, min(_SIDE, opened.resolution), decode.AUTO)
  except tfrecords.RecordError as error:
    caption = f"{escape(text.printable(error.reason, _CAPTION_SHOWN))}<small>record {record:,}</small>"
    return f'<figure><div class="broken">unreadable</div><figcaption>{mark}{caption}</figcaption></figure>'
  primary, *others = (escape(text.printable(caption, _CAPTION_SHOWN)) for caption in example.captions[:3])
  more = len(example.captions) - 1 - len(others)
  small = "".join(f"<small>{other}</small>" for other in others)
  small += f"<small>and {more} more caption{'s' if more > 1 else ''}</small>" if more > 0 else ""
  coarse = opened.resolution <= _COARSE
  source = data_uri(Image.fromarray(pixels), None if coarse else 82)
  css = ' class="coarse"' if coarse else ""
  key = escape(text.printable(example.key, _KEY_SHOWN))
  return (
    f'<figure><img{css} loading="lazy" alt="{primary}" title="{key}" src="{source}">'
    f"<figcaption>{mark}{primary}{small}</figcaption></figure>"
  )


def _lengths(manifest, opened):
  lengths = data_summary.caption_lengths(manifest, opened)
  if lengths is None:
    return section("Caption lengths", "", "", "The manifest does not have them.")
  least, most = min(lengths.counts), max(lengths.counts)
  about = (
    f"Characters of the primary captions: {least} to {most}, half of them up to {lengths.quantile(0.5)}, "
    f"nine of ten up to {lengths.quantile(0.9)}."
  )
  return section("Caption lengths", about, f'<div class="card histogram">{histogram(lengths.counts)}</div>')


def histogram(counts: Mapping[int, int]) -> str:
  """A bar chart as SVG.

  Args:
    counts: {length: number}, not empty.

  Returns:
    An <svg>. Neighboring lengths share a bar if there are more than 48.
  """
  least, most = min(counts), max(counts)
  width = -(-(most - least + 1) // _BARS)  # lengths per bar
  bars = [0] * (-(-(most - least + 1) // width))
  for length, many in counts.items():
    bars[(length - least) // width] += many
  highest, step = max(bars), (_CHART_WIDTH - 60) / len(bars)
  drawn, base = [], _CHART_HEIGHT - 22
  for i, many in enumerate(bars):
    height = (base - 14) * many / highest
    first, last = least + i * width, min(most, least + (i + 1) * width - 1)
    span = f"{first}" if first == last else f"{first} to {last}"
    drawn.append(
      f'<rect x="{54 + i * step:.1f}" y="{base - height:.1f}" width="{max(0.6, min(step - 1, 40)):.1f}" '
      f'height="{height:.1f}"><title>{span} characters: {many:,}</title></rect>'
    )
  labels = sorted({0, len(bars) // 4, len(bars) // 2, 3 * len(bars) // 4, len(bars) - 1})
  for i in labels:
    middle = 54 + i * step + max(0.6, min(step - 1, 40)) / 2
    drawn.append(f'<text x="{middle:.1f}" y="{_CHART_HEIGHT - 6}" text-anchor="middle">{least + i * width}</text>')
  drawn.append(
    f'<text x="46" y="22" text-anchor="end">{highest:,}</text><text x="46" y="{base}" text-anchor="end">0</text>'
  )
  drawn.append(f'<line x1="54" x2="{_CHART_WIDTH - 4}" y1="{base}" y2="{base}"/>')
  return (
    f'<svg viewBox="0 0 {_CHART_WIDTH} {_CHART_HEIGHT}" role="img" aria-label="Number of captions by length">'
    f"{''.join(drawn)}</svg>"
  )


def _left_out(manifest: Mapping[str, Any]) -> str:
  rejected = manifest.get("rejected") or {"count": 0}
  if not rejected["count"]:
    return section("Left out", "", "", "Nothing was left out.")
  shown = lambda value, length: escape(text.printable(value, length))
  parts, kinds = [], data_summary.reasons(manifest)
  if kinds:
    rows = "".join(
      f'<tr><td>{shown(kind, _CAPTION_SHOWN)}</td><td class="number">{many:,}</td>'
      f'<td class="keys">{shown(", ".join(keys), _CAPTION_SHOWN)}</td></tr>'
      for kind, many, keys in kinds
    )
    parts.append(_table(("reason", "images", "for example"), rows, numeric=(1,)))
  listed = rejected.get("listed", [])[:_LISTED]
  rows = "".join(
    f"<tr><td>{shown(entry['key'], _KEY_SHOWN)}</td><td>{shown(entry['reason'], _CAPTION_SHOWN)}</td></tr>"
    for entry in listed
  )
  if rows:
    table = _table(("image", "reason"), rows)
    parts.append(f"<details{'' if kinds else ' open'}><summary>the first {len(listed)}</summary>{table}</details>")
  return section("Left out", f"{rejected['count']:,} in all.", "".join(parts), "The manifest lists none of them.")


def _table(heads, rows, numeric=()):
  cells = "".join(f"<th{' class=number' if i in numeric else ''}>{escape(head)}</th>" for i, head in enumerate(heads))
  return f'<div class="scroll"><table><tr>{cells}</tr>{rows}</table></div>'
