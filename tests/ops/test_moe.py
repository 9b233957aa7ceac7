"""Mixture of experts: small cases by hand, and the backends against each other and against a plain loop over tokens."""

import functools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.ops import large_experts, moe

TOKENS, WIDTH, HIDDEN, EXPERTS = 200, 8, 12, 4
expert_ffn = jax.jit(moe.expert_ffn, static_argnums=3)
BACKENDS = [pytest.param(backend, id=backend) for backend in moe.BACKENDS]


@pytest.fixture(scope="module")
def params():
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (EXPERTS, WIDTH, 2 * HIDDEN), (EXPERTS, 2 * HIDDEN), (EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH)
  return moe.ExpertParams(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes)))


def scaling_experts(*factors):
  """Experts of width 1 that multiply a token by their factor: the gate is 100, and gelu(100) = 100."""
  count = len(factors)
  in_weight = jnp.tile(jnp.array([[1.0, 0.0]]), (count, 1, 1))
  in_bias = jnp.tile(jnp.array([0.0, 100.0]), (count, 1))
  out_weight = jnp.asarray(factors, jnp.float32).reshape(count, 1, 1) / 100
  return moe.ExpertParams(in_weight, in_bias, out_weight, jnp.zeros((count, 1)))


# ----------------------------------------------------------------------------------------------------------------------
# One expert


def expert_of_one(value, gate, out, bias=0.0):
  return moe.ExpertParams(jnp.array([[value, gate]]), jnp.array([0.0, 0.0]), jnp.array([[out]]), jnp.array([bias]))


def gelu(x):
  return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("x", [-2.0, 0.0, 0.5, 3.0])
def test_geglu_of_one_number(x):
  out = moe.geglu_ffn(jnp.array([[x]]), expert_of_one(value=3.0, gate=0.5, out=2.0, bias=-1.0))
  assert out.tolist() == [[pytest.approx(2 * (3 * x) * gelu(0.5 * x) - 1, rel=1e-5, abs=1e-6)]]


def test_a_closed_gate_leaves_the_bias():
  out = moe.geglu_ffn(jnp.array([[7.0], [-7.0]]), expert_of_one(value=3.0, gate=0.0, out=2.0, bias=4.0))
  assert out.tolist() == [[4.0], [4.0]]


def test_fan_in_divides_each_product():
  # 4 inputs of 1 sum to 4, over sqrt(4); 9 hidden values of 2 * gelu(2) sum to 18 gelu(2), over sqrt(9).
  ones = moe.ExpertParams(jnp.ones((4, 18)), jnp.zeros(18), jnp.ones((9, 1)), jnp.zeros(1))
  assert moe.geglu_ffn(jnp.ones((1, 4)), ones)[0, 0] == pytest.approx(6 * gelu(2.0), rel=1e-5)


def test_the_first_half_is_the_value_and_the_second_the_gate():
  swapped = expert_of_one(value=0.0, gate=5.0, out=1.0)
  assert moe.geglu_ffn(jnp.array([[1.0]]), swapped)[0, 0] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_compute_type_is_that_of_the_tokens(params, backend):
  x = jnp.ones((4, WIDTH), jnp.bfloat16)
  out = expert_ffn(x, jnp.array([0, 1, 2, 3]), params, backend)
  assert out.dtype == jnp.bfloat16 and out.shape == x.shape


# ----------------------------------------------------------------------------------------------------------------------
# Queues and slots


@pytest.mark.parametrize(
  "expert, experts, position, load",
  [
    ([2, 0, 2, 2, 0], 3, [0, 0, 1, 2, 1], [2, 0, 3]),
    ([1, 1, 1], 2, [0, 1, 2], [0, 3]),  # all tokens on one expert
    ([3], 4, [0], [0, 0, 0, 1]),  # three experts without tokens
    ([0, 1, 2, 0, 1, 2], 3, [0, 0, 0, 1, 1, 1], [2, 2, 2]),  # equal loads
    ([0, 0], 1, [0, 1], [2]),
  ],
)
def test_position_in_expert_counts_in_order(expert, experts, position, load):
  found = moe.position_in_expert(jnp.array(expert), experts)
  assert [x.tolist() for x in found] == [position, load]
  assert all(x.dtype == jnp.int32 for x in found)


def test_tokens_return_from_their_slots():
  x = jnp.array([[1.0], [2.0], [3.0]])
  seen = []

  def feed_forward(slots):
    seen.append(slots)
    return 10 * slots

  out = moe.through_slots(x, jnp.array([4, 0, 2]), 5, feed_forward)
  assert seen[0].tolist() == [[2.0], [0.0], [3.0], [0.0], [1.0]]  # empty slots hold zeros
  assert out.tolist() == [[10.0], [20.0], [30.0]]


