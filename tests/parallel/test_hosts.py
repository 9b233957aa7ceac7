"""The rendezvous of processes, and the messages about devices. Jobs of real processes: test_two_processes.py."""

import argparse
import json
import socket
import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from aurora_jax.cli import host_flags
from aurora_jax.errors import UserError
from aurora_jax.parallel import environment, hosts, rendezvous
from aurora_jax.parallel.environment import Job


def free_address():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{found.getsockname()[1]}"


def call(jobs, timeout=20, fingerprints=()):
  """Runs each job's rendezvous in a thread of its own. Returns the message of each one's error, or None."""
  outcomes = [None] * len(jobs)

  def wait(i):
    try:
      rendezvous.wait_for_all(jobs[i], timeout, fingerprints[i] if fingerprints else "")
    except UserError as error:
      outcomes[i] = str(error)

  threads = [threading.Thread(target=wait, args=(i,)) for i in range(len(jobs))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return outcomes


def jobs(numbers, processes, names=()):
  address = free_address()
  return [Job("flags", address, processes, number, names) for number in numbers]


def test_all_are_present_and_the_port_is_free_afterwards():
  members = jobs(range(5), 5)
  assert call(members) == [None] * 5
  port = int(members[0].coordinator.rpartition(":")[2])
  with socket.create_server(("127.0.0.1", port)):
    pass


def test_every_process_is_told_which_ones_are_missing():
  said = call(jobs([0, 2], 4, ("n1", "n2", "n3", "n4")), timeout=1)
  assert said[0] == said[1] and "process 1 (host n2), process 3 (host n4) of 4 did not connect to 127.0.0.1:" in said[0]
  assert "within 1 s; present: processes 0 (" in said[0]
  assert "more" not in call(jobs([0], 9), timeout=0.2)[0]
  assert "process 8 and 2 more of 11 did not connect" in call(jobs([0], 11), timeout=0.2)[0]


def test_without_process_0_the_address_is_named():
  [said] = call(jobs([1], 2, ("n1", "n2")), timeout=0.5)
  assert (
    said.startswith("process 0 (host n1) of 2 does not answer at 127.0.0.1:") and "this is process 1 on host" in said
  )


def test_two_with_the_same_number_and_strangers():
  said = call(jobs([0, 1, 1], 3), timeout=5)
  assert any("two processes have the number 1, on hosts" in message for message in said if message)
  members = jobs([0, 1], 2)
  members[1] = Job("flags", members[1].coordinator, 3, 1)
  assert all("process 1 of 3 (host " in text and "joined a job of 2 processes" in text for text in call(members))


def test_another_experiment_is_refused():
  assert all("started with another experiment" in text for text in call(jobs([0, 1], 2), fingerprints=("a", "b")))
  assert call(jobs([0, 1], 2), fingerprints=("a", "a")) == [None, None]


def test_a_port_that_is_taken():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    [said] = call([Job("flags", f"127.0.0.1:{port}", 2, 0)], timeout=1)
  assert said.startswith(f"process 0 cannot listen at port {port}")


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"3\n", json.dumps({"process": "x"}).encode() + b"\n"])
def test_other_connections_are_ignored(data):
  members = jobs([0, 1], 2)
  host, _, port = members[0].coordinator.rpartition(":")
  outcome = []
  first = threading.Thread(target=lambda: outcome.extend(call(members[:1])))
  first.start()
  while True:
    try:
      with socket.create_connection((host, int(port))) as connection:
        connection.sendall(data)
      break
    except ConnectionRefusedError:
      pass
  assert call(members[1:]) == [None]
  first.join()
  assert outcome == [None]


def test_the_banner_and_its_warning(monkeypatch, capsys):
  line, warning = hosts.banner(Job())
  assert line == f"devices: {jax.device_count()} x cpu (cpu); one process" and warning is None
  monkeypatch.setattr(environment, "expected_accelerator", lambda: "NVIDIA GPUs (/dev/nvidia0)")
  line, warning = hosts.banner(Job())
  hosts.announce(Job(), line, warning)
  said = capsys.readouterr()
  assert said.out == f"{line}\n" and "NVIDIA GPUs (/dev/nvidia0), but JAX FELL BACK TO THE CPU" in said.err
  for required in ("accelerator", "tpu", "gpu"):
    with pytest.raises(UserError, match=f"--require {required}, but JAX runs on cpu .*has NVIDIA GPUs"):
      hosts.banner(Job(), required)


def test_a_single_process_needs_no_agreement():
  parser = argparse.ArgumentParser()
  host_flags.add_arguments(parser)
  assert hosts.join(parser.parse_args([])).processes == 1
  with pytest.raises(UserError, match="--join-seconds must be positive, got 0"):
    hosts.join(parser.parse_args(["--join-seconds", "0"]))
  assert hosts.vote(None)(3) == 3 and hosts.from_primary(7) == 7 and hosts.is_primary()
  with pytest.raises(UserError, match="^as it was$"), hosts.together("trying"):
    raise UserError("as it was")


def test_local_rows():
  mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  assert hosts.local_rows(sharding, 6).tolist() == list(range(6))

  class Scattered:
    """The devices of this process have the first and the last quarter."""

    def addressable_devices_indices_map(self, shape):
      assert shape == (8,)
      return {"a": (slice(6, 8),), "b": (slice(0, 2),)}

  assert hosts.local_rows(Scattered(), 8).tolist() == [0, 1, 6, 7]
  array = hosts.replicate(NamedSharding(mesh, PartitionSpec()), {"a": np.arange(3)})["a"]
  assert array.tolist() == [0, 1, 2]
