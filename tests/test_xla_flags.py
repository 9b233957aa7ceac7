"""Operations in order: what the flag is for, seen in a process whose JAX is imported but whose backend is not awake."""

import os
import subprocess
import sys

import pytest

from aurora_jax import xla_flags

_PROGRAM = """
import jax
import jax.numpy as jnp
from aurora_jax import xla_flags
if IN_ORDER:
  xla_flags.run_in_order()

def layers(x, weights, mix):
  for weight in weights:
    x = jnp.tanh(jnp.einsum("bi,bio->bo", x, jnp.tensordot(mix, weight, 1)))
  return x

shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
program = jax.jit(layers).lower(shape(4, 64), [shape(2, 64, 64)] * 8, shape(4, 2)).compile()
print(program.memory_analysis().temp_size_in_bytes)
"""


def temporaries(in_order):
  done = subprocess.run([sys.executable, "-c", f"IN_ORDER = {in_order}\n{_PROGRAM}"], capture_output=True, text=True,
                        check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  return int(done.stdout)


def test_in_order_one_layers_filters_are_in_memory_at_a_time():
  assert temporaries(True) < temporaries(False) / 3


@pytest.mark.parametrize("given, expected", [
    ("", "--xla_cpu_enable_concurrency_optimized_scheduler=false"),
    ("--a=1", "--a=1 --xla_cpu_enable_concurrency_optimized_scheduler=false"),
    ("--xla_cpu_enable_concurrency_optimized_scheduler=true", "--xla_cpu_enable_concurrency_optimized_scheduler=true")])
def test_what_the_user_says_stands(monkeypatch, given, expected):
  monkeypatch.setenv("XLA_FLAGS", given)
  xla_flags.run_in_order()
  assert os.environ["XLA_FLAGS"] == expected
