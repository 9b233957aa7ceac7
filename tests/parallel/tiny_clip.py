"""A CLIP of random weights in a Hugging Face folder, for runs that need one and do not look at its answers."""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.interop import clip_hf
from aurora_jax.models import clip as clip_lib
from aurora_jax.parallel import mesh

WIDTH = 32  # of the text features


def save(folder: pathlib.Path, captions: Sequence[str], context_length: int = 24) -> None:
  """Writes it: towers of one layer, images of 8 pixels, a tokenizer of these captions."""
  tokenizer = Tokenizer.train(list(captions), 520, context_length)
  tower = dict(width=WIDTH, layers=1, heads=2, mlp_width=64)
  config = clip_lib.ClipConfig(
    text=clip_lib.TextConfig(
      vocabulary_size=tokenizer.vocabulary_size, context_length=context_length, eot_id=tokenizer.end_id, **tower
    ),
    image=clip_lib.ImageConfig(size=8, patch=4, **tower),
    embedding_width=16,
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = mesh.names_of(path)[-1]
    values = {"scale": 1.0, "bias": 0.0, "log_scale": 2.66}.get(name, 0.15 * rng.standard_normal(leaf.shape))
    return np.broadcast_to(np.float32(values), leaf.shape)

  variables = jax.tree_util.tree_map_with_path(draw, clip_lib.abstract_variables(config))
  clip_hf.save(folder, clip_hf.ClipBundle(config, variables, tokenizer))
