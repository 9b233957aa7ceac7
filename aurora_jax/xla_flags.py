"""What XLA is told: by the environment variable XLA_FLAGS, which it reads once, when the first backend starts, and per program."""

import importlib.metadata
import os

_SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"
_EMITTERS = "xla_cpu_use_fusion_emitters"
_LAST_WITH_EMITTERS = (
  0,
  10,
)  # the newest jaxlib in which that flag was seen; XLA ends a process that names one it lacks


def run_in_order():
  """Has operations on a CPU run one after the other, in every program of this process; later than that it does nothing.

  By default they start as soon as they can, the best for many small ones: a small training step takes a third longer in
  order. In order there is less in memory at once (for pictures of the full generator a fifth, at the same speed), and
  several CPU devices begin their collectives in one order: those that do not depend on each other could each wait for
  devices that wait in another one, until a time-out ends the process.

  As `compiler_options` of a single program the flag has no effect (jax 0.10.2).
  """
  _turn_off(_SCHEDULER)


def compile_quickly():
  """Has loops on a CPU compiled by XLA's older emitters, in every program of this process, where this jaxlib has them.

  The newer ones, its default, take three times as long to compile a small training step, which then runs as fast
  (benchmarks/README.md). For pictures of the full generator they are worth their time: those take a seventh less.
  """
  if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) <= _LAST_WITH_EMITTERS:
    _turn_off(_EMITTERS)


def _turn_off(flag):
  """Sets a flag to false, unless the user has said something about it."""
  flags = os.environ.get("XLA_FLAGS", "")
  if flag not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --{flag}=false".strip()


def compiler_options(platform: str, *, runs_once: bool = False) -> dict[str, int] | None:
  """`compiler_options` for `jax.jit`: how much work the compiler puts into a program on a CPU.

  There, nearly all of the compile time is LLVM optimising loops. Level 1 compiles the small experiment's step in half the
  time of the default, and it runs as fast, since the heavy work is in library calls. Level 0 runs loops at half the speed,
  which does not matter to a program that runs once.

  Args:
    platform: of the program's devices.
    runs_once: whether the program runs a single time.

  Returns:
    Options, or None where the default is right: on accelerators, or if XLA_FLAGS sets a level.
  """
  if platform != "cpu" or "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
    return None
  return {"xla_backend_optimization_level": 0 if runs_once else 1}
