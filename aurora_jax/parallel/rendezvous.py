"""Checks that all processes of a job are present, before JAX connects them.

If a process is missing, `jax.distributed.initialize` ends the others with a stack trace that does not name it. So all
processes first report to process 0, at the address that JAX will use next. Each sends one line of JSON and gets one
back.
"""

import contextlib
import json
import socket
import time

from aurora_jax.errors import UserError
from aurora_jax.parallel.environment import Job

_LONGEST_LINE = 1 << 16
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_FOR_A_LINE = 5.0
# The other processes wait longer than process 0 by so many seconds, so that it can tell them which process is missing.
_SLACK = 10.0


def wait_for_all(job: Job, timeout: float, fingerprint: str = "") -> None:
  """Returns when all processes of the job have called this.

  Args:
    job: with more than one process.
    timeout: seconds to wait for the last process.
    fingerprint: of the experiment; a process with another one is refused.

  Raises:
    UserError: in all processes. A process is missing (the message names it), two have the same number, or one has
      another fingerprint or another number of processes.
  """
  host, _, port = job.coordinator.rpartition(":")
  local = {"process": job.process, "processes": job.processes, "host": socket.gethostname(), "fingerprint": fingerprint}
  if job.process == 0:
    problem = _collect(job, int(port), local, timeout)
  else:
    problem = _report(job, host.strip("[]"), int(port), local, timeout)
  if problem:
    raise UserError(problem)


def _collect(job, port, local, timeout):
  """The side of process 0. Returns an error message, or None."""
  deadline = time.monotonic() + timeout
  present, connections = {0: local}, []
  with contextlib.ExitStack() as stack:
    try:
      dual = socket.has_dualstack_ipv6()
      server = stack.enter_context(
        socket.create_server(
          ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=job.processes
        )
      )
    except (OSError, OverflowError) as error:
      return f"process 0 cannot listen at port {port} of {job.coordinator}: {error}"
    problem = None
    while len(present) < job.processes and problem is None:
      left = deadline - time.monotonic()
      if left <= 0:
        problem = _missing(job, present, timeout)
        break
      server.settimeout(left)
      with contextlib.suppress(TimeoutError):
        connection, _ = server.accept()
        stack.callback(connection.close)
        other = _receive(connection)
        if other is None:  # not a process of a job: a health probe, a port scan
          continue
        problem = _refusal(job, present, local, other)
        present.setdefault(other["process"], other)
        connections.append(connection)
    for connection in connections:
      _send(connection, {"problem": problem})
    for connection in connections:  # waits until the other side closes, so that the port is free at once
      with contextlib.suppress(OSError):
        connection.settimeout(_SECONDS_FOR_A_LINE)
        connection.recv(1)
  return problem


def _refusal(job, present, local, other):
  process = other["process"]
  if other["processes"] != job.processes or not 0 < process < job.processes:
    return f"process {process} of {other['processes']} (host {other['host']}) joined a job of {job.processes} processes"
  if process in present:
    return f"two processes have the number {process}, on hosts {present[process]['host']} and {other['host']}"
  if other["fingerprint"] != local["fingerprint"]:
    return (
      f"process {process} (host {other['host']}) was started with another experiment than process 0 (host "
      f"{local['host']}): all processes take the same --config flags"
    )
  return None


def _missing(job, present, timeout):
  absent = [process for process in range(job.processes) if process not in present]
  shown = ", ".join(job.name(process) for process in absent[:8])
  more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
  found = ", ".join(f"{process} ({present[process]['host']})" for process in sorted(present)[:8])
  return (
    f"{shown}{more} of {job.processes} did not connect to {job.coordinator} within {timeout:g} s; present: "
    f"process{'' if len(present) == 1 else 'es'} {found}{', ...' if len(present) > 8 else ''}"
  )


def _report(job, host, port, local, timeout):
  """The side of every other process. Returns an error message, or None."""
  deadline = time.monotonic() + timeout
  reason = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=min(left, 10.0)) as connection:
        _send(connection, local)
        connection.settimeout(max(left, 1.0) + _SLACK)
        reply = _read_line(connection)
        if isinstance(reply, dict) and "problem" in reply:
          return reply["problem"]
        reason = "the connection was closed"
    except (OSError, OverflowError) as error:
      reason = str(getattr(error, "strerror", None) or error)
    time.sleep(_SECONDS_BETWEEN_TRIES)
  return (
    f"{job.name(0)} of {job.processes} does not answer at {job.coordinator} within {timeout:g} s ({reason}); this "
    f"is process {job.process} on host {local['host']}"
  )


def _receive(connection):
  connection.settimeout(_SECONDS_FOR_A_LINE)
  try:
    message = _read_line(connection)
  except OSError:
    return None
  if (
    isinstance(message, dict)
    and isinstance(message.get("process"), int)
    and message.keys() >= {"process", "processes", "host", "fingerprint"}
  ):
    return message
  return None


def _read_line(connection):
  """One line of JSON; None if there is none."""
  data = b""
  while not data.endswith(b"\n") and len(data) < _LONGEST_LINE:
    piece = connection.recv(4096)
    if not piece:
      break
    data += piece
  try:
    return json.loads(data)
  except ValueError:
    return None


def _send(connection, message):
  with contextlib.suppress(OSError):
    connection.sendall(json.dumps(message).encode() + b"\n")
