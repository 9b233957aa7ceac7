"""One persistent compilation cache for the whole suite and for the processes that it starts."""

import os
import pathlib
import signal

import pytest

from aurora_jax import xla_flags

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time goes to compiling; the arithmetic is the same without the optimisers of the code generator.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
xla_flags.compile_quickly()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
FLAGS = os.environ["XLA_FLAGS"]

# A suite started in the background of a script ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def flags_of_this_process(monkeypatch):
  """A command that a test calls may add flags for its own process; those that other tests start do not inherit them."""
  monkeypatch.setenv("XLA_FLAGS", FLAGS)
