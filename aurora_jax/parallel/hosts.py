"""Multi-process jobs: joining, agreeing on decisions, and the messages of the primary process (process 0).

Call `join` before anything that initializes a JAX backend. Afterwards every process sees the devices of all processes,
and every program runs on all of them. So all processes must run the same programs in the same order. Anything that
depends on one machine (a signal, the time, a file) must therefore be agreed on before it affects a decision.
`together`, `Vote` and `from_primary` do that.
"""

import argparse
import contextlib
import functools
import os
import socket
import sys
import traceback
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aurora_jax import xla_flags
from aurora_jax.errors import UserError
from aurora_jax.parallel import environment, rendezvous

_MESSAGE_BYTES = 1000  # of an error message that is sent to the other processes
_AGREED = "is_agreed"  # attribute of an error that all processes know of


def join(args: argparse.Namespace, fingerprint: str = "") -> environment.Job:
  """Joins the job that the flags or the environment describe. Does nothing if there is a single process.

  Args:
    args: parsed flags of `cli/host_flags.py`.
    fingerprint: of the experiment; must be the same in all processes.

  Returns:
    `environment.Job`.

  Raises:
    UserError: the flags or the environment contradict themselves, a process is missing, or the fingerprints differ.
  """
  job = environment.find(args.coordinator, args.processes, args.process)
  if args.join_seconds <= 0:
    raise UserError(f"--join-seconds must be positive, got {args.join_seconds:g}")
  if job.processes > 1 or _has_many_cpu_devices():
    _run_programs_in_order(job.processes)
  if job.processes > 1:
    if job.process == 0:
      print(
        f"{job.processes} processes (found by {job.source}); this is process 0, waiting at {job.coordinator}",
        flush=True,
      )
    rendezvous.wait_for_all(job, args.join_seconds, fingerprint)
    # JAX's own detection is turned off: on SLURM it would use one GPU per process.
    jax.distributed.initialize(
      job.coordinator,
      job.processes,
      job.process,
      local_device_ids=job.local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=max(1, round(args.join_seconds)),
    )
  return job


def is_alone() -> bool:
  """Whether this is the only process. Unlike `jax.process_count` this initializes no backend."""
  return not jax.distributed.is_initialized()


