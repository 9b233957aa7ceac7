"""Finds the weight files in the folder of a Hugging Face model."""

import json
import pathlib
import re

from aurora_jax import text
from aurora_jax.errors import UserError

_STEMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_VARIANT = re.compile(r"(?:model|pytorch_model)\.(?:safetensors\.index\.|bin\.index\.)?(\w+)\.(?:safetensors|bin|json)")
_PRECISION = {"fp32": 0, "bf16": 1, "fp16": 2}


def read_json(path: pathlib.Path) -> dict:
  """Reads the object in a JSON file of a model's folder. Raises `UserError` if there is none."""
  try:
    value = json.loads(text.decode(path.read_bytes()))
  except FileNotFoundError as error:
    raise UserError(f"{path} is missing: {path.parent} is no folder of such a model") from error
  except text.TextError as error:
    raise UserError(f"cannot read {path}: it {error}") from error
  except RecursionError as error:
    raise UserError(f"cannot read {path}: it is nested too deeply") from error
  except (OSError, ValueError) as error:
    raise UserError(f"cannot read {path}: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"cannot read {path}: a JSON object was expected")
  return value


def find(folder: pathlib.Path) -> list[pathlib.Path]:
  """Finds the weights of a folder: one file, or shards.

  The names are `model.safetensors` or `pytorch_model.bin`, or those of shards with an index. If there is neither, a
  variant such as `model.fp16.safetensors` is taken, of several the most precise.

  Args:
    folder: the folder.

  Raises:
    UserError: no weights, or shards are missing.
  """
  try:
    variants = {match[1] for path in folder.iterdir() if (match := _VARIANT.fullmatch(path.name))}
  except OSError as error:
    raise UserError(f"cannot read {folder}: {error.strerror or error}") from error
  variants = sorted(variants, key=lambda name: (_PRECISION.get(name, len(_PRECISION)), name))
  for variant in ("", *(f".{name}" for name in variants)):
    for stem, suffix in _STEMS:
      whole, index = folder / f"{stem}{variant}{suffix}", folder / f"{stem}{suffix}.index{variant}.json"
      if whole.is_file():
        return [whole]
      if index.is_file():
        return _shards(folder, index)
  raise UserError(f"no weights in {folder}: neither model.safetensors nor pytorch_model.bin")


def _shards(folder: pathlib.Path, index: pathlib.Path) -> list[pathlib.Path]:
  """The files that an index names."""
  names = read_json(index).get("weight_map")
  if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
    raise UserError(f"{index} does not say which tensor is in which file")
  # A name with a folder in it would leave this one.
  files = [folder / pathlib.PurePath(name).name for name in sorted(set(names.values()))]
  absent = [file.name for file in files if not file.is_file()]
  if absent or not files:
    raise UserError(f"{folder}: shards of the weights are missing: {', '.join(absent) or 'all'}")
  return files
