"""Writes a data set folder from a source: held-out split, tfrecord shards, index files and manifest."""

import collections
import concurrent.futures
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from aurora_jax import files, text
from aurora_jax.data import dataset, images, schema, sources, tfrecords
from aurora_jax.data.sources import words
from aurora_jax.errors import UserError

# An evaluation compares the colors of these prompts with the real images, so they stay in the training split.
KEEP_FOR_TRAINING = ("red circle", "blue circle", "green circle", "red heart", "blue heart")
MAXIMAL_RESOLUTION = 4096
_REJECTED_LISTED = 1000
_STORED = "images stored"

# Scripts without spaces between words: Han with kana and bopomofo, Yi, Thai, Lao, Tibetan, Burmese, Khmer, Tai,
# Javanese.
_UNSPACED = (
  "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f\u31a0-\u31ff"
  "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9df\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNIT = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}]+")


def choose_heldout(
  items: Sequence[sources.Item], fraction: float, seed: int, keep: Collection[str] = KEEP_FOR_TRAINING
) -> set[int]:
  """Chooses items to hold out, by primary caption. Their captions are new combinations of known words.

  Every word of a held-out caption occurs in the primary caption of a training item. The same combination of words, in
  any order, occurs in none. Items of one group, or with the same words, stay together. A caption of one word is no
  combination and stays in training. In scripts without spaces between words, each character is a word.

  Args:
    items: the items.
    fraction: fraction of the items to hold out, in [0, 1).
    seed: seed of the choice.
    keep: captions that are never held out.

  Returns:
    Positions in `items`, at most `fraction` of them. There are fewer if the captions share too few words.
  """
  target = round(fraction * len(items))
  bags = [_bag(item.captions[0]) for item in items]
  kept_bags = {_bag(caption) for caption in keep}
  uses = collections.Counter(word for bag in bags for word in bag)
  held = set()
  clusters = _clusters(items, bags)
  for number in np.random.default_rng(seed).permutation(len(clusters)):
    cluster = clusters[number]
    if len(held) + len(cluster) > target:
      continue
    if any(len(bags[member]) < 2 or bags[member] in kept_bags for member in cluster):
      continue
    lost = collections.Counter(word for member in cluster for word in bags[member])
    if all(uses[word] > count for word, count in lost.items()):
      uses -= lost
      held.update(cluster)
  return held


def _bag(caption):
  """The words of a caption as a frozenset; in scripts without spaces, its characters."""
  return frozenset(unit for word in words(caption) for unit in _UNIT.findall(word))


def _clusters(items, bags):
  """Groups the positions of items that share a group or a set of words: a list of lists, in a fixed order."""
  parent = list(range(len(items)))

  def root(member):
    while parent[member] != member:
      parent[member] = parent[parent[member]]
      member = parent[member]
    return member

  first = {}
  for member, (item, bag) in enumerate(zip(items, bags)):
    for shared in (item.group, bag):
      parent[root(member)] = root(first.setdefault(shared, member))
  clusters = collections.defaultdict(list)
  for member in range(len(items)):
    clusters[root(member)].append(member)
  return list(clusters.values())


