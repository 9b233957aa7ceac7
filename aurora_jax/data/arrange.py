"""Puts the records of the parts of a source into the shards of a data set."""

import dataclasses
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from aurora_jax.data import build_part, caption_index, schema, tfrecords
from aurora_jax.data.build_settings import HELDOUT, TRAIN, Settings
from aurora_jax.data.heldout import choose_heldout
from aurora_jax.data.sources.base import Item
from aurora_jax.errors import UserError


@dataclasses.dataclass
class Merged:
  """The reports of all parts together. `shards`: (entry of the report, bool [examples] of records to drop or None)."""

  total: build_part.Report
  shards: list[tuple[dict[str, Any], np.ndarray | None]]
  lengths: Counter
  features: set[str]


def by_hash(folder: pathlib.Path, work: pathlib.Path, merged: Merged, settings: Settings) -> dict[str, Any]:
  """Puts the shards of the parts into the folder under their final names. Returns the manifest's `splits`."""
  splits = {}
  for split in (TRAIN, HELDOUT):
    left = [
      (entry, drop) for entry, drop in merged.shards if entry["split"] == split and (drop is None or not drop.all())
    ]
    if not left:
      continue
    entries = []
    for shard, (entry, drop) in enumerate(left):
      path = folder / tfrecords.shard_name(settings.name, split, shard, len(left))
      entries.append(_copy_without(work / entry["file"], path, entry, drop))
    splits[split] = _split_entry(entries)
  if TRAIN not in splits:
    raise UserError("no image is left for training: all are held out")
  return splits


def _copy_without(source, path, entry, drop):
  """Copies a shard without some of its records, or links it if all stay. Returns its entry of the manifest."""
  if drop is None:
    for name in (pathlib.Path, tfrecords.index_path, caption_index.caption_path):
      old, new = name(source), name(path)
      try:
        os.link(old, new)
      except OSError:  # a file system without links
        shutil.copyfile(old, new)
    return {"file": path.name} | {name: entry[name] for name in ("examples", "captions", "bytes", "sha256")}
  index = tfrecords.load_index(source)
  return _copy_records(path, [(source, *index[record].tolist()) for record in np.flatnonzero(~drop)])


def _copy_records(path: pathlib.Path, places: Sequence[tuple[pathlib.Path, int, int]]) -> dict[str, Any]:
  """Writes a shard of records of other shards, each given by path, offset and length. Returns its manifest entry."""
  captions = []
  with tfrecords.ShardWriter(path) as writer:
    for place in places:
      payload = tfrecords.read_record(*place)
      captions.append(schema.decode(payload).captions)
      writer.write(payload)
  caption_index.write(path, captions)
  return {
    "file": path.name,
    "examples": len(places),
    "captions": sum(map(len, captions)),
    "bytes": writer.size,
    "sha256": writer.sha256,
  }


def by_words(folder: pathlib.Path, work: pathlib.Path, merged: Merged, settings: Settings) -> dict[str, Any]:
  """Chooses the held-out images and writes all records in a mixed order. Returns the manifest's `splits`."""
  places = []  # (shard, offset, length) of all records that stay, in the order of the source
  for entry, drop in merged.shards:
    path = work / entry["file"]
    index = tfrecords.load_index(path).tolist()
    places += [(path, *row) for record, row in enumerate(index) if drop is None or not drop[record]]
  items = [Item("", (primary,), group) for primary, group in merged.total.pairs]
  held = choose_heldout(items, settings.heldout_fraction, settings.seed, settings.keep)
  # The order is shuffled, so that a program that reads the shards sequentially sees a mixed order too.
  order = np.random.default_rng(settings.seed).permutation(len(items)).tolist()
  members = {
    TRAIN: [position for position in order if position not in held],
    HELDOUT: [position for position in order if position in held],
  }
  splits = {}
  for split, positions in members.items():
    if positions:
      count = min(len(positions), max(1, round(settings.shards * len(positions) / len(members[TRAIN]))))
      ends = [shard * len(positions) // count for shard in range(count + 1)]
      entries = []
      for shard, (start, end) in enumerate(zip(ends, ends[1:])):
        path = folder / tfrecords.shard_name(settings.name, split, shard, count)
        entries.append(_copy_records(path, [places[position] for position in positions[start:end]]))
      splits[split] = _split_entry(entries)
  return splits


def _split_entry(entries):
  """The manifest's entry of a split, from those of its shards, which lose their number of captions."""
  return {
    "examples": sum(entry["examples"] for entry in entries),
    "captions": sum(entry.pop("captions") for entry in entries),
    "shards": entries,
  }
