"""Every command under what shells, containers and schedulers do to it: the right result, or one line and status 2.

All at once in each process: a POSIX locale without Python's coercion, no HOME, JAX_ENABLE_X64, an unknown current
  folder
in which nothing may appear. The paths have spaces, "#", "%", letters beyond ASCII and, where no checkpoint is stored,
bytes that are no UTF-8. Without JAX, a process takes a tenth of a second; those with JAX are marked slow.
"""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
import random_run
from PIL import Image

from aurora_jax.cli import environment, main
from aurora_jax.runs import checkpoint_reader, references, workdir

ROOT = pathlib.Path(__file__).parents[2]
ODD = "möwe #1 (50%)"
NO_UTF8 = os.fsdecode(b"caf\xe9 #1")
COMMANDS = tuple(main.COMMANDS)
REQUIRED = {
  "build-data": ("--source", "folder", "--out", "out"),
  "train-clip": ("--data", "nowhere", "--out", "out"),
  "train": ("--config", "nowhere.py", "--workdir", "out"),
  "sample": ("--workdir", "nowhere", "--prompt", "x", "--out", "out.png"),
  "interpolate": ("--workdir", "nowhere", "--prompt", "x", "--prompt", "y", "--out", "out.gif"),
  "evaluate": ("--workdir", "nowhere", "--judge", "nowhere"),
  "compile": ("--config", "nowhere.py", "--topology", "cpu-1"),
  "bench": ("sample", "--config", "nowhere.py"),
  "convert": ("nowhere.pth", "out"),
  "export": ("--workdir", "nowhere", "--out", "out"),
  "inspect": ("nowhere",),
}


def hostile(**more):
  """An environment as a container or a cron job gives it."""
  kept = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "PATH", "TMP"))}
  settings = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "JAX_ENABLE_X64": "1"}
  return kept | settings | {"PYTHONPATH": str(ROOT)} | more


def run(cwd, *arguments, redirections="", **more):
  """The command in an empty folder, in which nothing appears. Returns the finished process, its output as bytes."""
  cwd.mkdir(exist_ok=True)
  done = subprocess.run(
    [
      "sh",
      "-c",
      f'exec "$0" -m aurora_jax "$@" {redirections}',
      sys.executable,
      *map(os.fsencode, map(str, arguments)),
    ],
    cwd=cwd,
    env=hostile(**more),
    stdin=subprocess.DEVNULL,
    capture_output=True,
    timeout=600,
    check=False,
  )
  assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
  assert list(cwd.iterdir()) == []
  return done


def succeed(cwd, *arguments, **options):
  done = run(cwd, *arguments, **options)
  assert done.returncode == 0, done.stderr.decode(errors="replace")
  return done


def broken_pipe(cwd, *arguments):
  """The command with stdout and stderr whose reader has gone. Returns the exit status."""
  read_end, write_end = os.pipe()
  os.close(read_end)
  cwd.mkdir(exist_ok=True)
  try:
    return subprocess.run(
      [sys.executable, "-m", "aurora_jax", *map(str, arguments)],
      cwd=cwd,
      env=hostile(),
      stdin=subprocess.DEVNULL,
      stdout=write_end,
      stderr=write_end,
      timeout=600,
      check=False,
    ).returncode
  finally:
    os.close(write_end)


@pytest.fixture(name="images")
def _images(tmp_path):
  folder = tmp_path / f"{ODD} {NO_UTF8}"
  folder.mkdir()
  for i, color in enumerate(("red", "green", "blue")):
    Image.new("RGB", (8, 8), color).save(folder / f"{i} ü.png")
    (folder / f"{i} ü.txt").write_text(f"{color} möwe\n", encoding="utf-8")
  return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input_is_one_line(tmp_path, command):
  done = run(tmp_path / "cwd", command, *REQUIRED[command])
  assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1), done.stderr
  assert done.stderr.startswith(f"aurora_jax {command}: ".encode())


