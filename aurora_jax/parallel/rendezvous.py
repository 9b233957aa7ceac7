"""Who is there: the processes of a job find each other before JAX does.

`jax.distributed.initialize` ends the whole process with a stack trace when somebody does not come, and names nobody. So
all processes first report to process 0 at the address that JAX will use a moment later: one line of JSON each way.
"""

import contextlib
import json
import socket
import time

from aurora_jax.errors import UserError

_LONGEST_LINE = 1 << 16
_SECONDS_BETWEEN_TRIES = 0.2
_SECONDS_FOR_A_LINE = 5.0
_SLACK = 10.0  # the others wait a little longer than process 0, so as to hear from it who is missing


def answer(job, timeout, fingerprint=""):
  """Returns when all processes of the job have called it.

  Args:
    job: `environment.Job` with more than one process.
    timeout: seconds to wait for the last one.
    fingerprint: of what the job is about; those who are about something else are refused.

  Raises:
    UserError: processes are missing, which it names; two have the same number; they differ in what they are about.
  """
  host, _, port = job.coordinator.rpartition(":")
  mine = {"process": job.process, "processes": job.processes, "host": socket.gethostname(), "fingerprint": fingerprint}
  if job.process == 0:
    problem = _gather(job, int(port), mine, timeout)
  else:
    problem = _report(job, host.strip("[]"), int(port), mine, timeout)
  if problem:
    raise UserError(problem)


def _gather(job, port, mine, timeout):
  """Process 0's side. Returns what is wrong, or None."""
  deadline = time.monotonic() + timeout
  there, connections = {0: mine}, []
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
    while len(there) < job.processes and problem is None:
      left = deadline - time.monotonic()
      if left <= 0:
        problem = _missing(job, there, timeout)
        break
      server.settimeout(left)
      with contextlib.suppress(TimeoutError):
        connection, _ = server.accept()
        stack.callback(connection.close)
        other = _receive(connection)
        if other is None:  # somebody else's business: a probe, a scan
          continue
        problem = _refusal(job, there, mine, other)
        there.setdefault(other["process"], other)
        connections.append(connection)
    for connection in connections:
      _send(connection, {"problem": problem})
    for connection in connections:  # the other side closes first, so that the port is free at once
      with contextlib.suppress(OSError):
        connection.settimeout(_SECONDS_FOR_A_LINE)
        connection.recv(1)
  return problem


def _refusal(job, there, mine, other):
  process = other["process"]
  if other["processes"] != job.processes or not 0 < process < job.processes:
    return (
      f"process {process} of {other['processes']} (host {other['host']}) came to a job of {job.processes} processes"
    )
  if process in there:
    return f"two processes call themselves {process}, on hosts {there[process]['host']} and {other['host']}"
  if other["fingerprint"] != mine["fingerprint"]:
    return (
      f"process {process} (host {other['host']}) was started with another experiment than process 0 (host "
      f"{mine['host']}): all processes take the same --config flags"
    )
  return None


def _missing(job, there, timeout):
  absent = [process for process in range(job.processes) if process not in there]
  shown = ", ".join(job.name(process) for process in absent[:8])
  more = f" and {len(absent) - 8} more" if len(absent) > 8 else ""
  present = ", ".join(f"{process} ({there[process]['host']})" for process in sorted(there)[:8])
  return (
    f"{shown}{more} of {job.processes} did not come to {job.coordinator} within {timeout:g} s; there "
    f"{'is process' if len(there) == 1 else 'are processes'} {present}{', ...' if len(there) > 8 else ''}"
  )


def _report(job, host, port, mine, timeout):
  """Any other process's side. Returns what is wrong, or None."""
  deadline = time.monotonic() + timeout
  reason = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=min(left, 10.0)) as connection:
        _send(connection, mine)
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
    f"is process {job.process} on host {mine['host']}"
  )


def _receive(connection):
  connection.settimeout(_SECONDS_FOR_A_LINE)
  try:
    words = _read_line(connection)
  except OSError:
    return None
  if (
    isinstance(words, dict)
    and isinstance(words.get("process"), int)
    and words.keys() >= {"process", "processes", "host", "fingerprint"}
  ):
    return words
  return None


def _read_line(connection):
  """One line of JSON; None where there is none."""
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


def _send(connection, words):
  with contextlib.suppress(OSError):
    connection.sendall(json.dumps(words).encode() + b"\n")
