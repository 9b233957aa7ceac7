"""Our configuration and the released constructor's keyword arguments (github zhujiapeng/Aurora, models/)."""

from collections.abc import Mapping
from typing import Any

from aurora_jax.config import PerResolution
from aurora_jax.errors import UserError
from aurora_jax.systems.aurora.config import Generator

_CONSTRUCTOR: dict[str, tuple[str, type]] = {
  # released keyword: (our field, its type); per-resolution mappings have string keys there
  "resolution": ("resolution", int),
  "z_dim": ("z_dim", int),
  "w_dim": ("w_dim", int),
  "mapping_layers": ("mapping_layers", int),
  "mapping_fmaps": ("mapping_width", int),
  "mapping_lr_mul": ("mapping_lr_multiplier", float),
  "clip_out_dim": ("text_feature_dim", int),
  "context_dim": ("text_dim", int),
  "num_layers_text_enc": ("text_layers", int),
  "text_lr_mul": ("text_lr_multiplier", float),
  "text_head_gain": ("text_residual_gain", float),
  "fmaps_base": ("channels_base", int),
  "fmaps_max": ("channels_max", int),
  "num_block_per_res": ("blocks", dict),
  "num_adaptive_kernels": ("adaptive_kernels", dict),
  "attn_depth": ("attention_depth", dict),
  "num_experts": ("experts", dict),
  "num_heads": ("heads", int),
  "head_dim": ("head_dim", int),
  "residual_gain": ("conv_residual_gain", float),
  "attn_gain": ("attention_residual_gain", float),
  "zero_out": ("zero_init_attention", bool),
  "fourier_feat": ("fourier_input", bool),
  "tie": ("tied_attention", bool),
  "use_w_cond": ("w_token", bool),
}

# Keywords with one value that our generator implements.
_FIXED: dict[str, Any] = {
  "init_res": 4,
  "image_channels": 3,
  "repeat_w": True,
  "normalize_z": True,
  "mapping_use_wscale": True,
  "mapping_wscale_gain": 1.0,
  "use_class_label": False,
  "use_text_cond": True,
  "dropout": 0.0,
  "text_use_wscale": True,
  "text_wscale_gain": 1.0,
  "normalize_text_cond": True,
  "demodulate": True,
  "use_wscale": True,
  "wscale_gain": 1.0,
  "lr_mul": 1.0,
  "filter_kernel": (1, 3, 3, 1),
  "conv_clamp": None,
  "l2_attention": True,
  "scale_in": False,
  "include_ff": True,
  "glu": False,
  "mask_self": False,
  "final_tanh": False,
  "skip_connection": True,
  "attn_ch_factor": 1,
}

_MTM_MAX_RESOLUTION = 16  # `mtm=True` there
_RESOLUTIONS = (8, 16, 32, 64, 128, 256)  # that the released constructor takes

# No effect on weights or results.
_IGNORED = {
  "label_dim",
  "embedding_bias",
  "embedding_use_wscale",
  "embedding_wscale_gain",
  "embedding_lr_mul",
  "normalize_class_embed",
  "use_checkpoint",
  "checkpoint_res",
  "eps",
  "embedding_dim",
}