def _run_programs_in_order(processes):
  """Settings without which several CPU devices abort now and then. Must run before a backend is initialized.

  If two programs run at once on several CPU devices, as those of a step may, their collectives wait for each other
  until a time-out ends the process. With several processes gloo matches messages by their order. That order is not kept
  either within a program from the compilation cache ("Received data size doesn't match", seen with jaxlib 0.10.2).
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)  # for the CPU backend only
  xla_flags.run_in_order()  # also within a program, for its collectives
  if processes > 1 and jax.config.jax_platforms == "cpu":  # pyrefly: ignore [missing-attribute]  (absent from the stubs)
    jax.config.update("jax_enable_compilation_cache", False)


def _has_many_cpu_devices():
  """Whether the CPU acts as several devices, as far as this is known before a backend is initialized."""
  devices = jax.config.jax_num_cpu_devices  # pyrefly: ignore [missing-attribute]  (absent from the stubs)
  return devices > 1 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")


def is_primary() -> bool:
  """Whether this is the process that prints and writes files: process 0."""
  return is_alone() or jax.process_index() == 0


def banner(job: environment.Job, required: str | None = None) -> tuple[str, str | None]:
  """Describes the devices of the run. Initializes the backend.

  Args:
    job: `environment.Job`.
    required: device that must be present: "accelerator", "tpu" or "gpu"; None: any.

  Returns:
    (description of one line, warning or None).

  Raises:
    UserError: JAX finds no devices, or none of the required kind.
  """
  try:
    backend, devices = jax.default_backend(), jax.devices()
  except RuntimeError as error:  # JAX_PLATFORMS names what is not there
    raise UserError(f"JAX finds no devices: {' '.join(str(error).split())}") from error
  kinds = sorted({device.device_kind for device in devices})
  where = "one process" if job.processes == 1 else f"{job.processes} processes by {job.source}"
  line = f"devices: {len(devices)} x {', '.join(kinds)} ({backend}); {where}"
  expected = environment.expected_accelerator() if backend == "cpu" else None
  if required and (backend == "cpu" or required not in ("accelerator", backend)):
    hint = f"; this machine has {expected}: is jax[tpu] or jax[cuda12] installed?" if expected else ""
    raise UserError(f"--require {required}, but JAX runs on {backend} ({len(devices)} x {', '.join(kinds)}){hint}")
  warning = expected and (
    f"WARNING: this machine has {expected}, but JAX FELL BACK TO THE CPU, which is hundreds of times slower. "
    "Install jax[tpu] or jax[cuda12] into this environment; JAX_PLATFORMS=cpu says that the CPU is meant; "
    "--require accelerator makes this an error."
  )
  return line, warning


def announce(job: environment.Job, line: str, warning: str | None) -> None:
  """Prints the result of `banner`: the description in the primary process, a warning in every process that has one."""
  if is_primary():
    print(line, flush=True)
  if warning:
    name = f"{job.name(job.process)}: " if job.processes > 1 else ""
    print(f"{'!' * 100}\n{name}{warning}\n{'!' * 100}", file=sys.stderr, flush=True)


def replicate(sharding: NamedSharding, tree: Any) -> Any:
  """Copies arrays that are equal in all processes to every device. Unlike `device_put` this does not compare them
  first.

  Args:
    sharding: a fully replicated sharding.
    tree: pytree of numpy arrays, or of JAX arrays that are fully addressable by this process.

  Returns:
    The same pytree of JAX arrays.
  """
  put = lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf), np.shape(leaf))
  return jax.tree.map(put, tree)


def local_rows(sharding: jax.sharding.Sharding, rows: int) -> np.ndarray:
  """Indices of the rows on this process's devices, of an array of `rows` rows that is sharded along its first axis.

  They need not be contiguous: a mesh orders devices by their wiring, not by process.

  Returns:
    int64, ascending.
  """
  pieces = sharding.addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows, dtype=np.int64)[index] for index in pieces]))


@contextlib.contextmanager
def together(description: str) -> Generator[None, None, None]:
  """A context whose body fails in all processes or in none.

  The body must not run a computation across processes: if one process failed before it, the others would wait forever.

  Args:
    description: of the body, for the error message.

  Raises:
    Exception: of the body, in this process.
    UserError: the body failed in another process only; the message names that process.
  """
  if is_alone():
    yield
    return
  error = None
  try:
    yield
  except Exception as raised:
    error = raised
  message = "" if error is None else f"({socket.gethostname()}), {description}: {error or type(error).__name__}"
  padded = np.zeros(_MESSAGE_BYTES, np.uint8)
  encoded = np.frombuffer(message.encode(errors="replace")[:_MESSAGE_BYTES], np.uint8)
  padded[: len(encoded)] = encoded
  from jax.experimental import multihost_utils

  for process, row in enumerate(multihost_utils.process_allgather(padded)):
    if row[0] and error is None:
      error = UserError(f"process {process} {bytes(row[row > 0]).decode(errors='replace')}")
  if error is not None:
    setattr(error, _AGREED, True)
    raise error


@contextlib.contextmanager
def exiting_on_local_errors(command: str) -> Generator[None, None, None]:
  """A context in which an error of this process alone ends the process at once, with status 2 (bad input) or 1.

  The other processes will wait for this one in some computation, and a normal exit waits for them: JAX's shutdown is a
  barrier. So the process exits without it. A scheduler then ends the job, or else JAX does within two minutes. An error
  that all processes know of (see `together`), or that of a single process, is raised as usual.

  Args:
    command: name of the command, for the message.
  """
  try:
    yield
  except Exception as error:
    if is_alone() or getattr(error, _AGREED, False):
      raise
    known = isinstance(error, UserError)
    message = f"aurora_jax {command}: {' '.join(str(error).split())}" if known else traceback.format_exc()
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2 if known else 1)


def from_primary(number: int) -> int:
  """The primary process's value of an int32, in every process."""
  if is_alone():
    return number
  from jax.experimental import multihost_utils

  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_same(digest: int, message: str) -> None:
  """Checks that all processes have read the same data.

  Args:
    digest: int32 digest of the data.
    message: of the error; " than in process 0" is appended.

  Raises:
    UserError: in all processes, if the digest of one differs from that of process 0.
  """
  expected = from_primary(digest)
  with together("comparing what was read"):
    if expected != digest:
      raise UserError(f"{message} than in process 0")


