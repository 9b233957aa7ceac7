"""Streams that are closed, broken or full, in processes that import nothing but the module."""

import os
import pathlib
import pty
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BEGIN = "import os, sys; from aurora_jax.cli import standard_streams; standard_streams.prepare(); "


def run(code, redirections="", **options):
  """The code in a process under a shell's redirections."""
  return subprocess.run(
    ["sh", "-c", f'exec "$0" -c "$1" {redirections}', sys.executable, BEGIN + code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    **options,
  )


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_closed_stream(tmp_path, number):
  """A file that is opened later must not get the number of the closed stream, and what is printed there."""
  code = f"""
file = open({str(tmp_path / "x")!r}, "w")
assert file.fileno() > 2 and os.get_inheritable({number})
print("out"); print("err", file=sys.stderr); assert sys.stdin.read() == ""
file.write("content"); file.close()
"""
  done = run(code, f"{number}{'<' if number == 0 else '>'}&-", stdin=subprocess.DEVNULL)
  assert done.returncode == 0, done.stderr
  assert (done.stdout, done.stderr) == ("" if number == 1 else "out\n", "" if number == 2 else "err\n")
  assert (tmp_path / "x").read_text() == "content"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_has_gone(name):
  number = {"stdout": 1, "stderr": 2}[name]
  code = f"""
stream = sys.{name}
for i in range(10000):
  print("line", file=stream, flush=True)
error = standard_streams.lost(stream)
other = sys.stderr if stream is sys.stdout else sys.stdout
print(standard_streams.is_reader_gone(error), file=other)
"""
  read_end, write_end = os.pipe()
  os.close(read_end)
  streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {name: write_end}
  process = subprocess.Popen([sys.executable, "-c", BEGIN + code], cwd=ROOT, text=True, **streams)
  os.close(write_end)
  out, error = process.communicate(timeout=60)
  assert (process.returncode, error if number == 1 else out) == (0, "True\n")


def test_a_terminal_that_has_gone():
  ours, theirs = pty.openpty()
  code = """
input()  # the terminal is gone by now
print("x" * 100000, flush=True); print("y", file=sys.stderr, flush=True)
os._exit(0 if standard_streams.is_reader_gone(standard_streams.lost(sys.stdout)) else 9)
"""
  process = subprocess.Popen(
    [sys.executable, "-c", BEGIN + code], cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
  )
  os.close(theirs)
  os.close(ours)
  process.communicate(b"\n", timeout=60)
  assert process.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_no_reader_that_has_gone():
  code = (
    "print('x', flush=True); print(standard_streams.is_reader_gone(standard_streams.lost(sys.stdout)), file=sys.stderr)"
  )
  done = run(code, ">/dev/full")
  assert (done.returncode, done.stderr) == (0, "False\n")


def test_a_terminal_that_another_program_made_non_blocking():
  read_end, write_end = os.pipe()
  os.set_blocking(write_end, False)
  process = subprocess.Popen([sys.executable, "-c", BEGIN + "print('x' * 300000)"], cwd=ROOT, stdout=write_end)
  os.close(write_end)
  with open(read_end, "rb") as file:
    assert len(file.read()) == 300001
  assert process.wait(timeout=60) == 0
