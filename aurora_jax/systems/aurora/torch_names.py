"""Aurora's generator as the state dict of its PyTorch twin, `modeling_aurora.py`, and back.

The twin's names are ours with its own structure: "params/synthesis/r8_block0_attention/layer_1/norm1/norm/scale" is
"synthesis.attentions.r8_block0.layers.1.norm1.weight". Its layouts are PyTorch's:

  dense          [I, O]           -> [O, I]; so are the 1x1 convolutions of self-attention's output and of the router
  filters        [K, h, w, I, O]  -> [K, O, I, h, w], or [K, I, O, h, w] where they upsample
  experts        [E, I, O]        -> [E, O, I]
  constant input [h, w, C]        -> [1, C, h, w]

  I input channels, O output channels, K kernels, E experts
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aurora_jax.config import PerResolution
from aurora_jax.errors import UserError
from aurora_jax.interop.hub import folder, twin_map
from aurora_jax.systems.aurora import generator
from aurora_jax.systems.aurora.config import Experiment, Generator

# Fields of `Generator` that the twin does not have: how training computes and begins.
TRAINING_FIELDS = frozenset(
  {
    "zero_init_attention",
    "moe_backend",
    "router_z_weight",
    "router_balance_weight",
    "w_average_decay",
    "attention",
    "attention_chunk",
    "remat",
    "loop_layers",
    "compute_dtype",
  }
)

_FILTERS = twin_map.permuted(0, 4, 3, 1, 2)
_UPSAMPLING_FILTERS = twin_map.permuted(0, 3, 4, 1, 2)
_EXPERTS = twin_map.permuted(0, 2, 1)
_POINTWISE = twin_map.Layout(to_ours=lambda t: t.T[None, None, None], to_theirs=lambda a: a[0, 0, 0].T)
_CONSTANT = twin_map.Layout(to_ours=lambda t: t[0].transpose(1, 2, 0), to_theirs=lambda a: a.transpose(2, 0, 1)[None])

# Our path, joined by ".", step by step to the twin's name.
_RENAMED = tuple(
  (re.compile(pattern), name)
  for pattern, name in (
    (r"^w_avg$", "average.w"),
    (r"\bmapping_(\d+)", r"mapping.\1"),
    (r"\bblock_(\d+)", r"blocks.\1"),
    (r"\blayer_(\d+)", r"layers.\1"),
    (r"\b(r\d+_block\d+)_conv\b", r"convs.\1"),
    (r"\b(r\d+_block\d+)_attention\.in\b", r"attentions.\1.proj_in"),
    (r"\b(r\d+_block\d+)_attention\.out\b", r"attentions.\1.proj_out"),
    (r"\b(r\d+_block\d+)_attention\b", r"attentions.\1"),
    (r"\b(r\d+)_rgb\b", r"rgb.\1"),
    (r"\.norm\.scale$", ".weight"),
    (r"\.norm\.bias$", ".bias"),
    (r"\bmtm_(weight|style)\b", r"mtm.\1"),
    (r"\bmtm_(scale|bias)$", r"mtm_output.\1"),
  )
)


def _place(path: twin_map.Path, axes: int) -> tuple[str, twin_map.Layout]:
  name = ".".join(path[1:])
  for pattern, new in _RENAMED:
    name = pattern.sub(new, name)
  leaf = path[-1]
  if leaf in ("in_weight", "out_weight"):
    return name, _EXPERTS
  if leaf == "constant":
    return name, _CONSTANT
  if axes == 5:
    if path[-2] in ("router", "out"):
      return name, _POINTWISE
    upsamples = path[-2] == "conv1" and re.fullmatch(r"r\d+_block0_conv", path[-3])
    return name, _UPSAMPLING_FILTERS if upsamples else _FILTERS
  return name, twin_map.DENSE if leaf == "weight" else twin_map.SAME


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
  plain = lambda value: {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value
  values = {name: list(v) if isinstance(v, tuple) else plain(v) for name, v in fields.items()}
  return {"architectures": ["AuroraGenerator"], "model_type": "aurora", **values}


def config_from_torch(values: Mapping[str, Any]) -> Generator:
  """The inverse of `config_to_torch`; fields of training take their defaults.

  Raises:
    UserError: another model's configuration, an unknown field, or a value that does not fit.
  """
  if values.get("model_type") != "aurora":
    raise UserError(f"config.json describes a model of type {values.get('model_type')!r}, not 'aurora'")
  known = {field.name: field for field in dataclasses.fields(Generator) if field.name not in TRAINING_FIELDS}
  fields = {}
  for name, value in values.items():
    if name in ("architectures", "model_type"):
      continue
    if name not in known:
      raise UserError(f"config.json: no field {name!r} in the generator of aurora")
    default = getattr(Generator(), name)
    try:
      if isinstance(default, Mapping):
        value = PerResolution({int(r): int(count) for r, count in value.items()})
      elif isinstance(default, tuple):
        value = tuple(int(r) for r in value)
      else:
        value = type(default)(value)
    except (TypeError, ValueError, AttributeError) as error:
      raise UserError(f"config.json: {name} is {value!r}, which is no value like {default!r}") from error
    fields[name] = value
  return Generator(**fields)


# ----------------------------------------------------------------------------------------------------------------------
# For `systems/hub.py`


def generator_config(whole: Experiment, trained: Experiment) -> Generator:
  """The architecture to export of a run at a checkpoint: all of it, with the outputs that are trained so far.

  Args:
    whole: the run's configuration.
    trained: the same at the checkpoint's stage of progressive growing.
  """
  return dataclasses.replace(whole.generator, output_resolutions=trained.generator.output_resolutions)


def for_sampling(cfg: Generator) -> Generator:
  """As the twin samples: each image by itself, whatever the batch."""
  return dataclasses.replace(
    cfg, text_attention="independent" if cfg.text_attention == "uniform" else cfg.text_attention
  )


def text_input(cfg: Generator) -> str | None:
  """What the twin takes of a prompt: the text encoder's features of all tokens."""
  del cfg
  return "tokens"


def joined(networks: Mapping[str, Any]) -> dict[str, Any]:
  """{network: variables} as the variables of `to_torch`."""
  return dict(networks["generator"])


def split(variables: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `joined`."""
  return {"generator": variables}


def hub_model(variables: Mapping[str, Any], cfg: Generator) -> folder.Model:
  """The generator as `interop.hub.folder.write` takes it."""
  modeling = pathlib.Path(__file__).parent / "modeling_aurora.py"
  return folder.Model(config_to_torch(cfg), modeling, entries(cfg), to_torch(variables, cfg))
