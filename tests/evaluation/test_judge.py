"""A judge made of a real CLIP with random weights."""

import numpy as np
import pytest

from aurora_jax.evaluation import judge


def test_in_batches_pads_to_one_shape():
  shapes = []

  def double(x):
    shapes.append(x.shape)
    return 2 * x

  values = np.arange(14).reshape(7, 2)
  assert (judge.in_batches(double, (values,), 3) == 2 * values).all()
  assert shapes == [(3, 2)] * 3


@pytest.mark.slow
def test_a_real_clip_as_a_judge(tiny_clip):
  made = judge.from_clip(tiny_clip.bundle, batch_size=2)
  words, text = tiny_clip.words, tiny_clip.text.embedding
  np.testing.assert_allclose(made.embed_images(tiny_clip.images), tiny_clip.image_embeddings, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(made.embed_captions(words), text, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(made.embed_captions(words[::-1]), text[::-1], rtol=1e-4, atol=1e-5)
  assert made.retrieval(tiny_clip.images, [0, 1, 2], words).images == 3
