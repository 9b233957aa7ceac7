"""The fused kernels of L2 attention, in Pallas's interpreter, against XLA's operations; compiled for accelerators."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from aurora_jax import config
from aurora_jax.errors import UserError
from aurora_jax.ops import attention, l2_flash, l2_flash_gpu, l2_flash_tpu
from aurora_jax.parallel import mesh
from aurora_jax.parallel.attention import Sharded
from aurora_jax.systems.aurora import config as aurora_config
from aurora_jax.systems.aurora import discriminator, generator

_ROOT = pathlib.Path(__file__).parents[2]
REFERENCE = attention.by_xla(None)
KERNELS = pytest.mark.parametrize("kernels", ["tpu", "gpu"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks of queries and of keys at small sizes."""
  for module, name, size in (
    (l2_flash_tpu, "_QUERIES", 128),
    (l2_flash_tpu, "_KEYS", 48),
    (l2_flash_gpu, "_FORWARD", 32),
    (l2_flash_gpu, "_BACKWARD", 32),
  ):
    monkeypatch.setattr(module, name, size)


def draw(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def fused(kernels):
  return lambda *arrays: l2_flash.attend(*arrays, REFERENCE, kernels)


def outputs_and_gradients(attend, arrays):
  """Output and gradients of all arrays, for a fixed random gradient of the output."""

  @jax.jit
  def run(arrays):
    out, pull_back = jax.vjp(attend, *arrays)
    return out, *pull_back(draw(9, *out.shape).astype(out.dtype))

  return run(arrays)


def deviation(found, wanted):
  """The largest, relative to the largest entry."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  assert found.shape == wanted.shape and np.all(np.isfinite(found))
  return np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))


def assert_equal(found, wanted):
  assert found[0].dtype == wanted[0].dtype
  assert deviation(found[0], wanted[0]) < 1e-6
  for gradient, expected in zip(found[1:], wanted[1:]):
    assert gradient.dtype == expected.dtype
    assert deviation(gradient, expected) < 1e-5


def arrays_of(batch, queries, keys, heads):
  return [draw(seed, batch, count, heads, 16) for seed, count in enumerate((queries, keys, keys))]


@functools.cache
def by_xla(sizes, *dtypes):
  return outputs_and_gradients(REFERENCE, [x.astype(dtype) for x, dtype in zip(arrays_of(*sizes), dtypes)])


@pytest.mark.slow
@KERNELS
def test_ragged_cross_attention_at_batch_one(kernels):
  sizes = 1, 150, 77, 2
  found = outputs_and_gradients(fused(kernels), arrays_of(*sizes))
  assert_equal(found, by_xla(sizes, "float32", "float32", "float32"))


@KERNELS
def test_tied_self_attention_and_equal_rows(kernels):
  """Queries are keys, and some rows are the same. Sums of quarters are exact, so a zero distance is zero everywhere."""
  rows = jnp.round(4 * draw(0, 1, 64, 1, 16)) / 4
  rows, values = rows.at[:, 5:9].set(rows[:, 4:5]), draw(1, 1, 64, 1, 16)
  tied = lambda attend: lambda rows, values: attend(rows, rows, values)
  found = outputs_and_gradients(tied(fused(kernels)), (rows, values))
  assert_equal(found, outputs_and_gradients(tied(REFERENCE), (rows, values)))


@KERNELS
def test_zero_distances_have_zero_gradients(kernels):
  same = jnp.ones((1, 20, 1, 16))
  out, *gradients = outputs_and_gradients(fused(kernels), (same, same, draw(0, 1, 20, 1, 16)))
  np.testing.assert_array_equal(gradients[0], 0)
  np.testing.assert_array_equal(gradients[1], 0)
  np.testing.assert_allclose(out[0], jnp.broadcast_to(draw(0, 1, 20, 1, 16).mean(1), out[0].shape), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernels, rows", [("tpu", "float32"), ("gpu", "float32"), ("tpu", "bfloat16")])
def test_bfloat16_values_are_no_further_from_float32_than_by_xla(kernels, rows):
  """With queries and keys in float32 or in bfloat16."""
  sizes, dtypes = (2, 40, 76, 1), (rows, rows, "bfloat16")
  arrays = [x.astype(dtype) for x, dtype in zip(arrays_of(*sizes), dtypes)]
  # The same numbers in float32.
  exact = outputs_and_gradients(REFERENCE, [x.astype("float32") for x in arrays])
  for x, y, wanted in zip(outputs_and_gradients(fused(kernels), arrays), by_xla(sizes, *dtypes), exact):
    assert x.dtype == y.dtype
    assert deviation(x, wanted) < min(0.01, 1.5 * deviation(y, wanted))


def test_parts_add_up_to_a_float32():
  x = draw(0, 1000) * jnp.exp2(jnp.arange(1000.0) % 60 - 30)
  parts = l2_flash.parts(x)
  assert [part.dtype for part in parts] == [jnp.bfloat16] * 3
  np.testing.assert_array_equal(sum(np.asarray(part, np.float64) for part in parts), np.asarray(x, np.float64))


def penalty(attend, arrays):
  """A gradient penalty, as R1."""
  return jnp.sum(jax.grad(lambda x: jnp.sum(jnp.sin(attend(x, x, x))))(arrays) ** 2)


@pytest.mark.slow
def test_second_derivatives_and_rematerialization():
  x = jnp.round(4 * draw(0, 1, 20, 1, 16)) / 4  # exact sums: the distance of a row to itself is zero everywhere
  second = lambda attend: jax.jit(jax.grad(functools.partial(penalty, attend)))(x)
  assert deviation(second(jax.checkpoint(fused("gpu"))), second(REFERENCE)) < 1e-5


@pytest.mark.slow
def test_second_derivatives_keep_the_precision_of_the_penalty():
  """R1 asks for the highest precision around its gradient; what differentiates that is traced outside."""

  def exact(x):
    with jax.default_matmul_precision("highest"):
      return penalty(functools.partial(attention.l2_attention, implementation="pallas"), x)

  def products(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        yield equation.invars[0].aval.dtype, equation.params["precision"]
      yield from (found for inner in core.jaxprs_in_params(equation.params) for found in products(inner))

  found = list(products(jax.make_jaxpr(jax.grad(exact))(jnp.zeros((1, 16, 1, 16))).jaxpr))
  # The parts of float32 numbers are bfloat16, which are multiplied exactly.
  float32 = [precision for dtype, precision in found if dtype == jnp.float32]
  assert len(float32) > 20 and set(float32) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.slow
def test_on_a_cpu_pallas_is_xla():
  arrays = [draw(seed, 1, count, 2, 16) for seed, count in enumerate((12, 7, 7))]
  by = lambda name: functools.partial(attention.l2_attention, implementation=name, chunk=6)
  for found, wanted in zip(*(outputs_and_gradients(by(name), arrays) for name in attention.IMPLEMENTATIONS)):
    np.testing.assert_array_equal(found, wanted)
  with pytest.raises(ValueError, match="must be 'xla' or 'pallas', got 'triton'"):
    attention.l2_attention(*arrays, implementation="triton")


def test_the_config_chooses_the_implementation():
  """In every attention layer, as a field that does not tell runs apart; sampling on a CPU uses XLA's operations."""
  used = []

  def attend(queries, keys, values, *, chunk, implementation):
    used.append((implementation, chunk))
    return REFERENCE(queries, keys, values)

  cfg = aurora_config.Generator(
    resolution=8, text_layers=0, attention_depth={8: 1}, attention="pallas", attention_chunk=32, output_resolutions=(4,)
  )
  layer = generator.TransformerLayer(cfg, experts=1, attend=attend)
  jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 8, 8, 512)), jnp.zeros((1, 4)), jnp.zeros((1, 3, 4)))
  assert used == [("pallas", 32)] * 2
  layer = discriminator.AttentionLayer(2, 4, 1, 16, "pallas", attend)
  jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4, 4, 8)))
  assert used[2:] == [("pallas", 16)]
  assert "attention" in aurora_config.RUNTIME_FIELDS and cfg.for_sampling("cpu").attention == "xla"
  assert cfg.for_sampling("gpu").attention == "pallas"
  for name, group in (("generator", aurora_config.Generator), ("discriminator", aurora_config.Discriminator)):
    with pytest.raises(UserError, match=f"{name}.attention must be 'xla' or 'pallas', got 'flash'"):
      group(attention="flash")


