"""StyleGAN-T's generator as the state dict of its PyTorch twin, `modeling_stylegan_t.py`, and back.

The twin's names are ours with its own structure: "params/synthesis/b16/convs1_1/norm/scale" is
"blocks.b16.convs1.1.norm.weight". Its layouts are PyTorch's: [O, I, 3, 3] for convolutions, [I, O, 3, 3] where they
upsample, [O, I] for linear maps; the layers of the text tower, which are one array here, are one tensor each.

  I input channels, O output channels
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop.hub import folder, twin_map
from aurora_jax.systems.stylegan_t import generator
from aurora_jax.systems.stylegan_t.config import Experiment, Generator, TextTower

# Fields of `Generator` that the twin does not have: how training computes and begins.
TRAINING_FIELDS = frozenset({"w_average_decay", "noise_in_training", "remat", "compute_dtype"})

_FILTERS = twin_map.permuted(3, 2, 0, 1)
_UPSAMPLING_FILTERS = twin_map.permuted(2, 3, 0, 1)

# Our path, joined by ".", step by step to the twin's name.
_RENAMED = tuple(
  (re.compile(pattern), name)
  for pattern, name in (
    (r"^synthesis\.", "blocks."),
    (r"\bconvs1_(\d+)", r"convs1.\1"),
    (r"\.(conv0|convs1\.\d+|torgb)\.(bias|noise_strength|noise_const)$", r".\1.output.\2"),
    (r"\.gamma$", ".residual.gamma"),
    (r"^text_tower\.text_projection\.", "text_tower.projection."),
    (r"^text_tower\.text\.transformer\.blocks\.", "text_tower.blocks.{}."),
    (r"^text_tower\.text\.", "text_tower."),
    (r"\.(scale|kernel)$", ".weight"),
  )
)


def _place(path: twin_map.Path, axes: int) -> tuple[str, twin_map.Layout]:
  name = ".".join(path[1:])
  for pattern, new in _RENAMED:
    name = pattern.sub(new, name)
  if axes == 4:
    return name, _UPSAMPLING_FILTERS if path[-2] == "conv0" else _FILTERS
  dense = path[-1] in ("weight", "kernel")
  return name, twin_map.DENSE if dense else twin_map.SAME


@functools.cache
def entries(cfg: Generator) -> list[twin_map.Entry]:
  """Every array of the generator with its name, layout and shape in the twin."""
  return twin_map.table(generator.abstract_variables(cfg), _place)


def to_torch(variables: Mapping[str, Any], cfg: Generator) -> Iterator[tuple[str, np.ndarray]]:
  """Variables {"params", "buffers"} as the twin's state dict, one (name, float32 array) at a time.

  Raises:
    UserError: the variables do not fit the configuration.
  """
  return twin_map.to_torch(variables, entries(cfg))


def from_torch(state_dict: Mapping[str, Any], cfg: Generator) -> dict[str, Any]:
  """The inverse of `to_torch`, exact to the bit: name -> array to {"params", "buffers"}.

  Raises:
    UserError: lists what is missing, left over or misshapen.
  """
  return twin_map.from_torch(state_dict, entries(cfg))


def config_to_torch(cfg: Generator) -> dict[str, Any]:
  """The configuration as the twin's `config.json` holds it."""
  fields = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in TRAINING_FIELDS}
  return {"architectures": ["StyleganTGenerator"], "model_type": "stylegan_t", **fields}


def config_from_torch(values: Mapping[str, Any]) -> Generator:
  """The inverse of `config_to_torch`; fields of training take their defaults.

  Raises:
    UserError: another model's configuration, an unknown field, or a value that does not fit.
  """
  if values.get("model_type") != "stylegan_t":
    raise UserError(f"config.json describes a model of type {values.get('model_type')!r}, not 'stylegan_t'")
  known = {name: v for name, v in dataclasses.asdict(Generator()).items() if name not in TRAINING_FIELDS}
  fields = _checked({n: v for n, v in values.items() if n not in ("architectures", "model_type")}, known, "")
  if "text_tower" in fields:
    fields["text_tower"] = TextTower(**_checked(fields["text_tower"], known["text_tower"], "text_tower."))
  return Generator(**fields)


def _checked(values, known, where):
  for name, value in values.items():
    if name not in known:
      raise UserError(f"config.json: no field {where + name!r} in the generator of stylegan_t")
    if type(value) is not type(known[name]):
      raise UserError(f"config.json: {where}{name} is {value!r}, which is no value like {known[name]!r}")
  return dict(values)


# ----------------------------------------------------------------------------------------------------------------------
# For `systems/hub.py`


def generator_config(whole: Experiment, trained: Experiment) -> Generator:
  """The architecture to export of a run at a checkpoint: it ends at the resolution that is trained.

  Args:
    whole: the run's configuration.
    trained: the same at the checkpoint's stage of progressive growing.
  """
  del whole
  return trained.generator


def for_sampling(cfg: Generator) -> Generator:
  """As the twin samples, which is as the configuration says."""
  return cfg


def text_input(cfg: Generator) -> str | None:
  """What the twin takes of a prompt: an embedding, ids for its own text tower, or nothing."""
  if not cfg.text_dim:
    return None
  return "ids" if cfg.text_tower.layers else "embedding"


def joined(networks: Mapping[str, Any]) -> dict[str, Any]:
  """{network: variables} as the variables of `to_torch`."""
  return dict(networks["generator"])


def split(variables: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `joined`."""
  return {"generator": variables}


def hub_model(variables: Mapping[str, Any], cfg: Generator) -> folder.Model:
  """The generator as `interop.hub.folder.write` takes it."""
  modeling = pathlib.Path(__file__).parent / "modeling_stylegan_t.py"
  return folder.Model(config_to_torch(cfg), modeling, entries(cfg), to_torch(variables, cfg))
