"""Writes and reads a whole folder in the Hub's layout (see this package's docstring)."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from aurora_jax import files
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop import weight_files
from aurora_jax.interop.clip_hf import ClipBundle, check_writable
from aurora_jax.interop.hub import layout, text_encoder, twin_map, weights
from aurora_jax.interop.hub.layout import CARD, CONFIG, EXPERIMENT, PIPELINE, TEXT_ENCODER, TOKENIZER


@dataclasses.dataclass(frozen=True)
class Model:
  """A generator in the form of its PyTorch twin.

  Attributes:
    config: the content of `config.json`: `model_type`, `architectures` and the twin's fields.
    modeling: path of the twin's source, `modeling_NAME.py` with `model_type` for NAME.
    entries: of its state dict.
    arrays: (name, array) in the order of `entries`; a generator function keeps only one array in memory.
  """

  config: Mapping[str, Any]
  modeling: pathlib.Path
  entries: Sequence[twin_map.Entry]
  arrays: Iterable[tuple[str, np.ndarray]]

  @property
  def pipeline(self) -> str:
    """Name of the class in the folder's `pipeline.py`: "AuroraPipeline" for "AuroraGenerator"."""
    return self.config["architectures"][0].removesuffix("Generator") + "Pipeline"

  @property
  def parameters(self) -> int:
    """Numbers in its state dict, buffers included."""
    return sum(entry.values for entry in self.entries)


def write(
  folder: str | os.PathLike,
  model: Model,
  *,
  card: str,
  text: ClipBundle | None = None,
  tokenizer: Tokenizer | None = None,
  experiment: Mapping[str, Any] | None = None,
  extra: Mapping[str, bytes] | None = None,
  overwrite: bool = False,
  shard_bytes: int = weights.SHARD_BYTES,
) -> pathlib.Path:
  """Writes a folder. All of it appears, or nothing: it is written next to its place and then renamed.

  Args:
    folder: must not exist or be empty, or be an earlier folder of this kind with `overwrite`.
    model: the generator.
    card: the content of `README.md` (`model_card.render`).
    text: the CLIP whose text tower the generator is conditioned by; None for a generator without text features.
    tokenizer: of a generator that takes tokens; with `text`, None takes that one's.
    experiment: the run's configuration (`public_mapping`), for the way back.
    extra: further files {name: content}, such as the images of the card; a name may be in one of the folders above.
    overwrite: replace an earlier folder.
    shard_bytes: the most that one file of weights holds.

  Returns:
    The folder.

  Raises:
    UserError: the folder is in use or cannot be written.
  """
  folder = pathlib.Path(folder)
  check_target(folder, overwrite=overwrite)
  with files.atomic_folder(folder, lambda: check_target(folder, overwrite=overwrite)) as work:
    _write_json(work / CONFIG, model.config)
    weights.write(work, model.entries, model.arrays, shard_bytes)
    shutil.copyfile(model.modeling, work / f"modeling_{model.config['model_type']}.py")
    source = (pathlib.Path(__file__).parent / PIPELINE).read_text(encoding="utf-8")
    (work / PIPELINE).write_text(re.sub(r"\bPipeline\b", model.pipeline, source), encoding="utf-8")
    if text is not None:
      (work / TEXT_ENCODER).mkdir()
      text_encoder.write(work / TEXT_ENCODER, text)
      tokenizer = tokenizer or text.tokenizer
    if tokenizer is not None:
      (work / TOKENIZER).mkdir()
      tokenizer.save(work / TOKENIZER)
    if experiment is not None:
      _write_json(work / EXPERIMENT, experiment)
    (work / CARD).write_text(card, encoding="utf-8")
    for name, content in (extra or {}).items():
      (work / name).write_bytes(content)
  return folder


def check_target(folder: str | os.PathLike, *, overwrite: bool = False) -> None:
  """Raises a UserError if `write` would refuse the folder; to be asked before minutes of work."""
  folder = pathlib.Path(folder)
  check_writable(folder, overwrite=overwrite)
  if folder.is_dir() and any(folder.iterdir()) and not is_hub_folder(folder):
    raise UserError(f"{folder} is not an earlier export, so --overwrite leaves it alone; choose another folder")


def is_hub_folder(folder: str | os.PathLike) -> bool:
  """Whether a folder looks like one that `write` made: a config.json with a model_type and that type's modeling
  file.
  """
  folder = pathlib.Path(folder)
  try:
    kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
  except (OSError, ValueError, AttributeError):
    return False
  return isinstance(kind, str) and (folder / f"modeling_{pathlib.PurePath(kind).name}.py").is_file()


@dataclasses.dataclass(frozen=True)
class HubFolder:
  """What a folder holds.

  Attributes:
    path: the folder.
    config: the content of `config.json`.
    weights: {name: `StoredArray`}; arrays stay on the disk until they are read.
    experiment: the content of `experiment.json`, with `text.clip` as a path, or None.
    text_encoder: path of the text tower, which `interop.clip_hf.load(path, text_only=True)` reads, or None.
    tokenizer: path of the tokenizer, or None.
  """

  path: pathlib.Path
  config: Mapping[str, Any]
  weights: Mapping[str, Any]
  experiment: Mapping[str, Any] | None
  text_encoder: pathlib.Path | None
  tokenizer: pathlib.Path | None


def read(folder: str | os.PathLike, model_type: str | None = None) -> HubFolder:
  """Reads a folder that `write` or the twin's `save_pretrained` made. No code of the folder runs.

  Args:
    folder: its path.
    model_type: the system whose folder it must be; None takes any.

  Raises:
    UserError: no such folder, one of another system, or weights that are missing.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise UserError(f"no exported model at {folder}")
  config = weight_files.read_json(folder / CONFIG)
  kind = config.get("model_type")
  if not isinstance(kind, str) or model_type not in (None, kind):
    raise UserError(
      f"{folder / CONFIG} describes a model of type {kind!r}" + (f", not {model_type!r}" * bool(model_type))
    )
  present = lambda name: folder / name if (folder / name).is_dir() else None
  experiment = layout.read_experiment(folder)
  return HubFolder(folder, config, weights.read(folder), experiment, present(TEXT_ENCODER), present(TOKENIZER))


def public_mapping(experiment: Any) -> dict[str, Any]:
  """An experiment's configuration without the paths of this machine.

  Args:
    experiment: a configuration dataclass (`config.Experiment`).

  Returns:
    Nested dicts of plain values. Of a field that names a data set, weights (`config.reference`) or another run only the
    last part of the path is left.
  """
  values = {}
  for field in dataclasses.fields(experiment):
    value = getattr(experiment, field.name)
    if field.metadata.get("reference") or field.name == "init_from":
      value = tuple(map(_public, value)) if isinstance(value, tuple) else pathlib.PurePath(value).name
    values[field.name] = public_mapping(value) if dataclasses.is_dataclass(value) else value
  return values


def _public(entry):
  """ "WEIGHT:FOLDER" of a mixture with the last part of the path alone."""
  weight, colon, path = entry.partition(":")
  return f"{weight}{colon}{pathlib.PurePath(path).name}"


def _write_json(path, value):
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
