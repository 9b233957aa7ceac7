"""build-data the way a user meets it, on good and bad input."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import icc_profiles as icc
import numpy as np
import pytest
from PIL import Image

from aurora_jax.cli import main
from aurora_jax.data import images, schema, tfrecords
from aurora_jax.data.dataset import Dataset

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def command(*arguments):
  return [sys.executable, "-m", "aurora_jax", "build-data", *map(os.fspath, arguments)]


def run(*arguments, cwd=ROOT, name="build-data", **environment):
  """A command in a process of its own if it gets an environment, else in this process."""
  if not environment:
    return run_here(name, *arguments, cwd=cwd)
  command = [sys.executable, "-m", "aurora_jax", name, *arguments]
  environment = os.environ | {"PYTHONPATH": ROOT} | environment
  return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def run_here(name, *arguments, cwd=ROOT):
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), contextlib.chdir(cwd):
    try:
      status = main.main([name, *map(os.fspath, arguments)])
    except SystemExit as end:  # argparse
      status = end.code
  return types.SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=error.getvalue())


def built(folder, out, *arguments, **environment):
  """The lines that building a data set from a folder says on stdout, but for the last; on stderr only progress."""
  done = run("--source", "folder", "--path", folder, "--out", out, "--resolution", "16", *arguments, **environment)
  assert done.returncode == 0, done.stderr
  assert re.fullmatch(r"(folder: images: .*\n)*", done.stderr)
  return done.stdout.splitlines()[:-1]


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


@pytest.mark.slow
def test_openmoji(tmp_path):
  out = tmp_path / "sets" / "openmoji"
  done = run("--source", "openmoji", "--out", out, "--resolution", "16", "--shards", "4", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  train, heldout, rejected, written = done.stdout.splitlines()
  manifest = json.loads((out / "manifest.json").read_text())
  splits = manifest["splits"]
  assert train == (
    f"train: {splits['train']['examples']} images, {splits['train']['captions']} image-text pairs, 4 files"
  )
  assert heldout == (
    f"heldout: {splits['heldout']['examples']} images, {splits['heldout']['captions']} image-text pairs, 1 file"
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
    "train: 4 images, 8 image-text pairs, 2 files",
    "heldout: 2 images, 4 image-text pairs, 1 file",
    "rejected: 2 (listed in manifest.json)",
    "  alone.jpg: no caption file alone.txt",
    "  text.png: not a readable image: 18 bytes of no known format",
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
    r"^held out (\d) of the 5 images asked for: the captions share too few words for more$", done.stdout, re.MULTILINE
  )
  assert 1 <= int(said[1]) <= 3
  without = run("--source", "folder", "--path", pictures, "--out", tmp_path / "none", "--heldout", "0")
  assert without.returncode == 0 and "held out" not in without.stdout
  assert without.stdout.startswith("train: 6 images, 12 image-text pairs")


@pytest.mark.slow
def test_same_command_same_files(pictures, tmp_path):
  for name in ("one", "two"):
    assert run("--source", "folder", "--path", pictures, "--out", tmp_path / name, "--seed", "5").returncode == 0
  for path in (tmp_path / "one").iterdir():
    assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.slow
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
    (("--source", "folder", "--path", "nowhere"), "image folder nowhere does not exist"),
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


def put(folder, name, caption=None, image=(16, 16), colour=(255, 0, 0), **options):
  """An image file and its caption file; `image` is its size or its bytes."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / os.fsdecode(name)
  if isinstance(image, bytes):
    path.write_bytes(image)
  else:
    Image.new("RGB", image, colour).save(path, **options)
  if caption is not None:
    path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())


def test_a_name_that_is_not_utf8(tmp_path):
  put(tmp_path / "in", "blue.png", "blue square")
  put(tmp_path / "in", b"caf\xe9.png", "red square")
  assert built(tmp_path / "in", tmp_path / "out") == [
    "train: 2 images, 2 image-text pairs, 2 files",
    "rejected: none",
    "files seen: 4",
    "  images stored: 2",
    "  caption files read: 2",
  ]
  assert {key for key, _ in examples(tmp_path / "out")} == {"blue.png", r"caf\xe9.png"}


