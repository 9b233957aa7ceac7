"""Writes a data set folder from a source: parts in parallel, held-out split, tfrecord shards, indices and manifest.

A build works in `.NAME.building` next to `out`. Every part of the source becomes whole shards and a report there (see
`build_part`). The same command, run again after a crash, keeps the finished parts. At the end the shards get their
names in a temporary folder, which is renamed to `out`: `out` is complete or absent. The bytes do not depend on the
number of workers, or on where a build was interrupted.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from aurora_jax import files, text
from aurora_jax.data import (
  arrange,
  build_part,
  dataset,
  decode,
  duplicates,
  run_parts,
  schema,
  tfds_metadata,
  tfrecords,
)
from aurora_jax.data.build_settings import KEEP_FOR_TRAINING, Settings
from aurora_jax.data.heldout import choose_heldout as choose_heldout
from aurora_jax.data.sources.base import Source
from aurora_jax.data.sources.listed import ListedSource
from aurora_jax.errors import UserError

_STORED = "images stored"
_STATE = "build.json"


@dataclasses.dataclass(frozen=True)
class Execution:
  """How a build runs. It changes no byte of the data set.

  Attributes:
    workers: number of processes.
    runner: a runner of Apache Beam instead, or None.
    runner_options: Beam's own flags.
  """

  workers: int = 1
  runner: str | None = None
  runner_options: tuple[str, ...] = ()

  def __post_init__(self):
    if self.workers < 1:
      raise UserError(f"workers must be 1 or more, not {self.workers}")


def build(
  source: Source,
  out: str | os.PathLike,
  *,
  resolution: int,
  shards: int,
  heldout_fraction: float = 0.08,
  seed: int = 0,
  name: str | None = None,
  keep: Collection[str] = KEEP_FOR_TRAINING,
  overwrite: bool = False,
  on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Writes a data set with a held-out split by words, in this process; see `build_with`.

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
    on_progress: called with (images done, images in all or None if that is not known).

  Returns:
    The manifest.
  """
  settings = Settings(
    name=source.name if name is None else name,
    resolution=resolution,
    shards=shards,
    heldout_fraction=heldout_fraction,
    seed=seed,
    keep=tuple(keep),
  )
  return build_with(source, out, settings, overwrite=overwrite, on_progress=on_progress)


def build_with(
  source: Source,
  out: str | os.PathLike,
  settings: Settings,
  execution: Execution = Execution(),
  *,
  overwrite: bool = False,
  on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, Any]:
  """Writes a data set folder.

  With split "caption-hash" an interrupted build leaves its finished parts in `.NAME.building` next to `out`, for the
  next run. With split "words" only a build that is killed does.

  Args:
    source: the source.
    out: the folder to write.
    settings: what is written.
    execution: how the work is done.
    overwrite: replace a data set at `out`.
    on_progress: called with (images done, images in all or None if that is not known).

  Returns:
    The manifest, as written to `manifest.json`:
      `schema_version`, `name`, `source`, `licence`, `resolution`, `seed`, `heldout_fraction`, `split`, `encoding`;
      `distinct_captions`, with split "words": number of distinct primary captions;
      `splits`: {split: {`examples`, `captions`, `shards` [{`file`, `examples`, `bytes`, `sha256`}]}};
      `rejected`: {`count`, `listed` [{`key`, `reason`}]} and, if any, `reasons` {kind: {`count`, `examples`}};
      `caption_lengths`: {characters: number of primary captions};
      `decode`, if JPEGs may be stored: how training reduces them; `filters`, `duplicates`, if there are any;
      `enlarged`, if images were smaller than the resolution: {`count`, `smallest` [width, height], `key`}, the last two
        of the smallest image;
      `files`, of a source that searches files: {`seen`, `counts` {kind: number}, `passed_over`, `captions_left_out`}.
        The counts add up to `seen`; the last two have the form of `rejected`.

  Raises:
    UserError: `out` exists or cannot be written, or no image can be read.
  """
  check_out(out, overwrite)
  try:
    with _work_folder(out, settings) as work:
      on_items = lambda done: on_progress(done, source.count or None)
      if execution.runner:
        count = run_parts.run_on_beam(source.parts(), work, settings, execution.runner, execution.runner_options)
      else:
        count = run_parts.run(source.parts(), work, settings, execution.workers, on_items)
      merged = _merge(work, count, source, settings)
      with files.atomic_folder(out, lambda: check_out(pathlib.Path(out).resolve(), overwrite), "out ") as folder:
        place = arrange.by_words if settings.split == "words" else arrange.by_hash
        manifest = _manifest(source, settings, merged, place(folder, work, merged, settings))
        tfds_metadata.write(folder, manifest, sorted(merged.features))
        content = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (folder / dataset.MANIFEST).write_text(content, encoding="utf-8")
  except OSError as error:
    raise UserError(
      f"out {text.printable(text.path_text(out))} cannot be written: {error.strerror or error}"
    ) from error
  return manifest


