"""Exchange of weights and constructor keywords with the published PyTorch code (github autonomousvision/stylegan-t).

One table per network lists every tensor of the released state dict with its place in our variables; import and export
both follow it. Published snapshots are pickles of whole modules, which are never opened: see `load_state_dict`.

  I input channels, O output channels, K kernel size
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop import dino as dino_interop
from aurora_jax.interop import tensor_files
from aurora_jax.interop.clip_names import Entry, Layout
from aurora_jax.models.dino import DinoConfig
from aurora_jax.systems.stylegan_t import config as config_lib

_SAME = Layout(lambda x: x, lambda x: x)
_DENSE = Layout(np.transpose, np.transpose)  # [O, I] and [I, O]
_CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # [O, I, K, K] and [K, K, I, O]
_CONV_1X1 = Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # [O, I, 1, 1] and [I, O]
_TOKEN_CONV = Layout(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0))  # [O, I, K] and [K, I, O]
_CHANNELS = Layout(lambda x: x[0, :, 0, 0], lambda x: x[None, :, None, None])  # [1, O, 1, 1] and [O]

_FIR = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64
_TOWER = "mapping.clip.model"
_VIT = "dino.model.model"
_NAMES_IN_AN_ERROR = 8

StateDict = Mapping[str, Any]
Variables = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# Configurations


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
    {"num_res_blocks": 3, "gn_groups": 32},
  )
  if tower is not None:
    fields["text_tower"] = tower if isinstance(tower, config_lib.TextTower) else config_lib.TextTower(**tower)
  return config_lib.Generator(**fields)


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
  prefix = f"{_TOWER}.transformer.resblocks."
  layers = {name.removeprefix(prefix).split(".")[0] for name in state_dict if name.startswith(prefix)}
  if not layers:
    return config_lib.TextTower()
  shapes = {}
  for field, name in (
    ("vocabulary", "token_embedding.weight"),
    ("context", "positional_embedding"),
    ("hidden", "transformer.resblocks.0.mlp.c_fc.weight"),
  ):
    if f"{_TOWER}.{name}" not in state_dict:
      raise UserError(f"the text encoder of the checkpoint has no {_TOWER}.{name}")
    shapes[field] = np.shape(state_dict[f"{_TOWER}.{name}"])
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


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def _dense(theirs, ours, inputs, outputs) -> Iterator[Entry]:
  yield Entry(f"{theirs}.weight", (outputs, inputs), f"params/{ours}/weight", layout=_DENSE)
  yield Entry(f"{theirs}.bias", (outputs,), f"params/{ours}/bias")


def generator_entries(cfg: config_lib.Generator) -> Iterator[Entry]:
  """Every tensor of the released generator but the constant filters; paths begin with the collection."""
  for i in (0, 1):
    yield from _dense(f"mapping.mlp.fc{i}", f"mapping/fc{i}", cfg.z_dim, cfg.z_dim)
  yield Entry("mapping.x_avg", (cfg.z_dim,), "buffers/mapping/x_avg")
  if cfg.text_tower.layers:
    yield from _tower_entries(cfg)
  inputs = 0
  for r in cfg.resolutions:
    theirs, ours, outputs = f"synthesis.b{r}", f"synthesis/b{r}", cfg.channels(r)
    if inputs:
      yield from _layer_entries(f"{theirs}.conv0", f"{ours}/conv0", cfg, r, inputs, outputs)
    else:
      yield Entry(f"{theirs}.input.weight", (outputs, outputs), f"params/{ours}/input/weight", layout=_DENSE)
      yield from _dense(f"{theirs}.input.affine", f"{ours}/input/affine", cfg.w_dim, 4)
      for name, shape in (("freqs", (outputs, 2)), ("phases", (outputs,)), ("transform", (3, 3))):
        yield Entry(f"{theirs}.input.{name}", shape, f"buffers/{ours}/input/{name}")
    for j in range(2 * cfg.residual_blocks):
      layer = f"{ours}/convs1_{j}"
      yield from _layer_entries(f"{theirs}.convs1.{j}", layer, cfg, r, outputs, outputs)
      if j % 2:
        yield Entry(f"{theirs}.convs1.{j}.norm.weight", (outputs,), f"params/{layer}/norm/scale")
        yield Entry(f"{theirs}.convs1.{j}.norm.bias", (outputs,), f"params/{layer}/norm/bias")
        yield Entry(f"{theirs}.convs1.{j}.gamma", (1, outputs, 1, 1), f"params/{layer}/gamma", layout=_CHANNELS)
    yield Entry(f"{theirs}.torgb.weight", (3, outputs, 1, 1), f"params/{ours}/torgb/weight", layout=_CONV_1X1)
    yield Entry(f"{theirs}.torgb.bias", (3,), f"params/{ours}/torgb/bias")
    yield from _dense(f"{theirs}.torgb.affine.proj", f"{ours}/torgb/affine", cfg.w_dim, 3 * outputs)
    inputs = outputs


def _layer_entries(theirs, ours, cfg, resolution, inputs, outputs) -> Iterator[Entry]:
  yield Entry(f"{theirs}.weight", (outputs, inputs, 3, 3), f"params/{ours}/weight", layout=_CONV)
  yield Entry(f"{theirs}.bias", (outputs,), f"params/{ours}/bias")
  yield Entry(f"{theirs}.noise_strength", (), f"params/{ours}/noise_strength")
  yield Entry(f"{theirs}.noise_const", (resolution, resolution), f"buffers/{ours}/noise_const")
  yield from _dense(f"{theirs}.affine.proj", f"{ours}/affine", cfg.w_dim, 3 * inputs)


def _tower_entries(cfg) -> Iterator[Entry]:
  """The text encoder under its OpenCLIP names."""
  tower, ours = cfg.text_tower, "params/text_tower"
  width, inner = tower.width, tower.mlp_width
  yield Entry(f"{_TOWER}.token_embedding.weight", (tower.vocabulary_size, width), f"{ours}/text/token_embedding")
  yield Entry(f"{_TOWER}.positional_embedding", (tower.context_length, width), f"{ours}/text/position_embedding")
  blocks = f"{ours}/text/transformer/blocks"
  for layer in range(tower.layers):
    theirs = f"{_TOWER}.transformer.resblocks.{layer}"
    for name, place, shape in (
      ("attn.in_proj_", "qkv", (3 * width, width)),
      ("attn.out_proj.", "out", (width, width)),
      ("mlp.c_fc.", "up", (inner, width)),
      ("mlp.c_proj.", "down", (width, inner)),
    ):
      yield Entry(f"{theirs}.{name}weight", shape, f"{blocks}/{place}/kernel", (layer,), _DENSE)
      yield Entry(f"{theirs}.{name}bias", shape[:1], f"{blocks}/{place}/bias", (layer,))
    for name, place in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
      yield Entry(f"{theirs}.{name}.weight", (width,), f"{blocks}/{place}/scale", (layer,))
      yield Entry(f"{theirs}.{name}.bias", (width,), f"{blocks}/{place}/bias", (layer,))
  yield Entry(f"{_TOWER}.ln_final.weight", (width,), f"{ours}/text/final_norm/scale")
  yield Entry(f"{_TOWER}.ln_final.bias", (width,), f"{ours}/text/final_norm/bias")
  yield Entry(f"{_TOWER}.text_projection", (width, cfg.text_dim), f"{ours}/text_projection/kernel")
  yield Entry(f"{_TOWER}.logit_scale", (), "buffers/text_tower/log_scale")


def filter_names(cfg: config_lib.Generator) -> tuple[str, ...]:
  """Names of the released generator's FIR filters, all of one constant value [4, 4]."""
  layers = []
  for r in cfg.resolutions:
    names = [f"convs1.{j}." for j in range(2 * cfg.residual_blocks)]
    names = ["conv0.", *names] if r > config_lib.FIRST_RESOLUTION else names
    layers += [f"synthesis.b{r}.{name}resample_filter" for name in ["", *names]]
  return tuple(layers)


