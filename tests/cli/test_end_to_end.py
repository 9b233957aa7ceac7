"""The user's way, command by command, on a small real data set: data, CLIP, training with a stop, images, figures.

The cells of docs/quickstart.ipynb run first, in this process. They leave a data set, a CLIP, a run and its export, from
which the other commands start. `train`, `train-clip`, `sample` and `convert` also run as processes of their own. Runs
of `train` in this process share their compiled programs.
"""

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import quickstart_notebook
import shared_programs
from PIL import Image
from safetensors.numpy import load_file, save_file

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.data import loader, tfrecords
from aurora_jax.systems.aurora import released
from aurora_jax.training import setup

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
# What the released code can express: runs from scratch and one from a converted checkpoint share their programs.
CONFIG = "configs/aurora_64.py:released-test"


def process(*args):
  """Arguments of `subprocess` for `python -m aurora_jax ARGS` in the current folder."""
  path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
  return {"args": [sys.executable, "-m", "aurora_jax", *map(str, args)], "env": os.environ | {"PYTHONPATH": path}}


def command(*args):
  """Runs `python -m aurora_jax ARGS`; returns the finished process."""
  return subprocess.run(**process(*args), capture_output=True, text=True, check=False, timeout=600)


def succeed(*args):
  done = command(*args)
  assert done.returncode == 0, done.stderr[-3000:]
  return done


def here(*args):
  """The same in this process, for commands that end soon: (status, stdout, stderr)."""
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    status = main.main([str(arg) for arg in args])
  return status, out.getvalue(), error.getvalue()


def succeed_here(*args):
  """Like `here`, for a command that must end with status 0. Returns its stdout."""
  status, out, error = here(*args)
  assert status == 0, error[-3000:]
  return out


def fail(words, *args):
  """The command ends with status 2 and one line on stderr that holds `words`."""
  status, _, error = here(*args)
  lines = error.strip().splitlines()
  assert (status, len(lines)) == (2, 1), error[-3000:]
  assert words in lines[0]


@pytest.fixture(scope="module", autouse=True)
def _shared(tmp_path_factory):
  """All tests have one current folder: the notebook's paths are relative, and so are those in its run's config."""
  with contextlib.chdir(tmp_path_factory.mktemp("current")), shared_programs.shared():
    yield


@pytest.fixture(scope="module")
def notebook():
  """docs/quickstart.ipynb. Fixtures and tests run it section by section."""
  with quickstart_notebook.notebook() as notebook:
    yield notebook


@pytest.fixture(scope="module")
def home(notebook):
  """The notebook's folder: a data set of images with captions, with a CLIP and a judge trained on it."""
  notebook.run_to("Text encoder")
  home = notebook.variables["work"]
  # As the notebook's CLIP, but for the seed and the split.
  sizes = "--resolution 16 --image-width 32 --image-layers 1 --text-width 32 --text-layers 1 --heads 2"
  recipe = f"--seed 1 --split all --steps 3 --batch-size 8 --embedding-width 16 {sizes}"
  succeed("train-clip", "--data", home / "data", "--out", home / "judge", *recipe.split())
  return home


def train_args(home, run, *more, config=CONFIG):
  return (
    "train",
    "--config",
    config,
    "--workdir",
    home / run,
    f"--config.data.path={home / 'data'}",
    f"--config.text.clip={home / 'clip'}",
    *more,
  )


def fingerprint(run):
  return succeed_here("inspect", run, "--fingerprint").strip()


@pytest.fixture(scope="module")
def run(home, notebook):
  """The notebook's run: six steps, uninterrupted."""
  assert "all 6 steps are done" in notebook.run_to("Training")
  return home / "run"


def test_a_run_leaves_what_it_promises(run):
  assert config_files.from_json((run / "config.json").read_text()).name == "aurora_64"
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  trained = [line for line in lines if line["kind"] == "train"]
  assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
  assert all(np.isfinite(line["loss/g_adversarial"]) for line in trained)
  assert "loss/r1" in trained[0] and "loss/r1" not in trained[1]
  assert (run / "samples" / "step-00000006.png").is_file()
  assert list((run / "tensorboard").glob("events*"))
  assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [2, 4, 6]


