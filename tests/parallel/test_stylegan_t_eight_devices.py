"""Runs `stylegan_t_eight_devices.py` in one process with eight CPU devices."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

# As in test_eight_devices.py, where the reasons stand.
FLAGS = (
  "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  "--xla_llvm_disable_expensive_passes=true --xla_cpu_enable_concurrency_optimized_scheduler=false "
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_collective_call_terminate_timeout_seconds=300"
)


@pytest.mark.slow  # two programs, each compiled twice
def test_stylegan_t_on_eight_devices():
  file = pathlib.Path(__file__).with_name("stylegan_t_eight_devices.py")
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", str(file)],
    capture_output=True,
    text=True,
    check=False,
    timeout=900,
    cwd=file.parents[2],
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
  assert int(re.search(r"(\d+) passed", done.stdout)[1]) == 4 and "skipped" not in done.stdout
  # The partitioner says so when it can do no better than to copy whole activations to every device.
  assert "nvoluntary full rematerialization" not in done.stdout + done.stderr
