"""Several processes as one job: joining it, what they decide together, and what the first one tells the person.

`join` comes before anything that wakes a backend of JAX. Every process then sees the devices of all, and every program
runs on all of them at once: what one process does, all must do, in the same order. So whatever depends on one machine
(a signal, a clock, a file) is agreed on before it decides anything: `together`, `Vote`, `from_first`.
"""

import contextlib
import functools
import os
import socket
import sys
import traceback

import jax
import numpy as np

from aurora_jax import xla_flags
from aurora_jax.errors import UserError
from aurora_jax.parallel import environment, rendezvous

JOIN_SECONDS = 300.0
_LONGEST_WORDS = 1000  # bytes of an error that travel


def add_arguments(parser):
  """The flags of a command that can run on several hosts."""
  group = parser.add_argument_group(
    "several hosts", "found by themselves on Cloud TPU, in a SLURM step and in an indexed Job of Kubernetes; see README"
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port there")
  group.add_argument("--processes", type=int, metavar="N", help="number of processes, one per host as a rule")
  group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
  group.add_argument(
    "--join-seconds",
    type=float,
    default=JOIN_SECONDS,
    metavar="S",
    help="how long to wait for the other processes (default: %(default)g)",
  )
  group.add_argument(
    "--require",
    choices=("accelerator", "tpu", "gpu"),
    help="stop with an error where JAX finds no such thing and would fall back to the CPU",
  )


def join(args, fingerprint=""):
  """Joins the job that the flags or the environment tell of; does nothing where there is one process.

  Args:
    args: parsed flags of `add_arguments`.
    fingerprint: of what is to be done, the same in all processes.

  Returns:
    `environment.Job`.

  Raises:
    UserError: the environment makes no sense, or a process is missing.
  """
  job = environment.find(args.coordinator, args.processes, args.process)
  if args.join_seconds <= 0:
    raise UserError(f"--join-seconds must be positive, got {args.join_seconds:g}")
  if job.processes > 1 or _has_many_cpu_devices():
    _one_program_after_the_other(job.processes)
  if job.processes > 1:
    if job.process == 0:
      print(
        f"{job.processes} processes (found by {job.source}); this is process 0, waiting at {job.coordinator}",
        flush=True,
      )
    rendezvous.answer(job, args.join_seconds, fingerprint)
    # Nothing is left for JAX to detect: on SLURM it would take one GPU per process.
    jax.distributed.initialize(
      job.coordinator,
      job.processes,
      job.process,
      local_device_ids=job.local_devices,
      cluster_detection_method="deactivate",
      initialization_timeout=max(1, round(args.join_seconds)),
    )
  return job


def is_alone():
  """Whether this is the only process; unlike `jax.process_count` it wakes no backend."""
  return not jax.distributed.is_initialized()


def _one_program_after_the_other(processes):
  """Settings without which several CPU devices abort now and then; to be made before a backend wakes.

  Two programs that are on their way at once on several CPU devices, as those of a step are, wait for each other's
  collectives until a time-out ends the process. Several processes ("Received data size doesn't match"): gloo pairs the
  messages of all by their order, which is not kept either, measured with jaxlib 0.10.2, within a program that comes from
  the compilation cache.
  """
  jax.config.update("jax_cpu_enable_async_dispatch", False)  # for the CPU backend only
  xla_flags.run_in_order()  # of a program's collectives too
  if processes > 1 and jax.config.jax_platforms == "cpu":
    jax.config.update("jax_enable_compilation_cache", False)


def _has_many_cpu_devices():
  """Whether one CPU is to pass for several devices, as far as it can be known before a backend wakes."""
  return jax.config.jax_num_cpu_devices > 1 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")


def is_first():
  """Whether this process is the one that talks and writes."""
  return is_alone() or jax.process_index() == 0


def banner(job, required=None):
  """What the run runs on, in words. Wakes the backend.

  Args:
    job: `environment.Job`.
    required: "accelerator", "tpu" or "gpu": what must be there; None: anything.

  Returns:
    (line for everybody, warning or None).

  Raises:
    UserError: `required` is not there.
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


def announce(job, line, warning):
  """Prints what `banner` returned: the line once, a warning in every process that it concerns."""
  if is_first():
    print(line, flush=True)
  if warning:
    name = f"{job.name(job.process)}: " if job.processes > 1 else ""
    print(f"{'!' * 100}\n{name}{warning}\n{'!' * 100}", file=sys.stderr, flush=True)


def replicate(sharding, tree):
  """Puts arrays, the same in every process, onto every device. Unlike `device_put` it does not compare them first.

  Args:
    sharding: a replicated sharding.
    tree: of arrays of numpy, or that this process can see the whole of.
  """
  put = lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf), np.shape(leaf))
  return jax.tree.map(put, tree)


def own_rows(sharding, rows):
  """Which rows of an array that is cut along its first axis are this process's, int64, ascending.

  The devices of a mesh lie as suits their wiring, so that those of a process need not be neighbours.
  """
  pieces = sharding.addressable_devices_indices_map((rows,)).values()
  return np.unique(np.concatenate([np.arange(rows, dtype=np.int64)[index] for index in pieces]))


@contextlib.contextmanager
def together(doing):
  """What is done inside fails in all processes or in none.

  It must not hold a computation over several processes: the others would wait in it for one that has left.

  Args:
    doing: words for it, for a message.

  Raises:
    UserError: it was raised here, or in another process, which the message then names.
  """
  if is_alone():
    yield
    return
  error = None
  try:
    yield
  except Exception as raised:
    error = raised
  words = "" if error is None else f"({socket.gethostname()}), {doing}: {error or type(error).__name__}"
  padded = np.zeros(_LONGEST_WORDS, np.uint8)
  encoded = np.frombuffer(words.encode(errors="replace")[:_LONGEST_WORDS], np.uint8)
  padded[: len(encoded)] = encoded
  from jax.experimental import multihost_utils

  for process, row in enumerate(multihost_utils.process_allgather(padded)):
    if row[0] and error is None:
      error = UserError(f"process {process} {bytes(row[row > 0]).decode(errors='replace')}")
  if error is not None:
    error.is_agreed = True
    raise error


@contextlib.contextmanager
def leaving_at_once(command):
  """Inside, an error that the others know nothing of ends this process at once.

  They will wait for it in some computation, and JAX, when a process ends, for all others to end. So the process goes
  without a good-bye: a scheduler that looks after the job ends it, else JAX does within two minutes.

  Args:
    command: its name, for the message.
  """
  try:
    yield
  except Exception as error:
    if is_alone() or getattr(error, "is_agreed", False):
      raise
    known = isinstance(error, UserError)
    words = f"aurora_jax {command}: {' '.join(str(error).split())}" if known else traceback.format_exc()
    print(words, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2 if known else 1)


def from_first(number):
  """An integer as the first process has it."""
  if is_alone():
    return number
  from jax.experimental import multihost_utils

  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_same(digest: int, message: str) -> None:
  """Makes sure that all processes have read the same.

  Args:
    digest: an int32 of what was read.
    message: what is wrong otherwise; " than in process 0" is added.

  Raises:
    UserError: in all processes, if one differs from the first.
  """
  first = from_first(digest)
  with together("comparing what was read"):
    if first != digest:
      raise UserError(f"{message} than in process 0")


def from_all(text):
  """A text of each process, in all of them.

  Args:
    text: str, of any length.

  Returns:
    list of str, by process.
  """
  if is_alone():
    return [text]
  encoded = np.frombuffer(text.encode(), np.uint8)
  lengths = _rows_of_all(np.array([len(encoded)], np.int32))[:, 0]
  if not lengths.any():
    return [""] * len(lengths)
  # A power of two: few different programs are compiled.
  padded = np.zeros(1 << max(12, int(lengths.max() - 1).bit_length()), np.uint8)
  padded[: len(encoded)] = encoded
  return [bytes(row[:length]).decode() for row, length in zip(_rows_of_all(padded), lengths)]


def _rows_of_all(row):
  """[processes, n]: the row [n] of each process. All devices of this process are done with it afterwards."""
  devices = jax.devices()
  sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices), "all"), jax.sharding.PartitionSpec("all"))
  rows = jax.make_array_from_process_local_data(sharding, np.tile(row, (jax.local_device_count(), 1)))
  rows = jax.block_until_ready(_replicator(sharding.mesh)(rows))
  owners = [device.process_index for device in devices]
  return np.asarray(rows.addressable_data(0))[[owners.index(process) for process in range(jax.process_count())]]


@functools.lru_cache(maxsize=1)
def _replicator(mesh):
  return jax.jit(lambda rows: rows, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


def float_from_first(number):
  """A float as the first process has it, bit by bit."""
  if is_alone():
    return number
  return float(
    np.array([from_first(int(part)) for part in np.array([number]).view(np.int32)], np.int32).view(np.float64)[0]
  )


class Vote:
  """The largest of all processes' numbers, the same in all of them, at no waiting: known one call later.

  A call sends a small program after those that are on their way, and reads the result of the call before.
  """

  def __init__(self, sharding):
    """Args: sharding: of a batch, over all devices."""
    self._sharding = sharding
    self._largest = jax.jit(
      lambda numbers: numbers.max(),
      out_shardings=jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()),
    )
    self._local = len(sharding.addressable_devices)
    self._asked = None

  def __call__(self, number):
    """Casts this process's number. Returns the largest of the last round, 0 in the first one."""
    numbers = jax.make_array_from_process_local_data(self._sharding, np.full(self._local, number, np.int32))
    asked, self._asked = self._asked, self._largest(numbers)
    return 0 if asked is None else int(jax.device_get(asked))


class Alone:
  """The twin of `Vote` for one process, where nobody else is to be asked."""

  def __call__(self, number):
    return number


def vote(sharding):
  """`Vote` among several processes, `Alone` in one."""
  return Alone() if is_alone() else Vote(sharding)
