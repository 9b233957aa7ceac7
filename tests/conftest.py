"""One persistent compilation cache for the whole suite and for the processes that it starts."""

import collections
import fcntl
import gc
import os
import pathlib
import resource
import signal
import sys

import pytest

from aurora_jax import xla_flags

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time goes to compiling; the arithmetic is the same without the optimizers of the code generator.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
xla_flags.compile_quickly()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("EPATH_USE_TF", "0")  # as cli/environment.py
FLAGS = os.environ["XLA_FLAGS"]

# A suite started in the background of a script ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def flags_of_this_process(monkeypatch):
  """A command that a test calls may add flags for its own process; those that other tests start do not inherit them."""
  monkeypatch.setenv("XLA_FLAGS", FLAGS)


@pytest.fixture
def libtpu():
  """Held by tests whose processes load libtpu: one process at a time can. Waits for the tests of other workers."""
  CACHE.mkdir(parents=True, exist_ok=True)
  with open(CACHE.parent / "libtpu.lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@pytest.fixture(autouse=True, scope="module")
def _memory():
  """Drops compiled programs after a module that leaves more than 2 GB. Other modules use small ones again."""
  yield
  statm = pathlib.Path("/proc/self/statm")
  if "jax" in sys.modules and statm.exists():
    if int(statm.read_text().split()[1]) * resource.getpagesize() > 2 << 30:
      sys.modules["jax"].clear_caches()
      gc.collect()


# ---- CPU seconds: --durations-cpu N. Unlike wall time they hardly depend on what else the machine does. --------------


def pytest_addoption(parser):
  parser.addoption("--durations-cpu", type=int, metavar="N", help="show the CPU seconds of each file and of N tests")


_START = "start and collection"
_BY_TEST, _BY_FILE = collections.Counter(), collections.Counter()  # of all workers
_used = []  # CPU seconds of this process and of those that it waited for, when it started and after every report


def _count():
  _used.append(sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def pytest_collection_finish():
  """Tracing a program makes many objects that stay: a fifth of its time went into looking for garbage among them."""
  gc.freeze()
  gc.set_threshold(10_000, 20, 20)
  _count()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
  report = yield
  _count()
  report.cpu_seconds, report.cpu_start = _used[-1] - _used[-2], _used[0] if len(_used) == 2 else 0.0
  return report


def pytest_runtest_logreport(report):
  for name, seconds in ((report.nodeid, report.cpu_seconds), (_START, report.cpu_start)):
    _BY_TEST[name] += seconds
    _BY_FILE[name.split("::")[0]] += seconds


def pytest_terminal_summary(terminalreporter, config):
  count = config.getoption("durations_cpu")
  if count is None:
    return
  terminalreporter.section(f"CPU seconds: {_BY_FILE.total():.0f}")
  for table, rows in ((_BY_FILE, None), (_BY_TEST, count)):
    for name, seconds in table.most_common(rows):
      terminalreporter.write_line(f"{seconds:8.1f} {name}")
