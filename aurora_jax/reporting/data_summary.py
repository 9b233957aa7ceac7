"""What `inspect` prints about a data set: its manifest and some captions, or its corrupt records.

All lines are safe for a terminal, whatever the files hold.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aurora_jax import text
from aurora_jax.data import corrupt_records, dataset, tfrecords
from aurora_jax.errors import UserError
from aurora_jax.reporting import run_summary
from aurora_jax.runs.progress import progress

LENGTH_SHOWN = 100  # characters of what a file says
# Captions are counted for a data set whose manifest does not have their lengths, unless it is larger than this.
_MOST_COUNTED = 200_000
_CAPTIONS_SHOWN = 6
_DAMAGED_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Lengths:
  """Lengths of captions, in characters.

  Attributes:
    counts: {length: number of captions}, ascending; not empty.
  """

  counts: Mapping[int, int]

  def quantile(self, share: float) -> int:
    """The least length that at least this share of the captions does not exceed."""
    lengths, counts = list(self.counts), np.cumsum(list(self.counts.values()))
    return lengths[min(len(lengths) - 1, int(np.searchsorted(counts, share * counts[-1])))]


def caption_lengths(manifest: Mapping[str, Any], opened: Sequence[dataset.Dataset]) -> Lengths | None:
  """The lengths of the primary captions.

  Args:
    manifest: of the data set.
    opened: its splits. Their captions are counted if the manifest has no lengths and there are at most 200,000.

  Returns:
    The lengths, or None if they are not known.
  """
  stored = manifest.get("caption_lengths")
  try:
    counts = {int(length): int(count) for length, count in stored.items()} if isinstance(stored, Mapping) else {}
  except (TypeError, ValueError):
    counts = {}
  if not counts and sum(map(len, opened)) <= _MOST_COUNTED:
    counts = collections.Counter(
      len(captions[0]) for split in opened for _, captions in split.readable_captions() if captions
    )
  counts = {length: count for length, count in sorted(counts.items()) if length >= 0 and count > 0}
  return Lengths(counts) if counts else None


def settings_lines(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
  """(name, value) of the settings of a build that the manifest states: split, encoding, filters, duplicates."""
  found = []
  if manifest.get("split"):
    found.append(("split", f"{manifest['split']}, {manifest.get('heldout_fraction', 0):.3g} held out"))
  encoding = manifest.get("encoding")
  if isinstance(encoding, Mapping):
    quality = f", quality {encoding.get('quality')}" if encoding.get("method") != "png" else ""
    found.append(("encoding", f"{encoding.get('method')}{quality}"))
  filters = manifest.get("filters")
  if isinstance(filters, Mapping) and filters:
    found.append(("filters", ", ".join(f"{name} {value}" for name, value in filters.items())))
  if manifest.get("duplicates"):
    found.append(("duplicates", f"{manifest['duplicates']} ones are left out"))
  return [(name, text.printable(value, 2 * LENGTH_SHOWN)) for name, value in found]


def reasons(manifest: Mapping[str, Any]) -> list[tuple[str, int, list[str]]]:
  """(reason, number of images, keys of some) of what the build left out, most frequent first."""
  stored = (manifest.get("rejected") or {}).get("reasons")
  if not isinstance(stored, Mapping):
    return []
  found = [
    (str(kind), entry["count"], [str(key) for key in entry.get("examples", ())]) for kind, entry in stored.items()
  ]
  return sorted(found, key=lambda row: (-row[1], row[0]))


def lines(path: pathlib.Path) -> Iterator[str]:
  """Describes a data set by its manifest, with some captions of each split.

  Args:
    path: the folder.

  Yields:
    Lines.

  Raises:
    UserError: the manifest cannot be read, or a shard is missing or truncated.
  """
  text.tolerate_locale()
  return map(text.printable, _lines(path))


def _lines(path):
  manifest = dataset.read_manifest(path)
  yield f"data set   {text.path_text(path)} ({manifest['name']})"
  for name in ("source", "licence"):
    if manifest.get(name):
      yield f"{name:10s} {text.printable(manifest[name], LENGTH_SHOWN)}"
  yield f"images     {manifest['resolution']}x{manifest['resolution']} pixels"
  opened = []
  for split, entry in manifest["splits"].items():
    opened.append(dataset.Dataset.open(path, split))  # says what is missing or cut
    yield f"{split:10s} {_split_line(opened[-1], entry)}"
    yield from _some_captions(opened[-1])
  lengths = caption_lengths(manifest, opened)
  if lengths is not None:
    least, most = min(lengths.counts), max(lengths.counts)
    middle = ", ".join(
      f"{name} {lengths.quantile(share)}" for name, share in (("half up to", 0.5), ("9 of 10 up to", 0.9))
    )
    yield f"captions   {least} to {most} characters, {middle}"
  yield from (f"{name:10s} {value}" for name, value in settings_lines(manifest))
  rejected = manifest.get("rejected") or {"count": 0}
  yield f"rejected   {rejected['count'] or 'none'}"
  yield from (f"             {count:,}: {kind}" for kind, count, _ in reasons(manifest))
  for entry in rejected.get("listed", [])[:_CAPTIONS_SHOWN]:
    key, reason = (text.printable(entry[name], LENGTH_SHOWN) for name in ("key", "reason"))
    yield f"             {key}: {reason}"
  files = manifest.get("files")
  if files:
    yield f"files      {files['seen']:,} seen: {'; '.join(f'{what}: {n:,}' for what, n in files['counts'].items())}"


def size_bytes(opened: dataset.Dataset) -> int:
  """Size of the shards of a split."""
  entries = opened.manifest["splits"][opened.split]["shards"]
  return sum((opened.path / shard["file"]).stat().st_size for shard in entries)


def _split_line(opened, entry):
  captions = f"{entry['captions']:,} captions, " if isinstance(entry.get("captions"), int) else ""
  shards = len(entry["shards"])
  size = run_summary.format_bytes(size_bytes(opened))
  return f"{len(opened):,} images, {captions}{shards} file{'s' if shards != 1 else ''}, {size}"


def _some_captions(opened):
  for i in range(0, len(opened), max(1, len(opened) // _CAPTIONS_SHOWN))[:_CAPTIONS_SHOWN]:
    try:
      yield f"             {captions_line(opened[i].captions)}"
    except tfrecords.RecordError as error:
      yield f"             {error} (--verify lists all that are damaged)"


def captions_line(captions: Sequence[str]) -> str:
  """The captions of one image in one line: as many as fit, at least the first."""
  line = text.printable(" | ".join(captions), LENGTH_SHOWN)
  return f"{line} ({len(captions)} captions)" if len(captions) > 1 and line.endswith("...") else line


def verify_lines(path: pathlib.Path) -> Iterator[str]:
  """Reads every record of a data set and lists the corrupt ones, at most 20 of a split, then counts them by reason.

  Args:
    path: the folder.

  Yields:
    Lines.

  Raises:
    UserError: at the end, if records are corrupt or shards have changed.
  """
  text.tolerate_locale()
  return map(text.printable, _corruption_lines(path))


def _corruption_lines(path):
  damaged, total, changed = 0, 0, 0
  for split in dataset.read_manifest(path)["splits"]:
    opened = dataset.Dataset.open(path, split, tolerate_corruption=True)
    yield from (f"{split:10s} {line}" for line in _first(opened.problems, "shards and indices"))
    found, counts = 0, collections.Counter()
    with progress(f"reading {split}") as update:
      for skip in corrupt_records.verify(opened, update):
        found += 1
        counts[re.split(r"[:(]", skip.reason)[0].strip()] += 1
        if found <= _DAMAGED_SHOWN:
          yield f"{split:10s} {skip}"
    if found > _DAMAGED_SHOWN:
      yield f"{split:10s} ... and {found - _DAMAGED_SHOWN:,} more records"
      yield from (f"{split:10s} {count:,} of them: {reason}" for reason, count in counts.most_common(_DAMAGED_SHOWN))
    yield f"{split:10s} {f'{found:,}' if found else 'none'} of {len(opened):,} records damaged"
    with progress(f"checksums of {split}: files") as update:
      names = list(corrupt_records.changed_shards(opened, update))
    changed += len(names)
    about = (f"{name}: its bytes are not those that the manifest has the SHA-256 of" for name in names)
    yield from (f"{split:10s} {line}" for line in _first(list(about), "shards"))
    damaged, total = damaged + found, total + len(opened)
  if damaged or changed:
    shards = f"; {changed} shard{'s' if changed > 1 else ''} changed since build-data" if changed else ""
    raise UserError(
      f"data set {text.printable(text.path_text(path))}: {damaged:,} of {total:,} records are damaged{shards}"
    )


def _first(shown, what):
  """The first lines of many, and how many more there are of what."""
  more = len(shown) - _DAMAGED_SHOWN
  return shown[:_DAMAGED_SHOWN] + ([f"... and {more:,} more {what}"] if more > 0 else [])
