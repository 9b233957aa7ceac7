"""The text tower of a CLIP as transformers' `CLIPTextModelWithProjection`, and its tokenizer, in folders of their
own.
"""

import json
import pathlib

import numpy as np

from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.interop import clip_names
from aurora_jax.interop.clip_hf import ClipBundle
from aurora_jax.interop.hub import twin_map, weights
from aurora_jax.models.clip import ClipConfig

_PROJECTION = "text_projection.weight"


def config_json(config: ClipConfig, tokenizer: Tokenizer, *, projects: bool = True) -> str:
  """The text of the `config.json` of a text tower, which `interop.clip_hf.read_config` reads too."""
  text = config.text
  values = {
    "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
    "model_type": "clip_text_model",
    "dtype": "float32",
    "hidden_size": text.width,
    "num_hidden_layers": text.layers,
    "num_attention_heads": text.heads,
    "intermediate_size": text.mlp_width,
    "hidden_act": text.activation,
    "layer_norm_eps": text.layer_norm_epsilon,
    "projection_dim": config.embedding_width,
    "vocab_size": text.vocabulary_size,
    "max_position_embeddings": text.context_length,
    "bos_token_id": tokenizer.begin_id,
    "eos_token_id": text.eot_id,
    "pad_token_id": 0,
  }
  return json.dumps(values, indent=2) + "\n"


def write(folder: pathlib.Path, bundle: ClipBundle) -> None:
  """Writes a text tower into an existing folder; `interop.clip_hf.load(folder, text_only=True)` reads it too.

  Args:
    folder: e.g. `text_encoder`.
    bundle: the CLIP, with or without its image tower. Without a projection (`projects`) it becomes a `CLIPTextModel`.
  """
  content = config_json(bundle.config, bundle.tokenizer, projects=bundle.projects)
  (folder / "config.json").write_text(content, encoding="utf-8")
  table = [
    entry
    for entry in clip_names.entries(bundle.config)
    if entry.name.startswith("text_model.") or (entry.name == _PROJECTION and bundle.projects)
  ]
  params = bundle.variables["params"]

  def arrays():
    for entry in table:
      array = entry.layout.to_theirs(np.asarray(entry.leaf(params))[entry.index])
      yield entry.name, np.ascontiguousarray(array, np.float32).reshape(entry.shape)

  float32 = np.dtype(np.float32)
  announced = [twin_map.Entry(entry.name, (), twin_map.SAME, entry.shape, float32) for entry in table]
  weights.write(folder, announced, arrays())