def examples(folder):
  dataset = Dataset.open(folder)
  return [(dataset[number].key, dataset[number].captions) for number in range(len(dataset))]


POSIX = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.slow
def test_any_locale(tmp_path):
  folder = tmp_path / os.fsdecode(b"in \xe9 #1")
  put(folder, "äpfel.png", "rote Äpfel")
  put(folder, "öde.png")
  said = {}
  for name, locale in (
    ("posix", POSIX),
    ("utf8", {"LC_ALL": "C.UTF-8"}),
    ("ascii", {"PYTHONIOENCODING": "ascii:strict"}),
  ):
    said[name] = built(folder, tmp_path / f"ö {name}", **locale)
    assert examples(tmp_path / f"ö {name}") == [("äpfel.png", ("rote Äpfel",))]
    assert (tmp_path / f"ö {name}" / "manifest.json").read_bytes() == (
      tmp_path / "ö posix" / "manifest.json"
    ).read_bytes()
  assert said["utf8"][2] == "  öde.png: no caption file öde.txt"
  assert said["posix"][2] == r"  \xf6de.png: no caption file \xf6de.txt"
  for locale in (POSIX, {"LC_ALL": "C.UTF-8"}):
    done = run(tmp_path / "ö posix", name="inspect", **locale)
    assert (done.returncode, done.stderr) == (0, "") and "rote" in done.stdout


def test_linked_folders(tmp_path):
  put(tmp_path / "in", "a.png", "red square")
  put(tmp_path / "elsewhere", "b.png", "blue square")
  (tmp_path / "in" / "linked").symlink_to("../elsewhere")
  (tmp_path / "elsewhere" / "back").symlink_to("../in")
  assert built(tmp_path / "in", tmp_path / "out")[1:] == [
    "rejected: none",
    "files seen: 5",
    "  images stored: 2",
    "  caption files read: 2",
    "  linked folders that are searched elsewhere: 1",
    "passed over: 1 (listed in manifest.json)",
    "  linked/back: linked folder, which is searched under another name",
  ]
  assert {key for key, _ in examples(tmp_path / "out")} == {"a.png", "linked/b.png"}


def test_colours_of_profiles(tmp_path):
  expected = {None: (90, 160, 60), "Adobe RGB": (0, 161, 47), "Display P3": (59, 164, 33), "ProPhoto": (0, 187, 37)}
  for name in expected:
    profile = {"icc_profile": icc.rgb(name)} if name else {}
    put(tmp_path / "in", f"{name}.png", "green square", colour=(90, 160, 60), **profile)
  built(tmp_path / "in", tmp_path / "out", "--heldout", "0")
  dataset = Dataset.open(tmp_path / "out")
  stored = {dataset[n].key.removesuffix(".png"): images.decode_image(dataset[n].image) for n in range(4)}
  for name, colour in expected.items():
    np.testing.assert_array_equal(stored[str(name)], np.broadcast_to(colour, (16, 16, 3)))


