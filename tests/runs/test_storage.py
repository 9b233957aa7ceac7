"""Data sets and runs at s3:// and gs:// URLs, against servers on the loopback that refuse, stall and go away."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import saves_at_url  # noqa: E402
import storage_servers  # noqa: E402

from aurora_jax import local_copies, storage, storage_client
from aurora_jax.cli import main
from aurora_jax.data import dataset, remote_shards, tfrecords
from aurora_jax.errors import UserError
from aurora_jax.runs import (
  checkpoint_folder,
  checkpoint_manager,
  checkpoint_reader,
  fingerprint,
  metrics,
  remote_run,
  retention,
  workdir,
)
from aurora_jax.training import initialize

DEADLINE, STEPS = 20, 16
SCHEMES = ("s3", "gs")
CONFIG = f"""
from aurora_jax import config_files

def get_config(variant=""):
  config = config_files.defaults()
  config.train.total_steps, config.train.batch_size = {STEPS}, 8
  config.train.checkpoint_every, config.train.log_every, config.train.sample_every = 4, 3, 8
  config.train.keep_checkpoints, config.train.keep_every = 1, 8
  return config
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
  """{scheme: server}; this process and those that it starts find them by the standard variables."""
  home = tmp_path_factory.mktemp("servers")
  with pytest.MonkeyPatch.context() as patch:
    running = {}
    try:
      for scheme in SCHEMES:
        running[scheme] = storage_servers.Server(scheme, str(home / f"{scheme}.log"))
        for name, value in running[scheme].environment.items():
          patch.setenv(name, value)
      patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
      patch.setenv(storage_client.DEADLINE_VARIABLE, str(DEADLINE))
      storage_client.file_system.cache_clear()
      yield running
    finally:
      storage_client.file_system.cache_clear()
      for server in running.values():
        server.close()


@pytest.fixture(params=SCHEMES)
def server(request, servers):
  return servers[request.param]


@pytest.fixture
def url(server, request):
  return f"{server.scheme}://{storage_servers.BUCKET}/{request.node.originalname} 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of images with captions."""
  place = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for i in range(30):
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(place / f"{i}.png")
    (place / f"{i}.txt").write_text(f"image {i}")
  return place


def build(folder, out, *more):
  options = ["--resolution", "8", "--shards", "3", "--heldout", "0", *more]
  return main.main(["build-data", "--source", "folder", "--path", str(folder), "--out", str(out), *options])


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
  place = tmp_path_factory.mktemp("data") / "set"
  assert build(folder, place) == 0
  return place


def test_requests(server, url, tmp_path):
  content = {f"a/{i} é.bin": bytes([i]) * 999 * i for i in range(5)} | {"b": b"0123456789"}
  with server.proxy.misbehaving(refuse=0.2, stall=0.02):
    for name, value in content.items():
      storage.write(storage.join(url, name), value)
    assert storage.find(url) == {name: len(value) for name, value in content.items()}
    assert storage.list_folder(url) == (["b"], ["a"])
    assert storage.read_range(storage.join(url, "b"), 3, 4) == b"3456"
    storage.download_all(url, tmp_path, storage.find(url))
    assert {name: (tmp_path / name).read_bytes() for name in content} == content
    storage.upload_all(tmp_path, f"{url}-again", content)
    assert {name: storage.read(storage.join(f"{url}-again", name)) for name in content} == content
    storage.delete_folder(f"{url}-again", first=["b"])
  assert storage.find(f"{url}-again") == {} == storage.find(f"{url}-never")
  assert storage.size(storage.join(url, "c")) is None and not storage.exists(storage.join(url, "a"))
  with pytest.raises(storage.MissingError, match="1/c does not exist"):
    storage.read(storage.join(url, "c"))
  with pytest.raises(UserError, match=f"workdir x cannot be written: there is no bucket {server.scheme}://elsewhere"):
    storage.check_writable(f"{server.scheme}://elsewhere/run", "workdir x")
  with pytest.raises(UserError, match="BUCKET/FOLDER is needed"):
    storage.check_url(f"{server.scheme}://{storage_servers.BUCKET}")


