"""The first part of `bench accelerator`: which device it is, and how fast plain products and copies are on it."""

import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.performance import accelerator_inputs as inputs


def measure(run: inputs.Run) -> dict[str, Any]:
  """Measures products of square matrices at three precisions and a copy, beside the data sheet."""
  device, sheet = jax.devices()[0], inputs.chip()
  stats = device.memory_stats() or {}
  results: dict[str, Any] = {
    "config": run.config,
    "toy": run.toy,
    "platform": device.platform,
    "device": device.device_kind,
    "devices": jax.local_device_count(),
    "data_sheet": sheet.name if sheet else None,
    "memory_limit_bytes": stats.get("bytes_limit"),
    "jax": jax.__version__,
    "python": platform.python_version(),
    "rows": [],
  }
  run.save(results)
  side = 256 if run.toy else 8192
  highest = jax.lax.Precision.HIGHEST
  kinds = {
    "bfloat16": (jnp.bfloat16, None),
    "float32": (jnp.float32, None),
    "float32, highest": (jnp.float32, highest),
  }
  values = inputs.normals(side * side, 0).reshape(side, side)
  for name, (dtype, precision) in kinds.items():
    with inputs.attempts(results["rows"], {"what": f"product of {side} x {side}, {name}"}) as row:
      run.require_time(2, name)
      left = jax.device_put(values).astype(dtype)
      multiply = jax.jit(lambda x, precision=precision: jnp.matmul(x, x, precision=precision))
      seconds = inputs.seconds_of(lambda: multiply(left))
      row["tflops_per_second"] = 2 * side**3 / seconds / 1e12
      peak = sheet.peak(name) if sheet else None
      row["share_of_data_sheet"] = 2 * side**3 / seconds / peak if peak else None
    run.save(results)
  size = 1 << (16 if run.toy else 28)
  with inputs.attempts(results["rows"], {"what": f"copy of {4 * size / 2**20:g} MiB"}) as row:
    array = jax.device_put(np.ones(size, np.float32))
    add = jax.jit(lambda x: x + 1)
    seconds = inputs.seconds_of(lambda: add(array))
    row["gigabytes_per_second"] = 8 * size / seconds / 1e9
    row["share_of_data_sheet"] = 8 * size / seconds / sheet.memory_rate if sheet and sheet.memory_rate else None
  run.save(results)
  inputs.raise_failures(results["rows"])
  return results