def discriminator_entries(cfg: config_lib.Discriminator) -> Iterator[Entry]:
  """Every tensor of the released discriminator; paths begin with the collection."""
  for entry in dino_interop.entries(cfg.dino):
    yield Entry(f"{_VIT}.{entry.name}", entry.shape, f"dino/vit/{entry.path}", entry.index, entry.layout)
  width = cfg.dino.width
  outputs = cfg.text_map_dim if cfg.text_dim else 1
  for head in range(cfg.heads):
    for name, place, size, features in (
      ("main.0.0", "conv_in", 1, width),
      ("main.1.fn.0", "conv_mix", cfg.kernel_size, width),
      ("cls", "conv_out", 1, outputs),
    ):
      theirs, index = f"heads.{head}.{name}", (head,)
      yield Entry(f"{theirs}.bias", (features,), f"params/heads/{place}/bias", index)
      yield Entry(f"{theirs}.weight_orig", (features, width, size), f"params/heads/{place}/weight", index, _TOKEN_CONV)
      yield Entry(f"{theirs}.weight_u", (features,), f"spectral/heads/{place}/u", index)
      yield Entry(f"{theirs}.weight_v", (width * size,), f"spectral/heads/{place}/v", index)
    for name, place in (("main.0.1", "norm_in"), ("main.1.fn.1", "norm_mix")):
      yield Entry(f"heads.{head}.{name}.weight", (width,), f"params/heads/{place}/scale", (head,))
      yield Entry(f"heads.{head}.{name}.bias", (width,), f"params/heads/{place}/bias", (head,))
    if cfg.text_dim:
      theirs, ours, shape = f"heads.{head}.cmapper", "params/heads/text_map", (cfg.text_map_dim, cfg.text_dim)
      yield Entry(f"{theirs}.weight", shape, f"{ours}/weight", (head,), _DENSE)
      yield Entry(f"{theirs}.bias", shape[:1], f"{ours}/bias", (head,))


# ----------------------------------------------------------------------------------------------------------------------
# Import and export