@pytest.mark.parametrize("redirections", ["<&- >&- 2>&-", "2>/dev/full >/dev/full"])
def test_bad_input_that_nobody_can_be_told_of(tmp_path, redirections):
  done = run(tmp_path / "cwd", "sample", *REQUIRED["sample"], redirections=redirections)
  assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_help_needs_no_jax(tmp_path):
  """Nothing that takes long to import: in all commands one after the other, in one process."""
  code = f"""
import contextlib, io, sys
from aurora_jax.cli import main
for command in {COMMANDS!r}:
  with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
    main.main([command, "--help"])
  assert "usage:" in text.getvalue(), command
  heavy = sorted(set(sys.modules) & {{"jax", "numpy", "PIL", "rich", "orbax", "flax", "ml_collections"}})
  assert not heavy, (command, heavy)
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
  assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_build_data_and_inspect(tmp_path, images):
  out = tmp_path / NO_UTF8
  done = succeed(
    tmp_path / "cwd", "build-data", "--source", "folder", "--path", images, "--out", out, "--resolution", 8
  )
  assert b"train: 3 " in done.stdout and done.stderr == b""
  done = succeed(tmp_path / "cwd", "inspect", out)
  assert rb"red m\xf6we" in done.stdout and b"caf\\xe9 #1" in done.stdout
  for redirections in ("<&-", ">&-", "2>&-"):
    succeed(tmp_path / "cwd", "inspect", out, redirections=redirections)
  assert broken_pipe(tmp_path / "cwd", "inspect", out) == 0
  done = run(tmp_path / "cwd", "inspect", out, redirections=">/dev/full")
  assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"standard output" in done.stderr


def test_build_data_whose_reader_has_gone(tmp_path, images):
  out = tmp_path / "data"
  arguments = ("build-data", "--source", "folder", "--path", images, "--out", out, "--resolution", 8)
  assert broken_pipe(tmp_path / "cwd", *arguments) == 0 and (out / "manifest.json").is_file()
  assert not [entry.name for entry in tmp_path.iterdir() if "partial" in entry.name]


def test_a_prompt_in_any_locale(tmp_path):
  """In a POSIX locale, UTF-8 is text all the same; bytes that are not are refused before the run is looked at."""
  common = ("sample", "--workdir", tmp_path / "nowhere", "--out", tmp_path / "x.png", "--prompt")
  assert b"run folder not found" in run(tmp_path / "cwd", *common, "möwe").stderr
  done = run(tmp_path / "cwd", *common, NO_UTF8)
  assert b"the prompt 'caf\\xe9 #1' has bytes that are not UTF-8" in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
  "prompt, message",
  [
    ("a\x1b[31mb", "the prompt 'a\\x1b[31mb' has the control character \\x1b"),
    ("\u200b\u200b", "no visible character"),
    (" ", "a prompt is empty"),
    ("\ud800", "not UTF-8"),
  ],
)
def test_odd_prompts(tmp_path, capsys, prompt, message):
  common = ["sample", "--workdir", str(tmp_path), "--out", str(tmp_path / "x.png")]
  assert main.main([*common, "--prompt", prompt]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# The cache, and JAX's settings


@pytest.fixture(name="no_settings")
def _no_settings(monkeypatch, tmp_path):
  """As at the start of a process; a home, and a temporary folder that is the test's own."""
  for name in [name for name in os.environ if name.startswith("JAX_") or name == "XDG_CACHE_HOME"]:
    monkeypatch.delenv(name)
  (tmp_path / "home").mkdir()
  (tmp_path / "tmp").mkdir()
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
  with warnings.catch_warnings():
    yield tmp_path


def test_settings_that_would_change_results_are_ignored(no_settings, monkeypatch):
  for name in ("JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_TRANSFER_GUARD_HOST_TO_DEVICE", "JAX_DEBUG_NANS"):
    monkeypatch.setenv(name, "1")
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
  environment.prepare()
  assert "JAX_ENABLE_X64" not in os.environ and "JAX_DEFAULT_PRNG_IMPL" not in os.environ
  assert "JAX_TRANSFER_GUARD_HOST_TO_DEVICE" not in os.environ
  assert os.environ["JAX_DEBUG_NANS"] == "1" and os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "7"
  assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(no_settings / "home" / ".cache" / "aurora_jax"))