def test_nothing_is_said_of_broken_exif(tmp_path):
  put(tmp_path / "in", "good.jpg", "white square")
  put(tmp_path / "in", "exif.jpg", "red square", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff broken")
  assert built(tmp_path / "in", tmp_path / "out", PYTHONWARNINGS="always")[:2] == [
    "train: 2 images, 2 image-text pairs, 2 files",
    "rejected: none",
  ]


def test_what_captions_hold(tmp_path):
  folder = tmp_path / "in"
  put(folder, "bom.png", "\ufeffred square\r\n")
  put(folder, "utf16.png", "blue square".encode("utf-16"))
  put(folder, "utf16_bare.png", "blue square".encode("utf-16-le"))
  put(folder, "escape.png", "a\x1b[31mred\x07 \u202e square")
  put(folder, "nothing.png", "\u200b\ufeff")
  put(folder, "some.png", "green square\n\x1b]0;title\x07\n")
  assert built(folder, tmp_path / "out", LC_ALL="C.UTF-8") == [
    "train: 3 images, 3 image-text pairs, 3 files",
    "rejected: 3 (listed in manifest.json)",
    r"  escape.png: caption file escape.txt has the control character \x1b: a\x1b[31mred\x07 \u202e square",
    r"  nothing.png: caption file nothing.txt has no visible character: \u200b\ufeff",
    "  utf16_bare.png: caption file utf16_bare.txt looks like UTF-16 without a byte-order mark (save it as UTF-8)",
    "files seen: 12",
    "  images stored: 3",
    "  images whose captions cannot be used: 3",
    "  caption files read: 6",
    "captions left out: 1 (listed in manifest.json)",
    r"  some.txt: a caption has the control character \x1b: \x1b]0;title\x07",
  ]
  assert dict(examples(tmp_path / "out")) == {
    "bom.png": ("red square",),
    "utf16.png": ("blue square",),
    "some.png": ("green square",),
  }


def test_what_surprises_is_said(tmp_path):
  for number in range(5):
    put(tmp_path / "in", f"{number}.png", "red square", image=(1 + number, 40))
  assert built(tmp_path / "in", tmp_path / "out", "--heldout", "0.4")[1:3] == [
    "all 5 images have the same main caption: a prompt will have nothing to choose",
    "enlarged: 5 images of less than 16 pixels, the smallest 1x40 (0.png)",
  ]


@pytest.mark.slow
def test_inspect_shows_text_and_nothing_else(tmp_path):
  folder = tmp_path / "in"
  put(folder, "a\x1b[31m.png", "\n".join(f"apple number {number}" for number in range(300)))
  put(folder, "b.png", "very " * 2000)
  put(folder, "c.png", "red \u202e square")
  put(folder, "d.png", "\x1b[31m")
  built(folder, tmp_path / "out", LC_ALL="C.UTF-8")
  # Captions of other programs may hold anything.
  dataset = Dataset.open(tmp_path / "out")
  shard = tmp_path / "out" / dataset.manifest["splits"]["train"]["shards"][0]["file"]
  example = dataset[0]
  with tfrecords.ShardWriter(shard) as writer:
    writer.write(schema.encode(dataclasses.replace(example, captions=("\x1b]0;title\x07\n\r raw",))))
  done = run(tmp_path / "out", name="inspect", LC_ALL="C.UTF-8")
  assert done.returncode == 0, done.stderr
  assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", done.stdout)
  assert r"\x1b]0;title\x07\n\r raw" in done.stdout and max(map(len, done.stdout.splitlines())) < 240
  assert (
    "files      8 seen: images stored: 3; images whose captions cannot be used: 1; caption files read: 4" in done.stdout
  )


@pytest.mark.slow
def test_verify_of_a_data_set_without_a_whole_record(tmp_path):
  for number in range(60):
    put(tmp_path / "in", f"{number}.png", f"red {number}")
  built(tmp_path / "in", tmp_path / "out", "--shards", "30", "--heldout", "0")
  assert run(tmp_path / "out", "--verify", name="inspect").returncode == 0
  for shard in (tmp_path / "out").glob("*.tfrecord"):
    data = bytearray(shard.read_bytes())
    for offset, length in tfrecords.load_index(shard).tolist():
      data[offset + 12 + length // 2] ^= 1
    shard.write_bytes(data)
  done = run(tmp_path / "out", "--verify", name="inspect")
  assert done.returncode == 2
  assert done.stderr.splitlines() == [
    f"aurora_jax inspect: data set {tmp_path / 'out'}: 60 of 60 records are damaged; 30 shards changed since build-data"
  ]
  lines = done.stdout.splitlines()
  assert len(lines) == 20 + 3 + 21
  assert all(line.endswith("has a wrong checksum") for line in lines[:20])
  assert lines[20:23] == [
    "train      ... and 40 more records",
    "train      60 of them: has a wrong checksum",
    "train      60 of 60 records damaged",
  ]
  assert lines[-1] == "train      ... and 10 more shards"


@pytest.mark.slow
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
    while not any(path.stat().st_size for path in tmp_path.glob(".out.building/*.tfrecord")):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
  finally:
    process.kill()
    process.wait()
  assert process.returncode == 130
  said = [
    line for line in stderr.splitlines() if not line.startswith("folder: images: ")
  ]  # progress, on a slow machine
  assert (stdout, said) == ("", ["aurora_jax build-data: interrupted"])
  assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
