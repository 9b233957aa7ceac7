"""Memory of a process."""

import pathlib
import subprocess
import sys

import pytest

# Pieces of 1 kB, of which every hundredth stays: the heap cannot shrink by itself.
CODE = """
import pathlib
from aurora_jax import memory

def resident():
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

pieces = [bytes(1000) for _ in range(200_000)]
full = resident()
pieces = pieces[::100]
kept = resident()
memory.return_freed()
print(full - kept, full - resident())
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_freed_memory_goes_back():
  done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
  by_itself, trimmed = map(int, done.stdout.split())
  assert by_itself < 20e6 and trimmed > 150e6
