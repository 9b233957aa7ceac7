"""Files and folders are whole or not there, and what stood there before survives a failure."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from aurora_jax import files
from aurora_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def contents(folder):
  return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_whole_or_as_it_was(tmp_path):
  path = tmp_path / "made" / "x.txt"
  files.write_text(path, "old")
  with pytest.raises(KeyError):
    with files.atomic_file(path) as partial:
      partial.write_text("half")
      raise KeyError
  assert contents(tmp_path) == {"made/x.txt": "old"}
  files.write_text(path, "new")
  assert contents(tmp_path) == {"made/x.txt": "new"}


def test_a_folder_is_whole_or_as_it_was(tmp_path, monkeypatch):
  target = tmp_path / "out"

  def write(text):
    with files.atomic_folder(target) as folder:
      (folder / "x").write_text(text)

  write("old")
  with pytest.raises(KeyError):
    with files.atomic_folder(target) as folder:
      (folder / "x").write_text("half")
      raise KeyError
  rename = os.rename

  def refuse(old, new):
    if os.fspath(old).endswith(".partial"):
      raise OSError(28, "No space left on device")
    rename(old, new)

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", refuse)
    with pytest.raises(UserError, match="out cannot be written: No space left on device"):
      write("new")
  assert contents(tmp_path) == {"out/x": "old"}
  write("new")
  assert contents(tmp_path) == {"out/x": "new"}


KILLED = """
import os, pathlib, signal, sys
from aurora_jax import files
with files.atomic_folder(sys.argv[1]) as folder:
  (folder / "x").write_text("half")
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leftovers_of_killed_processes_are_removed(tmp_path):
  target, leftovers = tmp_path / "out", lambda: sorted(tmp_path.glob(".*"))
  done = subprocess.run([sys.executable, "-c", KILLED, target], cwd=ROOT, check=False)
  assert done.returncode == -signal.SIGKILL and len(leftovers()) == 1 and not target.exists()
  retired, others = tmp_path / ".out.abcdefgh.retired", tmp_path / ".outer.abcdefgh.partial"
  for folder in (retired, others):
    folder.mkdir()
  with files.atomic_folder(target) as first:
    # Neither one of a living process, nor what may be the only copy, nor that of another name.
    assert leftovers() == sorted([first, retired, others])
    with files.atomic_folder(target) as second:
      assert leftovers() == sorted([first, second, retired, others])
  with files.atomic_folder(target):
    assert not retired.exists()
  assert leftovers() == [others]


def test_places_that_cannot_be_written_are_named(tmp_path):
  (tmp_path / "file").write_text("in the way")
  for ask in (
    lambda: files.check_folder(tmp_path / "file" / "a"),
    lambda: files.write_text(tmp_path / "file" / "a", ""),
  ):
    with pytest.raises(UserError, match="file/a cannot be written: "):
      ask()
  files.check_folder(tmp_path / "a" / "b")
  assert contents(tmp_path) == {"file": "in the way"}


def test_files_below_a_folder_that_changes(tmp_path):
  for name in ("a", "b/c", "b/d/e", "skipped", "other/skipped", "folder/f"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  sizes = lambda **options: {name: status.st_size for name, status in files.files_below(tmp_path, **options)}
  whole = {name: len(name) for name in ("a", "b/c", "b/d/e", "skipped", "other/skipped", "folder/f")}
  assert sizes() == whole
  assert sizes(skip=("skipped", "folder")) == {name: whole[name] for name in ("a", "b/c", "b/d/e", "other/skipped")}
  walk = files.files_below(tmp_path)
  found = [next(walk)]
  shutil.rmtree(tmp_path)  # like the temporary folder of a checkpoint, while somebody looks at it
  assert len([*found, *walk]) < len(whole)
  assert not list(files.files_below(tmp_path))