def import_generator(state_dict: StateDict, cfg: config_lib.Generator) -> Variables:
  """The released generator's weights as our variables.

  Args:
    state_dict: name -> array (anything with a shape that `np.asarray` takes, `interop.tensor_files`' too), with the
      text encoder's (`mapping.clip.model.*`) exactly if `cfg.text_tower` has layers.
    cfg: `config.Generator` that fits it.

  Returns:
    {"params": ..., "buffers": ...}, numpy float32.

  Raises:
    UserError: lists what is missing, left over or misshapen, and filters that are not [1, 3, 3, 1].
  """
  constants = dict.fromkeys(filter_names(cfg), _FIR)
  hint = ""
  if not cfg.text_tower.layers and any(name.startswith(_TOWER) for name in state_dict):
    hint = "the checkpoint has a text encoder: give the configuration the text_tower of text_tower_from_released"
  return _import(state_dict, list(generator_entries(cfg)), constants, hint)


def export_generator(variables: Mapping[str, Any], cfg: config_lib.Generator) -> dict[str, np.ndarray]:
  """Our variables under the released names, bit for bit; loads with `strict=True` in the released code.

  Args:
    variables: {"params", "buffers"} of `Generator(cfg)`.
    cfg: `config.Generator`.

  Returns:
    dict name -> numpy float32 array, contiguous.
  """
  return _export(variables, generator_entries(cfg)) | {name: _FIR.copy() for name in filter_names(cfg)}


def import_discriminator(state_dict: StateDict, cfg: config_lib.Discriminator) -> Variables:
  """The released discriminator's weights as our variables.

  Args:
    state_dict: name -> array, heads and DINO.
    cfg: `config.Discriminator` that fits it.

  Returns:
    {"params": heads, "spectral": vectors of the heads' power iterations, "dino": {"vit": the frozen transformer}}.

  Raises:
    UserError: lists what is missing, left over or misshapen.
  """
  return _import(state_dict, list(discriminator_entries(cfg)), {}, "")


def export_discriminator(variables: Mapping[str, Any], cfg: config_lib.Discriminator) -> dict[str, np.ndarray]:
  """The inverse of `import_discriminator`, bit for bit."""
  return _export(variables, discriminator_entries(cfg))


def load_state_dict(path: str | os.PathLike, network: str = "G_ema") -> StateDict:
  """Reads a state dict of the released code from a file; arrays stay on the disk until they are read.

  Args:
    path: .pth, .pt or .safetensors, of one state dict or of several by network.
    network: which one of several: "G_ema", "G" or "D".

  Returns:
    name -> array.

  Raises:
    UserError: no such file, or a snapshot of whole modules, which is not opened.
  """
  try:
    content = tensor_files.read(path)
  except UserError as error:
    raise UserError(
      f"{error}. A snapshot of the released code is a pickle of whole modules, which is code: open it there and save "
      f"what is in it, torch.save(snapshot['{network}'].state_dict(), 'weights.pth')"
    ) from error
  content = content[network] if isinstance(content.get(network), Mapping) else content
  arrays = {name: value for name, value in content.items() if tensor_files.is_array(value)}
  if not arrays:
    raise UserError(f"{path} has no arrays, neither by name nor under {network!r}; it has {', '.join(content)}")
  return arrays


def _import(state_dict, table, constants, hint):
  """Variables as the table says, each an array of its own; every misfit goes into one error."""
  expected = {entry.name: entry.shape for entry in table} | {name: value.shape for name, value in constants.items()}
  problems = {
    "missing": [name for name in expected if name not in state_dict],
    "left over": sorted(set(state_dict) - expected.keys()),
    "misshapen": [
      f"{name} is {tuple(np.shape(state_dict[name]))}, expected {shape}"
      for name, shape in expected.items()
      if name in state_dict and tuple(np.shape(state_dict[name])) != shape
    ],
  }
  wrong = {name for name in constants if name in state_dict and np.shape(state_dict[name]) == expected[name]}
  problems["not the filter [1, 3, 3, 1]"] = [
    name for name in constants if name in wrong and not np.array_equal(np.asarray(state_dict[name]), constants[name])
  ]
  words = [f"{len(items)} {what}: {_some(items)}" for what, items in problems.items() if items]
  if words:
    raise UserError("; ".join(["the checkpoint does not fit the configuration", *words] + [hint] * bool(hint)))
  leaves = {}
  for entry in table:
    array = entry.layout.to_ours(np.asarray(state_dict[entry.name], np.float32))
    leaves.setdefault(entry.path, []).append(np.array(array, order="C"))
    if not entry.index:
      leaves[entry.path] = leaves[entry.path][0]
  variables = {}
  for path, value in leaves.items():
    *groups, last = path.split("/")
    node = variables
    for group in groups:
      node = node.setdefault(group, {})
    # The parts of a stacked leaf come in the order of their index.
    node[last] = np.stack(value) if isinstance(value, list) else value
  return variables


def _export(variables, table):
  return {
    entry.name: np.array(entry.layout.to_theirs(np.asarray(entry.leaf(variables)[entry.index])), np.float32, order="C")
    for entry in table
  }


def _some(items):
  return ", ".join(items[:_NAMES_IN_AN_ERROR]) + (", ..." if len(items) > _NAMES_IN_AN_ERROR else "")