def test_a_server_that_stays_away(server, url, monkeypatch):
  monkeypatch.setenv(storage_client.DEADLINE_VARIABLE, "3")
  begin = time.monotonic()
  with server.proxy.misbehaving(away=True), pytest.raises(storage.StorageError) as caught:
    storage.read(storage.join(url, "x"))
  message = str(caught.value)
  assert url in message and server.proxy.address in message and "3 s" in message or "2 s" in message, message
  assert "\n" not in message and time.monotonic() - begin < 8
  monkeypatch.setenv(storage_client.DEADLINE_VARIABLE, "soon")
  with pytest.raises(UserError, match="AURORA_JAX_STORAGE_DEADLINE=soon"):
    storage.read(storage.join(url, "x"))


def test_without_credentials_or_package(servers, monkeypatch, tmp_path):
  for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    monkeypatch.delenv(name)
  monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
  monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
  storage_client.file_system.cache_clear()
  with pytest.raises(UserError, match="workdir s3://bucket/x cannot be written: .*AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
    workdir.check_writable("s3://bucket/x")
  storage_client.file_system.cache_clear()
  for name in [name for name in sys.modules if name.split(".")[0] in ("s3fs", "gcsfs")]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, "s3fs", None)
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
    with pytest.raises(UserError, match=rf"{scheme}:// needs the package {package}: pip install"):
      storage.check_url(f"{scheme}://bucket/x")
  storage_client.file_system.cache_clear()


def test_data_set(server, url, data, folder, capsys, tmp_path):
  server.proxy.requests.clear()
  assert build(folder, url) == 0
  written = [line for line in server.proxy.requests if line.startswith(("PUT", "POST"))]
  assert "manifest.json" in written[-1], written  # half a data set is none
  assert storage.find(url) == {path.name: path.stat().st_size for path in data.iterdir()}
  assert build(folder, url) == 2 and "holds a data set (--overwrite replaces it)" in capsys.readouterr().err
  assert build(folder, url, "--overwrite", "--name", "other") == 0
  assert storage.exists(storage.join(url, "other-train-00000-of-00003.tfrecord")) and len(storage.find(url)) == len(
    list(data.iterdir())
  )

  local = dataset.Dataset.open(data)
  server.proxy.requests.clear()
  remote = dataset.Dataset.open(url)
  opening = len(server.proxy.requests)
  assert len(remote) == len(local) == 30 and remote.captions() == local.captions()
  for number in (0, 17, 29):
    assert remote.read(number) == local.read(number)
  assert remote.read_run(3, 20) == local.read_run(3, 20)
  assert len(server.proxy.requests) - opening <= 3 + 3  # one range for each record, one for each shard of a run
  again = dataset.Dataset.open(url, "train")
  assert again[5].captions == local[5].captions

  capsys.readouterr()
  assert main.main(["inspect", url]) == 0 and main.main(["inspect", url, "--verify"]) == 0
  shown = capsys.readouterr().out
  assert f"data set   {url} (other)" in shown and "none of 30 records damaged" in shown
  storage.delete([storage.join(url, "other-train-00001-of-00003.tfrecord")])
  remote_shards._mirror.cache_clear()
  with pytest.raises(UserError, match="00001-of-00003.tfrecord is missing"):
    dataset.Dataset.open(url)
  with pytest.raises(tfrecords.RecordError):
    remote.read(15)
  with pytest.raises(UserError, match="has no manifest.json"):
    dataset.Dataset.open(f"{url}-never")


