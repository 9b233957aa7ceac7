"""What a run refers to outside its folder: data set, CLIP and other weights. A changed one is refused like a changed
config.

`references.json` in the run's folder has an identity of each, as it was when the run began:

  {"references": {"data.path": {"path": ..., "sha256": ..., "summary": ...}, ...}, "judges": {path: the same, ...}}

An identity is cheap and does not depend on the path. Of a data set it is that of its manifest, which has a checksum of
every shard (`inspect DIR --verify` compares the shards with it). Of weights it covers names and sizes of the files,
small files whole, and of large ones the two ends and blocks between them.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Collection, Mapping

from aurora_jax import files, local_copies, storage, text
from aurora_jax.config import Experiment
from aurora_jax.data import remote_shards
from aurora_jax.errors import UserError
from aurora_jax.runs.workdir import RunFolder, read_json

FLAG = "--allow-config-change"
_WHOLE_BYTES = 16 << 20  # files up to this size are read whole
_BLOCKS, _BLOCK_BYTES = 256, 4096  # of larger ones
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".npz")
# What decides how weights are used, among the files next to them. Notes of their making are not part of it.
_SETTINGS = ("config.json", "preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer.json")
_SHARD_FIELDS = ("file", "examples", "bytes", "sha256")


@dataclasses.dataclass(frozen=True)
class Identity:
  """Identifies a data set or weights.

  Attributes:
    path: where it is.
    sha256: of what it consists of.
    summary: for a message, such as "24 images".
  """

  path: str
  sha256: str
  summary: str


def identify(path: str | os.PathLike) -> Identity | None:
  """The identity of a data set's folder, or of a folder or file of weights.

  Returns:
    None if nothing is there, or if it cannot be read: opening it says more about that.
  """
  place = pathlib.Path(path)
  if storage.is_url(path):
    path = str(path).rstrip("/")
    is_data = storage.exists(storage.join(path, "manifest.json"))
    place = remote_shards.local(path) if is_data else pathlib.Path(local_copies.of_folder(path))
  try:
    if (place / "manifest.json").is_file():
      content, summary = _of_manifest(json.loads((place / "manifest.json").read_bytes()))
    else:
      content, summary = _of_weights(place)
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return None
  digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
  name = path if storage.is_url(path) else os.path.abspath(place)
  return Identity(text.printable(text.path_text(name)), digest, summary) if content else None


def _of_manifest(manifest):
  shards = {
    name: [[shard.get(field) for field in _SHARD_FIELDS] for shard in split["shards"]]
    for name, split in manifest["splits"].items()
  }
  images = sum(split["examples"] for split in manifest["splits"].values())
  return [manifest.get("resolution"), shards], f"{images:,} images"


def _of_weights(place):
  if place.is_file():
    found = {"": place}
  else:
    found = {
      entry.name: entry
      for entry in place.iterdir()
      if entry.is_file() and (entry.suffix in _WEIGHTS or entry.name in _SETTINGS)
    }
  size = sum(entry.stat().st_size for entry in found.values())
  return {name: _of_file(entry) for name, entry in found.items()}, f"{size / 1e6:,.1f} MB of weights"


def _of_file(path):
  """[size, SHA-256] of a file, or of parts of a large one."""
  digest = hashlib.sha256()
  with open(path, "rb") as file:
    size = os.fstat(file.fileno()).st_size
    if size <= _WHOLE_BYTES:
      digest.update(file.read())
    else:
      for i in range(_BLOCKS):  # evenly spread; a header is at one of the ends
        file.seek((size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))
  return [size, digest.hexdigest()]


def of_experiment(experiment: Experiment, groups: Collection[str] | None = None) -> dict[str, Identity]:
  """Identities of what an experiment refers to (`config.reference` fields), by dotted name of the field.

  Args:
    experiment: the configuration.
    groups: only fields of these groups, such as "text"; None: all.
  """
  found = {}
  for name, path in _fields(experiment):
    if groups is None or name.split(".")[0] in groups:
      identity = identify(path)
      if identity is not None:
        found[name] = identity
  return found


def _fields(values, prefix=""):
  """(dotted name, path) of the reference fields that are set."""
  for field in dataclasses.fields(values):
    value, name = getattr(values, field.name), f"{prefix}{field.name}"
    if dataclasses.is_dataclass(value):
      yield from _fields(value, f"{name}.")
    elif field.metadata.get("reference") and isinstance(value, tuple):  # data.mixture, "WEIGHT:FOLDER"
      yield from ((f"{name}.{number}", entry.partition(":")[2]) for number, entry in enumerate(value))
    elif field.metadata.get("reference") and value:
      yield name, value


def refuse_changes(folder: RunFolder, found: Mapping[str, Identity], allowed: Collection[str] = ()) -> list[str]:
  """Refuses what is no longer what the run refers to.

  Args:
    folder: the run; one without a references.json (of an earlier version) takes anything.
    found: of `of_experiment`.
    allowed: names of fields ("data.path") or groups ("data") that may differ.

  Returns:
    Lines that say what differs and is allowed.

  Raises:
    UserError: something else differs; what it was and is, and the flag that allows it.
  """
  recorded = _read(folder).get("references", {})
  lines = []
  for name, identity in found.items():
    before = recorded.get(name)
    if not isinstance(before, dict) or before.get("sha256") in (None, identity.sha256):
      continue
    line = f"{name}: {_difference(before, identity)}"
    if not any(name == entry or name.startswith(f"{entry}.") for entry in allowed):
      raise UserError(
        f"{line} (go on all the same with {FLAG} {name}; the run is {text.printable(text.path_text(folder.path))})"
      )
    lines.append(line)
  return lines


def refuse_changed_judge(folder: RunFolder, judge: Identity, allowed: Collection[str] = ()) -> None:
  """Refuses a judge that is another one than an earlier evaluation of the run found at the same place.

  Raises:
    UserError: it is; figures of the two cannot be compared.
  """
  before = _read(folder).get("judges", {}).get(judge.path)
  if isinstance(before, dict) and before.get("sha256") != judge.sha256 and "judge" not in allowed:
    raise UserError(
      f"judge: {_difference(before, judge, 'evaluated')}; figures of the two cannot be compared (evaluate all the same "
      f"with {FLAG} judge)"
    )


def _difference(before, now, what="made"):
  summaries = (
    f"{before.get('summary')} then, {now.summary} now"
    if before.get("summary") != now.summary
    else "its content differs"
  )
  return f"what is at {now.path} is not what was there when the run was {what}: {summaries}"


def record(folder: RunFolder, found: Mapping[str, Identity], judge: Identity | None = None) -> None:
  """Records identities in the run's folder; those that are recorded under other names stay.

  Raises:
    UserError: the file cannot be written.
  """
  stored = _read(folder)
  before = json.dumps(stored, sort_keys=True)
  for name, identity in found.items():
    stored.setdefault("references", {})[name] = dataclasses.asdict(identity)
  if judge is not None:
    stored.setdefault("judges", {})[judge.path] = dataclasses.asdict(judge)
  if json.dumps(stored, sort_keys=True) != before:
    files.write_text(folder.references, json.dumps(stored, indent=2) + "\n")


def _read(folder):
  """The content of references.json, {} where there is none."""
  return read_json(folder.references) if folder.references.is_file() else {}
