"""L2 and dot-product attention against torch; chunks; gradients at zero distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from aurora_jax.ops import attention


@pytest.fixture(scope="module")
def inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  return [jax.random.normal(key, (2, count, 3, 4)) for key, count in zip(keys, (12, 7, 7))]


def to_torch(array):
  return torch.tensor(np.asarray(array)).permute(0, 2, 1, 3)


def test_l2_attention_equals_torch_cdist(inputs):
  queries, keys, values = map(to_torch, inputs)
  weights = torch.softmax(-torch.cdist(queries, keys) / 2, dim=-1)
  expected = (weights @ values).permute(0, 2, 1, 3).numpy()
  np.testing.assert_allclose(attention.l2_attention(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_dot_attention_equals_torch(inputs):
  expected = torch.nn.functional.scaled_dot_product_attention(*map(to_torch, inputs)).permute(0, 2, 1, 3).numpy()
  np.testing.assert_allclose(attention.dot_attention(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_chunks_change_neither_values_nor_gradients(inputs):
  def run(chunk):
    return jax.value_and_grad(lambda q: jnp.sum(jnp.sin(attention.l2_attention(q, *inputs[1:], chunk=chunk))))(
      inputs[0]
    )

  (value, gradient), (chunked_value, chunked_gradient) = run(None), run(4)
  assert value == pytest.approx(float(chunked_value), rel=1e-5)
  np.testing.assert_allclose(gradient, chunked_gradient, rtol=1e-4, atol=1e-6)
  with pytest.raises(ValueError, match="5 does not divide 12"):
    attention.l2_attention(*inputs, chunk=5)


@pytest.mark.slow
def test_zero_distance_has_a_zero_gradient(inputs):
  same = inputs[1]
  gradient = jax.grad(lambda t: jnp.sum(attention.l2_attention(t, t, inputs[2]) ** 2))(same)
  assert bool(jnp.all(jnp.isfinite(gradient)))
  assert float(jax.grad(attention.safe_sqrt)(0.0)) == 0.0
  second = jax.grad(
    lambda t: jnp.sum(jax.grad(lambda u: jnp.sum(attention.l2_attention(u, u, inputs[2]) ** 2))(t) ** 2)
  )(same)
  assert bool(jnp.all(jnp.isfinite(second)))
