"""A CLIP of a few parameters, shared by the tests of this folder."""

import types

import jax
import numpy as np
import pytest

from aurora_jax.models import clip


@pytest.fixture(scope="session")
def tiny_clip():
  """A bundle with random weights whose tokenizer knows three words, and what the model itself says of them."""
  config = clip.ClipConfig(
    text=clip.TextConfig(width=8, layers=1, heads=2, mlp_width=16, vocabulary_size=32, context_length=6),
    image=clip.ImageConfig(width=8, layers=1, heads=2, mlp_width=16, size=8, patch=4),
    embedding_width=5,
  )
  words = ["one", "two", "three"]
  tokens = np.array([[1, 5, 6, 31, 0, 0], [1, 7, 31, 0, 0, 0], [1, 8, 9, 10, 31, 0]], np.int32)
  images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32)
  model = clip.Clip(config)
  variables = jax.jit(model.init)(jax.random.key(0), tokens, images)
  text, embeddings, _ = jax.jit(model.apply)(variables, tokens, images)
  bundle = types.SimpleNamespace(
    config=config, variables=variables, tokenizer=lambda texts: tokens[[words.index(t) for t in texts]]
  )
  return types.SimpleNamespace(bundle=bundle, words=words, images=images, text=text, image_embeddings=embeddings)
