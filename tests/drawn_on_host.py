"""First weights for tests that do not ask how they were drawn.

A program that initializes a small network draws a hundred arrays. Each takes a tenth of a second to compile, more than
anything that is done with it.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@contextlib.contextmanager
def drawn_on_host(seed=0):
  """Within it, a program that is traced gets normal and uniform numbers from NumPy, as constants. Keys do not count."""
  rng = np.random.default_rng(seed)

  def normal(key, shape=(), dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  def uniform(key, shape=(), dtype=jnp.float32, minval=0.0, maxval=1.0):
    return jnp.asarray(rng.uniform(minval, maxval, shape), dtype)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.random, "normal", normal)
    patch.setattr(jax.random, "uniform", uniform)
    yield