@pytest.mark.slow
def test_orbax_writes_to_gs_itself(servers, tmp_path):
  """What several processes of a pod do, here by one."""
  url = f"gs://{storage_servers.BUCKET}/direct/checkpoints"
  state = {"step": jnp.int32(3), "networks": {"g": {"params": {"a": jnp.arange(6.0).reshape(2, 3)}}}}
  for folder in (url, tmp_path / "checkpoints"):
    with checkpoint_manager.Checkpoints(folder, retention.Policy(newest=1)) as checkpoints:
      for step in (1, 2):
        checkpoints.save(step, state, {"name": "x"}, {"clock": step})
    assert checkpoint_folder.steps(folder) == [2]
    assert checkpoint_folder.stored_progress(folder) == {"clock": 2}
  assert fingerprint.of_checkpoint(url) == fingerprint.of_checkpoint(tmp_path / "checkpoints")
  storage.write(storage.join(url, "7/state/d/half"), b"x")  # not committed
  abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
  with checkpoint_manager.Checkpoints(url) as checkpoints:
    restored, progress = checkpoints.restore(abstract)
  assert (
    progress == {"clock": 2}
    and (restored["networks"]["g"]["params"]["a"] == state["networks"]["g"]["params"]["a"]).all()
  )
  _, parts = checkpoint_reader.read_parts(storage.path(url), ["networks/g/params"])
  assert parts["networks/g/params"]["a"].shape == (2, 3)


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_at_gs(servers, tmp_path):
  """Killed while they write, they go on from what is complete."""
  url, server = f"gs://{storage_servers.BUCKET}/two/checkpoints", servers["gs"]

  def start():
    with socket.socket() as found:
      found.bind(("127.0.0.1", 0))
      port = found.getsockname()[1]
    command = [sys.executable, saves_at_url.__file__, url, str(port)]
    environment = os.environ | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "PYTHONPATH": os.getcwd()}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen([*command, str(i)], **options) for i in range(2)]

  with server.proxy.misbehaving(refuse=0.02):
    server.proxy.requests.clear()
    processes = start()
    end = time.monotonic() + 200
    while not any("checkpoints/3/state" in urllib.parse.unquote(line) for line in list(server.proxy.requests)):
      assert time.monotonic() < end and all(process.poll() is None for process in processes)
      time.sleep(0.002)
    for process in processes:
      process.kill()
      process.communicate()
    complete = checkpoint_folder.steps(url)
    assert complete in ([2], [1, 2])
    for process in start():
      said, _ = process.communicate(timeout=200)
      assert process.returncode == 0 and "went on from 2" in said, said
  assert checkpoint_folder.steps(url) == [3, 4]
  for step in (3, 4):
    _, parts = checkpoint_reader.read_parts(url, ["networks/g/params"], step)
    np.testing.assert_array_equal(parts["networks/g/params"]["a"], saves_at_url.values(step))
    assert checkpoint_folder.stored_progress(url, step) == {"clock": step}


@pytest.mark.slow
def test_lease(server, url, monkeypatch):
  monkeypatch.setattr(remote_run, "LEASE_SECONDS", 3.0)
  monkeypatch.setattr(remote_run, "_RENEW_SECONDS", 0.3)
  lease = storage.join(url, remote_run.LEASE)
  with remote_run.trained(url) as run:
    assert remote_run.is_leased(url) and workdir.is_locked(run.folder.path)
    (run.folder.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="another process is training in it"), remote_run.trained(url):
      pass
  assert storage.read(storage.join(url, "metrics.jsonl")) == b"{}\n" and not storage.exists(lease)
  stale = {"token": "x", "host": "elsewhere", "boot": "", "pid": 1, "renewed": time.time()}
  storage.write(lease, json.dumps(stale).encode())
  with remote_run.trained(url):  # nobody renews it
    pass
  copy = workdir.RunFolder(remote_run.fetched(url))
  with open(copy.metrics, "a") as file:
    file.write("[]\n")
  remote_run.write_back(copy)
  assert storage.read(storage.join(url, "metrics.jsonl")) == b"{}\n[]\n"
  storage.write(lease, json.dumps(stale | {"renewed": time.time() + 9}).encode())
  with pytest.raises(UserError, match="a process trains in it"):
    remote_run.refuse_trained(copy)
  with pytest.raises(UserError, match="run folder not found"):
    remote_run.fetched(f"{url}-never")


@pytest.fixture(scope="module")
def train(servers, folder, data, tmp_path_factory):
  """Starts `train` on the data set at a folder or URL: (fork server, its arguments, a whole local run)."""
  import fork_server

  home = tmp_path_factory.mktemp("train")
  (home / "small.py").write_text(CONFIG)
  command = lambda data: ["train", "--config", home / "small.py", f"--config.data.path={data}", "--workdir"]
  with fork_server.ForkServer("linear_at_url") as running:
    running.start(home / "whole.log", *command(data), home / "whole")
    assert running.wait() == 0, (home / "whole.log").read_text()
    yield running, command, home / "whole"


