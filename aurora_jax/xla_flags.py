"""Settings of XLA: the environment variable XLA_FLAGS, read once when the first backend starts, and options of
single programs.
"""

import os

_SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"
_EMITTERS = "xla_cpu_use_fusion_emitters"
# The newest jaxlib in which that flag was seen. XLA ends a process that names a flag it lacks.
_LAST_WITH_EMITTERS = (0, 10)


def run_in_order() -> None:
  """Has a CPU run the operations of every program one after the other. No effect once a backend has started.

  By default an operation starts as soon as its inputs are there. That suits many small ones: a small training
  step takes a third longer in order. In order, less is in memory at once (a fifth less for images of the full
  generator, at the same speed), and several CPU devices begin their collectives in the same order. Otherwise
  collectives that do not depend on each other can wait for one another on different devices until a time-out ends the
  process.

  As `compiler_options` of a single program the flag has no effect (jax 0.10.2).
  """
  _turn_off(_SCHEDULER)


def compile_quickly() -> None:
  """Has loops on a CPU compiled by XLA's older emitters, in every program of this process, if this jaxlib has them.

  The newer ones, the default, take three times as long to compile a small training step, which then runs as fast
  (benchmarks/README.md). They pay for images of the full generator, which take a seventh less time with them.
  """
  import importlib.metadata

  if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= _LAST_WITH_EMITTERS:
    _turn_off(_EMITTERS)


def _turn_off(flag):
  """Sets a flag to false, unless the user has set it."""
  flags = os.environ.get("XLA_FLAGS", "")
  if flag not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --{flag}=false".strip()


def compiler_options(platform: str, *, runs_once: bool = False) -> dict[str, int] | None:
  """`compiler_options` for `jax.jit`: how much the compiler optimizes a program on a CPU.

  Nearly all of the compile time goes into LLVM's optimization of loops. Level 1 compiles the small experiment's step in
  half the time of the default; the step runs as fast, since library calls do the heavy work. Level 0 runs loops at half
  the speed, which does not matter to a program that runs once.

  Args:
    platform: of the program's devices.
    runs_once: whether the program runs a single time.

  Returns:
    Options, or None where the default is right: on accelerators, or if XLA_FLAGS sets a level.
  """
  if platform != "cpu" or "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
    return None
  return {"xla_backend_optimization_level": 0 if runs_once else 1}
