"""The base class of networks: parameters that are there are not initialized again, and have their shapes."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.models.module import Module

TRACED = []


def ones(key, shape):
  TRACED.append(shape)
  return jnp.ones(shape)


class Scale(Module):
  width: int

  @nn.compact
  def __call__(self, x):
    return x * self.param("scale", ones, (self.width,)) + self.param("offset", lambda key: jnp.zeros(()))


class Twice(Module):
  @nn.compact
  def __call__(self, x):
    layer = nn.remat(Scale)(3, name="layer")
    return layer(layer(x))


def test_initializers_are_traced_by_init_alone():
  x = jnp.arange(3.0)
  variables = Twice().init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, variables) == {"params": {"layer": {"scale": (3,), "offset": ()}}}
  TRACED.clear()
  out = jax.jit(Twice().apply)({"params": {"layer": {"scale": 2 * jnp.ones(3), "offset": jnp.float32(1)}}}, x)
  np.testing.assert_array_equal(out, 2 * (2 * x + 1) + 1)
  assert TRACED == []


def test_a_parameter_of_another_shape_is_refused():
  with pytest.raises(flax.errors.ScopeParamShapeError, match="scale"):
    Scale(3).apply({"params": {"scale": jnp.ones(1), "offset": jnp.zeros(())}}, jnp.ones(3))
  with pytest.raises(flax.errors.ScopeParamNotFoundError, match="offset"):
    Scale(3).apply({"params": {"scale": jnp.ones(3)}}, jnp.ones(3))