def from_all(text: str) -> list[str]:
  """The texts of all processes, in every process.

  Args:
    text: of this process, of any length.

  Returns:
    One text per process, in the order of the processes.
  """
  if is_alone():
    return [text]
  encoded = np.frombuffer(text.encode(), np.uint8)
  lengths = _rows_of_all(np.array([len(encoded)], np.int32))[:, 0]
  if not lengths.any():
    return [""] * len(lengths)
  # Padded to a power of two, so that few different programs are compiled.
  padded = np.zeros(1 << max(12, int(lengths.max() - 1).bit_length()), np.uint8)
  padded[: len(encoded)] = encoded
  return [bytes(row[:length]).decode() for row, length in zip(_rows_of_all(padded), lengths)]


def _rows_of_all(row):
  """[processes, n]: the row [n] of each process. Waits until the exchange is complete."""
  devices = jax.devices()
  sharding = NamedSharding(jax.sharding.Mesh(np.array(devices), "all"), PartitionSpec("all"))
  rows = jax.make_array_from_process_local_data(sharding, np.tile(row, (jax.local_device_count(), 1)))
  rows = jax.block_until_ready(_replicator(sharding.mesh)(rows))
  owners = [device.process_index for device in devices]
  return np.asarray(rows.addressable_data(0))[[owners.index(process) for process in range(jax.process_count())]]


@functools.lru_cache(maxsize=1)
def _replicator(mesh):
  return jax.jit(lambda rows: rows, out_shardings=NamedSharding(mesh, PartitionSpec()))


def float_from_primary(number: float) -> float:
  """The primary process's value of a float64, bit by bit, in every process."""
  if is_alone():
    return number
  parts = [from_primary(int(part)) for part in np.array([number], np.float64).view(np.int32)]
  return float(np.array(parts, np.int32).view(np.float64)[0])


class Vote:
  """The maximum of a number over all processes, without waiting: each call returns the result of the call before.

  A call enqueues a small program after those that are running, and reads the result of the previous one.
  """

  def __init__(self, sharding: NamedSharding):
    """Args: sharding: of a batch, over all devices."""
    self._sharding = sharding
    self._largest = jax.jit(
      lambda numbers: numbers.max(),
      out_shardings=NamedSharding(sharding.mesh, PartitionSpec()),
    )
    self._local = len(sharding.addressable_devices)
    self._previous: jax.Array | None = None

  def __call__(self, number: int) -> int:
    """Contributes this process's number. Returns the maximum of the previous call, 0 in the first call."""
    numbers = jax.make_array_from_process_local_data(self._sharding, np.full(self._local, number, np.int32))
    previous, self._previous = self._previous, self._largest(numbers)
    return 0 if previous is None else int(jax.device_get(previous))


class Alone:
  """`Vote` for a single process: returns its own number at once."""

  def __call__(self, number: int) -> int:
    return number


def vote(sharding: NamedSharding | None) -> Vote | Alone:
  """`Vote` in a job of several processes, `Alone` in a single one, which needs no sharding.

  Raises:
    ValueError: there are several processes and no sharding.
  """
  if is_alone():
    return Alone()
  if sharding is None:
    raise ValueError("a vote of several processes needs the sharding of a batch")
  return Vote(sharding)