def test_a_cache_that_the_user_chose_stays(no_settings, monkeypatch):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  environment.prepare()
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere" and list((no_settings / "home").iterdir()) == []


def test_xdg_cache_home_counts_if_it_is_absolute(no_settings, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(no_settings / "cache"))
  assert environment.cache_folder().startswith(str(no_settings / "cache"))
  monkeypatch.setenv("XDG_CACHE_HOME", "cache")
  assert environment.cache_folder().startswith(str(no_settings / "home" / ".cache"))


@pytest.mark.parametrize("home", ["~", "/no/such/home", "is_a_file"])
def test_no_home(no_settings, monkeypatch, home):
  """A container's user id without HOME and without an entry in passwd; a home that is not there."""
  (no_settings / "is_a_file").touch()
  place = str(no_settings / home) if home == "is_a_file" else home
  monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", place, 1))
  folder = pathlib.Path(environment.cache_folder())
  private = folder.parents[1]
  assert private.parent == no_settings / "tmp" and private.stat().st_mode & 0o777 == 0o700
  assert not pathlib.Path("~").exists() and not pathlib.Path("/no").exists()


def test_a_home_of_somebody_else(no_settings, monkeypatch):
  monkeypatch.setattr(os, "geteuid", lambda: 12345)
  assert environment.cache_folder() is None  # nor is the temporary folder's entry ours: made by us, owned by another id
  environment.prepare()
  assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize("trap", ["link", "writable", "file"])
def test_a_temporary_folder_that_others_can_write_to(no_settings, monkeypatch, trap):
  """Programs in the cache are run: nobody else may put one there."""
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  place = no_settings / "tmp" / f"aurora_jax-{os.geteuid()}"
  if trap == "link":
    (no_settings / "theirs").mkdir()
    place.symlink_to(no_settings / "theirs")
  elif trap == "writable":
    place.mkdir()
    place.chmod(0o777)
  else:
    place.touch()
  assert environment.cache_folder() is None


def test_a_cache_that_cannot_be_written_to_is_no_warning(no_settings):
  environment.prepare()
  with warnings.catch_warnings(record=True) as heard:
    warnings.warn("Error writing persistent compilation cache entry for 'jit_f': OSError", stacklevel=1)
    warnings.warn("another", stacklevel=1)
  assert [str(warning.message) for warning in heard] in (["another"], [])


# ----------------------------------------------------------------------------------------------------------------------
# With JAX


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory):
  """run and clip, in a folder whose name is odd."""
  home = tmp_path_factory.mktemp("home") / ODD
  random_run.make_clip(home / "clip")
  # What the released code can express, for `convert`.
  released = ("--config.generator.deformable_max_resolution=16", "--config.generator.text_attention=independent")
  random_run.make_run(home / "run", home / "clip", *released)
  return home


@pytest.mark.slow
def test_sample(home, tmp_path, capsys):
  """The same image as here, in a process where everything is odd and nobody reads."""
  out = tmp_path / NO_UTF8
  common = ("sample", "--workdir", home / "run", "--prompt", "möwe", "--latents", 1, "--singles")
  assert main.main([*map(str, common), str(tmp_path / "a"), "--out", str(tmp_path / "a.png")]) == 0
  assert broken_pipe(tmp_path / "cwd", *common, out, "--out", tmp_path / "b.png") == 0
  one, other = (np.asarray(Image.open(folder / "0000-00-psi1.png")) for folder in (tmp_path / "a", out))
  assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


@pytest.mark.slow
def test_interpolate_convert_and_inspect_with_closed_streams(home, tmp_path):
  cwd = tmp_path / "cwd"
  common = ("interpolate", "--workdir", home / "run", "--prompt", "a", "--prompt", "b", "--steps", 2, "--latents", 1)
  succeed(cwd, *common, "--out", tmp_path / f"{NO_UTF8}.gif", redirections="<&- >&- 2>&-")
  assert (tmp_path / f"{NO_UTF8}.gif").stat().st_size
  succeed(cwd, "convert", home / "run", tmp_path / f"{ODD}.safetensors", redirections=">&-")
  assert (tmp_path / f"{ODD}.safetensors").is_file()
  done = succeed(cwd, "inspect", home / "run")
  assert f"sample --workdir '{home / 'run'}'".encode("ascii", "backslashreplace") in done.stdout