def config_from_released(kwargs: Mapping[str, Any]) -> Generator:
  """The released constructor's keyword arguments as our configuration.

  Args:
    kwargs: keyword arguments of `Text2ImageGenerator`. Missing ones take the values that the released scripts pass,
      where the constructor's defaults differ from them.

  Returns:
    The configuration of the generator.

  Raises:
    UserError: a keyword that does not exist, or a value that this generator does not implement.
  """
  fields: dict[str, Any] = {"text_attention": "uniform"}
  for name, value in kwargs.items():
    if name in _CONSTRUCTOR:
      field, kind = _CONSTRUCTOR[name]
      fields[field] = PerResolution({int(k): int(v) for k, v in value.items()}) if kind is dict else kind(value)
    elif name in _FIXED:
      value = tuple(value) if isinstance(value, list) else value
      if value != _FIXED[name]:
        raise UserError(f"released configuration: {name}={value!r} is not supported, only {_FIXED[name]!r}")
    elif name == "mtm":
      fields["deformable_max_resolution"] = _MTM_MAX_RESOLUTION if value else 0
    elif name not in _IGNORED | {"attn_resolutions", "ms_training_res"}:
      raise UserError(f"released configuration: no keyword {name!r}")
  fields = _sized(fields)
  first: dict[str, Any] = fields | {"output_resolutions": (4,)}
  cfg = Generator(**first)
  fields["text_heads"] = cfg.heads
  attention = {int(r) for r in kwargs.get("attn_resolutions") or cfg.attention_depth}
  for field in ("attention_depth", "experts"):
    fields[field] = PerResolution({r: v for r, v in getattr(cfg, field).items() if r in attention})
  outputs = kwargs.get("ms_training_res") or cfg.resolutions
  fields["output_resolutions"] = tuple(sorted(int(r) for r in outputs))
  return Generator(**fields)


def config_to_released(cfg: Generator) -> dict[str, Any]:
  """The inverse of `config_from_released`: keyword arguments with which the released constructor builds this generator.

  Args:
    cfg: configuration of the generator. Its RUNTIME_FIELDS have no keywords.

  Returns:
    JSON values of all keywords that have a field, or whose released default differs from what our generator does.

  Raises:
    UserError: lists every field whose value the released code cannot express.
  """
  resolutions = cfg.resolutions
  deformable = [r for r in resolutions if r <= cfg.deformable_max_resolution]
  problems = []
  for field, fits, only in (
    ("resolution", cfg.resolution in _RESOLUTIONS, f"one of {_RESOLUTIONS}"),
    ("text_attention", cfg.text_attention in ("uniform", "independent"), "'uniform' or 'independent'"),
    ("text_heads", cfg.text_heads == cfg.heads or not cfg.text_layers, f"heads, {cfg.heads}"),
    ("feed_forward_ratio", cfg.feed_forward_ratio == 4, "4"),
    (
      "deformable_max_resolution",
      deformable in ([], [r for r in resolutions if r <= _MTM_MAX_RESOLUTION]),
      f"{_MTM_MAX_RESOLUTION} or 0",
    ),
  ):
    if not fits:
      problems.append(f"generator.{field} is {getattr(cfg, field)!r}, there it can only be {only}")
  if problems:
    raise UserError(f"the released code cannot express this configuration: {'; '.join(problems)}")
  by_resolution = lambda values, chosen: {str(r): values[r] for r in chosen}
  attention = sorted(cfg.attention_depth)
  chosen = {"attention_depth": attention, "experts": attention}
  kwargs = {}
  for name, (field, kind) in _CONSTRUCTOR.items():
    value = getattr(cfg, field)
    kwargs[name] = by_resolution(value, chosen.get(field, resolutions)) if kind is dict else value
  kwargs["attn_resolutions"] = [str(r) for r in attention]
  kwargs["ms_training_res"] = [str(r) for r in sorted(cfg.output_resolutions)]
  kwargs["mtm"] = bool(deformable)
  # Ours are fixed where the released defaults differ, or might.
  return kwargs | {name: list(value) if isinstance(value, tuple) else value for name, value in _FIXED.items()}


def _sized(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Drops entries above the resolution from all per-resolution mappings, so that the defaults fit smaller
  generators.
  """
  fields, defaults = dict(fields), Generator()
  top = fields.get("resolution", defaults.resolution)
  for name in ("blocks", "adaptive_kernels", "attention_depth", "experts"):
    values = fields.get(name, getattr(defaults, name))
    fields[name] = PerResolution({r: v for r, v in values.items() if r <= top})
  if fields.get("heads", defaults.heads) != defaults.heads:
    fields.setdefault("text_heads", fields["heads"])
  return fields