def test_a_token_without_a_slot_gives_zeros():
  x = jnp.array([[1.0], [2.0]])
  out, gradient = jax.value_and_grad(
    lambda x: (y := moe.through_slots(x, jnp.array([3, 0]), 3, lambda s: s + 1), jnp.sum(y))[1]
  )(x)
  assert out == 3.0 and gradient.tolist() == [[0.0], [1.0]]


def test_a_bucket_drops_what_exceeds_its_capacity():
  expert = jnp.array([0, 0, 0, 1])
  position, _ = moe.position_in_expert(expert, 2)
  x = jnp.array([[1.0], [2.0], [3.0], [4.0]])
  bucket_ffn = jax.jit(moe.bucket_ffn, static_argnums=4)
  out = lambda capacity: bucket_ffn(x, expert, position, scaling_experts(2.0, 5.0), capacity)[:, 0].tolist()
  assert out(2) == pytest.approx([2, 4, 0, 20], rel=1e-5)
  assert out(3) == pytest.approx([2, 4, 6, 20], rel=1e-5)
  assert out(1) == pytest.approx([2, 0, 0, 20], rel=1e-5)


@pytest.mark.parametrize(
  "tokens, experts, size", [(1, 1, 64), (200, 4, 64), (1024, 4, 128), (2047, 8, 64), (4096, 4, 256), (10**6, 4, 256)]
)
def test_tile_sizes(tokens, experts, size):
  assert moe._tile_size(tokens, experts) == size


# ----------------------------------------------------------------------------------------------------------------------
# All tokens through their experts


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
  "expert, factors",
  [
    ([0, 1, 2, 0], (2.0, 3.0, 5.0)),
    ([1, 1, 1, 1], (2.0, 3.0, 5.0)),  # all on one expert, which is more than any rung but the last holds
    ([2, 2, 0, 0], (2.0, 3.0, 5.0)),  # an expert without tokens between two with
    ([0, 0, 0, 0], (7.0,)),  # a single expert
    ([3, 1, 2, 0], (2.0, 3.0, 5.0, 7.0)),  # one token each
    ([6, 0, 6, 4], (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)),  # more experts than tokens
  ],
)
def test_each_token_meets_its_own_expert(backend, expert, factors):
  x = jnp.array([[1.0], [-2.0], [3.0], [0.5]])
  out = expert_ffn(x, jnp.array(expert), scaling_experts(*factors), backend)
  expected = [float(value) * factors[e] for value, e in zip(x[:, 0], expert)]
  np.testing.assert_allclose(out[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_token(backend):
  out = expert_ffn(jnp.array([[3.0]]), jnp.array([1]), scaling_experts(2.0, 5.0), backend)
  np.testing.assert_allclose(out, [[15.0]], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_tokens_learns_nothing(params, backend):
  expert = jnp.array([0, 2, 2, 0, 3])
  x = jax.random.normal(jax.random.key(5), (5, WIDTH))
  gradients = jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(moe.expert_ffn(x, expert, params, backend)))))(params)
  for gradient in gradients:
    norms = jnp.sum(jnp.abs(gradient.reshape(EXPERTS, -1)), axis=1)
    assert norms[1] == 0 and (norms[jnp.array([0, 2, 3])] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_the_tokens_is_their_experts_factor(backend):
  run = lambda x: jnp.sum(expert_ffn(x, jnp.array([1, 0, 1]), scaling_experts(2.0, 5.0), backend))
  np.testing.assert_allclose(jax.grad(run)(jnp.array([[1.0], [2.0], [3.0]])), [[5.0], [2.0], [5.0]], rtol=1e-5)


ROUTINGS = {
  "uniform": np.arange(TOKENS) % EXPERTS,
  "skewed": np.where(np.arange(TOKENS) % 3, 1, np.arange(TOKENS) % EXPERTS),
  "one expert": np.full(TOKENS, 2),
  "last token alone": np.r_[np.zeros(TOKENS - 1, int), 3],
}


@functools.partial(jax.jit, static_argnums=4)
def outputs_and_gradients(x, expert, params, target, backend):
  """Compiled once per backend for all routings."""

  def loss(x, params):
    out = moe.expert_ffn(x, expert, params, backend)
    return jnp.sum(out * target), out

  (_, out), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
  return out, gradients


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_backends_agree_in_values_and_gradients(params, routing):
  expert = jnp.asarray(ROUTINGS[routing], jnp.int32)
  x = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))
  target = jax.random.normal(jax.random.key(2), (TOKENS, WIDTH))
  run = lambda backend: outputs_and_gradients(x, expert, params, target, backend)
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


