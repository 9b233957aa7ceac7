"""Names of the files in a folder in the Hub's layout, and what can be said about one without JAX."""

import os
import pathlib
from typing import Any

from aurora_jax.errors import UserError
from aurora_jax.interop import weight_files

CONFIG, EXPERIMENT, CARD, PIPELINE = "config.json", "experiment.json", "README.md", "pipeline.py"
ORIGIN = "training.json"  # where the weights are from: step, kind, images seen
TEXT_ENCODER, TOKENIZER = "text_encoder", "tokenizer"


def model_type(folder: str | os.PathLike) -> str | None:
  """The system whose generator a folder holds, by its config.json; None for a run's folder, a CLIP and all others."""
  try:
    values = weight_files.read_json(pathlib.Path(folder) / CONFIG)
  except UserError:
    return None
  kind = values.get("model_type")
  # A run's config.json has groups of fields.
  return kind if isinstance(kind, str) and not {"generator", "text_config"} & values.keys() else None


def read_experiment(folder: str | os.PathLike) -> dict[str, Any] | None:
  """The content of `experiment.json`, with the folder's own text encoder (or tokenizer) in `text.clip`; None without.

  Raises:
    UserError: it cannot be read.
  """
  folder = pathlib.Path(folder)
  if not (folder / EXPERIMENT).is_file():
    return None
  experiment = weight_files.read_json(folder / EXPERIMENT)
  for name in (TEXT_ENCODER, TOKENIZER):
    if (folder / name / CONFIG).is_file() and isinstance(experiment.get("text"), dict):
      experiment["text"]["clip"] = str(folder / name)
      break
  return experiment


def read_origin(folder: str | os.PathLike) -> dict[str, Any]:
  """The content of `training.json`; {} where there is none."""
  path = pathlib.Path(folder) / ORIGIN
  return weight_files.read_json(path) if path.is_file() else {}
