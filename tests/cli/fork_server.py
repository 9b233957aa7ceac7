"""Starts commands of aurora_jax in processes forked from one that has imported everything.

The real command spends seconds importing; a fork of a process that has done so, and has neither a JAX backend nor
threads, begins at once and is otherwise the same: `cli.main.main` of its own, to be killed like any other.

    python tests/cli/fork_server.py [MODULE]

reads a JSON list per line (log file, arguments), writes the child's pid, and its exit status (negative: the signal)
when it has ended. MODULE.prepare takes the place of `training.setup.prepare`.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).parents[2]
# What `train` imports sooner or later, none of which wakes a backend.
_IMPORTS = (
  "aurora_jax.cli.main",
  "aurora_jax.cli.train",
  "aurora_jax.training.loop",
  "aurora_jax.training.setup",
  "aurora_jax.reporting.report",
  "aurora_jax.reporting.image_sheets",
  "orbax.checkpoint",
  "clu.parameter_overview",
  "ml_collections.config_flags",
  "tensorboard.compat.proto.event_pb2",
  "tensorboard.compat.proto.summary_pb2",
)


class ForkServer:
  """The server as a context manager, seen from the test."""

  def __init__(self, module=None):
    """Args: module: see above; it must be importable."""
    self._arguments = [] if module is None else [module]
    self._pid = None  # of a command that has not been waited for

  def __enter__(self):
    self._process = subprocess.Popen(
      [sys.executable, __file__, *self._arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/training:{ROOT}/tests/cli"},
    )
    assert self._process.stdout.readline() == "ready\n"
    return self

  def __exit__(self, *_):
    self._process.stdin.close()
    self._process.wait()

  def start(self, log, *arguments):
    """Starts a command whose output goes to a file, after the end of the one before. Returns its pid."""
    if self._pid is not None:  # a test failed meanwhile
      with contextlib.suppress(ProcessLookupError):
        os.kill(self._pid, signal.SIGKILL)
      self.wait()
    self._process.stdin.write(json.dumps([str(log), [str(argument) for argument in arguments]]) + "\n")
    self._process.stdin.flush()
    self._pid = int(self._process.stdout.readline())
    return self._pid

  def is_alive(self):
    """Whether the command that was started last still runs."""
    return not select.select([self._process.stdout], [], [], 0)[0]

  def wait(self):
    """The exit status of the command that was started last; negative: the signal that killed it."""
    self._pid = None
    return int(self._process.stdout.readline())


def _serve():
  import importlib

  for name in _IMPORTS:
    importlib.import_module(name)
  for name in sys.argv[1:]:
    importlib.import_module("aurora_jax.training.setup").prepare = importlib.import_module(name).prepare
  assert threading.active_count() == 1, threading.enumerate()
  print("ready", flush=True)
  for line in sys.stdin:
    log, arguments = json.loads(line)
    pid = os.fork()
    if not pid:
      _become(log, arguments)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _become(log, arguments):
  """In the child: the command, as if it had just been started."""
  output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  nothing = os.open(os.devnull, os.O_RDONLY)
  for descriptor, number in ((nothing, 0), (output, 1), (output, 2)):
    os.dup2(descriptor, number)
  from aurora_jax.cli import main

  status = 1
  try:
    status = main.main(arguments)
  except BaseException:
    import traceback

    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
  _serve()
