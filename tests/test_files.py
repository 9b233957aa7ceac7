"""Files and folders are whole or not there, and what stood there before survives a failure."""

import os

import pytest

from aurora_jax import files
from aurora_jax.errors import UserError


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
