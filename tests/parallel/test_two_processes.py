"""Two processes as one job, started as commands: what one process computes, nothing read or written twice."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from parallel import tiny_clip
from PIL import Image

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.data import loader, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.runs import checkpoint_reader
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import step as step_lib

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
RECORDS, BATCH, STEPS = 20, 4, 3  # an epoch is five steps
# KiB: more than a file that a process logs, less than the largest file of its part of a checkpoint. That had 128 to
# 400 KiB; the slower the machine, the more files there are.
LARGEST_FILE = 48
CONFIG = """
from configs import aurora_64

def get_config(variant=""):
  config = aurora_64.get_config("test")
  generator, discriminator = config.generator, config.discriminator
  for network in (generator, discriminator):
    network.resolution, network.blocks, network.text_layers, network.attention_depth = 4, {4: 1}, 0, {}
  generator.adaptive_kernels, generator.attention_depth, generator.experts = {4: 1}, {4: 1}, {4: 4}
  generator.mapping_layers, generator.deformable_max_resolution = 1, 0
  generator.output_resolutions = discriminator.input_resolutions = (4,)
  discriminator.exit_resolutions, discriminator.head_layers = (1,), 0
  config.loss.clip_min_resolution = 4
  config.loss.clip_bank, config.loss.r1_gamma = 3, 0.0
  config.mesh.data, config.mesh.expert, config.mesh.fsdp = 2, 2, True
  config.train.batch_size, config.train.total_steps = 4, 3
  config.train.checkpoint_every = 2
  config.train.log_every = 1
  config.train.sample_every = 3
  return config
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A data set in which two records have a flipped byte, none of those that the first three steps read; and a CLIP."""
  home = tmp_path_factory.mktemp("home")
  (home / "small.py").write_text(CONFIG)
  (home / "images").mkdir()
  rng = np.random.default_rng(0)
  for i in range(RECORDS):
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(home / f"images/{i}.png")
    (home / f"images/{i}.txt").write_text(f"image number {i}\n")
  options = {
    "source": "folder",
    "path": home / "images",
    "out": home / "data",
    "resolution": 4,
    "shards": 3,
    "heldout": 0,
  }
  assert (
    main.main(["build-data", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]) == 0
  )
  tiny_clip.save(home / "clip", [f"image number {i}" for i in range(RECORDS)])
  corrupt(home / "data")
  return home


def corrupt(folder):
  maker = loader.BatchMaker(Dataset.open(folder), 4, BATCH, 0)
  early = {number for step in range(STEPS) for number in maker(step)["index"]}
  names = sorted(folder.glob("*.tfrecord"))
  places = [(path, record) for path in names for record in range(len(tfrecords.load_index(path)))]
  assert len(places) == RECORDS
  for number in sorted(set(range(RECORDS)) - early)[:2]:
    path, record = places[number]
    data = bytearray(path.read_bytes())
    data[tfrecords.load_index(path)[record, 0] + 40] ^= 4
    path.write_bytes(data)


def start(home, run, devices, *more, records="records", largest_file=None):
  """Starts `train` with so many CPU devices, and perhaps on a disk that takes no file of more than so many KiB."""
  flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "XLA_FLAGS": flags,
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "RECORDS": str(home / records),
    "PYTHONPATH": str(ROOT),
    # Threads of XLA's CPU client; by default as many as cores or devices. A collective holds its thread until all
    # devices have joined. With few threads, devices that begin two collectives in different orders deadlock.
    "NPROC": "32",
    "PJRT_NPROC": "32",
  }
  limit = ("bash", "-c", f'ulimit -f {largest_file} && exec "$@"', "bash") if largest_file else ()
  return subprocess.Popen(
    [
      *limit,
      sys.executable,
      str(ROOT / "tests/parallel/logged.py"),
      "train",
      "--config",
      str(home / "small.py"),
      "--workdir",
      str(home / run),
      f"--config.data.path={home / 'data'}",
      f"--config.text.clip={home / 'clip'}",
      *map(str, more),
    ],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_two(home, run, *more, port=None):
  """The same command twice, as processes 0 and 1 of two."""
  port = port or free_port()
  return [
    start(
      home,
      run,
      2,
      "--coordinator",
      f"127.0.0.1:{port}",
      "--processes",
      2,
      "--process",
      i,
      *more,
      records=f"{run}-records-{i}",
    )
    for i in range(2)
  ]


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def finish(processes, timeout=500):
  """[(exit status, stdout without what the gloo library says, stderr)]; all processes end, whatever happens."""
  try:
    # All at once: one that waits for its full pipe to be read would keep the others waiting.
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
      said = list(pool.map(lambda process: process.communicate(timeout=timeout), processes))
    return [
      (process.returncode, re.sub(r"^\[Gloo\].*\n", "", out, flags=re.MULTILINE), error)
      for process, (out, error) in zip(processes, said)
    ]
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
  """{name: value per step}, of the first steps."""
  rows = [row for row in lines(run / "metrics.jsonl") if row["kind"] == "train"][:STEPS]
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  names = {name for row in rows for name in row if name.startswith(("loss/", "moe/"))}
  return {name: [row.get(name) for row in rows] for name in names}


def records(path):
  """{step: records}, of the first steps."""
  return {row["step"]: row["index"] for row in lines(path) if row["step"] < STEPS}


def abstract_state(home):
  """The shapes of the training state, on one device."""
  experiment = config_files.load([f"--config={home / 'small.py'}"])
  return step_lib.abstract_state(System(experiment))


@pytest.fixture(scope="module")
def one(home):
  """One process with four devices takes three steps."""
  [(status, _, error)] = finish([start(home, "one", 4)])
  assert status == 0, error[-4000:]
  return home / "one"


@pytest.fixture(scope="module")
def two(home):
  """Two processes with two devices each would train for ever, but the second one is sent a signal after six steps.
  Returns what the two said."""
  processes = start_two(home, "two", "--config.train.total_steps=100000")
  log = home / "two/metrics.jsonl"
  deadline = time.monotonic() + 400
  while time.monotonic() < deadline and not (log.is_file() and log.read_text().count('"train"') >= 6):
    assert processes[1].poll() is None
    time.sleep(0.1)
  processes[1].send_signal(signal.SIGTERM)
  done = finish(processes)
  assert [status for status, _, _ in done] == [0, 0], done[0][2][-4000:] + done[1][2][-4000:]
  return done


def test_the_same_losses_as_one_process(home, one, two):
  alone, together = losses(one), losses(home / "two")
  assert alone.keys() == together.keys() and "loss/g_adversarial" in alone
  for name, values in alone.items():
    np.testing.assert_allclose(
      np.array(together[name], float), np.array(values, float), rtol=1e-5, atol=1e-7, err_msg=name
    )


def test_each_record_is_read_once(home, one, two):
  parts = [records(home / f"two-records-{i}") for i in range(2)]
  assert all(len(part[step]) == BATCH // 2 for part in parts for step in range(STEPS))
  together = [index for part in parts for step in range(STEPS) for index in part[step]]
  assert len(set(together)) == len(together) == STEPS * BATCH
  whole = records(home / "records")
  assert {step: parts[0][step] + parts[1][step] for step in range(STEPS)} == whole


def test_only_the_primary_process_prints_and_writes(home, one, two):
  (_, first, _), (_, second, _) = two
  # Gloo's threads may print "[Gloo] Rank 1 is connected to 1 peer ranks. ...", interleaved with other output.
  gloo = ("[Gloo]", "peer ranks")
  assert [line for line in second.splitlines() if line.strip() and not any(part in line for part in gloo)] == []
  for text in (
    "2 processes (found by flags)",
    "devices: 4 x cpu (cpu); 2 processes by flags",
    "mesh: data 2, expert 2; 1 of 4 images per device",
    "(SIGTERM); saved in",
  ):
    assert text in first, first
  run = home / "two"
  kinds = [row["kind"] for row in lines(run / "metrics.jsonl")]
  assert kinds[:7] == ["start", "samples", "train", "train", "train", "samples", "train"] and kinds[-1] == "stop"
  assert kinds.count("start") == kinds.count("stop") == 1
  assert len(list((run / "tensorboard").iterdir())) == 1
  images = {path.name for path in (run / "samples").iterdir()}
  assert len(images) == kinds.count("samples") and {"step-00000000.png", "step-00000003.png"} <= images
  assert {path.name for path in run.iterdir()} == {path.name for path in one.iterdir()} - {"report.html"} | {
    "skipped_records.jsonl"
  }
  steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
  assert steps[-1] == lines(run / "metrics.jsonl")[-1]["step"] and all(step % 2 == 0 for step in steps[:-1])


@pytest.fixture(scope="module")
def moved(home, one):
  """Two processes go on from a checkpoint of one, and the second one's disk takes no file as large as its next
  checkpoint. Returns (exit status, stdout, stderr) of that one and stdout of the first, which waits for it and is
  ended.
  """
  shutil.copytree(one, home / "moved", ignore=lambda folder, names: {"3"} if "checkpoints" in folder else set())
  job = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--config.train.sample_every=1000", "--process")
  first = start(home, "moved", 2, *job, 0, records="moved-records-0")
  second = start(home, "moved", 2, *job, 1, records="moved-records-1", largest_file=LARGEST_FILE)
  try:
    [done] = finish([second])
    assert first.poll() != 0  # by itself it would end after a minute and a half
  finally:
    first.kill()
    said, _ = first.communicate()
  return *done, said


def test_two_processes_go_on_from_a_checkpoint_of_one(home, one, moved):
  """The state that they restore is the one that was saved, bit by bit; the loss of the next step the uninterrupted
  one's.
  """
  assert "going on from the checkpoint of step 2, to 3" in moved[-1]

  pieces = {}  # of both processes: {leaf: {where: SHA-256}}
  for path in home.glob("moved-records-*.restored-*"):
    for row in lines(path):
      pieces.setdefault(row["leaf"], {})[json.dumps(row["where"])] = row["sha256"]
  _, saved = checkpoint_reader.read(home / "moved/checkpoints", abstract_state(home), step=2, whole=True)
  for path, leaf in jax.tree_util.tree_flatten_with_path(saved)[0]:
    found, leaf = pieces.pop(jax.tree_util.keystr(path)), np.asarray(leaf)
    for where, digest in found.items():
      piece = leaf[tuple(slice(*bounds) for bounds in json.loads(where))]
      assert hashlib.sha256(piece.tobytes()).hexdigest() == digest, path
  assert not pieces

  expected, log = losses(one), lines(home / "moved/metrics.jsonl")
  [row] = [
    row for row in log[1 + max(i for i, row in enumerate(log) if row["kind"] == "resume") :] if row["kind"] == "train"
  ]
  for name in [name for name in expected if name.startswith("loss/")]:
    np.testing.assert_allclose(row[name], expected[name][2], rtol=1e-6, err_msg=name)


def test_a_save_that_fails_in_one_process_ends_it_at_once(home, moved):
  """Its line says what failed, and nothing half-written is taken for a checkpoint."""
  status, _, error, said_by_first = moved
  assert status == 2, error[-4000:]
  [line] = [line for line in error.splitlines() if line.startswith("aurora_jax train:")]
  assert "checkpoint of step 3 could not be saved" in line and "File too large" in line and "of step 2)" in line
  assert "all 3 steps are done" not in said_by_first
  assert [path.name for path in (home / "moved/checkpoints").iterdir() if path.name.isdigit()] == ["2"]


def test_a_signal_to_one_stops_both_at_the_same_step_and_one_goes_on(home, two):
  """The list of the records that were skipped is that of one uninterrupted process too."""
  assert "(SIGTERM); saved in" in two[0][1] and "finishing this step" in two[1][2]
  log = home / "two/metrics.jsonl"
  stop = lines(log)[-1]
  assert (stop["kind"], stop["reason"]) == ("stop", "terminated")

  step = stop["step"]
  [(status, said, error)] = finish([start(home, "two", 4, f"--config.train.total_steps={step + 3}")])
  assert status == 0, error[-4000:]
  assert f"going on from the checkpoint of step {step:,}" in said

  last = step + 3
  maker = loader.BatchMaker(Dataset.open(home / "data"), 4, BATCH, 0)
  met = {}
  for number in range(last):
    for skip in maker(number)["skipped"]:
      met.setdefault(skip.number, skip.step)
  listed = lines(home / "two/skipped_records.jsonl")
  assert len(met) == 2 and {row["number"]: row["step"] for row in listed if row["step"] < last} == met
  assert len({row["number"] for row in listed}) == len(listed)
  for row in lines(log):
    if row["kind"] == "train":
      assert row["data/skipped"] == sum(first < row["step"] for first in met.values())


def test_a_missing_process_is_named(home):
  port = free_port()
  address = f"127.0.0.1:{port}"
  job = ("--coordinator", address, "--processes", 3, "--join-seconds", 4)
  done = finish([start(home, "alone", 1, *job, "--process", 0), start(home, "alone", 1, *job, "--process", 2)], 200)
  for status, _, error in done:
    assert status == 2 and len(error.strip().splitlines()) == 1, error
    assert f"process 1 of 3 did not connect to {address} within 4 s; present: processes 0 (" in error
  assert not (home / "alone").exists()


def test_an_error_of_one_process_ends_both(home, tmp_path):
  port = free_port()
  job = ("--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--process")
  (tmp_path / "run").write_text("")
  first = start(home, "bad", 2, *job, 0)
  second = start(home, tmp_path / "run", 2, *job, 1)
  (status, _, error), (other_status, _, other_error) = finish([first, second])
  assert (status, other_status) == (2, 2)
  assert len(error.strip().splitlines()) == len(other_error.strip().splitlines()) == 1, error + other_error
  assert "process 1 (" in error and "is not a folder" in error and "is not a folder" in other_error
  assert not (home / "bad").exists()


def test_a_process_without_its_accelerator_ends_without_waiting_for_the_others(home):
  job = ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process")
  first, second = start(home, "fallen", 2, *job, 0), start(home, "fallen", 2, *job, 1, "--require", "gpu")
  try:
    [(status, _, error)] = finish([second], timeout=60)
  finally:
    first.kill()  # it would end by itself in two minutes
    first.communicate()
  assert (status, len(error.strip().splitlines())) == (2, 1), error
  assert "aurora_jax train: --require gpu, but JAX runs on cpu (4 x cpu)" in error
