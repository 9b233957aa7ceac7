"""Files and folders are as readable as the umask lets them be, whatever wrote them, and names may be as long as names
can be.
"""

import os
import tempfile

import pytest

from aurora_jax import files


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o026])
def umask(request):
  before = os.umask(request.param)
  yield request.param
  os.umask(before)


def for_the_owner_alone(folder):
  """As libraries do that write a temporary file and rename it."""
  descriptor, path = tempfile.mkstemp(dir=folder)
  os.write(descriptor, b"weights")
  os.close(descriptor)
  return path


def test_files(tmp_path, umask):
  with files.atomic_file(tmp_path / "x") as partial:
    os.rename(for_the_owner_alone(tmp_path), partial)
  (tmp_path / "y").touch()
  assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode
  assert (tmp_path / "x").read_bytes() == b"weights"


def test_folders(tmp_path, umask):
  (tmp_path / "secret").touch(0o600)
  with files.atomic_folder(tmp_path / "x") as folder:
    os.rename(for_the_owner_alone(folder), folder / "weights")
    os.mkdir(folder / "deep", 0o700)
    os.rename(for_the_owner_alone(folder / "deep"), folder / "deep" / "weights")
    (folder / "script").touch(0o700)
    (folder / "link").symlink_to(tmp_path / "secret")
  (tmp_path / "y").mkdir()
  (tmp_path / "y" / "file").touch()
  folder_mode, file_mode = (tmp_path / "y").stat().st_mode, (tmp_path / "y" / "file").stat().st_mode
  assert (tmp_path / "x").stat().st_mode == (tmp_path / "x" / "deep").stat().st_mode == folder_mode
  for name in ("weights", "deep/weights"):
    assert (tmp_path / "x" / name).stat().st_mode == file_mode
  assert (tmp_path / "x" / "script").stat().st_mode & 0o700 == 0o700
  assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600  # what is linked is not ours


def test_the_umask_is_asked_for_without_a_change(monkeypatch, umask):
  """While it was zero, another thread would make files that anybody may write."""
  if not os.path.exists("/proc/self/status"):
    pytest.skip("only Linux tells")
  with monkeypatch.context() as patch:
    patch.setattr(os, "umask", None)
    assert files._umask() == umask


def test_a_mount_without_permissions(tmp_path, monkeypatch):
  def refuse(path, mode):
    raise PermissionError(1, "Operation not permitted", path)

  monkeypatch.setattr(os, "chmod", refuse)
  files.write_text(tmp_path / "x", "text")
  with files.atomic_folder(tmp_path / "y") as folder:
    (folder / "z").touch()
  assert (tmp_path / "x").read_text() == "text" and (tmp_path / "y" / "z").is_file()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, os.fsdecode(b"\xe9" * 255)])
def test_long_names(tmp_path, name):
  files.write_text(tmp_path / name, "text")
  assert [path.name for path in tmp_path.iterdir()] == [name]
  (tmp_path / name).unlink()
  for _ in range(2):
    with files.atomic_folder(tmp_path / name) as folder:
      (folder / "x").touch()
  assert [path.name for path in tmp_path.iterdir()] == [name]
