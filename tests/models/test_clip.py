"""CLIP's towers: size, masks, shapes, and that the fast paths agree with the plain ones (parity: test_clip_hf)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.models import clip
from aurora_jax.models.clip import Clip, ClipConfig, ImageConfig, TextConfig
from aurora_jax.ops import losses

TEXT = TextConfig(width=16, layers=2, heads=4, mlp_width=24, vocabulary_size=50, context_length=9)
IMAGE = ImageConfig(width=12, layers=3, heads=2, mlp_width=20, size=16, patch=4)
CONFIG = ClipConfig(text=TEXT, image=IMAGE, embedding_width=7)
TOKENS = np.array([[1, 5, 6, 49, 0, 0], [1, 7, 49, 0, 0, 0], [1, 8, 9, 10, 11, 49]], np.int32)


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
  # Fresh biases are 0 and fresh norms 1; here everything has a say.
  generator = np.random.default_rng(1)
  draw = lambda leaf: generator.normal(size=leaf.shape, scale=0.3).astype(np.float32)
  return jax.tree.map(draw, clip.abstract_variables(CONFIG))


@functools.lru_cache
def compiled(method, config, **options):
  return jax.jit(lambda *arguments: Clip(config, **options).apply(*arguments, method=method))


def apply(variables, *arguments, method, config=CONFIG, **options):
  return compiled(method, config, **options)(variables, *arguments)


def test_size_of_vit_l14():
  leaves = jax.tree.leaves(clip.abstract_variables(clip.vit_l14()))
  assert sum(leaf.size for leaf in leaves) == 427_616_513
  assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in leaves)


@pytest.mark.slow
def test_fresh_weights(images):
  fast = {"xla_backend_optimization_level": 0}  # of compilation
  variables = jax.jit(Clip(CONFIG).init, compiler_options=fast)(jax.random.key(0), TOKENS, images)
  leaves = jax.tree.leaves(variables)
  assert all(leaf.dtype == jnp.float32 and not leaf.weak_type for leaf in leaves)
  kernel = variables["params"]["text"]["transformer"]["blocks"]["up"]["kernel"]
  assert kernel.shape == (2, 16, 24) and not np.allclose(kernel[0], kernel[1])
  assert Clip(CONFIG).apply(variables, method="logit_scale") == pytest.approx(1 / 0.07, rel=1e-6)


@pytest.mark.slow
def test_shapes(variables, images):
  text = apply(variables, TOKENS, method="encode_text")
  assert text.features.shape == (3, 6, 16) and text.embedding.shape == (3, 7)
  assert text.eot.tolist() == [3, 2, 5] and text.eot.dtype == jnp.int32
  assert apply(variables, images, method="encode_image").shape == (3, 7)
  # The embedding is the projected feature at the end of the text.
  at_end = np.stack([text.features[i, end] for i, end in enumerate(text.eot)])
  np.testing.assert_allclose(at_end @ variables["params"]["text_projection"]["kernel"], text.embedding, atol=1e-6)


def test_text_sees_only_what_stands_before(variables):
  changed = TOKENS.copy()
  changed[:, 4:] = 33
  before, after = (apply(variables, tokens, method="encode_text").features for tokens in (TOKENS, changed))
  np.testing.assert_allclose(before[:, :4], after[:, :4], atol=1e-6)
  assert (np.abs(before[:, 4:] - after[:, 4:]).max(axis=-1) > 1e-3).all()


def test_embed_text_is_the_embedding_of_encode_text(variables):
  embedding = apply(variables, TOKENS, method="embed_text")
  np.testing.assert_allclose(embedding, apply(variables, TOKENS, method="encode_text").embedding, atol=1e-5)


@pytest.mark.parametrize("eot_id, expected", [(clip.LEGACY_EOT_ID, [1, 3]), (5, [2, 0])])
def test_end_of_text_rules(eot_id, expected):
  tokens = np.array([[3, 9, 5, 5], [5, 5, 0, 8]], np.int32)
  assert clip.eot_position(tokens, eot_id).tolist() == expected


@pytest.mark.slow
def test_images_of_other_sizes_are_resized(variables, images):
  large = np.random.default_rng(1).uniform(-1, 1, (3, 40, 40, 3)).astype(np.float32)
  by_hand = jax.image.resize(large, images.shape, "bicubic")
  np.testing.assert_allclose(
    apply(variables, large, method="encode_image"), apply(variables, by_hand, method="encode_image"), atol=1e-5
  )


@pytest.mark.slow
def test_colours_are_normalized(variables):
  # An image of the mean color is all zeros to the tower; one standard deviation more is all ones.
  mean, std = np.asarray(IMAGE.mean), np.asarray(IMAGE.std)
  plain = ImageConfig(**(dataclasses.asdict(IMAGE) | {"mean": (0.5,) * 3, "std": (0.5,) * 3}))
  plain = dataclasses.replace(CONFIG, image=plain)  # takes [-1, 1] as it comes
  for value in (0.0, 1.0):
    image = np.broadcast_to(2 * (mean + value * std) - 1, (1, 16, 16, 3)).astype(np.float32)
    as_it_comes = np.full((1, 16, 16, 3), value, np.float32)
    np.testing.assert_allclose(
      apply(variables, image, method="encode_image"),
      apply(variables, as_it_comes, method="encode_image", config=plain),
      atol=1e-5,
    )


@pytest.mark.slow
def test_every_pixel_counts(variables, images):
  gradient = jax.grad(lambda x: apply(variables, x, method="encode_image").sum())(images)
  assert np.isfinite(gradient).all() and (np.abs(gradient) > 0).mean() > 0.99


@pytest.mark.slow
def test_loop_and_recomputation_change_nothing(variables, images, monkeypatch):
  def value_and_gradient(**options):
    def loss(variables):
      module = Clip(CONFIG, **options)
      text, image, _ = module.apply(variables, TOKENS, images)
      return jnp.sum(text.features**2) + jnp.sum(jnp.sin(image)) + jnp.sum(text.embedding)

    return jax.jit(jax.value_and_grad(loss))(variables)

  expected, expected_gradient = value_and_gradient()
  monkeypatch.setattr(clip, "_UNROLLED_LAYERS", 1)
  value, gradient = value_and_gradient(remat=True)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), gradient, expected_gradient)


@pytest.mark.slow
def test_bfloat16(variables, images):
  text = apply(variables, TOKENS, method="encode_text", dtype=jnp.bfloat16)
  exact = apply(variables, TOKENS, method="encode_text")
  image = apply(variables, images, method="encode_image", dtype=jnp.bfloat16)
  assert text.features.dtype == text.embedding.dtype == image.dtype == jnp.float32
  assert 0 < np.abs(text.features - exact.features).max() < 0.1
  assert np.abs(image - apply(variables, images, method="encode_image")).max() < 0.1


def test_normalize():
  x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
  np.testing.assert_allclose(losses.normalize(x), [[0.6, 0.8], [0, 0]], atol=1e-6)
  assert np.isfinite(jax.grad(lambda x: losses.normalize(x).sum())(x)).all()


def test_impossible_sizes():
  with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
    dataclasses.replace(TEXT, width=10)
  with pytest.raises(ValueError, match="size 16 is not a multiple of the patch 5"):
    dataclasses.replace(IMAGE, patch=5)
  with pytest.raises(ValueError, match="unknown activation 'relu'"):
    dataclasses.replace(TEXT, activation="relu")
  with pytest.raises(ValueError, match="layers must be at least 1, it is 0"):
    dataclasses.replace(TEXT, layers=0)


def test_too_many_tokens(variables):
  with pytest.raises(ValueError, match="10 tokens, the context holds 9"):
    apply(variables, np.zeros((1, 10), np.int32), method="encode_text")
