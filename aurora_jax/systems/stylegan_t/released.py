"""Exchange of weights with the published PyTorch code (github autonomousvision/stylegan-t), and of its keywords.

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
from aurora_jax.interop import name_map, tensor_files
from aurora_jax.interop.name_map import CONV, DENSE, Entry, Layout
from aurora_jax.systems.stylegan_t import config as config_lib
from aurora_jax.systems.stylegan_t.released_config import (  # noqa: F401
  TOWER,
  config_from_released,
  config_to_released,
  discriminator_config_from_released,
  text_tower_from_released,
)

_CONV_1X1 = Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # [O, I, 1, 1] and [I, O]
_TOKEN_CONV = Layout(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0))  # [O, I, K] and [K, I, O]
_CHANNELS = Layout(lambda x: x[0, :, 0, 0], lambda x: x[None, :, None, None])  # [1, O, 1, 1] and [O]

_FIR = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64
_VIT = "dino.model.model"

# Names of the networks in a file that holds several: the generator's average, the generator, the discriminator.
NETWORKS = ("G_ema", "G", "D")

StateDict = Mapping[str, Any]
Variables = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def _dense(theirs, ours, inputs, outputs) -> Iterator[Entry]:
  yield Entry(f"{theirs}.weight", (outputs, inputs), f"params/{ours}/weight", layout=DENSE)
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
      yield Entry(f"{theirs}.input.weight", (outputs, outputs), f"params/{ours}/input/weight", layout=DENSE)
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
  yield Entry(f"{theirs}.weight", (outputs, inputs, 3, 3), f"params/{ours}/weight", layout=CONV)
  yield Entry(f"{theirs}.bias", (outputs,), f"params/{ours}/bias")
  yield Entry(f"{theirs}.noise_strength", (), f"params/{ours}/noise_strength")
  yield Entry(f"{theirs}.noise_const", (resolution, resolution), f"buffers/{ours}/noise_const")
  yield from _dense(f"{theirs}.affine.proj", f"{ours}/affine", cfg.w_dim, 3 * inputs)


def _tower_entries(cfg) -> Iterator[Entry]:
  """The text encoder under its OpenCLIP names."""
  tower, ours = cfg.text_tower, "params/text_tower"
  width, inner = tower.width, tower.mlp_width
  yield Entry(f"{TOWER}.token_embedding.weight", (tower.vocabulary_size, width), f"{ours}/text/token_embedding")
  yield Entry(f"{TOWER}.positional_embedding", (tower.context_length, width), f"{ours}/text/position_embedding")
  blocks = f"{ours}/text/transformer/blocks"
  for layer in range(tower.layers):
    theirs = f"{TOWER}.transformer.resblocks.{layer}"
    for name, place, shape in (
      ("attn.in_proj_", "qkv", (3 * width, width)),
      ("attn.out_proj.", "out", (width, width)),
      ("mlp.c_fc.", "up", (inner, width)),
      ("mlp.c_proj.", "down", (width, inner)),
    ):
      yield Entry(f"{theirs}.{name}weight", shape, f"{blocks}/{place}/kernel", (layer,), DENSE)
      yield Entry(f"{theirs}.{name}bias", shape[:1], f"{blocks}/{place}/bias", (layer,))
    for name, place in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
      yield Entry(f"{theirs}.{name}.weight", (width,), f"{blocks}/{place}/scale", (layer,))
      yield Entry(f"{theirs}.{name}.bias", (width,), f"{blocks}/{place}/bias", (layer,))
  yield Entry(f"{TOWER}.ln_final.weight", (width,), f"{ours}/text/final_norm/scale")
  yield Entry(f"{TOWER}.ln_final.bias", (width,), f"{ours}/text/final_norm/bias")
  yield Entry(f"{TOWER}.text_projection", (width, cfg.text_dim), f"{ours}/text_projection/kernel")
  yield Entry(f"{TOWER}.logit_scale", (), "buffers/text_tower/log_scale")


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
      yield Entry(f"{theirs}.weight", shape, f"{ours}/weight", (head,), DENSE)
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
  if not cfg.text_tower.layers and any(name.startswith(TOWER) for name in state_dict):
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
  return dict(exported_generator(variables, cfg))


def exported_generator(variables: Mapping[str, Any], cfg: config_lib.Generator) -> Iterator[tuple[str, np.ndarray]]:
  """`export_generator` one array at a time."""
  yield from _exported(variables, generator_entries(cfg))
  yield from ((name, _FIR.copy()) for name in filter_names(cfg))


def generator_shapes(cfg: config_lib.Generator) -> dict[str, tuple[int, ...]]:
  """Names and shapes of `export_generator`'s result."""
  return {entry.name: entry.shape for entry in generator_entries(cfg)} | dict.fromkeys(filter_names(cfg), _FIR.shape)


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
  return dict(_exported(variables, discriminator_entries(cfg)))


