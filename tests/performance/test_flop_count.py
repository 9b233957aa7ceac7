"""The count of floating-point operations against products that one can multiply out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from aurora_jax.ops import moe
from aurora_jax.performance import flop_count


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products():
  assert flop_count.count(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
  assert (
    flop_count.count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), shape(2, 3, 5), shape(2, 5, 7)) == 2 * 2 * 3 * 5 * 7
  )
  assert flop_count.count(lambda a: jnp.exp(a) + a, shape(3, 5)) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
  def conv(x, kernel):
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )

  assert flop_count.count(conv, shape(2, 4, 4, 6), shape(3, 3, 6 // groups, 8)) == 2 * (2 * 4 * 4 * 8) * 9 * 6 // groups


def test_loops_and_branches():
  def looped(x):
    return jax.lax.fori_loop(0, 10, lambda i, y: y @ y, x)  # a known number of trips becomes a scan

  def branched(flag, x):
    return jax.lax.cond(flag, lambda x: x @ x, lambda x: x @ x @ x, x)

  once = 2 * 4**3
  assert flop_count.count(looped, shape(4, 4)) == 10 * once
  assert flop_count.count(branched, jax.ShapeDtypeStruct((), bool), shape(4, 4)) == 2 * once
  assert flop_count.count(jax.jit(jax.checkpoint(lambda x: x @ x)), shape(4, 4)) == once
  gradient = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.sin(x @ x))(x)))
  assert flop_count.count(gradient, shape(4, 4)) == 4 * once  # forward, forward again, two products backward


@pytest.mark.parametrize("backend", ["grouped", "kernel"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_whose_loads_are_unknown(monkeypatch, dtype, backend):
  """Forward three products of T x D x F, six more backward: what a dense layer does, whatever the loads are."""
  monkeypatch.setattr(moe, "_REPEATED_BYTES", 0)
  tokens, width, hidden, experts = 64, 8, 12, 4
  params = moe.ExpertParams(
    shape(experts, width, 2 * hidden), shape(experts, 2 * hidden), shape(experts, hidden, width), shape(experts, width)
  )
  arguments = jax.ShapeDtypeStruct((tokens, width), dtype), jax.ShapeDtypeStruct((tokens,), jnp.int32), params
  run = lambda x, expert, params: jnp.sum(moe.expert_ffn(x, expert, params, backend))
  once = 2 * 3 * tokens * width * hidden
  # The kernel backend adds biases by a product with a one-hot matrix.
  biases = 2 * tokens * experts * (2 * hidden + width) if backend == "kernel" else 0
  assert flop_count.count(run, *arguments) == once + biases
  jaxpr = jax.make_jaxpr(jax.grad(run, argnums=(0, 2), allow_int=True))(*arguments).jaxpr
  assert flop_count.of_jaxpr(jaxpr) == 3 * once + 2 * biases
  if backend == "grouped":
    assert flop_count.by_precision(jaxpr) == {jnp.dtype(dtype).name: 3 * once}


def test_by_precision():
  """A product is "highest" only if both operands ask for it; branches and loops keep the kinds apart."""

  def products(flag, x, y):
    x = jax.lax.dot(x, x, precision=jax.lax.Precision.HIGHEST)
    x = jax.lax.dot(x, x, precision=(jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT))
    y = jax.lax.fori_loop(0, 3, lambda i, y: y @ y, y)
    return x, jax.lax.cond(flag, lambda y: y @ y @ y, lambda y: y, y)

  arguments = jax.ShapeDtypeStruct((), bool), shape(4, 4), jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
  jaxpr, once = jax.make_jaxpr(products)(*arguments).jaxpr, 2 * 4**3
  counted = flop_count.by_precision(jaxpr)
  assert counted == {flop_count.HIGHEST: once, "float32": once, "bfloat16": 5 * once}
  assert flop_count.of_jaxpr(jaxpr) == counted.total()


def test_a_loop_without_known_trips_is_refused():
  def until(x):
    return jax.lax.while_loop(lambda y: jnp.sum(y) < 1, lambda y: y @ y, x)

  with pytest.raises(ValueError, match="number of trips is unknown"):
    flop_count.count(until, shape(4, 4))


ONCE = 2 * 4**3  # of a product of two 4 x 4 matrices


def jaxpr_of(function, *arguments):
  return jax.make_jaxpr(function)(*arguments).jaxpr


def test_usual_branches():
  ladder = lambda i, x: jax.lax.switch(i, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)
  jaxpr = jaxpr_of(ladder, jnp.int32(0), shape(4, 4))
  assert flop_count.of_jaxpr(jaxpr) == 2 * ONCE
  assert flop_count.of_jaxpr(jaxpr, flop_count.usual_branch) == ONCE  # doing nothing is not what a step usually does


def test_the_exchange_is_the_usual_branch_though_its_fall_back_is_cheaper():
  mesh = jax.make_mesh((1,), ("e",), axis_types=(jax.sharding.AxisType.Auto,))

  def body(x):
    exchanged = lambda x: jax.lax.all_to_all(x, "e", 0, 0, tiled=True) @ x @ x
    return jax.lax.cond(x[0, 0] > 0, exchanged, lambda x: x @ x, x)

  spec = jax.P("e")
  jaxpr = jaxpr_of(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec), shape(4, 4))
  assert flop_count.of_jaxpr(jaxpr, flop_count.usual_branch) == 2 * ONCE


def test_branches_by_platform():
  jaxpr = jaxpr_of(
    lambda x: jax.lax.platform_dependent(x, cpu=lambda x: x @ x, default=lambda x: x @ x @ x), shape(4, 4)
  )
  assert [flop_count.of_jaxpr(jaxpr, platform=name) for name in ("cpu", "cuda", "tpu")] == [ONCE, 2 * ONCE, 2 * ONCE]


def test_a_kernel_counts_for_every_point_of_its_grid():
  def body(x, y, out):
    out[...] = x[...] @ y[...]

  whole = pl.BlockSpec((8, 16), lambda i: (0, 0))
  kernel = pl.pallas_call(
    body,
    jax.ShapeDtypeStruct((32, 16), jnp.float32),
    grid=(4,),
    in_specs=[pl.BlockSpec((8, 8), lambda i: (i, 0)), whole],
    out_specs=pl.BlockSpec((8, 16), lambda i: (i, 0)),
    interpret=True,
  )
  assert flop_count.count(kernel, jnp.zeros((32, 8)), jnp.zeros((8, 16))) == 2 * 32 * 8 * 16
