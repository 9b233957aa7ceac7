"""Runs `eight_devices.py` and `exchange_eight_devices.py` in one process with eight CPU devices."""

import os
import pathlib
import re
import subprocess
import sys

FLAGS = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  "--xla_llvm_disable_expensive_passes=true --xla_cpu_enable_concurrency_optimized_scheduler=false "
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_collective_call_terminate_timeout_seconds=300"
)


def test_on_eight_devices():
  folder = pathlib.Path(__file__).parent
  files = [str(folder / name) for name in ("exchange_eight_devices.py", "eight_devices.py")]
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", *files],
    capture_output=True,
    text=True,
    check=False,
    timeout=1800,
    cwd=folder.parents[1],
    # The last, and the last flag, as hosts.join has it: a step's programs, on their way at once, would wait for each
    # other. And threads enough, as in test_two_processes.py: a collective holds one until all devices are there.
    env=os.environ
    | {
      "XLA_FLAGS": FLAGS,
      "JAX_PLATFORMS": "cpu",
      "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
      "NPROC": "32",
      "PJRT_NPROC": "32",
    },
  )
  assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
  cases = 42 if os.environ.get("ALL_MESHES") else 22
  assert int(re.search(r"(\d+) passed", done.stdout)[1]) == cases and "skipped" not in done.stdout
  # The partitioner says so when it can do no better than to copy whole activations to every device.
  assert "nvoluntary full rematerialization" not in done.stdout + done.stderr