@contextlib.contextmanager
def _work_folder(out, settings):
  """Yields the folder for parts, which is kept if the build does not end and can go on later."""
  target = pathlib.Path(out).resolve()
  work = target.parent / f".{os.fsdecode(os.fsencode(target.name)[:100])}.building"
  target.parent.mkdir(parents=True, exist_ok=True)
  state = json.dumps({"schema_version": schema.SCHEMA_VERSION, "settings": repr(settings)})
  if work.is_dir() and any(work.iterdir()) and not (work / _STATE).is_file():
    raise UserError(f"{text.printable(text.path_text(work))} is in the way: it is no unfinished build")
  work.mkdir(exist_ok=True)
  lock = os.open(work, os.O_RDONLY)
  try:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"out {text.printable(text.path_text(out))} is being built by another process") from None
    except OSError:  # a file system without locks
      pass
    path = work / _STATE
    if not path.is_file() or path.read_text(encoding="utf-8") != state:
      for entry in work.iterdir():
        entry.unlink()
      files.write_text(path, state)
    finished = False
    try:
      yield work
      finished = True
    finally:
      if finished or settings.split == "words":
        shutil.rmtree(work, ignore_errors=True)
  finally:
    os.close(lock)


def _merge(work, count, source, settings):
  """Merges the reports in the order of the parts, and finds the duplicates."""
  merged = arrange.Merged(build_part.Report(), [], Counter(), set())
  total = merged.total
  for key, reason in source.rejected if isinstance(source, ListedSource) else ():
    total.reject(key, reason, "images without a caption" if source.files is None else "")
  hashes = []
  for number in range(count):
    report = build_part.read_report(work, number)
    if report is None:
      raise UserError(f"part {number} of the source was not built: run the same command again")
    build_part.add_rejected(total.rejected, report.rejected)
    total.add_enlarged(report.enlarged)
    total.pairs += report.pairs
    merged.shards += [(entry, None) for entry in report.shards]
    merged.lengths.update({int(length): n for length, n in report.caption_lengths.items()})
    merged.features.update(report.features)
    if settings.duplicates:
      hashes.append(np.load(build_part.hashes_path(work, number)))
  if not merged.shards:
    rejected = total.rejected
    first = rejected["listed"][0] if rejected["listed"] else None
    raise UserError(
      f"source {source.description} has no readable image"
      + (f": {rejected['count']} rejected, the first is {first['key']}: {first['reason']}" if first else "")
    )
  if settings.duplicates:
    _drop_duplicates(merged, duplicates.repeated(np.concatenate(hashes)), work)
  return merged


def _drop_duplicates(merged, repeated, work):
  """Marks the records to drop, and counts them."""
  start, shards = 0, []
  for entry, _ in merged.shards:
    drop = repeated[start : start + entry["examples"]]
    start += entry["examples"]
    shards.append((entry, drop if drop.any() else None))
    for example in _examples(work / entry["file"], np.flatnonzero(drop)):
      merged.total.reject(example.key, "another image has the same hash", duplicates.KIND)
      merged.lengths[min(len(example.captions[0]), build_part.LONGEST_COUNTED)] -= 1
  merged.shards = shards
  merged.lengths = +merged.lengths
  if merged.total.pairs:
    merged.total.pairs = [pair for pair, drop in zip(merged.total.pairs, repeated) if not drop]


def _examples(shard, records):
  """Decodes some records of a shard."""
  index = tfrecords.load_index(shard) if len(records) else []
  for record in records:
    yield schema.decode(tfrecords.read_record(shard, *index[record].tolist()))


def _manifest(source, settings, merged, splits):
  total = merged.total
  reasons = total.rejected.pop("reasons")
  files_seen = source.files if isinstance(source, ListedSource) else None
  manifest = {
    "schema_version": schema.SCHEMA_VERSION,
    "name": settings.name,
    "source": source.description,
    "licence": source.licence,
    "resolution": settings.resolution,
    "seed": settings.seed,
    "heldout_fraction": settings.heldout_fraction,
    "split": settings.split,
    "encoding": dataclasses.asdict(settings.encoding),
    "splits": splits,
    "rejected": total.rejected,
    "caption_lengths": {str(length): count for length, count in sorted(merged.lengths.items())},
  }
  if settings.encoding.method in ("keep", "jpeg"):
    manifest["decode"] = decode.SHRINK  # training may reduce JPEGs inside the decoder
  if settings.split == "words":
    manifest["distinct_captions"] = len({primary for primary, _ in total.pairs})
  kinds = {kind: entry for kind, entry in reasons.items() if kind}
  if files_seen is not None:
    stored = sum(entry["examples"] for entry in splits.values())
    counts = Counter(files_seen.counts) + Counter({kind: entry["count"] for kind, entry in kinds.items()})
    counts = {_STORED: stored} | dict(counts)
    manifest["files"] = {
      "seen": sum(counts.values()),
      "counts": counts,
      "passed_over": _listed(files_seen.passed_over),
      "captions_left_out": _listed(files_seen.captions_left_out),
    }
  if kinds:
    manifest["rejected"]["reasons"] = kinds
  used = {name: value for name, value in dataclasses.asdict(settings.filters).items() if value not in (None, False)}
  if used:
    manifest["filters"] = used
  if settings.duplicates:
    manifest["duplicates"] = settings.duplicates
  if total.enlarged is not None:
    manifest["enlarged"] = total.enlarged
  return manifest


def _listed(pairs):
  listed = [{"key": key, "reason": reason} for key, reason in pairs[: build_part.LISTED]]
  return {"count": len(pairs), "listed": listed}


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
