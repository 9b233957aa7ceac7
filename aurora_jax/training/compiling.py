"""How much work the compiler puts into a program on a CPU, where it decides how soon training starts."""

import os

import jax


def options(*, runs_once=False, devices=1):
  """`compiler_options` for `jax.jit`.

  On CPU nearly all of the compile time is LLVM optimising loops. Level 1 compiles the small experiment's step in half
  the time of the default and runs as fast, since the heavy lifting is in library calls; level 0 runs loops at half
  the speed, which does not matter to a program that runs once.

  Several CPU devices take a program's collectives in one order: left to run as they become ready, those that do not
  depend on each other can each wait for devices that wait in another one, until a time-out ends the process.

  Args:
    runs_once: whether the program runs a single time.
    devices: that the program runs on.

  Returns:
    dict, or None where the default is right: on accelerators, or on one CPU if XLA_FLAGS sets a level.
  """
  if jax.default_backend() != "cpu":
    return None
  chosen = {}
  if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    chosen["xla_backend_optimization_level"] = 0 if runs_once else 1
  if devices > 1:
    chosen["xla_cpu_enable_concurrency_optimized_scheduler"] = False
  return chosen or None
