"""From a source to a data set folder: held-out split, tfrecord shards, index and manifest, all of it or nothing."""

import collections
import concurrent.futures
import json
import os
import pathlib
import re

import numpy as np

from aurora_jax import files
from aurora_jax.data import dataset, images, schema, tfrecords
from aurora_jax.data.sources import words
from aurora_jax.errors import UserError

# Plain colours can be checked by eye and by number in what a generator makes of them: keep them for training.
KEEP_FOR_TRAINING = ("red circle", "blue circle", "green circle", "red heart", "blue heart")
MAXIMAL_RESOLUTION = 4096
_REJECTED_LISTED = 1000


def choose_heldout(items, fraction, seed, keep=KEEP_FOR_TRAINING):
  """Chooses items to hold out, by primary caption, so that they ask for new combinations of known words.

  Every word of a held-out caption occurs in the primary caption of a training item, the combination (the same words in
  whatever order) in none. Items of one group, or of the same words, stay together. Captions of one word are no
  combination and stay in training.

  Args:
    items: sequence of `sources.Item`.
    fraction: of the items to hold out, in [0, 1).
    seed: int.
    keep: captions that are never held out.

  Returns:
    set of positions in `items`: at most `fraction` of them, fewer where the captions share too few words.
  """
  target = round(fraction * len(items))
  bags = [frozenset(words(item.captions[0])) for item in items]
  kept_bags = {frozenset(words(caption)) for caption in keep}
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


def _clusters(items, bags):
  """Positions of items, joined where they share a group or a bag of words: a list of lists, in a fixed order."""
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
  source,
  out,
  *,
  resolution,
  shards,
  heldout_fraction=0.08,
  seed=0,
  name=None,
  keep=KEEP_FOR_TRAINING,
  overwrite=False,
  on_progress=lambda done, total: None,
):
  """Writes a data set folder.

  Everything is written to a temporary folder beside `out` and renamed at the end: `out` is whole or not there.

  Args:
    source: a `sources.Source`.
    out: the folder to make.
    resolution: side of the stored pictures, in pixels.
    shards: number of training shards (fewer where there are fewer pictures).
    heldout_fraction: of the pictures for the split "heldout"; 0 writes no such split. See `choose_heldout`.
    seed: of the held-out choice and of the order of the records.
    name: of the data set; the source's by default.
    keep: captions that are never held out.
    overwrite: replace a data set at `out`.
    on_progress: called with (pictures done, pictures in all).

  Returns:
    The manifest, a dict, as written to `manifest.json`: `schema_version`, `name`, `source`, `licence`, `resolution`,
    `seed`, `heldout_fraction`, `splits` {split: {`examples`, `captions`, `shards` [{`file`, `examples`, `bytes`,
    `sha256`}]}}, `rejected` {`count`, `listed` [{`key`, `reason`}]}.

  Raises:
    UserError: a value out of range, `out` exists or cannot be written, or no picture could be read.
  """
  name = source.name if name is None else name
  _check_values(resolution, shards, heldout_fraction, seed, name)
  check_out(out, overwrite)
  with files.whole_folder(out, lambda: check_out(pathlib.Path(out).resolve(), overwrite), "out ") as folder:
    # Only what can be read counts for the split and the shards: render everything first, then sort it into its places.
    with tfrecords.ShardWriter(folder / "rendered.tfrecord") as rendered:
      items, rejected = _render_to(rendered, source, resolution, on_progress)
    if not items:
      raise UserError(
        f"source {source.description} has no readable picture: {len(rejected)} rejected, "
        f"the first is {rejected[0]['key']}: {rejected[0]['reason']}"
      )
    held = choose_heldout(items, heldout_fraction, seed, keep)
    # Shuffled once here, so that a program that reads the shards from front to back also sees a mixed order.
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
      "splits": splits,
      "rejected": {"count": len(rejected), "listed": rejected[:_REJECTED_LISTED]},
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
    raise UserError(f"data set name {name!r} may only have letters, digits, '_', '-' and '.'")


def _render_to(writer, source, resolution, on_progress):
  """Writes all readable pictures of a source in its order: (their items, list of {key, reason} of all others)."""
  items = []
  rejected = [{"key": key, "reason": reason} for key, reason in source.rejected]
  for done, (item, picture) in enumerate(_render_all(source, resolution), start=1):
    if isinstance(picture, images.ImageError):
      rejected.append({"key": item.key, "reason": str(picture)})
    else:
      writer.write(schema.encode(schema.Example(picture, item.captions, resolution, resolution, item.key)))
      items.append(item)
    on_progress(done, len(source.items))
  return items, rejected


def _render_all(source, resolution):
  """Yields (item, PNG bytes or the `ImageError`), in order; threads work a little ahead."""

  def render(item):
    try:
      return images.encode_png(source.render(item, resolution))
    except images.ImageError as error:
      return error

  threads = min(16, os.cpu_count() or 1)
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = collections.deque()
    for item in source.items:
      waiting.append((item, pool.submit(render, item)))
      if len(waiting) > 4 * threads:
        first, future = waiting.popleft()
        yield first, future.result()
    for first, future in waiting:
      yield first, future.result()


def _write_shards(folder, name, split, count, rendered, positions):
  """Copies records into the shards of a split; returns their entries for the manifest."""
  entries = []
  with open(rendered.path, "rb") as file:
    for shard in range(count):
      part = positions[shard * len(positions) // count : (shard + 1) * len(positions) // count]
      with tfrecords.ShardWriter(folder / tfrecords.shard_name(name, split, shard, count)) as writer:
        for position in part:
          writer.write(tfrecords.read_record(file.fileno(), *rendered.index[position], rendered.path, position))
      entries.append({"file": writer.path.name, "examples": len(part), "bytes": writer.size, "sha256": writer.sha256})
  return entries


def check_out(out, overwrite):
  """Raises `UserError` where `build` may not write its folder: what is there is not lightly replaced."""
  dataset.check_local(out)
  out = pathlib.Path(out)
  try:
    if not out.exists():
      return
    if not out.is_dir():
      raise UserError(f"out {out} exists and is not a folder")
    if not any(out.iterdir()):
      return
  except OSError as error:
    raise UserError(f"out {out}: {error.strerror}") from None
  if not (out / dataset.MANIFEST).is_file():
    raise UserError(f"out {out} exists and is not a data set: choose another folder")
  if not overwrite:
    raise UserError(f"out {out} exists: choose another folder or give --overwrite")