def test_a_killed_run_goes_on_and_ends_in_the_same_state(home, run):
  args = train_args(home, "killed", "--config.train.sample_prompts=()")
  training = subprocess.Popen(**process(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 500
  while not (home / "killed" / "checkpoints" / "2").is_dir() and time.monotonic() < deadline:
    time.sleep(0.02)
  os.kill(training.pid, signal.SIGKILL)
  training.wait()
  said = succeed_here(*args)
  assert "going on from the checkpoint of step" in said or "all 6 steps are done" in said
  assert fingerprint(home / "killed") == fingerprint(run)


@pytest.fixture
def train_with_nan(monkeypatch):
  """`train` with a NaN in the images of the batches of some steps: (steps, *arguments) -> as `here`."""
  whole = setup._batches

  def train(poisoned, *args):
    def batches(*args):
      for step, batch in enumerate(whole(*args), start=args[-1]):
        if step in poisoned:
          batch = batch | {"image": np.array(loader.to_float(batch["image"]))}
          batch["image"][1, 2, 3, 0] = np.nan
        yield batch

    monkeypatch.setattr(setup, "_batches", batches)
    return here(*args)

  return train


def test_nan_in_one_batch_is_skipped_diagnosed_and_told(home, run, train_with_nan):
  status, out, error = train_with_nan(range(3, 4), *train_args(home, "one_nan"))
  assert status == 0 and "all 6 steps are done" in out, error[-3000:]
  (said,) = [line for line in error.splitlines() if "skipped" in line]
  assert "step 3 was skipped: the batch's images are not finite; discriminator: loss/d_adversarial is nan" in said
  assert "gradient not finite in " in said and "generator" not in said
  lines = [json.loads(line) for line in (home / "one_nan" / "metrics.jsonl").read_text().splitlines()]
  trained = {line["step"]: line for line in lines if line["kind"] == "train"}
  assert [trained[step]["guard/skipped"] for step in range(1, 7)] == [0, 0, 0, 1, 0, 0]
  assert "loss/g_clip" not in trained[4] and np.isfinite(trained[6]["loss/g_clip"])
  assert fingerprint(home / "one_nan" / "checkpoints" / "2") == fingerprint(run / "checkpoints" / "2")
  _, story, _ = here("inspect", home / "one_nan")
  assert "skipped    1 step, no record" in story and "the newest, step 3: the batch's images are not finite" in story


def test_nan_in_every_batch_stops_with_the_last_good_checkpoint(home, run, train_with_nan):
  poisoned = range(2, 99)
  status, _, error = train_with_nan(poisoned, *train_args(home, "nans", "--config.train.max_skipped_in_a_row=3"))
  assert status == 3, error[-3000:]
  last = error.splitlines()[-1]
  assert "3 steps in a row were skipped up to step 4 (train.max_skipped_in_a_row=3); training stopped; the last" in last
  assert f"checkpoint, step 2, stands in {home / 'nans' / 'checkpoints'}" in last and "Traceback" not in error
  assert fingerprint(home / "nans") == fingerprint(run / "checkpoints" / "2")


def test_sample_writes_a_grid_and_singles_and_repeats_itself(home, run, notebook, tmp_path):
  """In the notebook's process and in one of its own."""
  notebook.run_to("Sampling")
  args = ("sample", "--workdir", run, "--prompt", "red circle", "--prompt", "blue bar", "--latents", 4, "--psi", 0.7)
  succeed(*args, "--out", tmp_path / "two.png", "--singles", tmp_path / "singles")
  one, two = (np.asarray(Image.open(path)) for path in (home / "samples.png", tmp_path / "two.png"))
  assert np.array_equal(one, two)
  assert len(list((tmp_path / "singles").glob("*.png"))) == len(list((home / "singles").glob("*.png"))) == 8
  assert Image.open(tmp_path / "singles" / "0000-00-psi0.7.png").size == (16, 16)


def test_the_notebook_exports_and_loads_in_pytorch(home, run, notebook):
  """The notebook compares PyTorch's images with those of `sample`. They must not be blank."""
  pytest.importorskip("torch")
  notebook.run_to("Export")
  assert "![samples](samples.png)" in (home / "exported" / "README.md").read_text()
  notebook.run_to("Where to go next")
  assert notebook.variables["difference"] <= 1
  assert notebook.variables["singles"].shape == (8, 16, 16, 3) and notebook.variables["singles"].std() > 1
  assert [image.size for image in notebook.variables["images"]] == [(16, 16)]


def test_evaluate_measures_and_reports(home, run):
  said = succeed_here("evaluate", "--workdir", run, "--judge", home / "judge")
  assert "training captions, among all" in said
  figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
  assert figures["kind"] == "judge" and 0 <= figures["judge/top1_of_all"] <= 1
  page = (run / "report.html").read_text()
  assert "experts of r8_block0_layer0" in page
  assert page.count("data:image/") > 4 and "http://" not in page.replace("http://www.w3.org", "")


def test_bad_input_is_one_line_and_status_2(home, run, tmp_path):
  out = tmp_path / "x.png"
  nowhere = train_args(home, "bad", "--config.data.path=nowhere")
  fail("nowhere", *nowhere)
  done = command(*nowhere)  # as a process too
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "nowhere" in done.stderr
  fail("trian", *train_args(home, "bad", "--config.trian.total_steps=3"))
  fail("mesh.data=2", *train_args(home, "bad", "--config.mesh.data=2"))
  (tmp_path / "empty").mkdir()
  fail("empty", *train_args(home, "bad", f"--config.data.path={tmp_path / 'empty'}"))
  (tmp_path / "file").write_text("")
  fail("file", *train_args(home, tmp_path / "file" / "run"))
  assert not (home / "bad").exists()
  fail("10,000 characters", "sample", "--workdir", run, "--prompt", "x" * 10_000, "--out", out)
  fail("nowhere", "sample", "--workdir", "nowhere", "--prompt", "x", "--out", out)
  fail("between 0 and 1", "sample", "--workdir", run, "--prompt", "x", "--psi", 3, "--out", out)
  fail("nowhere", "evaluate", "--workdir", run, "--judge", "nowhere")
  judge = home / "judge"
  fail("text.clip: what is at", "evaluate", "--workdir", run, "--judge", judge, "--clip", judge)
  assert not out.exists()


def test_damaged_data(home, tmp_path, capsys):
  """What sizes show at the start is refused, unless it is allowed; else the record is skipped and told of."""
  data = shutil.copytree(home / "data", tmp_path / "data")
  flipped, cut = sorted(data.glob("*train*.tfrecord"))
  content = bytearray(flipped.read_bytes())
  content[tfrecords.load_index(flipped)[1, 0] + 50] ^= 1
  flipped.write_bytes(content)
  last = len(tfrecords.load_index(cut)) - 1
  cut.write_bytes(cut.read_bytes()[:-7])
  args = train_args(
    home,
    "cut",
    f"--config.data.path={data}",
    "--config.train.total_steps=3",
    "--config.data.max_skipped=0.9",
    "--config.train.sample_prompts=()",
  )
  fail(cut.name, *args)
  assert not (home / "cut").exists()

  status, out, error = here(*args, "--config.data.tolerate_corruption=True")
  assert status == 0, error[-3000:]
  assert f"WARNING: shard {cut} has" in out and "it is truncated" in out
  assert "WARNING: 2 of " in error or "WARNING: 1 of " in error
  listed = [json.loads(line) for line in (home / "cut/skipped_records.jsonl").read_text().splitlines()]
  assert {(row["shard"], row["record"], row["reason"].split(":")[0]) for row in listed} == {
    (flipped.name, 1, "has a wrong checksum"),
    (cut.name, last, "is cut off"),
  }
  trained = [json.loads(line) for line in (home / "cut/metrics.jsonl").read_text().splitlines()]
  assert [row["data/skipped"] for row in trained if row["kind"] == "train"][-1] == 2
  assert main.main(["inspect", str(home / "cut")]) == 0
  assert "skipped    no step, 2 records (listed in" in capsys.readouterr().out

  assert main.main(["inspect", str(data), "--verify"]) == 2
  said = capsys.readouterr()
  assert "2 of 12 records are damaged; 2 shards changed since build-data" in said.err and said.err.count("\n") == 1
  assert f"{flipped.name}: record 1: has a wrong checksum" in said.out
  assert f"{cut.name}: record {last}: is cut off" in said.out
  assert main.main(["inspect", str(home / "data"), "--verify"]) == 0
  assert "none of" in capsys.readouterr().out


def test_a_clip_of_another_width_is_refused(home):
  fail(
    "text features are 32 wide, generator.text_feature_dim is 48",
    *train_args(home, "wide", "--config.generator.text_feature_dim=48"),
  )


# Of the variant `test` the one value that the released code does not know.
KNOWN_TO_RELEASE = "--config.generator.deformable_max_resolution=16"


@pytest.fixture(scope="module")
def converted(home):
  """A released checkpoint with random weights, and the folder that `convert` makes of it."""
  cfg = config_files.load(["--config=configs/aurora_64.py:test", KNOWN_TO_RELEASE]).generator
  rng, weights = np.random.default_rng(0), {}
  for entry in released.entries(cfg):  # all names of an entry that is not stacked are one tensor
    weights |= dict.fromkeys(entry.names)
  for name, shape in released.expected_shapes(cfg).items():
    twin = name.replace(".mlp.", ".")
    weights[name] = rng.normal(size=shape).astype(np.float32) if weights[twin] is None else weights[twin]
  names, taps = released.fir_buffers(cfg)
  save_file(weights | dict.fromkeys(names, taps), home / "released.safetensors")
  done = succeed(
    "convert",
    home / "released.safetensors",
    home / "converted",
    "--config",
    "configs/aurora_64.py:test",
    KNOWN_TO_RELEASE,
    f"--config.text.clip={home / 'clip'}",
  )
  assert "text_attention is 'independent'" in done.stdout
  return home / "converted"


def test_a_converted_checkpoint_can_be_sampled_and_trained_on(home, converted, tmp_path):
  sample = ("sample", "--workdir", converted, "--prompt", "red circle", "--prompt", "blue bar", "--latents", 4)
  succeed_here(*sample, "--out", tmp_path / "x.png")
  assert np.asarray(Image.open(tmp_path / "x.png")).std() > 0
  short = ("--config.train.total_steps=3", "--config.train.sample_prompts=()")
  begin = (f"--config.train.init_from={converted}", *short)
  fail(
    'generator.text_attention "independent" -> "scaled"; generator.deformable_max_resolution 16 -> 8',
    *train_args(home, "tuned", *begin, config="configs/aurora_64.py:test"),
  )
  fail(f"--config.train.init_from={converted}", *train_args(home, "converted"))
  assert not (home / "tuned").exists() and not (converted / "metrics.jsonl").exists()

  said = succeed_here(*train_args(home, "tuned", *begin))
  assert "discriminator fresh (the checkpoint has none)" in said
  lines = [json.loads(line) for line in (home / "tuned" / "metrics.jsonl").read_text().splitlines()]
  trained = [line for line in lines if line["kind"] == "train"]
  assert [line["step"] for line in trained] == [1, 2, 3]
  for line in trained:
    assert all(np.isfinite(value) for name, value in line.items() if name.startswith("loss/")), line
  succeed_here("convert", home / "tuned", tmp_path / "tuned.safetensors")
  before, after = load_file(home / "released.safetensors"), load_file(tmp_path / "tuned.safetensors")
  assert {name: array.shape for name, array in before.items()} == {name: array.shape for name, array in after.items()}
  assert all(np.isfinite(array).all() for array in after.values())
  # All but the constants and the experts that no token went to.
  idle = [e for e in range(4) if not any(line[f"moe/load/r8_block0_layer0/{e}"] for line in trained)]
  still = tuple(f".ff.net.{e}." for e in idle)
  for name in before:
    constant = name.endswith((".freqs", ".phases", ".transform", "filter"))
    same = constant or any(expert in name for expert in still)
    assert np.array_equal(before[name], after[name]) == same, name
  succeed_here("convert", tmp_path / "tuned.safetensors", tmp_path / "back")  # by the .json beside it
  # Going on, whatever has become of the beginning.
  said = succeed_here(*train_args(home, "tuned", "--config.train.init_from=nowhere", *short))
  assert "all 3 steps are done" in said


def test_a_checkpoint_with_code_in_it_is_refused(home, tmp_path):
  torch = pytest.importorskip("torch")

  class Evil:
    def __reduce__(self):
      return os.system, (f"touch {tmp_path / 'ran'}",)

  torch.save({"generator_smooth": {"w_avg": torch.zeros(3)}, "notes": Evil()}, tmp_path / "evil.pth")
  fail(
    "evil.pth holds code or objects besides tensors (posix.system)",
    "convert",
    tmp_path / "evil.pth",
    tmp_path / "run",
    "--config",
    "configs/aurora_64.py:test",
  )
  assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]
