"""DINO and DINOv2 checkpoints for `models/dino.py`: original, timm and Hugging Face names, folders or single files.

A CLIP folder can replace a DINO: its image tower has the same layout.

Every name is first converted to the original one (`blocks.0.attn.qkv.weight`). `entries` is the table of the original
names, for reading and writing. Hugging Face stores query, key and value separately; they become one array.

  W width, M width of the feed-forward, P side of a patch
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop import clip_hf, name_map, tensor_files
from aurora_jax.interop.name_map import CONV, DENSE, SAME, Entry, Layout
from aurora_jax.models import dino as dino_lib
from aurora_jax.models.dino import Dino, DinoConfig, abstract_variables, block_shapes

_VECTOR = Layout(lambda x: x[0, 0], lambda x: x[None, None])  # [1, 1, W]
_TABLE = Layout(lambda x: x[0], lambda x: x[None])  # [1, T, W]

# Prefixes of the names, and keys under which files store the network.
_PREFIXES = ("module.", "backbone.", "dino.model.model.", "vit.", "dinov2.", "dinov2_with_registers.", "model.")
_AROUND = ("teacher", "state_dict", "model", "D")
# Arrays for training or for downstream tasks, which the network does not use.
_UNUSED = re.compile(r"(mask_token|embeddings\.mask_token|heads?\..*|fc_norm\..*|pooler\..*|classifier\..*)$")

# The layers of a block, and its norms by their names in `models/clip.py`.
_DENSE_LAYERS = ("qkv", "out", "up", "down")
_BLOCK_NORMS = {"norm1": "attention_norm", "norm2": "mlp_norm"}

# (pattern, original name, part). The part is the position within an array that the original names do not split.
_RENAMED = (
  (r"embeddings\.cls_token", "cls_token", 0),
  (r"embeddings\.position_embeddings", "pos_embed", 0),
  (r"embeddings\.register_tokens", "register_tokens", 0),
  (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1", 0),
  (r"layernorm\.(\w+)", r"norm.\1", 0),
  (r"blocks\.(\d+)\.attention\.(?:attention\.query|q_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2", 0),
  (r"blocks\.(\d+)\.attention\.(?:attention\.key|k_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2", 1),
  (r"blocks\.(\d+)\.attention\.(?:attention\.value|v_proj)\.(\w+)", r"blocks.\1.attn.qkv.\2", 2),
  (r"blocks\.(\d+)\.attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2", 0),
  (r"blocks\.(\d+)\.(?:intermediate\.dense|mlp\.weights_in|mlp\.w12)\.(\w+)", r"blocks.\1.mlp.fc1.\2", 0),
  (r"blocks\.(\d+)\.(?:output\.dense|mlp\.weights_out|mlp\.w3|mlp\.down_proj)\.(\w+)", r"blocks.\1.mlp.fc2.\2", 0),
  (r"blocks\.(\d+)\.mlp\.gate_proj\.(\w+)", r"blocks.\1.mlp.fc1.\2", 0),
  (r"blocks\.(\d+)\.mlp\.up_proj\.(\w+)", r"blocks.\1.mlp.fc1.\2", 1),
  (r"blocks\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm1.\2", 0),
  (r"blocks\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm2.\2", 0),
  (r"blocks\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma", 0),
  (r"reg_token", "register_tokens", 0),
)


@dataclasses.dataclass(frozen=True)
class DinoBundle:
  """A DINO, ready to use.

  Attributes:
    config: the sizes.
    variables: {"params": ...}, float32 numpy arrays on the host.
  """

  config: DinoConfig
  variables: dict[str, Any]

  def module(self, **options: Any) -> Dino:
    """The Flax module; the options are those of `Dino` (dtype, remat)."""
    return Dino(self.config, **options)


def load(path: str | os.PathLike, *, heads: int = 0) -> DinoBundle:
  """Reads a DINO or DINOv2 from a folder (Hugging Face, timm) or a file (.safetensors, .pth).

  Sizes come from a Hugging Face config.json if there is one, otherwise from the shapes of the weights. From a CLIP
  folder the image tower is read (`from_clip`).

  Args:
    path: folder or file.
    heads: attention heads, for files without config.json; 0 is one per 64 channels, as in all published models.

  Returns:
    `DinoBundle`. Weights of any float type become float32.

  Raises:
    UserError: no such file, another model, or weights that do not fit. All misfits are named.
  """
  path = pathlib.Path(path)
  settings = {}
  if path.is_dir():
    if is_clip(path):
      return from_clip(clip_hf.load(path))
    settings, path = _folder(path)
  names = _original_names(_unwrapped(tensor_files.read(path)))
  config = _config(names, path, settings, heads)
  return DinoBundle(config, import_dino(names, config, str(path)))


def from_clip(bundle: clip_hf.ClipBundle) -> DinoBundle:
  """A CLIP's image tower as a `Dino`, without the projection.

  The class token after the final norm is the tower's output. `Dino` expects ImageNet's color statistics, so the
  difference to CLIP's is folded into the patch embedding.

  Args:
    bundle: the CLIP.
  """
  image, tower = bundle.config.image, bundle.variables["params"]["image"]
  config = DinoConfig(
    image_size=image.size,
    patch=image.patch,
    width=image.width,
    depth=image.layers,
    heads=image.heads,
    mlp_width=image.mlp_width,
    layer_norm_epsilon=image.layer_norm_epsilon,
    activation=image.activation,
    pre_norm=True,
  )
  array = lambda values: np.asarray(values, np.float64)
  scale = array(dino_lib.STD) / array(image.std)
  offset = (array(dino_lib.MEAN) - array(image.mean)) / array(image.std)
  kernel, blocks = array(tower["patch_embedding"]), tower["transformer"]["blocks"]
  params = {
    "patch_kernel": kernel * scale[:, None],
    "patch_bias": np.einsum("pqcw,c->w", kernel, offset),
    "class_token": tower["class_embedding"],
    "positions": tower["position_embedding"],
    "norm_scale": tower["final_norm"]["scale"],
    "norm_bias": tower["final_norm"]["bias"],
    "pre_norm_scale": tower["pre_norm"]["scale"],
    "pre_norm_bias": tower["pre_norm"]["bias"],
    "blocks": {f"{name}_{part}": blocks[name][part] for name in _DENSE_LAYERS for part in ("kernel", "bias")}
    | {f"{ours}_{part}": blocks[name][part] for ours, name in _BLOCK_NORMS.items() for part in ("scale", "bias")},
  }
  return DinoBundle(config, {"params": jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)})


def import_dino(state_dict: Mapping[str, Any], config: DinoConfig, where: str = "the state dict") -> dict[str, Any]:
  """Converts weights under any of the known names to our variables.

  Args:
    state_dict: name -> array (anything that `np.asarray` takes).
    config: the sizes.
    where: name of the state dict for errors.

  Returns:
    {"params": ...}, numpy float32.

  Raises:
    UserError: lists what is missing, left over or misshapen.
  """
  names = state_dict if isinstance(state_dict, _Names) else _original_names(state_dict)
  table = {entry.name: entry for entry in entries(config)}
  # What is left over is called by its name in the file.
  found = {name: names.shape(name) for name in names.keys() & table.keys()}
  found |= {source: () for name in names.keys() - table.keys() for source in names.sources(name)}
  expected = {name: entry.shape for name, entry in table.items()}
  name_map.check(f"the weights in {where} are not those of this DINO", found, expected)
  params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract_variables(config)["params"])
  for name, entry in table.items():
    entry.leaf(params)[entry.index] = entry.layout.to_ours(names.read(name))
  return {"params": params}


def export_dino(variables: Mapping[str, Any], config: DinoConfig) -> dict[str, np.ndarray]:
  """Our variables under the original names, exact to the bit. timm loads them too if it has the model.

  Args:
    variables: {"params": ...} of `Dino(config)`.
    config: its sizes.

  Returns:
    dict name -> numpy float32 array, contiguous.
  """
  return {
    entry.name: np.array(entry.layout.to_theirs(np.asarray(entry.leaf(variables["params"])[entry.index])), order="C")
    for entry in entries(config)
  }


def entries(config: DinoConfig) -> Iterator[Entry]:
  """Yields every tensor under its original name, with its place in `Dino`'s parameters."""
  width, patch = config.width, config.patch
  yield Entry("cls_token", (1, 1, width), "class_token", layout=_VECTOR)
  yield Entry("pos_embed", (1, 1 + config.grid**2, width), "positions", layout=_TABLE)
  if config.registers:
    yield Entry("register_tokens", (1, config.registers, width), "registers", layout=_TABLE)
  yield Entry("patch_embed.proj.weight", (width, 3, patch, patch), "patch_kernel", layout=CONV)
  yield Entry("patch_embed.proj.bias", (width,), "patch_bias")
  shapes = block_shapes(config)
  for layer in range(config.depth):
    for theirs, ours in (
      ("norm1.weight", "norm1_scale"),
      ("norm1.bias", "norm1_bias"),
      ("attn.qkv.weight", "qkv_kernel"),
      ("attn.qkv.bias", "qkv_bias"),
      ("attn.proj.weight", "out_kernel"),
      ("attn.proj.bias", "out_bias"),
      ("ls1.gamma", "gain1"),
      ("norm2.weight", "norm2_scale"),
      ("norm2.bias", "norm2_bias"),
      ("mlp.fc1.weight", "up_kernel"),
      ("mlp.fc1.bias", "up_bias"),
      ("mlp.fc2.weight", "down_kernel"),
      ("mlp.fc2.bias", "down_bias"),
      ("ls2.gamma", "gain2"),
    ):
      if ours in shapes:
        dense = len(shapes[ours]) == 2
        shape = shapes[ours][::-1]
        yield Entry(f"blocks.{layer}.{theirs}", shape, f"blocks/{ours}", (layer,), DENSE if dense else SAME)
  if config.pre_norm:
    yield Entry("norm_pre.weight", (width,), "pre_norm_scale")  # timm's name
    yield Entry("norm_pre.bias", (width,), "pre_norm_bias")
  yield Entry("norm.weight", (width,), "norm_scale")
  yield Entry("norm.bias", (width,), "norm_bias")


