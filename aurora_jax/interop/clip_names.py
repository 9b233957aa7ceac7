"""The name map of a Hugging Face CLIPModel: one table for both directions.

The blocks of a tower are stacked on a leading axis. Query, key and value share one kernel. Dense kernels are [in, out]
instead of [out, in].

  W width of a tower, P side of a patch, C colors
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from aurora_jax.interop.name_map import CONV, DENSE, Entry
from aurora_jax.models.clip import ClipConfig


def _norm_entries(theirs, ours, width, index=()) -> Iterator[Entry]:
  yield Entry(f"{theirs}.weight", (width,), f"{ours}/scale", index)
  yield Entry(f"{theirs}.bias", (width,), f"{ours}/bias", index)


def _dense_entries(theirs, ours, shape, index) -> Iterator[Entry]:
  yield Entry(f"{theirs}.weight", shape, f"{ours}/kernel", index, DENSE)
  yield Entry(f"{theirs}.bias", shape[:1], f"{ours}/bias", index)


def _block_entries(tower, theirs, ours) -> Iterator[Entry]:
  """The blocks of one tower."""
  width = tower.width
  for layer in range(tower.layers):
    source, target = f"{theirs}.encoder.layers.{layer}", f"{ours}/transformer/blocks"
    for number, letter in enumerate("qkv"):
      index = (layer, ..., slice(number * width, (number + 1) * width))
      yield from _dense_entries(f"{source}.self_attn.{letter}_proj", f"{target}/qkv", (width, width), index)
    yield from _dense_entries(f"{source}.self_attn.out_proj", f"{target}/out", (width, width), (layer,))
    yield from _dense_entries(f"{source}.mlp.fc1", f"{target}/up", (tower.mlp_width, width), (layer,))
    yield from _dense_entries(f"{source}.mlp.fc2", f"{target}/down", (width, tower.mlp_width), (layer,))
    yield from _norm_entries(f"{source}.layer_norm1", f"{target}/attention_norm", width, (layer,))
    yield from _norm_entries(f"{source}.layer_norm2", f"{target}/mlp_norm", width, (layer,))


def entries(config: ClipConfig) -> Iterator[Entry]:
  """Every tensor of the Hugging Face CLIPModel of this config."""
  text, image, width = config.text, config.image, config.embedding_width
  theirs = "text_model.embeddings"
  yield Entry(f"{theirs}.token_embedding.weight", (text.vocabulary_size, text.width), "text/token_embedding")
  yield Entry(f"{theirs}.position_embedding.weight", (text.context_length, text.width), "text/position_embedding")
  yield from _block_entries(text, "text_model", "text")
  yield from _norm_entries("text_model.final_layer_norm", "text/final_norm", text.width)
  yield Entry("text_projection.weight", (width, text.width), "text_projection/kernel", layout=DENSE)

  theirs = "vision_model.embeddings"
  patches = (image.width, 3, image.patch, image.patch)
  positions = ((image.size // image.patch) ** 2 + 1, image.width)
  yield Entry(f"{theirs}.class_embedding", (image.width,), "image/class_embedding")
  yield Entry(f"{theirs}.patch_embedding.weight", patches, "image/patch_embedding", layout=CONV)
  yield Entry(f"{theirs}.position_embedding.weight", positions, "image/position_embedding")
  yield from _norm_entries("vision_model.pre_layrnorm", "image/pre_norm", image.width)  # their spelling
  yield from _block_entries(image, "vision_model", "image")
  yield from _norm_entries("vision_model.post_layernorm", "image/final_norm", image.width)
  yield Entry("visual_projection.weight", (width, image.width), "image_projection/kernel", layout=DENSE)

  yield Entry("logit_scale", (), "log_scale")


def empty(entries: Iterable[Entry]) -> dict[str, Any]:
  """Our variables with room for some tensors, not yet filled: float32 arrays in nested dicts.

  Tracing the network would give the same shapes, and takes half a second.
  """
  shapes: dict[str, tuple[int, ...]] = {}
  for entry in entries:
    shape = entry.layout.to_ours(np.broadcast_to(np.float32(0), entry.shape)).shape
    if entry.index:
      layer, *columns = entry.index
      shape = (layer + 1, *shape[:-1], columns[-1].stop if columns else shape[-1])
    shapes[entry.path] = max(shape, shapes.get(entry.path, shape))
  tree: dict[str, Any] = {}
  for path, shape in shapes.items():
    *outer, name = path.split("/")
    node = tree
    for key in outer:
      node = node.setdefault(key, {})
    node[name] = np.empty(shape, np.float32)
  return tree
