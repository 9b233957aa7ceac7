"""Flags: paths with `~`, seeds, complaints of one line; and exceptions of others that become one."""

import argparse
import errno
import sys

import pytest

from aurora_jax.cli import build_data, flag_types, foreign_errors, main, train_clip
from aurora_jax.data import sources
from aurora_jax.errors import UserError


def test_home_is_put_in_place_of_the_tilde(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert flag_types.path("~/x") == f"{tmp_path}/x"
  assert flag_types.path("~") == str(tmp_path)
  assert flag_types.path("x/~/y") == "x/~/y" and flag_types.path("~no-such-user/x") == "~no-such-user/x"


@pytest.mark.parametrize("value", ["", "a\0b"])
def test_a_path_that_is_none(value):
  with pytest.raises(argparse.ArgumentTypeError):
    flag_types.path(value)


def test_no_home(monkeypatch):
  monkeypatch.setattr("os.path.expanduser", lambda path: path)
  with pytest.raises(argparse.ArgumentTypeError, match="HOME is not set"):
    flag_types.path("~/x")


@pytest.mark.parametrize("value", ["-1", str(2**32), str(10**30), "1.5", "x", "", "\x1b[31m"])
def test_seeds_out_of_range(value):
  with pytest.raises(argparse.ArgumentTypeError) as error:
    flag_types.seed(value)
  assert "\x1b" not in str(error.value)


def test_seeds():
  assert flag_types.seed("0") == 0 and flag_types.seed(str(2**32 - 1)) == 2**32 - 1
  assert flag_types.long_seed(str(10**30)) == 10**30
  with pytest.raises(argparse.ArgumentTypeError, match="0 or more"):
    flag_types.long_seed("-1")


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "required: COMMAND"),
    (("paint",), "invalid choice: 'paint'"),
    (("sample",), "required: --out, --workdir"),
    (("sample", "--workdir", "x", "--out", "x.png", "--seed", "-1"), "from 0 to 4294967295, got -1"),
    (("sample", "--workdir", "x", "--out", "x.png", "--prompt", "-x"), "given as --flag=VALUE"),
    (("sample", "--workdir", "x", "--out", "x.png", "--seed=-1"), "from 0 to 4294967295, got -1"),
    (("train-clip", "--data", "x", "--out", "y", f"--seed={2**32}"), "from 0 to 4294967295"),
    (("evaluate", "--workdir", "x", "--judge", "y", "--seed=a"), "'a' is no whole number"),
    (("build-data", "--source", "folder", "--out", "x", "--seed=-3"), "0 or more"),
    (("train", "--workdir", "x", "--config"), "--config needs a value"),
    (("inspect", "x", "--no-such-\x1b[31mflag"), "unrecognized arguments: --no-such-\\x1b[31mflag"),
  ],
)
def test_a_wrong_flag_is_one_line(capsys, arguments, message):
  assert main.main(list(arguments)) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and message in error and error.startswith("aurora_jax")


def test_defaults_that_stand_twice():
  """`--help` must not import what they come from."""
  from aurora_jax.training import clip

  defaults = clip.ClipTraining()
  for name, kind, default, _ in train_clip.SETTINGS:
    assert getattr(defaults, name) == default and isinstance(default, kind)
  assert build_data.SKIN_TONES == (sources.NAMED, sources.UNNAMED)


def test_what_is_explained(monkeypatch):
  explain = lambda error: str(foreign_errors.explain(error))
  assert explain(PermissionError(errno.EACCES, "Permission denied", "a\x1b/b")) == "a\\x1b/b: Permission denied"
  assert explain(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
  assert explain(MemoryError()) == "not enough memory"
  assert "smaller batch size" in explain(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"))
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "x")
  found = explain(ValueError('Invalid value "x" for JAX flag jax_num_cpu_devices'))
  assert found == "JAX_NUM_CPU_DEVICES=x in the environment: JAX takes no such value"
  assert "JAX_ENABLE_X64=" in explain(ValueError("invalid truth value 'b' for environment 'JAX_ENABLE_X64'"))


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert foreign_errors.explain(AssertionError()) is None and foreign_errors.explain(KeyError("x")) is None


def test_platforms_that_are_not_there(monkeypatch):
  class Jax:
    @staticmethod
    def devices():
      raise AssertionError

  monkeypatch.setitem(sys.modules, "jax", Jax)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  error = foreign_errors.explain(AssertionError())
  assert isinstance(error, UserError) and str(error).startswith("JAX_PLATFORMS=cuda in the environment")


def test_the_traceback_on_demand(monkeypatch, capsys):
  monkeypatch.setenv(main.TRACEBACK_VARIABLE, "1")
  with pytest.raises(UserError):
    main.main(["paint"])
