"""How much work the compiler puts into a program on a CPU, where it decides how soon training starts."""

import os

import jax


def options(*, runs_once=False):
  """`compiler_options` for `jax.jit`.

  On CPU nearly all of the compile time is LLVM optimising loops. Level 1 compiles the small experiment's step in half
  the time of the default and runs as fast, since the heavy lifting is in library calls; level 0 runs loops at half
  the speed, which does not matter to a program that runs once.

  Args:
    runs_once: whether the program runs a single time.

  Returns:
    dict, or None where the default is right: on accelerators, or if XLA_FLAGS sets a level.
  """
  if jax.default_backend() != "cpu" or "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
    return None
  return {"xla_backend_optimization_level": 0 if runs_once else 1}
