"""A pull-back cut in one program and joined in another gives the gradient, and carries over no more than it must."""

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.training import pull_back


def test_a_gradient_in_two_programs():
  params = {"first": jnp.arange(12.0).reshape(3, 4) / 10, "second": jnp.ones((4, 2)), "unused": jnp.ones(5)}
  x, cotangent = jnp.linspace(-1, 1, 21).reshape(7, 3), jnp.arange(14.0).reshape(7, 2)

  def network(params):
    hidden = jnp.tanh(x @ params["first"])
    return hidden @ params["second"]

  @jax.jit
  def forward(params):
    out, back = jax.vjp(network, params)
    return out, pull_back.cut(back, params)

  backward = jax.jit(lambda params, residuals, cotangent: pull_back.join(residuals, params)(cotangent)[0])
  out, residuals = forward(params)
  np.testing.assert_allclose(out, network(params), rtol=1e-6)
  expected = jax.grad(lambda params: jnp.sum(network(params) * cotangent))(params)
  got = backward(params, residuals, cotangent)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)
  # The parameters stay at home, though both products need them.
  shapes = [leaf.shape for leaf in residuals.computed]
  assert ("shared", 1) in residuals.origins and (4, 2) not in shapes and (3, 4) not in shapes
  assert (7, 4) in shapes
