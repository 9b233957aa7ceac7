"""What XLA is told by the environment variable XLA_FLAGS, which it reads once, when the first backend wakes."""

import os

_SCHEDULER = "xla_cpu_enable_concurrency_optimized_scheduler"


def run_in_order():
  """Has operations on a CPU run one after the other, in every program of this process; later than that it does nothing.

  By default they start as soon as they can, the best for many small ones: a small training step takes a third longer in
  order. In order there is less in memory at once (for pictures of the full generator a fifth, at the same speed), and
  several CPU devices begin their collectives in one order: those that do not depend on each other could each wait for
  devices that wait in another one, until a time-out ends the process.

  As `compiler_options` of a single program the flag has no effect (jax 0.10.2).
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if _SCHEDULER not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --{_SCHEDULER}=false".strip()
