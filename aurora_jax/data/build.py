"""From a source to a data set folder: held-out split, tfrecord shards, index and manifest, all of it or nothing."""

import collections
import concurrent.futures
import json
import os
import pathlib
import re

import numpy as np

from aurora_jax import files, text
from aurora_jax.data import dataset, images, schema, sources, tfrecords
from aurora_jax.data.sources import words
from aurora_jax.errors import UserError

# Plain colours can be checked by eye and by number in what a generator makes of them: keep them for training.
KEEP_FOR_TRAINING = ("red circle", "blue circle", "green circle", "red heart", "blue heart")
MAXIMAL_RESOLUTION = 4096
_REJECTED_LISTED = 1000
_STORED = "images stored"

# Scripts that put no space between words: Han with kana and bopomofo, Yi, Thai, Lao, Tibetan, Burmese, Khmer, Tai, Javanese.
_UNSPACED = (
  "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f\u31a0-\u31ff"
  "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9df\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNIT = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}]+")


def choose_heldout(items, fraction, seed, keep=KEEP_FOR_TRAINING):
  """Chooses items to hold out, by primary caption, so that they ask for new combinations of known words.

  Every word of a held-out caption occurs in the primary caption of a training item, the combination (the same words in
  whatever order) in none. Items of one group, or of the same words, stay together. Captions of one word are no
  combination and stay in training. In scripts without spaces between words each character is one.

  Args:
    items: sequence of `sources.Item`.
    fraction: of the items to hold out, in [0, 1).
    seed: int.
    keep: captions that are never held out.

  Returns:
    set of positions in `items`: at most `fraction` of them, fewer where the captions share too few words.
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
  """The words of a caption as a frozenset; the characters of what is written without spaces."""
  return frozenset(unit for word in words(caption) for unit in _UNIT.findall(word))


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
    `seed`, `heldout_fraction`, `distinct_captions` (primary ones), `splits` {split: {`examples`, `captions`, `shards`
    [{`file`, `examples`, `bytes`, `sha256`}]}}, `rejected` {`count`, `listed` [{`key`, `reason`}]}. Where images were
    smaller than the resolution, `enlarged` {`count`, `smallest` [width, height], `key` of that one}. Of a source that
    looks for files, `files` {`seen`, `counts` {what: number}, which add up to it, `passed_over` and `captions_left_out`,
    each as `rejected`}.

  Raises:
    UserError: a value out of range, `out` exists or cannot be written, or no picture could be read.
  """
  name = source.name if name is None else name
  _check_values(resolution, shards, heldout_fraction, seed, name)
  check_out(out, overwrite)
  with files.whole_folder(out, lambda: check_out(pathlib.Path(out).resolve(), overwrite), "out ") as folder:
    # Only what can be read counts for the split and the shards: render everything first, then sort it into its places.
    with tfrecords.ShardWriter(folder / "rendered.tfrecord") as rendered:
      items, rejected, counts, enlarged = _render_to(rendered, source, resolution, on_progress)
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
  """Writes all readable pictures of a source in its order.

  Returns:
    (their items, list of {key, reason} of all others, Counter of what the pictures among those are, the manifest's
    `enlarged` or None).
  """
  items, counts, enlarged = [], collections.Counter(), None
  rejected = _entries(source.rejected)
  for done, (item, picture, original) in enumerate(_render_all(source, resolution), start=1):
    if isinstance(picture, images.ImageError):
      rejected.append({"key": item.key, "reason": str(picture)})
      counts[picture.kind] += 1
    else:
      writer.write(schema.encode(schema.Example(picture, item.captions, resolution, resolution, item.key)))
      items.append(item)
    if original is not None:
      enlarged = enlarged or {"count": 0, "smallest": list(original), "key": item.key}
      enlarged["count"] += 1
      if min(original) < min(enlarged["smallest"]):
        enlarged |= {"smallest": list(original), "key": item.key}
    on_progress(done, len(source.items))
  return items, rejected, counts, enlarged


def _render_all(source, resolution):
  """Yields (item, PNG bytes or the `ImageError`, size before it was enlarged or None), in order; threads work ahead."""

  def render(item):
    try:
      picture = source.render(item, resolution)
      return images.encode_png(picture), picture.info.get(sources.ENLARGED_FROM)
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