def process(*command, **environment):
  done = subprocess.run(
    [sys.executable, *command],
    capture_output=True,
    text=True,
    check=False,
    cwd=_ROOT,
    env=os.environ | environment,
    timeout=600,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  return done.stdout


_COMPILE = """
import sys
from aurora_jax.performance import topology
names = [topology.parse(text) for text in sys.argv[1:]]
topology.prepare_environment(names[0])
import jax
from jax.sharding import AxisType, Mesh
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.parallel.attention import Sharded

def run(layout, *arrays):
  attend = lambda *arrays: Sharded(layout)(*arrays, chunk=64, implementation="pallas")
  out, pull_back = jax.vjp(attend, *arrays)
  return out, pull_back(out)

for name in names:
  mesh = Mesh(topology.load(name).devices[:2], "data", axis_types=(AxisType.Auto,))
  layout = mesh_lib.Layout(mesh, mesh_lib.Rules(batch=("data",)))
  for dtype, keys in (("bfloat16", 1024), ("float32", 77)):
    shapes = [jax.ShapeDtypeStruct((2, count, 1, 64), dtype, sharding=layout.batch) for count in (1024, keys, keys)]
    compiled = jax.jit(run, static_argnums=0).lower(layout, *shapes).compile()
    print("temporaries", compiled.memory_analysis().temp_size_in_bytes, "bytes")
    print(compiled.as_text(), "END OF PROGRAM")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("topologies", [("v5e:2x2", "v6e:2x2"), ("h100-2",)], ids=str)
def test_compiled_for_accelerators(topologies):
  """Three kernels on each of two devices, which see their own images only. No array is as large as the logits."""
  compilers = pathlib.Path(sys.prefix) / "compilers"  # where launch/setup.sh --dev puts them
  path = os.pathsep.join(filter(None, [str(compilers), os.environ.get("PYTHONPATH")]))
  programs = process("-c", _COMPILE, *topologies, PYTHONPATH=path).split("END OF PROGRAM")[:-1]
  assert len(programs) == 2 * len(topologies)
  for program in programs:
    kernels = program.count('custom_call_target="tpu_custom_call"') + program.count("__gpu$xla.gpu.triton")
    assert kernels == 3
    assert "all-gather" not in program and "all-reduce" not in program and "all-to-all" not in program
    assert int(program.split()[1]) < 1024 * 1024 * 4


@pytest.mark.slow
def test_devices_compute_their_own_images(monkeypatch):
  """In a process with two devices."""
  if len(jax.devices()) < 2:
    process("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", f"{__file__}", "-k", "own", JAX_NUM_CPU_DEVICES="2")
    return
  layout = mesh.build(config.Mesh(data=2), batch_size=2, experts={}, devices=jax.devices()[:2])
  arrays = [draw(seed, 2, count, 1, 16) for seed, count in enumerate((20, 7, 7))]
  placed = [jax.device_put(x, layout.batch) for x in arrays]
  monkeypatch.setattr(l2_flash, "attend", functools.partial(l2_flash.attend, interpret="gpu"))
  attend = functools.partial(Sharded(layout), implementation="pallas")
  found = outputs_and_gradients(attend, placed)
  assert all(x.sharding.is_equivalent_to(layout.batch, 4) for x in found)
  assert_equal(found, outputs_and_gradients(REFERENCE, arrays))
  one = [x[:1] for x in arrays]
  np.testing.assert_allclose(attend(*one), REFERENCE(*one), atol=1e-6)
