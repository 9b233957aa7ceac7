"""Builds one part of a source: streams its items, filters and shapes them, writes whole shards and a report.

The report `part-000012.json` is written last and under a temporary name. A part with a report is finished. The memory
that a part needs grows with its items only by their keys, a hash of 8 bytes each if duplicates are searched, and the
primary captions if the split goes by words.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from aurora_jax.data import build_settings, caption_index, duplicates, images, schema, shaping, tfrecords
from aurora_jax.data.sources.base import SAME_KEY, Part, Rejected

LISTED = 1000  # rejected items of a part that are listed; all are counted
EXAMPLES = 3  # keys per reason in the manifest
_PROGRESS_EVERY = 16
LONGEST_COUNTED = 512  # captions of more characters are counted under this length


class Stopped(Exception):
  """The build was stopped while the part was processed."""


@dataclasses.dataclass
class Report:
  """What became of a part's items.

  Attributes:
    part: identity of the part that was built.
    shards: [{`split`, `file`, `examples`, `captions`, `bytes`, `sha256`}], in order.
    rejected: {`count`, `listed` [{`key`, `reason`}], `reasons` {kind: {`count`, `examples` [key]}}}.
    enlarged: {`count`, `smallest` [width, height], `key`} or None.
    caption_lengths: {characters of a primary caption: number}.
    pairs: [[primary caption, group]], with split "words".
    features: names of the features of the records, besides those of the schema.
  """

  part: str = ""
  shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  rejected: dict[str, Any] = dataclasses.field(default_factory=lambda: {"count": 0, "listed": [], "reasons": {}})
  enlarged: dict[str, Any] | None = None
  caption_lengths: dict[str, int] = dataclasses.field(default_factory=dict)
  pairs: list[list[str]] = dataclasses.field(default_factory=list)
  features: list[str] = dataclasses.field(default_factory=list)

  def reject(self, key: str, reason: str, kind: str) -> None:
    """Counts a rejected item."""
    add_rejected(
      self.rejected,
      {"count": 1, "listed": [{"key": key, "reason": reason}], "reasons": {kind: {"count": 1, "examples": [key]}}},
    )

  def add_enlarged(self, entry: dict[str, Any] | None) -> None:
    """Adds the count of enlarged images of another report."""
    if entry is None:
      return
    mine = self.enlarged
    smallest = entry if mine is None or min(entry["smallest"]) < min(mine["smallest"]) else mine
    self.enlarged = {**smallest, "count": entry["count"] + (mine["count"] if mine else 0)}


def add_rejected(total: dict[str, Any], more: dict[str, Any]) -> None:
  """Adds the counts of `more` to `total`, both of the form of `Report.rejected`; lists and examples stay short."""
  total["count"] += more["count"]
  total["listed"] += more["listed"][: max(0, LISTED - len(total["listed"]))]
  for kind, entry in more["reasons"].items():
    mine = total["reasons"].setdefault(kind, {"count": 0, "examples": []})
    mine["count"] += entry["count"]
    mine["examples"] += entry["examples"][: max(0, EXAMPLES - len(mine["examples"]))]


def report_path(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Path of the report of part `number`."""
  return folder / f"part-{number:06d}.json"