# ----------------------------------------------------------------------------------------------------------------------
# Names


class _Names(dict):
  """Arrays by original name: {name: {part: (name in the file, array)}}."""

  def sources(self, name):
    return [source for source, _ in self[name].values()]

  def shape(self, name):
    """The shape of the concatenated parts; () if they do not fit each other."""
    shapes = [tuple(np.shape(array)) for _, array in self[name].values()]
    if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
      return shapes[0] if len(shapes) == 1 else ()
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])

  def read(self, name):
    parts = [np.asarray(self[name][part][1], np.float32) for part in sorted(self[name])]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _original_names(state_dict):
  """The arrays of a state dict under the original names, without those that the network does not use."""
  names = _Names()
  for source, array in state_dict.items():
    name = source
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), ""):
      name = name.removeprefix(prefix)
    if _UNUSED.match(name):
      continue
    name, part = re.sub(r"^(encoder\.)?layers?\.", "blocks.", name), 0
    for pattern, original, number in _RENAMED:
      if re.fullmatch(pattern, name):
        name, part = re.sub(pattern, original, name), number
        break
    if part in names.setdefault(name, {}):
      raise UserError(f"{names[name][part][0]} and {source} are both {name}")
    names[name][part] = source, array
  return _with_class_position(names)


def _with_class_position(names):
  """Adds a zero position of the class token if timm has added that position to the token, as it does with registers."""
  if "reg_token" in names.get("register_tokens", {0: ("",)})[0][0] and "pos_embed" in names:
    source, table = names["pos_embed"][0]
    shape = np.shape(table)
    if len(shape) == 3 and math.isqrt(shape[1]) ** 2 == shape[1]:
      table = np.asarray(table, np.float32)
      names["pos_embed"][0] = source, np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
  return names