@pytest.mark.parametrize("fullest", [2, 3, 4, 5, 8])
def test_no_rung_of_the_ladder_drops_a_token(fullest):
  # 8 tokens, 4 experts: the rungs hold 3 and 4 tokens per expert, the last one any number.
  expert = [0] * fullest + [1, 2, 3, 1, 2, 3][: 8 - fullest]
  x = jnp.arange(1.0, 9.0)[:, None]
  out = expert_ffn(x, jnp.array(expert), scaling_experts(1.0, 2.0, 3.0, 4.0), "bucket")
  np.testing.assert_allclose(out[:, 0], [float(x[t, 0]) * (e + 1) for t, e in enumerate(expert)], rtol=1e-5)


@pytest.mark.parametrize("factors", [(1.0,), (0.1,), (100.0,), (0.5, 1.0, 1.0, 4.0)])
def test_any_capacity_factors_are_exact(factors):
  expert = jnp.array([0, 0, 0, 1, 1, 0])
  x = jnp.arange(1.0, 7.0)[:, None]
  run = lambda x: moe.expert_ffn(x, expert, scaling_experts(2.0, 5.0, 7.0), "bucket", factors)
  np.testing.assert_allclose(jax.jit(run)(x)[:, 0], [2, 4, 6, 20, 25, 12], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_large_experts_go_one_after_the_other(params, monkeypatch, dtype, tolerance):
  """Against the dense backend in float32, relative to the largest entry of each array."""
  x = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))
  target = jax.random.normal(jax.random.key(2), (TOKENS, WIDTH))
  monkeypatch.setattr(moe, "_REPEATED_BYTES", 0)
  large = jax.jit(outputs_and_gradients.__wrapped__, static_argnums=4)
  for name, routing in ROUTINGS.items():
    expert = jnp.asarray(routing, jnp.int32)
    expected = outputs_and_gradients(x, expert, params, target, "dense")
    got = large(x.astype(dtype), expert, params, target, "grouped")
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      assert jnp.abs(ours - theirs).max() <= tolerance * jnp.abs(theirs).max(), name
    unused = np.setdiff1d(np.arange(EXPERTS), routing)
    assert not any(np.any(np.asarray(gradient)[unused]) for gradient in got[1][1])
  assert "while" in large.lower(x, expert, params, target, "grouped").as_text()


@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_large_experts_with_few_tokens(monkeypatch, tokens):
  monkeypatch.setattr(moe, "_REPEATED_BYTES", 0)
  factors = np.array([2.0, 5.0, 7.0])
  expert = np.arange(tokens) ** 2 % 3  # none for the last expert
  x = jnp.arange(1.0, tokens + 1)[:, None]
  run = jax.jit(lambda x, expert: moe.expert_ffn(x, expert, scaling_experts(*factors), "grouped"))
  np.testing.assert_allclose(run(x, jnp.asarray(expert))[:, 0], factors[expert] * x[:, 0], rtol=1e-5)


@pytest.mark.parametrize("tokens, experts", [(1, 1), (3, 8), (200, 4), (131072, 7)])
def test_large_experts_take_every_row_once(tokens, experts):
  """Whatever the loads are."""

  def body(expert, first, own, taken):
    return taken.at[first + jnp.arange(own.size)].add(jnp.where(own[:, 0], 1 + 1000 * expert, 0))

  run = jax.jit(lambda load: large_experts._for_each_expert(load, tokens, body, jnp.zeros(tokens, jnp.int32)))
  rng = np.random.default_rng(0)
  for load in (
    rng.multinomial(tokens, np.full(experts, 1 / experts)),
    rng.multinomial(tokens, rng.dirichlet(np.full(experts, 0.3))),
    np.eye(experts, dtype=int)[-1] * tokens,
  ):
    np.testing.assert_array_equal(run(load), 1 + 1000 * np.repeat(np.arange(experts), load))


def test_without_tokamax_the_line_says_what_to_install(params, monkeypatch):
  monkeypatch.setitem(sys.modules, "tokamax", None)
  with pytest.raises(UserError, match=r"generator.moe_backend='kernel': .*pip install 'aurora_jax\[kernels\]'"):
    moe.expert_ffn(jnp.zeros((4, WIDTH)), jnp.zeros(4, jnp.int32), params, "kernel")


_COMMAND_LINE = """
import jax, jax.numpy as jnp
from aurora_jax.ops import moe
params = moe.ExpertParams(jnp.ones((2, 4, 8)), jnp.ones((2, 8)), jnp.ones((2, 4, 4)), jnp.ones((2, 4)))
print(moe.expert_ffn(jnp.ones((3, 4)), jnp.array([0, 1, 1]), params, "kernel").shape)
"""


