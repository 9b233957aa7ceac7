"""Exchange of generator weights with the released PyTorch model (github zhujiapeng/Aurora, `models/text_generator.py`).

One table, `entries`, lists every tensor of the released state dict with its place in our variables; import and export
both follow it, so neither can forget what the other does.
"""

from typing import NamedTuple

import numpy as np

from aurora_jax import config as config_lib
from aurora_jax.errors import UserError
from aurora_jax.models import generator

# Per layout: the released array as ours, and back. Both are permutations, hence exact.
_LAYOUTS = {
    "same": (lambda t: t, lambda a: a),
    "dense": (lambda t: t.T, lambda a: a.T),  # [O, I] and [I, O]
    "conv1x1": (lambda t: t[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),  # [O, I, 1, 1] and [I, O]
    "filters": (lambda t: t.transpose(0, 3, 4, 2, 1), lambda a: a.transpose(0, 4, 3, 1, 2)),  # [K, O, I, h, w]
    "mtm_filter": (lambda t: t.transpose(2, 3, 1, 0)[None], lambda a: a[0].transpose(3, 2, 0, 1)),  # [O, I, h, w]
    "mtm_vector": (lambda t: t.reshape(-1), lambda a: a.reshape(1, -1, 1, 1)),
}


class Entry(NamedTuple):
  """One array of ours and where it stands in the released state dict."""

  path: tuple[str, ...]  # in our variables, from the collection on
  names: tuple[str, ...]  # released names: one per expert if `stacked`, else all names of the same tensor
  layout: str
  stacked: bool = False


_CONSTRUCTOR = {
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
}

# Keywords with one value that our generator implements.
_FIXED = {
    "init_res": 4, "image_channels": 3, "repeat_w": True, "normalize_z": True, "mapping_use_wscale": True,
    "mapping_wscale_gain": 1.0, "use_class_label": False, "use_text_cond": True, "use_w_cond": False, "dropout": 0.0,
    "text_use_wscale": True, "text_wscale_gain": 1.0, "normalize_text_cond": True, "fourier_feat": True,
    "demodulate": True, "use_wscale": True, "wscale_gain": 1.0, "lr_mul": 1.0, "filter_kernel": (1, 3, 3, 1),
    "conv_clamp": None, "l2_attention": True, "tie": False, "scale_in": False, "include_ff": True, "glu": False,
    "mask_self": False, "final_tanh": False, "mtm": True, "skip_connection": True, "attn_ch_factor": 1,
}

# No effect on weights or results.
_IGNORED = {"label_dim", "embedding_bias", "embedding_use_wscale", "embedding_wscale_gain",
            "embedding_lr_mul", "normalize_class_embed", "use_checkpoint", "checkpoint_res", "eps", "embedding_dim"}


def config_from_released(kwargs):
  """The released constructor's keyword arguments as our configuration.

  Args:
    kwargs: mapping of `Text2ImageGenerator`'s keyword arguments; those left out take its defaults.

  Returns:
    A `config.Generator`.

  Raises:
    UserError: a keyword that does not exist, or a value that this generator does not implement.
  """
  fields = {"text_attention": "uniform"}
  for name, value in kwargs.items():
    if name in _CONSTRUCTOR:
      field, kind = _CONSTRUCTOR[name]
      fields[field] = config_lib.PerResolution({int(k): int(v) for k, v in value.items()}) if kind is dict else kind(value)
    elif name in _FIXED:
      value = tuple(value) if isinstance(value, list) else value
      if value != _FIXED[name]:
        raise UserError(f"released configuration: {name}={value!r} is not supported, only {_FIXED[name]!r}")
    elif name not in _IGNORED | {"attn_resolutions", "ms_training_res"}:
      raise UserError(f"released configuration: no keyword {name!r}")
  cfg = config_lib.Generator(**{"output_resolutions": (4,), **_sized(fields)})
  fields["text_heads"] = cfg.heads
  attention = {int(r) for r in kwargs.get("attn_resolutions") or cfg.attention_depth}
  for field in ("attention_depth", "experts"):
    fields[field] = config_lib.PerResolution({r: v for r, v in getattr(cfg, field).items() if r in attention})
  outputs = kwargs.get("ms_training_res") or cfg.resolutions
  fields["output_resolutions"] = tuple(sorted(int(r) for r in outputs))
  return config_lib.Generator(**fields)


def _sized(fields):
  """Keeps of every per-resolution mapping what is within the resolution, so that defaults of 64 pixels fit smaller ones."""
  top = fields.get("resolution", config_lib.Generator.resolution)
  defaults = config_lib.Generator()
  for name in ("blocks", "adaptive_kernels", "attention_depth", "experts"):
    values = fields.get(name, getattr(defaults, name))
    fields[name] = config_lib.PerResolution({r: v for r, v in values.items() if r <= top})
  if fields.get("heads", defaults.heads) != defaults.heads:
    fields.setdefault("text_heads", fields["heads"])
  return fields


def _dense(path, name, bias=True):
  yield Entry(path + ("weight",), (name + ".weight",), "dense")
  if bias:
    yield Entry(path + ("bias",), (name + ".bias",), "same")


def _norm(path, name):
  yield Entry(path + ("norm", "scale"), (name + ".weight",), "same")
  yield Entry(path + ("norm", "bias"), (name + ".bias",), "same")


def _modulated(path, name, kernels=1, deformable=False):
  yield Entry(path + ("weight",), (name + ".weight",), "filters")
  yield Entry(path + ("bias",), (name + ".bias",), "same")
  yield from _dense(path + ("style",), name + ".style")
  if kernels > 1:
    yield from _dense(path + ("mix",), name + ".filter_weight")
  if deformable:
    yield from _dense(path + ("mtm_style",), name + ".mtm_style")
    yield Entry(path + ("mtm_weight",), (name + ".mtm_weight",), "mtm_filter")
    yield Entry(path + ("mtm_bias",), (name + ".mtm_bias",), "mtm_vector")
    yield Entry(path + ("mtm_scale",), (name + ".mtm_scales",), "mtm_vector")


def _text_head(cfg):
  path = ("params", "text_head")
  if cfg.text_feature_dim != cfg.text_dim:
    yield from _dense(path + ("align",), "text_head.align_dim")
  for i in range(cfg.text_layers):
    block, name = path + (f"block_{i}",), f"text_head.transformer.res_blocks.{i}"
    yield from _dense(block + ("qkv",), name + ".attn.to_qkv")
    yield from _dense(block + ("out",), name + ".attn.to_out.0")
    for ours, theirs in (("mlp_in", "c_fc"), ("mlp_out", "c_proj")):
      for entry in _dense(block + (ours,), f"{name}.{theirs}"):
        # The released module registers these two layers twice: the same tensor under two names.
        yield entry._replace(names=entry.names + (entry.names[0].replace(f".{theirs}.", f".mlp.{theirs}."),))
    yield from _norm(block + ("norm1",), name + ".ln_1")
    yield from _norm(block + ("norm2",), name + ".ln_2")


def _attention_block(cfg, r, path, name):
  yield from _norm(path + ("norm",), name + ".norm")
  yield Entry(path + ("in", "weight"), (name + ".proj_in.weight",), "conv1x1")
  yield Entry(path + ("out", "weight"), (name + ".proj_out.weight",), "conv1x1")
  for k in range(cfg.attention_depth[r]):
    layer, inner = path + (f"layer_{k}",), f"{name}.attn_blocks.{k}"
    for i in (1, 2, 3):
      yield from _norm(layer + (f"norm{i}",), f"{inner}.norm{i}")
    yield from _dense(layer + ("self_attention", "qk"), inner + ".self_attn.to_qk", bias=False)
    yield from _dense(layer + ("self_attention", "v"), inner + ".self_attn.to_v", bias=False)
    yield from _modulated(layer + ("self_attention", "out"), inner + ".self_attn.proj_out")
    yield from _dense(layer + ("cross_attention", "q"), inner + ".cross_attn.to_q", bias=False)
    yield from _dense(layer + ("cross_attention", "kv"), inner + ".cross_attn.to_kv", bias=False)
    yield from _dense(layer + ("cross_attention", "out"), inner + ".cross_attn.proj_out.0")
    feed_forward, experts = layer + ("feed_forward",), cfg.experts[r]
    nets = [f"{inner}.ff.net"] if experts == 1 else [f"{inner}.ff.net.{e}" for e in range(experts)]
    for ours, theirs, layout in (("in_weight", "0.proj.weight", "dense"), ("in_bias", "0.proj.bias", "same"),
                                 ("out_weight", "2.weight", "dense"), ("out_bias", "2.bias", "same")):
      yield Entry(feed_forward + (ours,), tuple(f"{net}.{theirs}" for net in nets), layout, stacked=True)
    if experts > 1:
      yield from _modulated(feed_forward + ("router",), inner + ".ff.routing")


def entries(cfg):
  """Every array of the generator with its released names, in the released order of layers.

  Args:
    cfg: `config.Generator`.

  Yields:
    `Entry`.
  """
  yield Entry(("buffers", "w_avg"), ("w_avg",), "same")
  yield from _text_head(cfg)
  for i in range(cfg.mapping_layers):
    yield from _dense(("params", f"mapping_{i}"), f"mapping.dense{i}")
  index = 0
  for r in cfg.resolutions:
    deformable, kernels = r <= cfg.deformable_max_resolution, cfg.adaptive_kernels[r]
    for i in range(cfg.blocks[r]):
      name, path = f"synthesis.net.{index}.0", ("params", "synthesis", f"r{r}_block{i}_conv")
      if r == 4 and i == 0:
        fourier = ("synthesis", "input")
        for buffer in ("freqs", "phases", "transform"):
          yield Entry(("buffers",) + fourier + (buffer,), (f"{name}.{buffer}",), "same")
        yield from _dense(("params",) + fourier + ("affine",), name + ".affine")
        yield Entry(("params",) + fourier + ("mix", "weight"), (name + ".weight",), "dense")
        yield from _modulated(path, f"synthesis.net.{index}.1", kernels, deformable)
      else:
        yield from _modulated(path + ("conv1",), name + ".conv1", kernels)
        yield from _modulated(path + ("conv2",), name + ".conv2", kernels, deformable)
        if r > 4 and i == 0:
          yield Entry(path + ("skip", "weight"), (name + ".skip_connection.weight",), "conv1x1")
      index += 1
      if r in cfg.attention_depth:
        block = ("params", "synthesis", f"r{r}_block{i}_attention")
        yield from _attention_block(cfg, r, block, f"synthesis.net.{index}.0")
        index += 1
    yield from _modulated(("params", "synthesis", f"r{r}_rgb"), f"synthesis.output_res_{r}x{r}", kernels)


def fir_buffers(cfg):
  """The released state dict's constant FIR filters: names and their one value [4, 4]."""
  names, index = ["synthesis.filter"], 0
  for r in cfg.resolutions:
    if r > 4:
      names += [f"synthesis.net.{index}.0.conv1.filter", f"synthesis.net.{index}.0.skip_connection.filter"]
    index += cfg.blocks[r] * (2 if r in cfg.attention_depth else 1)
  taps = np.array([1, 3, 3, 1], np.float32) / 8
  return names, np.outer(taps, taps)


def layer_names(cfg):
  """Our routing names with the released module that each belongs to: {"r8_block0_layer0": "synthesis.net.3.0..."}."""
  names = {}
  for entry in entries(cfg):
    if entry.path[-2:] == ("router", "weight"):
      block, layer = entry.path[2].removesuffix("_attention"), entry.path[3].replace("_", "")
      names[f"{block}_{layer}"] = entry.names[0].removesuffix(".routing.weight")
  return names


def import_generator(state_dict, cfg):
  """The released weights as our variables.

  Args:
    state_dict: mapping name -> array (anything `np.asarray` takes).
    cfg: `config.Generator` that fits it.

  Returns:
    {"params": ..., "buffers": ...}, numpy float32.

  Raises:
    UserError (a ValueError): lists what is missing, left over or misshapen.
  """
  left, missing, misshapen = set(state_dict), [], []
  variables = {}

  def take(name):
    if name not in state_dict:
      missing.append(name)
      return None
    left.discard(name)
    return np.asarray(state_dict[name], dtype=np.float32)

  expected = expected_shapes(cfg)
  for entry in entries(cfg):
    to_ours = _LAYOUTS[entry.layout][0]
    arrays = [take(name) for name in entry.names]
    if any(array is None for array in arrays):
      continue
    bad = [(name, array.shape) for name, array in zip(entry.names, arrays) if array.shape != expected[name]]
    if bad:
      misshapen += [f"{name} is {shape}, expected {expected[name]}" for name, shape in bad]
      continue
    if entry.stacked:
      value = np.stack([to_ours(array) for array in arrays])
    else:
      if any(not np.array_equal(arrays[0], other) for other in arrays[1:]):
        misshapen.append(f"{' and '.join(entry.names)} should be the same tensor and differ")
      value = np.ascontiguousarray(to_ours(arrays[0]))
    node = variables
    for part in entry.path[:-1]:
      node = node.setdefault(part, {})
    node[entry.path[-1]] = value
  names, taps = fir_buffers(cfg)
  for name in names:
    array = take(name)
    if array is not None and not np.allclose(array, taps, atol=1e-6):
      misshapen.append(f"{name} is not the filter [1, 3, 3, 1]")
  problems = []
  for what, items in (("missing", missing), ("left over", sorted(left)), ("misshapen", misshapen)):
    if items:
      problems.append(f"{len(items)} {what}: {', '.join(items[:8])}{', ...' if len(items) > 8 else ''}")
  if problems:
    raise UserError("the checkpoint does not fit the configuration; " + "; ".join(problems))
  return variables


def export_generator(variables, cfg):
  """Our variables under the released names; loads with `strict=True` in the released code.

  Args:
    variables: {"params", "buffers"} of `Generator(cfg)`.
    cfg: `config.Generator`.

  Returns:
    dict name -> numpy float32 array, contiguous.
  """
  state_dict = {}
  for entry in entries(cfg):
    value = variables
    for part in entry.path:
      value = value[part]
    to_torch = _LAYOUTS[entry.layout][1]
    values = list(np.asarray(value)) if entry.stacked else [np.asarray(value)] * len(entry.names)
    for name, array in zip(entry.names, values):
      state_dict[name] = np.ascontiguousarray(to_torch(array))
  names, taps = fir_buffers(cfg)
  state_dict.update({name: taps.copy() for name in names})
  return state_dict


def expected_shapes(cfg):
  """Shape of every released tensor, {name: shape}, from the model's own shapes without allocating it."""
  abstract = generator.abstract_variables(cfg)
  shapes = {}
  for entry in entries(cfg):
    value = abstract
    for part in entry.path:
      value = value[part]
    shape = value.shape[1:] if entry.stacked else value.shape
    # A strided view of one element costs nothing, whatever its shape.
    probe = np.broadcast_to(np.float32(0), shape)
    for name in entry.names:
      shapes[name] = _LAYOUTS[entry.layout][1](probe).shape
  return shapes