def history(path):
  """What was measured on the way to the present state, but for the times."""
  plain = lambda name: name not in ("seconds", "images_per_second") and not name.startswith("time/")
  rows = [row for row in metrics.history(path) if row["kind"] == "train"]
  return [{name: value for name, value in row.items() if plain(name)} for row in rows]


def printed(capsys, *arguments):
  capsys.readouterr()
  assert main.main([str(argument) for argument in arguments]) == 0
  return capsys.readouterr().out.strip()


def wait_for(server, text, running, log, seconds=120):
  end = time.monotonic() + seconds
  while not any(text in line for line in list(server.proxy.requests)):
    assert time.monotonic() < end and running.is_alive(), (text, server.proxy.requests[-9:], log.read_text())
    time.sleep(0.002)


@pytest.mark.slow
def test_killed_and_restarted_on_a_bad_server(server, url, train, data, tmp_path, capsys):
  running, command, whole = train
  run, log = f"{url}/run", tmp_path / "log"
  remote_shards.upload(data, f"{url}/data")
  moments = ["checkpoints/4/state", "checkpoints/12/commit_success"] if server.scheme == "s3" else ["12/state"]
  with server.proxy.misbehaving(refuse=0.05, stall=0.005):
    for moment in moments:
      server.proxy.requests.clear()
      pid = running.start(log, *command(f"{url}/data"), run)
      wait_for(server, moment, running, log)
      os.kill(pid, signal.SIGKILL)
      assert running.wait() == -signal.SIGKILL
    running.start(log, *command(f"{url}/data"), run)
    assert running.wait() == 0, log.read_text()
  assert printed(capsys, "inspect", run, "--fingerprint") == printed(capsys, "inspect", whole, "--fingerprint")
  assert checkpoint_folder.steps(f"{run}/checkpoints") == checkpoint_folder.steps(whole / "checkpoints")
  (tmp_path / "metrics.jsonl").write_bytes(storage.read(f"{run}/metrics.jsonl"))
  assert history(tmp_path / "metrics.jsonl") == history(whole / "metrics.jsonl")
  assert f"{run}: all {STEPS} steps are done" in log.read_text() and f"report: {run}/report.html" in log.read_text()
  assert local_copies.cache_folder("runs", run).name not in log.read_text()
  assert not storage.exists(f"{run}/lease.json") and storage.exists(f"{run}/samples/step-00000008.png")
  assert f"{run}/checkpoints/{STEPS}" in printed(capsys, "inspect", f"{run}/checkpoints/{STEPS}")
  assert "done" in printed(capsys, "inspect", run)
  for name in (run, f"{run}/checkpoints", f"{run}/checkpoints/{STEPS}"):
    place, step = initialize.source(name)
    assert (str(place), step) == (f"{run}/checkpoints", STEPS)
  with pytest.raises(UserError, match=f"train.init_from={url}/data: no checkpoint there"):
    initialize.source(f"{url}/data")
  # `linear` takes over nothing; what `train.init_from` reads is the same here and there.
  (_, here), (_, there) = (
    checkpoint_reader.read_parts(folder, ["networks/generator/params"], step)
    for folder in (whole / "checkpoints", place)
  )
  assert jax.tree.leaves(here)
  jax.tree.map(np.testing.assert_array_equal, here, there)


@pytest.mark.slow
def test_a_run_whose_server_goes_away(servers, train, data, tmp_path):
  running, command, _ = train
  server, run, log = servers["s3"], f"s3://{storage_servers.BUCKET}/away", tmp_path / "log"
  server.proxy.requests.clear()
  running.start(log, *command(data), run)
  with contextlib.ExitStack() as stack:
    wait_for(server, "away/checkpoints/4/commit_success", running, log)
    wait_for(server, "away/checkpoints/8/state", running, log)
    stack.enter_context(server.proxy.misbehaving(away=True))
    begin = time.monotonic()
    assert running.wait() == 2, log.read_text()
    assert time.monotonic() - begin < 3 * DEADLINE
  line = [line for line in log.read_text().splitlines() if line.startswith("aurora_jax train:")][-1]
  assert server.proxy.address in line and "the last complete checkpoint is of step 4" in line, line
  assert "Traceback" not in log.read_text()
  shutil.rmtree(local_copies.cache_folder("runs", run), ignore_errors=True)