def _unwrapped(content):
  """The innermost mapping of names to arrays. From a training checkpoint of two networks it is that of the teacher."""
  while True:
    inner = next((content[key] for key in _AROUND if isinstance(content.get(key), Mapping)), None)
    if inner is None:
      return {name: value for name, value in content.items() if tensor_files.is_array(value)}
    content = inner


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


def is_clip(path: str | os.PathLike) -> bool:
  """Whether a folder holds a CLIP, by its config.json."""
  try:
    return json.loads((pathlib.Path(path) / "config.json").read_text(encoding="utf-8")).get("model_type") == "clip"
  except (OSError, ValueError, AttributeError):
    return False


def _folder(folder):
  """(sizes in a Hugging Face config.json, file of weights)."""
  path = next((folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()), None)
  if path is None:
    raise UserError(f"no weights in {folder}: neither model.safetensors nor pytorch_model.bin")
  if not (folder / "config.json").is_file():
    return {}, path
  try:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = values.get("model_type")
  except (OSError, ValueError, AttributeError) as error:
    raise UserError(f"cannot read {folder / 'config.json'}: {error}") from error
  if kind is None and "architecture" in values:
    return {}, path  # timm's: its weights say the rest
  if kind not in ("vit", "dinov2", "dinov2_with_registers"):
    raise UserError(f"{folder / 'config.json'} describes a model of type {kind!r}, not a DINO or DINOv2")
  if values.get("hidden_act", "gelu") != "gelu":
    raise UserError(f"{folder / 'config.json'}: hidden_act is {values['hidden_act']!r}, only 'gelu' is supported")
  settings = {
    "heads": values.get("num_attention_heads", 12),
    "layer_norm_epsilon": values.get("layer_norm_eps", 1e-12 if kind == "vit" else 1e-6),
    "position_resize": "bicubic_antialiased" if kind == "dinov2_with_registers" else "bicubic",
  }
  return settings, path


