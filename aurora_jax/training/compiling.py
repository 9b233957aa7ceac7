"""What the compiler is told about a program on a CPU, where it decides how soon training starts."""

import os

import jax


def options(*, runs_once=False, in_order=False):
  """`compiler_options` for `jax.jit`.

  On CPU nearly all of the compile time is LLVM optimising loops. Level 1 compiles the small experiment's step in half
  the time of the default and runs as fast, since the heavy lifting is in library calls; level 0 runs loops at half
  the speed, which does not matter to a program that runs once.

  By default operations on CPU start as soon as they can, the best for many small ones: a small training step takes a
  third longer in order. In order there is less in memory at once, for pictures of the full generator a fifth. And several
  CPU devices need one order for their collectives: those that do not depend on each other could each wait for devices
  that wait in another one, until a time-out ends the process.

  Args:
    runs_once: whether the program runs a single time.
    in_order: whether operations run one after the other.

  Returns:
    dict, or None where the default is right: on accelerators, or on one CPU if XLA_FLAGS sets a level.
  """
  if jax.default_backend() != "cpu":
    return None
  chosen = {}
  if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    chosen["xla_backend_optimization_level"] = 0 if runs_once else 1
  if in_order:
    chosen["xla_cpu_enable_concurrency_optimized_scheduler"] = False
  return chosen or None