def hashes_path(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Path of the hashes of part `number`: uint64 [n], n records in the order of `Report.shards`."""
  return folder / f"part-{number:06d}.npy"


def read_report(folder: pathlib.Path, number: int) -> Report | None:
  """The report of a part; None if the part is not finished, or one of its files is missing or has another size."""
  try:
    report = Report(**json.loads(report_path(folder, number).read_text(encoding="utf-8")))
    if all((folder / shard["file"]).stat().st_size == shard["bytes"] for shard in report.shards):
      return report
  except (OSError, ValueError, TypeError):
    pass
  return None


def build_part(
  part: Part,
  number: int,
  folder: pathlib.Path,
  settings: build_settings.Settings,
  identity: str = "",
  on_items: Callable[[int], None] = lambda count: None,
) -> Report:
  """Builds a part, or returns its report if it is finished.

  Args:
    part: the part.
    number: its number in the source.
    folder: where shards and report are written.
    settings: of the data set.
    identity: of the part; the report of a part of another identity does not count.
    on_items: called with the number of items done since the last call. It may raise to stop the work.

  Returns:
    The report, as written.
  """
  report = read_report(folder, number)
  if report is not None and report.part == identity:
    return report
  report, writers, hashes = Report(identity), _Writers(folder, number, settings), {split: [] for split in _SPLIT_ORDER}
  lengths, features, keys, waiting = collections.Counter(), set(), set(), 0
  with contextlib.closing(writers):
    for found in part.items():
      waiting += 1
      if waiting == _PROGRESS_EVERY:
        on_items(waiting)
        waiting = 0
      if isinstance(found, Rejected):
        report.reject(found.key, found.reason, found.kind)
        continue
      if found.key in keys:
        made = Rejected(found.key, "another record has the same key", SAME_KEY)
      else:
        made = _example(part, found, settings)
      if isinstance(made, Rejected):
        report.reject(made.key, made.reason, made.kind)
        continue
      keys.add(found.key)
      report.add_enlarged(made.enlarged)
      primary = made.example.captions[0]
      split = settings.split_of(primary)
      writers.write(split, made.example)
      hashes[split].append(made.hash)
      lengths[min(len(primary), LONGEST_COUNTED)] += 1
      features.update(made.example.features)
      if settings.split == "words":
        report.pairs.append([primary, found.group or found.key])
  on_items(waiting)
  report.shards = writers.entries()
  report.caption_lengths = {str(length): count for length, count in sorted(lengths.items())}
  report.features = sorted(features)
  if settings.duplicates:
    stored = np.array([value for split in _SPLIT_ORDER for value in hashes[split]], np.uint64)
    with _renamed(hashes_path(folder, number)) as path, open(path, "wb") as file:
      np.save(file, stored)
  write_report(folder, number, report)
  return report


def write_report(folder: pathlib.Path, number: int, report: Report) -> None:
  """Writes the report of a part, which makes it a finished part."""
  with _renamed(report_path(folder, number)) as path:
    path.write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")


_SPLIT_ORDER = (build_settings.TRAIN, build_settings.HELDOUT)


@contextlib.contextmanager
def _renamed(path):
  """Yields a temporary path in the same folder, which becomes `path`."""
  tmp_path = path.with_name(f".{path.name}.{os.getpid()}")
  yield tmp_path
  os.replace(tmp_path, path)


@dataclasses.dataclass(frozen=True)
class _Made:
  """A record to write: the example, its hash for duplicates, and the report's `enlarged` of this image alone."""

  example: schema.Example
  hash: int
  enlarged: dict[str, Any] | None


def _example(part, item, settings):
  """The record of an item, or why there is none."""
  filters = settings.filters
  bad = filters.bad_score(item.scores)
  chosen, no_caption = filters.choose_captions(item.captions)
  bad = bad or no_caption
  if bad:
    return Rejected(item.key, *bad)
  try:
    source = part.read(item, settings.resolution)
    header = images.header(source) if isinstance(source, bytes) else None
    bad = filters.bad_size(header.size, header.frames) if header else None
    if bad:
      return Rejected(item.key, *bad)
    rendered = shaping.render(source, settings.resolution, header)
    image = shaping.encode(rendered, source, settings.encoding)
  except images.ImageError as error:
    return Rejected(item.key, str(error), error.kind)
  captions, weights = _mixed(item, chosen, settings.seed)
  features = dict(item.features) | {name: item.scores[name] for name in settings.store_scores if name in item.scores}
  features = {name: np.array([value], np.float32) for name, value in features.items()}
  if weights:
    features[schema.CAPTION_WEIGHT] = np.array(weights, np.float32)
  value = 0
  if settings.duplicates == "exact":
    value = duplicates.exact_hash(source if isinstance(source, bytes) else image)
  elif settings.duplicates:
    value = duplicates.perceptual_hash(rendered.image)
  enlarged = {"count": 1, "smallest": list(rendered.original), "key": item.key} if rendered.enlarged else None
  side = settings.resolution
  return _Made(schema.Example(image, captions, side, side, item.key, features), value, enlarged)


def _mixed(item, chosen, seed):
  """(captions, normalized weights). With weights, the primary caption is drawn by them; the others keep their order."""
  captions = [item.captions[i] for i in chosen]
  if not item.weights:
    return tuple(captions), ()
  weights = np.array([item.weights[i] for i in chosen])
  weights = weights / weights.sum() if weights.sum() else np.full(len(weights), 1 / len(weights))
  drawn = int(np.searchsorted(np.cumsum(weights), build_settings.uniform(seed, "caption", item.key), side="right"))
  drawn = min(drawn, len(captions) - 1)
  order = [drawn, *(i for i in range(len(captions)) if i != drawn)]
  return tuple(captions[i] for i in order), tuple(weights[order].tolist())


class _Writers:
  """The open shard of each split of a part. A shard that is long enough is closed, and the next one begins."""

  def __init__(self, folder, number, settings):
    self._folder, self._number, self._settings = folder, number, settings
    self._open, self._entries = {}, {split: [] for split in _SPLIT_ORDER}

  def write(self, split, example):
    if split not in self._open:
      name = f"part-{self._number:06d}-{split}-{len(self._entries[split]):03d}.tfrecord"
      writer = tfrecords.ShardWriter(self._folder / name)
      self._open[split] = writer, []
    writer, captions = self._open[split]
    writer.write(schema.encode(example))
    captions.append(example.captions)
    if self._settings.split != "words" and writer.size >= self._settings.shard_bytes:
      self._close(split)

  def _close(self, split):
    writer, captions = self._open.pop(split)
    writer.close()
    caption_index.write(writer.path, captions)
    entry = {"split": split, "file": writer.path.name, "examples": len(captions), "captions": sum(map(len, captions))}
    self._entries[split].append(entry | {"bytes": writer.size, "sha256": writer.sha256})

  def close(self):
    for split in list(self._open):
      self._close(split)

  def entries(self):
    return [entry for split in _SPLIT_ORDER for entry in self._entries[split]]
