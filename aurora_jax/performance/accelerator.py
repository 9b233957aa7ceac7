"""`bench accelerator`: what this project does on one GPU or TPU, in a few minutes, in parts that fail one by one.

Each part is a process of its own with a budget of time: a crash, a lack of memory or a compilation that does not end
costs that part alone. Results are in OUT/parts/NAME.json as soon as they are measured, and in OUT/accelerator.json and
OUT/accelerator.md after every part. This file imports no JAX: the process that waits must not hold the device.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from aurora_jax import files
from aurora_jax.errors import UserError
from aurora_jax.performance import accelerator_table


@dataclasses.dataclass(frozen=True)
class Part:
  """One part.

  Attributes:
    module: of performance/.
    function: of it, `Run` -> results.
    share: of the time, relative to the other parts.
    environment: variables that are set for its process.
  """

  module: str
  function: str
  share: float
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


_NO_POOL = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
PARTS = {
  "device": Part("accelerator_device", "measure", 25, _NO_POOL),
  "goldens": Part("accelerator_goldens", "measure", 70, _NO_POOL),
  "training": Part("accelerator_training", "measure", 240, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}),
  "sampling": Part("accelerator_sampling", "measure", 100),
  "pytorch": Part("accelerator_sampling", "measure_pytorch", 40, _NO_POOL | {"JAX_PLATFORMS": "cpu"}),
  "experts": Part("accelerator_kernels", "measure_experts", 50),
  "attention": Part("accelerator_kernels", "measure_attention", 30),
}
# Seconds that a part may take beyond its budget, to end by itself.
_GRACE = 5.0
# Compiled programs, for a second run with the same folder. Not on a CPU, where compiling takes little.
_CACHE = "compilation_cache"
_CACHED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def run(
  out: pathlib.Path,
  config: str,
  *,
  minutes: float,
  toy: bool = False,
  parts: Sequence[str] = (),
  progress: Callable[[str], None] = print,
) -> int:
  """Runs parts, each in its own process.

  Args:
    out: folder of the results; made if it is not there. Results of other parts in it stay.
    config: the experiment, FILE[:VARIANT]; with `toy` a small one.
    minutes: for all parts together.
    toy: small sizes, for a CPU.
    parts: names; () for all.
    progress: called with a line before and after each part.

  Returns:
    The exit status: 0, or 1 if a part failed.

  Raises:
    UserError: no such part, or without `toy` there is no accelerator.
  """
  chosen = list(parts) or list(PARTS)
  for name in chosen:
    if name not in PARTS:
      raise UserError(f"no part {name!r}; there are {', '.join(PARTS)}")
  (out / "parts").mkdir(parents=True, exist_ok=True)
  deadline = time.monotonic() + 60 * minutes
  for place, name in enumerate(chosen):
    waiting = sum(PARTS[other].share for other in chosen[place:])
    budget = max(1.0, (deadline - time.monotonic()) * PARTS[name].share / waiting)
    progress(f"{name}: at most {budget:.0f} s")
    (out / "parts" / f"{name}.json").unlink(missing_ok=True)
    _run_apart(out, config, name, budget, toy)
    found = _stored(out, name)
    progress(f"  {found['status']} after {found['seconds']:.0f} s{': ' * bool(found['reason'])}{found['reason']}")
    write_tables(out)
    if name == "device" and not toy and found["results"].get("platform") == "cpu":
      raise UserError("JAX finds no accelerator, only the CPU; --toy measures small sizes on it")
  return int(any(_stored(out, name)["status"] != "done" for name in chosen))


def run_here(out: pathlib.Path, config: str, name: str, end: float, toy: bool) -> None:
  """Runs a part in this process. Its failure is recorded, not raised.

  Args:
    out, config, toy: as of `run`.
    name: of the part.
    end: of `time.time`, when it has to be done.
  """
  begin, deadline = time.monotonic(), time.monotonic() + end - time.time()

  from aurora_jax.performance import accelerator_inputs as inputs

  part, results = PARTS[name], {}

  def store(status, reason=""):
    _store(out, name, status, reason, time.monotonic() - begin, results)

  def save(so_far):
    results.update(so_far)
    store("running")
    results.pop(inputs.DOING, None)

  store("running")
  try:
    module = importlib.import_module(f"{__package__}.{part.module}")
    save(getattr(module, part.function)(inputs.Run(config, toy, out, deadline, save)))
  except Exception as error:
    store("failed", inputs.one_line(error))
    if not isinstance(error, UserError):
      import traceback

      traceback.print_exc()
  else:
    store("done")


def _run_apart(out, config, name, budget, toy):
  """Runs a part in a process of its own, and ends it when its budget is spent."""
  command = [sys.executable, "-m", "aurora_jax", "bench", "accelerator", "--out", str(out), "--config", config]
  command += ["--part", name, "--end", f"{time.time() + budget:.3f}"] + ["--toy"] * toy
  cache = {} if toy else _CACHED | {"JAX_COMPILATION_CACHE_DIR": str((out / _CACHE).resolve())}
  environment = dict(PARTS[name].environment) | cache | os.environ
  environment["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(pathlib.Path(__file__).parents[2]), environment.get("PYTHONPATH")))
  )
  log, begin = out / "parts" / f"{name}.log", time.monotonic()
  with open(log, "wb") as file, _ending_by_exception():
    process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
      code = process.wait(budget + _GRACE)
      reason = f"its process ended with {code}: {_last_line(log)}"
    except subprocess.TimeoutExpired:
      reason = f"stopped: its {budget:.0f} s were over"
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
  found = _stored(out, name)
  if found["status"] == "running":  # it did not come to say how it ended
    doing = found["results"].pop("doing", "")
    _store(out, name, "failed", f"{reason}{f' ({doing})' if doing else ''}", time.monotonic() - begin, found["results"])


@contextlib.contextmanager
def _ending_by_exception():
  """SIGTERM and SIGHUP raise, so that the part's process does not outlive this one."""

  def leave(number, frame):
    del frame
    raise SystemExit(128 + number)

  if threading.current_thread() is not threading.main_thread():  # only there can a program set them
    yield
    return
  before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _last_line(path):
  lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
  return next((" ".join(line.split())[:200] for line in reversed(lines) if line.strip()), "it printed nothing")


def _store(out, name, status, reason, seconds, results):
  content = {"part": name, "status": status, "reason": reason, "seconds": round(seconds, 2), "results": results}
  files.write_text(str(out / "parts" / f"{name}.json"), json.dumps(content, indent=1) + "\n")


def _stored(out, name):
  path = out / "parts" / f"{name}.json"
  if not path.is_file():
    return {"part": name, "status": "running", "reason": "", "seconds": 0.0, "results": {}}
  return json.loads(path.read_text(encoding="utf-8"))


def write_tables(out: pathlib.Path) -> None:
  """Writes accelerator.json and accelerator.md from what the parts have stored so far."""
  found = {name: _stored(out, name) for name in PARTS if (out / "parts" / f"{name}.json").is_file()}
  files.write_text(str(out / "accelerator.json"), json.dumps({"parts": found}, indent=1) + "\n")
  files.write_text(str(out / "accelerator.md"), "\n".join(accelerator_table.lines(found)) + "\n")