def _config(names, path, settings, heads):
  """Sizes from the shapes of the weights."""
  wanted = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc2.weight": 2, "blocks.0.mlp.fc1.weight": 2}
  bad = [name for name, axes in wanted.items() if name not in names or len(names.shape(name)) != axes]
  if bad:
    raise UserError(f"{path} holds no DINO: no {bad[0]}, under none of the known names")
  width, _, patch, _ = names.shape("patch_embed.proj.weight")
  mlp_width = names.shape("blocks.0.mlp.fc2.weight")[1]
  depth = 1 + max(int(found[1]) for name in names if (found := re.match(r"blocks\.(\d+)\.", name)))
  registers = names.shape("register_tokens")[1] if "register_tokens" in names else 0
  sizes = {
    "image_size": patch * math.isqrt(names.shape("pos_embed")[1] - 1),
    "patch": patch,
    "width": width,
    "depth": depth,
    "heads": heads or max(1, width // 64),
    "mlp_width": mlp_width,
    "registers": registers,
    "qkv_bias": "blocks.0.attn.qkv.bias" in names,
    "layer_scale": "blocks.0.ls1.gamma" in names,
    "pre_norm": "norm_pre.weight" in names,
    "swiglu": names.shape("blocks.0.mlp.fc1.weight")[0] == 2 * mlp_width,
    "position_resize": "bicubic_antialiased" if registers else "bicubic",
  }
  try:
    return DinoConfig(**sizes | settings)
  except ValueError as error:
    raise UserError(f"{path}: {error}") from error