@pytest.mark.slow
def test_changed_references_are_refused_before_jax_is_loaded(home, tmp_path, capsys):
  """`sample` and `evaluate`, which say how to go on; --clip names another CLIP and is not asked about."""
  folder = workdir.RunFolder(home / "run")
  sample = ["sample", "--workdir", str(home / "run"), "--prompt", "x", "--out", str(tmp_path / "x.png")]
  evaluate = ["evaluate", "--workdir", str(home / "run"), "--judge", str(home / "clip")]

  def refused(arguments, message):
    assert main.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error

  try:
    clip = references.identify(home / "clip")
    other = dataclasses.replace(clip, sha256="0" * 64)
    references.record(folder, {"text.clip": other}, other)
    refused(sample, "--allow-config-change text.clip")
    refused(evaluate, "--allow-config-change text.clip")
    refused([*sample, "--allow-config-change", "text", "--step", "99"], "no checkpoint of step 99")
    refused([*sample, "--allow-config-change", "text", "--latents-file", "nowhere.npz"], "not found: nowhere.npz")
    refused([*sample, "--clip", str(home / "clip"), "--latents-file", "nowhere.npz"], "not found: nowhere.npz")
    refused([*evaluate, "--allow-config-change", "text"], "--allow-config-change judge")
  finally:
    folder.references.unlink()


TRAIN = """
import runpy, sys, toy
from aurora_jax.training import setup
delay = float(sys.argv.pop(1))
setup.prepare = lambda values: toy.Toy(values, delay=delay, width=8)
runpy.run_module("aurora_jax", run_name="__main__")
"""
CONFIG = """
from aurora_jax import config_files
def get_config(variant=""):
  config = config_files.defaults()
  config.train.total_steps, config.train.batch_size, config.train.log_every = 30, 8, 5
  config.train.checkpoint_every, config.train.sample_every = 10, 1_000_000
  return config
"""


def start_training(tmp_path, delay, total, **streams):
  (tmp_path / "möwe.py").write_text(CONFIG, encoding="utf-8")
  arguments = (
    "train",
    "--config",
    tmp_path / "möwe.py",
    "--workdir",
    tmp_path / ODD,
    f"--config.train.total_steps={total}",
  )
  return subprocess.Popen(
    [sys.executable, "-c", TRAIN, str(delay), *map(str, arguments)],
    cwd=ROOT,
    env=hostile(PYTHONPATH=f"{ROOT}:{ROOT}/tests/training") | {"PYTHONUTF8": "1"},
    stdin=subprocess.DEVNULL,
    **streams,
  )


@pytest.mark.slow
def test_training_goes_on_when_nobody_listens(tmp_path):
  process = start_training(tmp_path, 0.01, 30, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdout.close()
  process.stderr.close()
  assert process.wait(timeout=300) == 0
  assert checkpoint_reader.newest(tmp_path / ODD / "checkpoints") == 30


@pytest.mark.slow
def test_a_terminal_that_hangs_up_saves(tmp_path):
  process = start_training(tmp_path, 0.05, 10**6, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
  try:
    for line in process.stdout:
      if b"a new run of" in line:
        break
    while not checkpoint_reader.steps(tmp_path / ODD / "checkpoints"):
      assert process.poll() is None
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
  finally:
    process.kill()
  assert checkpoint_reader.newest(tmp_path / ODD / "checkpoints") % 10  # not one of every ten steps


def test_a_run_needs_a_folder_whose_name_is_utf8(tmp_path, capsys):
  (tmp_path / "x.py").write_text(CONFIG)
  assert main.main(["train", "--config", str(tmp_path / "x.py"), "--workdir", str(tmp_path / NO_UTF8)]) == 2
  assert "not UTF-8" in capsys.readouterr().err and not (tmp_path / NO_UTF8).exists()
