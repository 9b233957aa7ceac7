"""What the flags are for, seen in a process whose JAX is imported but whose backend is not awake."""

import importlib.metadata
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
  done = subprocess.run(
    [sys.executable, "-c", f"IN_ORDER = {in_order}\n{_PROGRAM}"],
    capture_output=True,
    text=True,
    check=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  return int(done.stdout)


@pytest.mark.slow
def test_in_order_one_layers_filters_are_in_memory_at_a_time():
  assert temporaries(True) < temporaries(False) / 3


@pytest.mark.parametrize(
  "function, flag",
  [
    (xla_flags.run_in_order, "--xla_cpu_enable_concurrency_optimized_scheduler"),
    (xla_flags.compile_quickly, "--xla_cpu_use_fusion_emitters"),
  ],
)
def test_what_the_user_says_stands(monkeypatch, function, flag):
  for given, expected in (("", f"{flag}=false"), ("--a=1", f"--a=1 {flag}=false"), (f"{flag}=true", f"{flag}=true")):
    monkeypatch.setenv("XLA_FLAGS", given)
    function()
    assert os.environ["XLA_FLAGS"] == expected


def test_a_jaxlib_that_may_lack_the_flag_is_not_given_it(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
  xla_flags.compile_quickly()
  assert os.environ["XLA_FLAGS"] == ""
