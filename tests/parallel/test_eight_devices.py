"""Runs files of tests in a process with eight CPU devices: one process per row, so that programs are compiled once."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent
# The last, and the last flag, as hosts.join has it: a step's programs, on their way at once, would wait for each other.
# And threads enough, as in test_two_processes.py: a collective holds one until all devices are there.
ENVIRONMENT = {
  "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
  "--xla_llvm_disable_expensive_passes=true --xla_cpu_enable_concurrency_optimized_scheduler=false "
  "--xla_cpu_use_fusion_emitters=false --xla_cpu_collective_call_terminate_timeout_seconds=300",
  "JAX_PLATFORMS": "cpu",
  "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
  "NPROC": "32",
  "PJRT_NPROC": "32",
}
AURORA = ("exchange_eight_devices.py", "eight_devices.py")


@pytest.mark.parametrize(
  "files, cases",
  [
    pytest.param(AURORA, 50 if os.environ.get("ALL_MESHES") else 18, id="aurora", marks=pytest.mark.slow),
    pytest.param(("megan_eight_devices.py",), 7, id="megan", marks=pytest.mark.slow),
    pytest.param(("stylegan_t_eight_devices.py",), 4, id="stylegan_t", marks=pytest.mark.slow),
  ],
)
def test_on_eight_devices(files, cases):
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "-x",
      "-n",
      "0",
      "-p",
      "no:cacheprovider",
      *(str(FOLDER / name) for name in files),
    ],
    capture_output=True,
    text=True,
    check=False,
    timeout=1800,
    cwd=FOLDER.parents[1],
    env=os.environ | ENVIRONMENT,
  )
  assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
  assert int(re.search(r"(\d+) passed", done.stdout)[1]) == cases and "skipped" not in done.stdout
  # The partitioner says so when it can do no better than to copy whole activations to every device.
  assert "nvoluntary full rematerialization" not in done.stdout + done.stderr
