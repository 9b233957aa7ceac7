"""The published code's constructor keywords as our configurations, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.models.dino import DinoConfig
from aurora_jax.systems.stylegan_t import config as config_lib

TOWER = "mapping.clip.model"  # where a generator's state dict has its text encoder
_GROUPS = 32  # of the group norms, where the keywords do not say

StateDict = Mapping[str, Any]


def config_from_released(kwargs: Mapping[str, Any]) -> config_lib.Generator:
  """The released generator's constructor keywords as our configuration.

  Args:
    kwargs: z_dim, c_dim, img_resolution, img_channels and synthesis_kwargs (channel_base, channel_max, num_res_blocks,
      architecture, gn_groups); or a mapping that has them under "generator". "text_tower", which is ours, adds the text
      encoder: fields of `config.TextTower` (see `text_tower_from_released`).

  Returns:
    `config.Generator`.

  Raises:
    UserError: a keyword that is missing, unknown, or of a value that this generator does not implement.
  """
  kwargs = dict(kwargs.get("generator", kwargs))
  layers = dict(kwargs.pop("synthesis_kwargs", {}))
  tower = kwargs.pop("text_tower", None)
  _require_fixed(kwargs, {"img_channels": 3}, {"img_channels": 3})
  # Where the architecture is left out the released constructor has another one.
  _require_fixed(layers, {"architecture": "skip"}, {"architecture": "orig"})
  fields = _renamed(kwargs, {"z_dim": "z_dim", "c_dim": "text_dim", "img_resolution": "resolution"}, {"z_dim": 64})
  fields |= _renamed(
    layers,
    {
      "channel_base": "channels_base",
      "channel_max": "channels_max",
      "num_res_blocks": "residual_blocks",
      "gn_groups": "norm_groups",
    },
    {"num_res_blocks": 3, "gn_groups": _GROUPS},
  )
  if tower is not None:
    fields["text_tower"] = tower if isinstance(tower, config_lib.TextTower) else config_lib.TextTower(**tower)
  return config_lib.Generator(**fields)


def config_to_released(cfg: config_lib.Generator) -> dict[str, Any]:
  """The inverse of `config_from_released`; the text encoder's sizes, which are ours, are there if it has one."""
  layers = {
    "channel_base": cfg.channels_base,
    "channel_max": cfg.channels_max,
    "num_res_blocks": cfg.residual_blocks,
    "architecture": "skip",
  }
  if cfg.norm_groups != _GROUPS:
    layers["gn_groups"] = cfg.norm_groups
  kwargs = {
    "z_dim": cfg.z_dim,
    "c_dim": cfg.text_dim,
    "img_resolution": cfg.resolution,
    "img_channels": 3,
    "synthesis_kwargs": layers,
  }
  return kwargs | ({"text_tower": dataclasses.asdict(cfg.text_tower)} if cfg.text_tower.layers else {})


def discriminator_config_from_released(kwargs: Mapping[str, Any]) -> config_lib.Discriminator:
  """The released discriminator's sizes as our configuration.

  Args:
    kwargs: c_dim, cmap_dim, hooks, vit (img_size, patch_size, embed_dim, depth, num_heads); what is left out is as
      published. Or a mapping that has them under "discriminator".

  Returns:
    `config.Discriminator`.

  Raises:
    UserError: an unknown keyword or an impossible value.
  """
  kwargs = dict(kwargs.get("discriminator", kwargs))
  vit = dict(kwargs.pop("vit", {}))
  sizes = _renamed(
    vit,
    {"img_size": "image_size", "patch_size": "patch", "embed_dim": "width", "depth": "depth", "num_heads": "heads"},
    {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
  )
  fields = _renamed(
    kwargs,
    {"c_dim": "text_dim", "cmap_dim": "text_map_dim", "hooks": "taps"},
    {"c_dim": 768, "cmap_dim": 64, "hooks": (2, 5, 8, 11)},
  )
  fields["taps"] = tuple(fields["taps"])
  dino = DinoConfig(**sizes, mlp_width=4 * sizes["width"], position_resize="bilinear")
  return config_lib.Discriminator(dino=dino, image_size=dino.image_size, **fields)


def text_tower_from_released(state_dict: StateDict, heads: int = 0) -> config_lib.TextTower:
  """Sizes of the text encoder in a generator's state dict.

  Args:
    state_dict: of a generator; no array is read.
    heads: attention heads; 0: one per 64 channels, as in every published CLIP.

  Returns:
    `config.TextTower`, for `dataclasses.replace(cfg, text_tower=...)`; one of 0 layers if there is no text encoder.
  """
  prefix = f"{TOWER}.transformer.resblocks."
  layers = {name.removeprefix(prefix).split(".")[0] for name in state_dict if name.startswith(prefix)}
  if not layers:
    return config_lib.TextTower()
  shapes = {}
  for field, name in (
    ("vocabulary", "token_embedding.weight"),
    ("context", "positional_embedding"),
    ("hidden", "transformer.resblocks.0.mlp.c_fc.weight"),
  ):
    if f"{TOWER}.{name}" not in state_dict:
      raise UserError(f"the text encoder of the checkpoint has no {TOWER}.{name}")
    shapes[field] = np.shape(state_dict[f"{TOWER}.{name}"])
  width = shapes["vocabulary"][1]
  return config_lib.TextTower(
    layers=len(layers),
    width=width,
    heads=heads or max(1, width // 64),
    mlp_width=shapes["hidden"][0],
    vocabulary_size=shapes["vocabulary"][0],
    context_length=shapes["context"][0],
  )


def _require_fixed(kwargs, supported, defaults):
  """Takes out the keywords of which only one value is implemented."""
  for name, value in supported.items():
    given = kwargs.pop(name, defaults[name])
    if given != value:
      raise UserError(f"released configuration: {name}={given!r} is not supported, only {value!r}")


def _renamed(kwargs, names, defaults):
  """Our fields; every keyword must be known and have a value."""
  for name in kwargs:
    if name not in names:
      raise UserError(f"released configuration: no keyword {name!r}, there are {', '.join(names)}")
  values = {**defaults, **kwargs}
  for name in names:
    if name not in values:
      raise UserError(f"released configuration: the keyword {name!r} is missing")
  return {ours: values[name] for name, ours in names.items()}
