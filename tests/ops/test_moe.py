"""The MoE backends against each other and against a plain loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.ops import moe

TOKENS, WIDTH, HIDDEN, EXPERTS = 200, 8, 12, 4


@pytest.fixture(scope="module")
def params():
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (EXPERTS, WIDTH, 2 * HIDDEN), (EXPERTS, 2 * HIDDEN), (EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH)
  return moe.ExpertParams(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes)))


ROUTINGS = {
  "uniform": np.arange(TOKENS) % EXPERTS,
  "skewed": np.where(np.arange(TOKENS) % 3, 1, np.arange(TOKENS) % EXPERTS),
  "one expert": np.full(TOKENS, 2),
  "last token alone": np.r_[np.zeros(TOKENS - 1, int), 3],
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_backends_agree_in_values_and_gradients(params, routing):
  expert = jnp.asarray(ROUTINGS[routing], jnp.int32)
  x = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))
  target = jax.random.normal(jax.random.key(2), (TOKENS, WIDTH))

  def run(backend):
    def loss(x, params):
      out = moe.expert_ffn(x, expert, params, backend)
      return jnp.sum(out * target), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, params)
    return out, gradients

  by_hand = np.stack(
    [
      np.asarray(moe.geglu_ffn(x[t : t + 1], jax.tree.map(lambda p: p[ROUTINGS[routing][t]], params)))[0]
      for t in range(0, TOKENS, 37)
    ]
  )
  expected, expected_gradients = run("dense")
  np.testing.assert_allclose(expected[::37], by_hand, rtol=1e-4, atol=1e-4)
  for backend in ("bucket", "grouped"):
    out, gradients = run(backend)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4, err_msg=backend)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)):
      np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=backend)


def test_position_in_expert_counts_in_order():
  position, load = moe.position_in_expert(jnp.array([2, 0, 2, 2, 0]), 3)
  assert position.tolist() == [0, 0, 1, 2, 1]
  assert load.tolist() == [2, 0, 3]


def test_router_losses_by_hand():
  # Two images of two tokens, three experts; uniform logits: log Z = log 3, balance = E * sum f_e / E = 1.
  z_loss, balance = moe.router_losses(jnp.zeros((2, 2, 3)), jnp.array([[0, 1], [2, 2]]))
  assert z_loss == pytest.approx(np.log(3) ** 2, rel=1e-6)
  assert balance == pytest.approx(1.0, rel=1e-6)
  # All tokens to expert 0 with certainty: f = P = (1, 0, 0), E^2 * mean over experts of f P = 9 / 3.
  _, balance = moe.router_losses(jnp.array([[[50.0, 0, 0]] * 2]), jnp.zeros((1, 2), jnp.int32))
  assert balance == pytest.approx(3.0, rel=1e-5)


def test_unknown_backend_is_named(params):
  with pytest.raises(ValueError, match="ragged"):
    moe.expert_ffn(jnp.zeros((4, WIDTH)), jnp.zeros(4, jnp.int32), params, "ragged")