def build(
  source: sources.Source,
  out: str | os.PathLike,
  *,
  resolution: int,
  shards: int,
  heldout_fraction: float = 0.08,
  seed: int = 0,
  name: str | None = None,
  keep: Collection[str] = KEEP_FOR_TRAINING,
  overwrite: bool = False,
  on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Writes a data set folder.

  Everything is written to a temporary folder next to `out`, which is renamed at the end: `out` is complete or absent.

  Args:
    source: the source.
    out: the folder to write.
    resolution: side of the stored images, in pixels.
    shards: number of training shards; at most one per image is written.
    heldout_fraction: fraction of the images for the split "heldout" (see `choose_heldout`); 0 writes no such split.
    seed: seed of the held-out choice and of the order of the records.
    name: name of the data set; None takes the source's.
    keep: captions that are never held out.
    overwrite: replace a data set at `out`.
    on_progress: called with (images done, images in all).

  Returns:
    The manifest, as written to `manifest.json`:
      `schema_version`, `name`, `source`, `licence`, `resolution`, `seed`, `heldout_fraction`;
      `distinct_captions`: number of distinct primary captions;
      `splits`: {split: {`examples`, `captions`, `shards` [{`file`, `examples`, `bytes`, `sha256`}]}};
      `rejected`: {`count`, `listed` [{`key`, `reason`}]};
      `enlarged`, if images were smaller than the resolution: {`count`, `smallest` [width, height], `key`}, the last two
        of the smallest image;
      `files`, of a source that searches files: {`seen`, `counts` {kind: number}, `passed_over`, `captions_left_out`}.
        The counts add up to `seen`; the last two have the form of `rejected`.

  Raises:
    UserError: a value is out of range, `out` exists or cannot be written, or no image can be read.
  """
  name = source.name if name is None else name
  _check_values(resolution, shards, heldout_fraction, seed, name)
  check_out(out, overwrite)
  with files.atomic_folder(out, lambda: check_out(pathlib.Path(out).resolve(), overwrite), "out ") as folder:
    # The split and the shards depend on which images can be read, so all images are rendered first.
    with tfrecords.ShardWriter(folder / "rendered.tfrecord") as rendered:
      items, rejected, counts, enlarged = _render_to(rendered, source, resolution, on_progress)
    if not items:
      raise UserError(
        f"source {source.description} has no readable image: {len(rejected)} rejected, "
        f"the first is {rejected[0]['key']}: {rejected[0]['reason']}"
      )
    held = choose_heldout(items, heldout_fraction, seed, keep)
    # The order is shuffled, so that a program that reads the shards sequentially sees a mixed order too.
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    members = {
      "train": [position for position in order if position not in held],
      "heldout": [position for position in order if position in held],
    }
    splits = {}
    for split, positions in members.items():
      if positions:
        count = min(len(positions), max(1, round(shards * len(positions) / len(members["train"]))))
        splits[split] = {
          "examples": len(positions),
          "captions": sum(len(items[position].captions) for position in positions),
          "shards": _write_shards(folder, name, split, count, rendered, positions),
        }
    rendered.path.unlink()
    tfrecords.index_path(rendered.path).unlink()
    manifest = {
      "schema_version": schema.SCHEMA_VERSION,
      "name": name,
      "source": source.description,
      "licence": source.licence,
      "resolution": resolution,
      "seed": seed,
      "heldout_fraction": heldout_fraction,
      "distinct_captions": len({item.captions[0] for item in items}),
      "splits": splits,
      "rejected": _listed(rejected),
    }
    if enlarged is not None:
      manifest["enlarged"] = enlarged
    if source.files is not None:
      counts = {_STORED: len(items)} | dict(collections.Counter(source.files.counts) + counts)
      manifest["files"] = {
        "seen": sum(counts.values()),
        "counts": counts,
        "passed_over": _listed(_entries(source.files.passed_over)),
        "captions_left_out": _listed(_entries(source.files.captions_left_out)),
      }
    (folder / dataset.MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
  return manifest


def _check_values(resolution, shards, heldout_fraction, seed, name):
  if not 1 <= resolution <= MAXIMAL_RESOLUTION:
    raise UserError(f"resolution must be between 1 and {MAXIMAL_RESOLUTION}, not {resolution}")
  if not 1 <= shards <= 99999:
    raise UserError(f"shards must be between 1 and 99999, not {shards}")
  if not 0 <= heldout_fraction < 1:
    raise UserError(f"held-out fraction must be at least 0 and below 1, not {heldout_fraction}")
  if seed < 0:
    raise UserError(f"seed must be 0 or more, not {seed}")
  if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
    raise UserError(f"data set name {text.printable(repr(name), 100)} may only have letters, digits, '_', '-' and '.'")


def _entries(pairs):
  return [{"key": key, "reason": reason} for key, reason in pairs]


def _listed(entries):
  return {"count": len(entries), "listed": entries[:_REJECTED_LISTED]}


def _render_to(writer, source, resolution, on_progress):
  """Writes all readable images of a source in its order.

  Returns:
    (items of the images written, list of {key, reason} of all others, number of unreadable images by kind, the
    manifest's `enlarged` or None).
  """
  items, counts, enlarged = [], collections.Counter(), None
  rejected = _entries(source.rejected)
  for done, (item, image, original) in enumerate(_render_all(source, resolution), start=1):
    if isinstance(image, images.ImageError):
      rejected.append({"key": item.key, "reason": str(image)})
      counts[image.kind] += 1
    else:
      writer.write(schema.encode(schema.Example(image, item.captions, resolution, resolution, item.key)))
      items.append(item)
    if original is not None:
      enlarged = enlarged or {"count": 0, "smallest": list(original), "key": item.key}
      enlarged["count"] += 1
      if min(original) < min(enlarged["smallest"]):
        enlarged |= {"smallest": list(original), "key": item.key}
    on_progress(done, len(source.items))
  return items, rejected, counts, enlarged


def _render_all(source, resolution):
  """Yields (item, PNG bytes or the `ImageError`, size before enlargement or None) in order. Threads render ahead."""

  def render(item):
    try:
      image = source.render(item, resolution)
      return images.encode_png(image), image.info.get(sources.ENLARGED_FROM)
    except images.ImageError as error:
      return error, None

  threads = min(16, os.cpu_count() or 1)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = collections.deque()
    for item in source.items:
      waiting.append((item, pool.submit(render, item)))
      if len(waiting) > 4 * threads:
        first, future = waiting.popleft()
        yield first, *future.result()
    for first, future in waiting:
      yield first, *future.result()


def _write_shards(folder, name, split, count, rendered, positions):
  """Copies records into the shards of a split. Returns the shards' entries of the manifest."""
  entries = []
  with open(rendered.path, "rb") as file:
    for shard in range(count):
      part = positions[shard * len(positions) // count : (shard + 1) * len(positions) // count]
      with tfrecords.ShardWriter(folder / tfrecords.shard_name(name, split, shard, count)) as writer:
        for position in part:
          writer.write(tfrecords.read_record(file.fileno(), *rendered.index[position], rendered.path, position))
      entries.append({"file": writer.path.name, "examples": len(part), "bytes": writer.size, "sha256": writer.sha256})
  return entries


def check_out(out: str | os.PathLike, overwrite: bool) -> None:
  """Raises `UserError` if `build` must not write this folder, because something else is there."""
  dataset.check_local(out)
  out, shown = pathlib.Path(out), text.printable(text.path_text(out))
  try:
    if not out.exists():
      return
    if not out.is_dir():
      raise UserError(f"out {shown} exists and is not a folder")
    if not any(out.iterdir()):
      return
  except OSError as error:
    raise UserError(f"out {shown}: {error.strerror}") from None
  if not (out / dataset.MANIFEST).is_file():
    raise UserError(f"out {shown} exists and is not a data set: choose another folder")
  if not overwrite:
    raise UserError(f"out {shown} exists: choose another folder or give --overwrite")
