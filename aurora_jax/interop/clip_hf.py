"""Reads and writes Hugging Face CLIP folders. `train-clip` writes such folders too, and `transformers` reads them.

A folder holds `config.json`, `model.safetensors` (or shards with an index, or `pytorch_model.bin`, or a variant of one
precision such as `model.fp16.safetensors`), the tokenizer's files and `preprocessor_config.json`. The text tower alone,
as in Stable Diffusion, is enough to encode prompts.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from aurora_jax import files, local_copies
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop import clip_names, name_map, tensor_files, weight_files
from aurora_jax.models.clip import Clip, ClipConfig, ImageConfig, TextConfig

# Hugging Face's values for fields that a config.json leaves out.
_TEXT_DEFAULTS = {
  "vocab_size": 49408,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "num_hidden_layers": 12,
  "num_attention_heads": 8,
  "max_position_embeddings": 77,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "eos_token_id": 49407,
}
_IMAGE_DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "num_channels": 3,
  "image_size": 224,
  "patch_size": 32,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
_EMBEDDING_WIDTH_DEFAULT = 512
_WHOLE, _TEXT_TOWER = "clip", "clip_text_model"  # model types
# A text tower alone may lack these, which compare it with images.
_OF_BOTH_TOWERS = ("text_projection.weight", "logit_scale")


@dataclasses.dataclass(frozen=True)
class ClipBundle:
  """A CLIP, ready to use.

  Attributes:
    config: the sizes.
    variables: {"params": ...}, float32 numpy arrays on the host. Callers put them on the devices once.
    tokenizer: captions -> int32 [B, context_length].
    projects: whether there is a text projection. The folder of a text tower may lack it; `TextOutput.embedding` is then
      NaN.
  """

  config: ClipConfig
  variables: dict[str, Any]
  tokenizer: Tokenizer
  projects: bool = True

  def module(self, **options: Any) -> Clip:
    """The Flax module; the options are those of `Clip` (dtype, remat)."""
    return Clip(self.config, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def load(folder: str | os.PathLike, *, text_only: bool = False) -> ClipBundle:
  """Reads a CLIP folder: one of `train-clip`, or a Hugging Face one (ViT-B/32, ViT-L/14, OpenCLIP exports, ...).

  Weights of any float type become float32. They are read one tensor at a time, so no second copy is in memory.

  Args:
    folder: the folder, or its gs:// or s3:// URL.
    text_only: whether to leave out the image tower, three quarters of a ViT-L/14. The folder may then be that of a text
      tower alone, such as `text_encoder` of Stable Diffusion, with the tokenizer in it or in `tokenizer` next to it.
      The config's image tower then has default sizes.

  Returns:
    `ClipBundle`.

  Raises:
    UserError: no such folder, not a CLIP, or weights that do not fit its config. All misfits are named.
  """
  folder = pathlib.Path(local_copies.of_folder(os.fspath(folder)))
  if not folder.is_dir():
    raise UserError(f"no CLIP folder at {folder}")
  config = read_config(folder)
  tokenizer = Tokenizer.load(folder, config.text.context_length)
  if tokenizer.vocabulary_size > config.text.vocabulary_size:
    raise UserError(
      f"{folder}: the tokenizer has {tokenizer.vocabulary_size} entries, the model only {config.text.vocabulary_size}"
    )
  weights = _open_weights(folder)
  if not text_only and weights and not any(name.startswith("vision_model.") for name in weights):
    raise _only_text(folder)
  params = _fill(config, weights, folder, text_only)
  return ClipBundle(config, {"params": params}, tokenizer, projects=_OF_BOTH_TOWERS[0] in weights)


def _only_text(folder: pathlib.Path) -> UserError:
  return UserError(f"{folder} has only the text tower of a CLIP: enough to sample, but here its image tower is needed")


def _fill(config: ClipConfig, weights: dict[str, Any], folder: pathlib.Path, text_only: bool) -> dict[str, Any]:
  """Our parameter tree from named tensors, with `text_only` that of the text tower. All misfits go into one error."""
  entries = {entry.name: entry for entry in clip_names.entries(config)}
  optional, ignored = (), ("position_ids",)  # old files store the position numbers as a buffer
  if text_only:
    entries = {name: entry for name, entry in entries.items() if not entry.path.startswith("image")}
    optional = _OF_BOTH_TOWERS
    weights = {name: value for name, value in weights.items() if not name.startswith(("vision_model.", "visual_"))}
  found = name_map.shapes({name: value for name, value in weights.items() if not name.endswith(ignored)})
  # A scalar may be stored as a tensor of one element, such as OpenCLIP's temperature.
  scalars = {name for name, entry in entries.items() if entry.shape == () and found.get(name) == (1,)}
  name_map.check(
    f"the weights in {folder} do not fit its config.json",
    found | dict.fromkeys(scalars, ()),
    {name: entry.shape for name, entry in entries.items()},
    optional=optional,
  )
  params = clip_names.empty(entries.values())
  for name, entry in entries.items():
    array = weights[name].read().reshape(entry.shape) if name in weights else None
    entry.leaf(params)[entry.index] = np.nan if array is None else entry.layout.to_ours(array)
  return params


def read_config(folder: pathlib.Path) -> ClipConfig:
  """Reads a `ClipConfig` from config.json and, for the colors, preprocessor_config.json.

  From the config of a text tower alone, the image tower gets default sizes.

  Args:
    folder: the folder.

  Raises:
    UserError: no config.json, or that of another model.
  """
  path = folder / "config.json"
  values = weight_files.read_json(path)
  kind = values.get("model_type")
  if kind == _TEXT_TOWER:
    values = {"text_config": values, "projection_dim": values.get("projection_dim")}
  elif kind != _WHOLE:
    raise UserError(f"{path} describes a model of type '{kind}', not 'clip'")
  text, image = _tower_config(path, values, "text"), _tower_config(path, values, "vision")
  for tower, defaults in ((text, _TEXT_DEFAULTS), (image, _IMAGE_DEFAULTS)):
    for name, default in defaults.items():
      if not isinstance(tower[name], type(default)):
        raise UserError(f"{path}: {name} is {tower[name]!r}, where {default!r} would be usual")
  if image["num_channels"] != 3:
    raise UserError(f"{path}: images of {image['num_channels']} channels are not supported, only 3")
  colors = {}
  if (folder / "preprocessor_config.json").is_file():
    processor = weight_files.read_json(folder / "preprocessor_config.json")
    for theirs, ours in (("image_mean", "mean"), ("image_std", "std")):
      if theirs in processor:
        colors[ours] = tuple(processor[theirs])
  try:
    return ClipConfig(
      text=TextConfig(
        **_tower_values(text),
        vocabulary_size=text["vocab_size"],
        context_length=text["max_position_embeddings"],
        eot_id=text["eos_token_id"],
      ),
      image=ImageConfig(**_tower_values(image), size=image["image_size"], patch=image["patch_size"], **colors),
      embedding_width=values.get("projection_dim") or _EMBEDDING_WIDTH_DEFAULT,
    )
  except (TypeError, ValueError) as error:
    raise UserError(f"{path}: {error}") from error


def _tower_config(path: pathlib.Path, values: dict, tower: str) -> dict:
  """A tower's values, as `transformers` 5 reads them.

  Old configs repeat a tower's values under "..._config_dict". If that exists, its values take precedence, and its
  missing values are the defaults, not those of "..._config".
  """
  defaults = _TEXT_DEFAULTS if tower == "text" else _IMAGE_DEFAULTS
  given, repeated = values.get(f"{tower}_config"), values.get(f"{tower}_config_dict")
  for name, part in ((f"{tower}_config", given), (f"{tower}_config_dict", repeated)):
    if not isinstance(part, dict | None):
      raise UserError(f"{path}: {name} is {part!r}, where an object would be usual")
  merged = defaults | (given or {})
  if repeated is not None:
    merged |= defaults | repeated
  for name in ("image_size", "patch_size"):  # height and width
    if isinstance(merged.get(name), list) and len(set(merged[name])) == 1:
      merged[name] = merged[name][0]
  return merged


def _tower_values(values: dict) -> dict:
  return {
    "width": values["hidden_size"],
    "layers": values["num_hidden_layers"],
    "heads": values["num_attention_heads"],
    "mlp_width": values["intermediate_size"],
    "activation": values["hidden_act"],
    "layer_norm_epsilon": values["layer_norm_eps"],
  }


def _open_weights(folder: pathlib.Path) -> dict[str, Any]:
  """The arrays of a folder's weight files by name. They are not read yet."""
  weights = {}
  for path in weight_files.find(folder):
    weights |= {name: value for name, value in tensor_files.read(path).items() if tensor_files.is_array(value)}
  if "embeddings.token_embedding.weight" in weights:  # transformers 5 writes a text tower so
    parts = ("embeddings.", "encoder.", "final_layer_norm.")
    weights = {f"text_model.{name}" if name.startswith(parts) else name: value for name, value in weights.items()}
  return weights


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def save(
  folder: str | os.PathLike, bundle: ClipBundle, *, overwrite: bool = False, notes: dict[str, Any] | None = None
) -> None:
  """Writes a folder that `load` and `transformers.CLIPModel.from_pretrained` read, completely or not at all.

  Args:
    folder: the folder; it must not exist, or be empty.
    bundle: the CLIP.
    overwrite: replace the content of the folder.
    notes: JSON values about the training, written as `training.json`.

  Raises:
    UserError: the folder is not empty, or cannot be written.
  """
  folder = pathlib.Path(folder)
  check_writable(folder, overwrite=overwrite)
  with files.atomic_folder(folder, lambda: check_writable(folder, overwrite=overwrite)) as work:
    _write_json(work / "config.json", _their_config(bundle))
    _write_json(work / "preprocessor_config.json", _their_processor(bundle.config.image))
    if notes is not None:
      _write_json(work / "training.json", notes)
    bundle.tokenizer.save(work)
    try:  # transformers refuses a file that does not say "pt"
      safetensors.numpy.save_file(_state_dict(bundle), work / "model.safetensors", metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # raised when the disk is full
      raise OSError(f"model.safetensors: {error}") from error


def check_writable(folder: str | os.PathLike, *, overwrite: bool = False) -> None:
  """Raises `UserError` if `save` would refuse the folder. Callers check this before they train."""
  folder = pathlib.Path(folder)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file, not a folder")
  if folder.is_dir() and any(folder.iterdir()) and not overwrite:
    raise UserError(f"{folder} is not empty; choose another folder or say --overwrite")
  files.check_folder(folder)


def _state_dict(bundle: ClipBundle) -> dict[str, np.ndarray]:
  """The Hugging Face state dict, float32."""
  params = jax.tree.map(np.asarray, bundle.variables["params"])
  state = {}
  for entry in clip_names.entries(bundle.config):
    array = entry.layout.to_theirs(entry.leaf(params)[entry.index])
    state[entry.name] = np.ascontiguousarray(array, np.float32).reshape(entry.shape)
  return state


def _their_tower(tower) -> dict:
  return {
    "hidden_size": tower.width,
    "num_hidden_layers": tower.layers,
    "num_attention_heads": tower.heads,
    "intermediate_size": tower.mlp_width,
    "hidden_act": tower.activation,
    "layer_norm_eps": tower.layer_norm_epsilon,
  }


def _their_config(bundle: ClipBundle) -> dict:
  config, tokenizer = bundle.config, bundle.tokenizer
  text, image = config.text, config.image
  return {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "dtype": "float32",
    "projection_dim": config.embedding_width,
    "logit_scale_init_value": float(np.log(1 / 0.07)),
    "text_config": {
      "model_type": "clip_text_model",
      **_their_tower(text),
      "projection_dim": config.embedding_width,
      "vocab_size": text.vocabulary_size,
      "max_position_embeddings": text.context_length,
      "bos_token_id": tokenizer.begin_id,
      "eos_token_id": text.eot_id,
      "pad_token_id": 0,
    },
    "vision_config": {
      "model_type": "clip_vision_model",
      **_their_tower(image),
      "projection_dim": config.embedding_width,
      "num_channels": 3,
      "image_size": image.size,
      "patch_size": image.patch,
    },
  }


def _their_processor(image: ImageConfig) -> dict:
  return {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": image.size},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": image.size, "width": image.size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(image.mean),
    "image_std": list(image.std),
    "do_convert_rgb": True,
  }


def _write_json(path: pathlib.Path, value: dict) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
