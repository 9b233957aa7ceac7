"""MEGAN's generators and gate as the state dict of their PyTorch twin, `modeling_megan.py`, and back.

The twin's names are ours; layouts are PyTorch's: [n, I, O, 4, 4] for the generators' transposed convolutions, [O, I]
for linear maps, and the shared projection takes features with channels first.

  n generators, I input channels, O output channels, Z latent width
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop.hub import folder, twin_map
from aurora_jax.systems.megan import generator
from aurora_jax.systems.megan.config import FEATURE_RESOLUTION, Experiment, Generator

# Fields of `Generator` that the twin does not have: how training computes and begins.
TRAINING_FIELDS = frozenset({"init", "compute_dtype"})

_SIDE = FEATURE_RESOLUTION
_TRANSPOSED = twin_map.permuted(0, 1, 4, 2, 3)
_PROJECTION = twin_map.Layout(  # [row * column * channel, Z] and [Z, channel * row * column]
  to_ours=lambda t: t.reshape(len(t), -1, _SIDE, _SIDE).transpose(2, 3, 1, 0).reshape(-1, len(t)),
  to_theirs=lambda a: a.reshape(_SIDE, _SIDE, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1),
)
_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "mean": "running_mean",
  "var": "running_var",
  "count": "num_batches_tracked",
}


def _place(path: twin_map.Path, axes: int) -> tuple[str, twin_map.Layout]:
  name = ".".join((*path[1:-1], _LEAVES.get(path[-1], path[-1])))
  if path[-1] != "kernel":
    return name, twin_map.SAME
  if path[1] == "projection":
    return name, _PROJECTION
  return name, _TRANSPOSED if axes == 5 else twin_map.DENSE


@functools.cache
def entries(cfg: Generator) -> list[twin_map.Entry]:
  """Every array of generators, projection and gate with its name, layout and shape in the twin."""
  return twin_map.table(generator.abstract_variables(cfg), _place)


def to_torch(variables: Mapping[str, Any], cfg: Generator) -> Iterator[tuple[str, np.ndarray]]:
  """Variables {"params", "batch_stats"} (`generator.join_gate`) as the twin's state dict, one (name, array) at a time.

  Raises:
    UserError: the variables do not fit the configuration.
  """
  return twin_map.to_torch(variables, entries(cfg))


def from_torch(state_dict: Mapping[str, Any], cfg: Generator) -> dict[str, Any]:
  """The inverse of `to_torch`, exact to the bit: name -> array to {"params", "batch_stats"} (`generator.split_gate`).

  Raises:
    UserError: lists what is missing, left over or misshapen.
  """
  return twin_map.from_torch(state_dict, entries(cfg))


def config_to_torch(cfg: Generator) -> dict[str, Any]:
  """The configuration as the twin's `config.json` holds it."""
  fields = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in TRAINING_FIELDS}
  return {"architectures": ["MeganGenerator"], "model_type": "megan", **fields}


def config_from_torch(values: Mapping[str, Any]) -> Generator:
  """The inverse of `config_to_torch`; fields of training take their defaults.

  Raises:
    UserError: another model's configuration, an unknown field, or a value that does not fit.
  """
  if values.get("model_type") != "megan":
    raise UserError(f"config.json describes a model of type {values.get('model_type')!r}, not 'megan'")
  default, fields = dataclasses.asdict(Generator()), {}
  for name, value in values.items():
    if name in ("architectures", "model_type"):
      continue
    if name not in default or name in TRAINING_FIELDS:
      raise UserError(f"config.json: no field {name!r} in the generator of megan")
    if type(value) is not type(default[name]):
      raise UserError(f"config.json: {name} is {value!r}, which is no value like {default[name]!r}")
    fields[name] = value
  return Generator(**fields)


# ----------------------------------------------------------------------------------------------------------------------
# For `systems/hub.py`


def generator_config(whole: Experiment, trained: Experiment) -> Generator:
  """The architecture to export of a run, which has no stages of progressive growing."""
  del trained
  return whole.generator


def for_sampling(cfg: Generator) -> Generator:
  """As the twin samples, which is as the configuration says."""
  return cfg


def text_input(cfg: Generator) -> str | None:
  """What the twin takes of a prompt: nothing."""
  del cfg
  return None


def joined(networks: Mapping[str, Any]) -> dict[str, Any]:
  """{network: variables} as the variables of `to_torch`."""
  return generator.join_gate(networks["generator"], networks["gate"])


def split(variables: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `joined`."""
  return dict(zip(("generator", "gate"), generator.split_gate(variables)))


def hub_model(variables: Mapping[str, Any], cfg: Generator) -> folder.Model:
  """The generator as `interop.hub.folder.write` takes it."""
  modeling = pathlib.Path(__file__).parent / "modeling_megan.py"
  return folder.Model(config_to_torch(cfg), modeling, entries(cfg), to_torch(variables, cfg))
