"""build-data the way a user meets it: as a process, on good and bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import images
from aurora_jax.data.dataset import Dataset

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def command(*arguments):
  return [sys.executable, "-m", "aurora_jax", "build-data", *map(os.fspath, arguments)]


def run(*arguments, cwd=ROOT):
  return subprocess.run(
    command(*arguments), cwd=cwd, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True, timeout=120
  )


def assert_refused(done, words):
  assert done.returncode == 2, done
  assert done.stdout == ""
  lines = done.stderr.splitlines()
  assert len(lines) == 1 and lines[0].startswith("aurora_jax build-data: "), done.stderr
  assert words in lines[0]


@pytest.fixture
def pictures(tmp_path):
  folder = tmp_path / "pictures"
  folder.mkdir()
  for number, name in enumerate(("red cat", "red dog", "blue cat", "blue dog", "cat", "dog")):
    Image.new("RGB", (12, 10), (40 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(f"{name}\nsome {name}\n")
  return folder


def test_openmoji(tmp_path):
  out = tmp_path / "sets" / "openmoji"
  done = run("--source", "openmoji", "--out", out, "--resolution", "16", "--shards", "4", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  train, heldout, rejected, written = done.stdout.splitlines()
  manifest = json.loads((out / "manifest.json").read_text())
  splits = manifest["splits"]
  assert train == (
    f"train: {splits['train']['examples']} pictures, {splits['train']['captions']} image-text pairs, 4 files"
  )
  assert heldout == (
    f"heldout: {splits['heldout']['examples']} pictures, {splits['heldout']['captions']} image-text pairs, 1 file"
  )
  assert rejected == "rejected: none"
  assert re.fullmatch(f"{re.escape(str(out))}: written in [0-9.]+ s", written)
  assert "Traceback" not in done.stderr
  dataset = Dataset.open(out)
  assert 1600 < len(dataset) < 2000
  pixels = {
    captions[0]: images.decode_image(dataset[number].image)
    for number, captions in enumerate(dataset.captions())
    if captions[0] in ("red circle", "blue circle")
  }
  assert pixels["red circle"][8, 8].argmax() == 0 and pixels["blue circle"][8, 8].argmax() == 2
  assert (pixels["red circle"][0, 0] == 255).all()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["sets"]
  assert [path.name for path in out.parent.iterdir()] == ["openmoji"]


def test_folder(pictures, tmp_path):
  (pictures / "text.png").write_text("this is no picture")
  (pictures / "text.txt").write_text("a caption")
  Image.new("RGB", (9, 9)).save(pictures / "alone.jpg")
  done = run(
    "--source",
    "folder",
    "--path",
    pictures,
    "--out",
    tmp_path / "out",
    "--resolution",
    "8",
    "--shards",
    "2",
    "--heldout",
    "0.4",
    "--name",
    "pets",
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[:5] == [
    "train: 4 pictures, 8 image-text pairs, 2 files",
    "heldout: 2 pictures, 4 image-text pairs, 1 file",
    "rejected: 2 (listed in manifest.json)",
    "  alone.jpg: no caption file alone.txt",
    "  text.png: not a readable picture: 18 bytes of no known format",
  ]
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert manifest["name"] == "pets" and manifest["rejected"]["count"] == 2
  assert {entry["key"] for entry in manifest["rejected"]["listed"]} == {"alone.jpg", "text.png"}
  dataset = Dataset.open(tmp_path / "out")
  assert images.decode_image(dataset[0].image).shape == (8, 8, 3)


def test_fewer_held_out_than_asked_for(pictures, tmp_path):
  done = run("--source", "folder", "--path", pictures, "--out", tmp_path / "out", "--heldout", "0.9")
  assert done.returncode == 0, done.stderr
  said = re.search(
    r"^held out (\d) of the 5 pictures asked for: the captions share too few words for more$", done.stdout, re.MULTILINE
  )
  assert 1 <= int(said[1]) <= 3
  without = run("--source", "folder", "--path", pictures, "--out", tmp_path / "none", "--heldout", "0")
  assert without.returncode == 0 and "held out" not in without.stdout
  assert without.stdout.startswith("train: 6 pictures, 12 image-text pairs")


def test_same_command_same_files(pictures, tmp_path):
  for name in ("one", "two"):
    assert run("--source", "folder", "--path", pictures, "--out", tmp_path / name, "--seed", "5").returncode == 0
  for path in (tmp_path / "one").iterdir():
    assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_out_is_there_already(pictures, tmp_path):
  arguments = ("--source", "folder", "--path", pictures, "--out", tmp_path / "out")
  assert run(*arguments, "--resolution", "8").returncode == 0
  assert_refused(run(*arguments, "--resolution", "16"), f"{tmp_path / 'out'} exists")
  assert Dataset.open(tmp_path / "out").resolution == 8
  assert run(*arguments, "--resolution", "16", "--overwrite").returncode == 0
  assert Dataset.open(tmp_path / "out").resolution == 16


@pytest.mark.parametrize(
  "arguments, words",
  [
    (("--source", "folder"), "--source folder needs --path DIR"),
    (("--source", "folder", "--path", "nowhere"), "picture folder nowhere does not exist"),
    (
      ("--source", "folder", "--path", "pictures", "--skin-tones", "named"),
      "--skin-tones named is for --source openmoji",
    ),
    (("--source", "folder", "--path", "pictures", "--no-aliases"), "--no-aliases is for --source openmoji"),
    (("--source", "folder", "--path", "pictures", "--resolution", "0"), "not 0"),
    (("--source", "folder", "--path", "pictures", "--shards", "-3"), "not -3"),
    (("--source", "folder", "--path", "pictures", "--heldout", "8"), "not 8.0"),
    (("--source", "folder", "--path", "pictures", "--name", "../x"), "'../x'"),
    (("--source", "openmoji", "--path", "pictures"), "--path pictures is for --source folder"),
  ],
)
def test_bad_input(pictures, tmp_path, arguments, words):
  done = run(*arguments, "--out", "out", cwd=tmp_path)
  assert_refused(done, words)
  assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_folder_without_captions(tmp_path):
  (tmp_path / "pictures").mkdir()
  Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "a.png")
  done = run("--source", "folder", "--path", "pictures", "--out", "out", cwd=tmp_path)
  assert_refused(done, "1 rejected, the first is a.png: no caption file a.txt")
  assert not (tmp_path / "out").exists()


def test_out_cannot_be_written(pictures, tmp_path):
  (tmp_path / "file").write_text("x")
  assert_refused(
    run("--source", "folder", "--path", pictures, "--out", tmp_path / "file" / "out"),
    f"out {tmp_path / 'file' / 'out'}",
  )


def test_unknown_source(tmp_path):
  done = run("--source", "imagenet", "--out", tmp_path / "out")
  assert done.returncode == 2 and "imagenet" in done.stderr and "Traceback" not in done.stderr


def test_help():
  done = run("--help")
  assert done.returncode == 0
  for words in ("openmoji", "folder", "--heldout", "--skin-tones", "python -m aurora_jax build-data --source openmoji"):
    assert words in done.stdout


def test_interrupted(tmp_path):
  """Ctrl-C while pictures are rendered: one line, and the folder as it was."""
  generator = np.random.default_rng(0)
  folder = tmp_path / "pictures"
  folder.mkdir()
  picture = images.encode_png(Image.fromarray(generator.integers(0, 256, (256, 256, 3), np.uint8)))
  for number in range(3000):
    (folder / f"{number}.png").write_bytes(picture)
    (folder / f"{number}.txt").write_text("noise")
  process = subprocess.Popen(
    command("--source", "folder", "--path", folder, "--out", tmp_path / "out", "--resolution", "128"),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob(".out.*.partial/*.tfrecord")):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
  finally:
    process.kill()
    process.wait()
  assert process.returncode == 130
  assert (stdout, stderr) == ("", "aurora_jax build-data: interrupted\n")
  assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
