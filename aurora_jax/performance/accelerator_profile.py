"""The kernels of a profile that take the longest. Reads what `jax.profiler` writes, by JAX's own reader."""

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from aurora_jax.errors import UserError

MOST = 20
_PRODUCT = re.compile(r"gemm|ynn|cutlass|cublas|xmma|wgmma|nvjet|conv(?!ert)|dot|cudnn|flash|matmul", re.IGNORECASE)
_SUMMARIES = ("XLA Modules", "Steps", "XLA TraceMe", "Framework", "Source code", "Launch Stats")


@contextlib.contextmanager
def recorded(folder: pathlib.Path) -> Iterator[None]:
  """Records what the device runs, into a folder. Python's calls are left out."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  options.host_tracer_level = 1
  jax.profiler.start_trace(str(folder), profiler_options=options)
  try:
    yield
  finally:
    jax.profiler.stop_trace()


def kernels(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The `MOST` kernels of a profile that take the longest in all.

  Args:
    folder: of `recorded`.

  Returns:
    [{"kernel", "calls", "milliseconds", "share", "is_product": whether its name is that of a product or convolution}],
    the longest first. Shares are of the time of all kernels.

  Raises:
    UserError: there is no profile, or none of a device.
  """
  files = sorted(folder.rglob("*.xplane.pb"))
  if not files:
    raise UserError(f"the profiler wrote no xplane.pb below {folder}")
  totals: dict[str, list[float]] = {}
  for name, nanoseconds in _events(jax.profiler.ProfileData.from_file(str(files[-1]))):
    total = totals.setdefault(name, [0, 0.0])
    total[0] += 1
    total[1] += nanoseconds
  if not totals:
    raise UserError(f"no kernels in the profile {files[-1]}; it is kept for other tools")
  whole = sum(nanoseconds for _, nanoseconds in totals.values())
  longest = sorted(totals.items(), key=lambda item: -item[1][1])[:MOST]
  return [
    {
      "kernel": name[:160],
      "calls": int(calls),
      "milliseconds": nanoseconds / 1e6,
      "share": nanoseconds / whole,
      "is_product": bool(_PRODUCT.search(name)),
    }
    for name, (calls, nanoseconds) in longest
  ]


def _events(profile):
  """(name, nanoseconds) of every kernel. On a CPU: of every operation of a program."""
  planes = list(profile.planes)
  devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
  for plane in devices:
    lines = list(plane.lines)
    chosen = [line for line in lines if line.name.startswith("Stream")]  # a GPU's
    chosen = chosen or [line for line in lines if line.name == "XLA Ops"]  # a TPU's
    chosen = chosen or [line for line in lines if not line.name.startswith(_SUMMARIES)]
    for line in chosen:
      for event in line.events:
        yield event.name, event.duration_ns
  if not devices:
    for plane in planes:
      for line in plane.lines:
        for event in line.events:
          if any(name == "hlo_op" for name, _ in event.stats):
            yield event.name, event.duration_ns