def load_state_dicts(path: str | os.PathLike) -> dict[str, StateDict]:
  """Reads the state dicts in a file; arrays stay on the disk until they are read.

  Args:
    path: .pth, .pt or .safetensors, of one state dict or of several by network.

  Returns:
    {"G_ema", "G", "D", as far as the file has them: name -> array}, or {"": name -> array} of a bare state dict.

  Raises:
    UserError: no such file, no arrays in it, or a snapshot of whole modules, which is not opened.
  """
  try:
    content = tensor_files.read(path)
  except UserError as error:
    raise UserError(
      f"{error}. A snapshot of the released code is a pickle of whole modules, which is code: open it there and save "
      "what is in it, torch.save({name: snapshot[name].state_dict() for name in ('G_ema', 'G', 'D')}, 'weights.pth')"
    ) from error
  arrays = lambda mapping: {name: value for name, value in mapping.items() if tensor_files.is_array(value)}
  named: dict[str, StateDict] = {
    name: arrays(content[name]) for name in NETWORKS if isinstance(content.get(name), Mapping)
  }
  found: dict[str, StateDict] = named or {"": arrays(content)}
  if not any(found.values()):
    raise UserError(
      f"{path} has no arrays, neither by name nor under {', '.join(NETWORKS)}; it has {', '.join(content)}"
    )
  return found


def load_state_dict(path: str | os.PathLike, network: str = "G_ema") -> StateDict:
  """One state dict of a file: see `load_state_dicts`.

  Args:
    path: of the file.
    network: which one of several: "G_ema", "G" or "D".

  Raises:
    UserError: as there, or the file has others only.
  """
  found = load_state_dicts(path)
  if "" in found:
    return found[""]
  if network not in found:
    raise UserError(f"{path} has no {network!r}, only {', '.join(found)}")
  return found[network]


def _import(state_dict, table, constants, hint):
  """Variables as the table says, each an array of its own; every misfit goes into one error."""
  expected = {entry.name: entry.shape for entry in table} | {name: value.shape for name, value in constants.items()}
  found = name_map.shapes(state_dict)
  fitting = [name for name, value in constants.items() if found.get(name) == value.shape]
  wrong = [name for name in fitting if not np.array_equal(np.asarray(state_dict[name]), constants[name])]
  name_map.check(
    "the checkpoint does not fit the configuration",
    found,
    expected,
    others={"not the filter [1, 3, 3, 1]": wrong},
    hint=hint,
  )
  leaves: dict[str, Any] = {}
  for entry in table:
    array = np.array(entry.layout.to_ours(np.asarray(state_dict[entry.name], np.float32)), order="C")
    if entry.index:
      leaves.setdefault(entry.path, []).append(array)
    else:
      leaves[entry.path] = array
  variables = {}
  for path, value in leaves.items():
    *groups, last = path.split("/")
    node = variables
    for group in groups:
      node = node.setdefault(group, {})
    # The parts of a stacked leaf come in the order of their index.
    node[last] = np.stack(value) if isinstance(value, list) else value
  return variables


def _exported(variables, table):
  for entry in table:
    array = np.asarray(entry.leaf(variables)[entry.index])
    yield entry.name, np.array(entry.layout.to_theirs(array), np.float32, order="C")
