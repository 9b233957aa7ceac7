"""The manifest of a data set folder."""

import json
import os
from typing import Any

from aurora_jax import storage, text
from aurora_jax.data import remote_shards, schema
from aurora_jax.errors import UserError

MANIFEST = "manifest.json"  # always UTF-8


def check_local(path: str | os.PathLike) -> None:
  """Raises `UserError` for a URL such as gs://bucket/folder: pathlib would read it as a local folder named "gs:"."""
  if "://" in str(path):
    raise UserError(f"{path} is an address: here a data set is written to a folder")


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
  """Reads and checks the manifest of a data set folder.

  Args:
    path: the folder, or its gs:// or s3:// URL.

  Returns:
    The manifest (see `build.build`).

  Raises:
    UserError: no such folder, no manifest, or a manifest that this version cannot read.
  """
  if "://" in str(path) and not storage.is_url(path):
    raise UserError(f"{path}: data sets are read from folders and from gs:// and s3:// URLs")
  path = remote_shards.local(path)
  if not path.is_dir():
    raise UserError(f"data set {path} {'is not a folder' if path.exists() else 'does not exist'}")
  try:
    manifest = json.loads(text.decode((path / MANIFEST).read_bytes()))
  except FileNotFoundError:
    shards = next(path.glob("*.tfrecord*"), None)
    found = f", and {text.printable(shards.name, 100)} alone does not say what is whole" if shards else ""
    raise UserError(f"data set {path} has no {MANIFEST}: it was not made by build-data{found}") from None
  except text.TextError as error:
    raise UserError(f"data set {path}: {MANIFEST} cannot be read: it {error}") from None
  except RecursionError:
    raise UserError(f"data set {path}: {MANIFEST} cannot be read: it is nested too deeply") from None
  except (OSError, ValueError) as error:
    raise UserError(f"data set {path}: {MANIFEST} cannot be read: {error}") from None
  version = manifest.get("schema_version") if isinstance(manifest, dict) else None
  if version != schema.SCHEMA_VERSION:
    raise UserError(f"data set {path} has schema version {version}, this program reads {schema.SCHEMA_VERSION}")
  missing = [name for name in ("name", "resolution", "splits") if name not in manifest]
  if missing:
    raise UserError(f"data set {path}: {MANIFEST} lacks {', '.join(missing)}")
  if not isinstance(manifest["resolution"], int) or manifest["resolution"] < 1:
    raise UserError(
      f"data set {path}: {MANIFEST} is damaged: its resolution is {text.printable(repr(manifest['resolution']), 40)}"
    )
  try:
    for split in manifest["splits"].values():
      for shard in split["shards"]:
        if not (isinstance(shard["file"], str) and isinstance(shard["examples"], int) and shard["examples"] >= 0):
          raise ValueError(shard)
  except (AttributeError, KeyError, TypeError, ValueError):
    raise UserError(f"data set {path}: {MANIFEST} is damaged: it does not list the shards of each split") from None
  return manifest