@pytest.mark.slow
def test_tokamax_leaves_the_command_line_alone():
  done = subprocess.run(
    [sys.executable, "-c", _COMMAND_LINE, "train", "--config", "x.py", "--config.data.path=y"],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "(3, 4)\n" and done.stderr == ""


def test_unknown_backend_is_named(params):
  with pytest.raises(ValueError, match="ragged"):
    moe.expert_ffn(jnp.zeros((4, WIDTH)), jnp.zeros(4, jnp.int32), params, "ragged")


# ----------------------------------------------------------------------------------------------------------------------
# Router losses


def test_losses_of_a_uniform_router():
  # Two images of two tokens, three experts: log Z = log 3, balance = E * sum of f P = sum of f = 1, whatever f is.
  for expert in ([[0, 1], [2, 2]], [[0, 0], [0, 0]]):
    z_loss, balance = moe.router_losses(jnp.zeros((2, 2, 3)), jnp.array(expert))
    assert z_loss == pytest.approx(np.log(3) ** 2, rel=1e-6)
    assert balance == pytest.approx(1.0, rel=1e-6)


def test_balance_of_a_certain_router():
  # All tokens to expert 0 with certainty: f = P = (1, 0, 0), and the loss is E; each of three to its own: f P = 1 / 9.
  _, balance = moe.router_losses(jnp.array([[[50.0, 0, 0]] * 2]), jnp.zeros((1, 2), jnp.int32))
  assert balance == pytest.approx(3.0, rel=1e-5)
  _, balance = moe.router_losses(50 * jnp.eye(3)[None], jnp.arange(3)[None])
  assert balance == pytest.approx(1.0, rel=1e-5)


def test_losses_of_a_known_distribution():
  # exp(logits) = (4, 2, 2), P = (1/2, 1/4, 1/4); of four tokens f = (1/2, 1/4, 1/4).
  logits = jnp.broadcast_to(jnp.log(jnp.array([4.0, 2.0, 2.0])), (1, 4, 3))
  z_loss, balance = moe.router_losses(logits, jnp.array([[0, 0, 1, 2]]))
  assert z_loss == pytest.approx(math.log(8) ** 2, rel=1e-6)
  assert balance == pytest.approx(3 * (1 / 4 + 1 / 16 + 1 / 16), rel=1e-6)
  _, worse = moe.router_losses(logits, jnp.array([[0, 0, 0, 0]]))
  assert worse == pytest.approx(3 / 2, rel=1e-6)


def test_the_z_loss_is_a_mean_of_squares():
  # log Z = log 2 and log 6: exp(logits) = (1, 1) and (2, 4).
  z_loss, _ = moe.router_losses(jnp.log(jnp.array([[[1.0, 1.0], [2.0, 4.0]]])), jnp.array([[0, 1]]))
  assert z_loss == pytest.approx((math.log(2) ** 2 + math.log(6) ** 2) / 2, rel=1e-6)
  shifted, _ = moe.router_losses(jnp.log(jnp.array([[[1.0, 1.0], [2.0, 4.0]]])) + 1, jnp.array([[0, 1]]))
  assert shifted == pytest.approx(((math.log(2) + 1) ** 2 + (math.log(6) + 1) ** 2) / 2, rel=1e-6)


def test_the_balance_does_not_depend_on_a_shift_of_the_logits():
  logits, expert = jax.random.normal(jax.random.key(0), (2, 5, 3)), jnp.array([[0, 1, 2, 0, 0], [2, 2, 1, 0, 1]])
  balances = [float(moe.router_losses(logits + shift, expert)[1]) for shift in (0.0, 7.0)]
  assert balances[0] == pytest.approx(balances[1], rel=1e-5)


def test_the_balance_is_per_image():
  # Each image has a single expert, both together have two: a balance over the batch would be 1.
  logits = 50 * jax.nn.one_hot(jnp.array([[0, 0], [1, 1]]), 2)
  _, balance = moe.router_losses(logits, jnp.array([[0, 0], [1, 1]]))
  assert balance == pytest.approx(2.0, rel=1e-5)


def test_the_gradient_of_the_balance_goes_through_the_probabilities():
  # One token: E * sum of f P = E P_e, whose gradient is E P_j (1[j = e] - P_e).
  logits = jnp.log(jnp.array([[[1.0, 2.0, 5.0]]]))
  gradient = jax.grad(lambda logits: moe.router_losses(logits, jnp.array([[1]]))[1])(logits)
  probability = np.array([1, 2, 5]) / 8
  np.testing.assert_allclose(gradient[0, 0], 3 * probability * (np.eye(3)[1] - probability[1]), rtol=1e-5)


def test_large_logits_stay_finite():
  z_loss, balance = moe.router_losses(jnp.array([[[1e4, 0.0], [0.0, 1e4]]]), jnp.array([[0, 1]]))
  assert z_loss == pytest.approx(1e8, rel=1e-5) and balance == pytest.approx(1.0, rel=1e-5)
