"""Config files that raise, are no Python or return something else: one line with the file and the number of the
line.
"""

import pytest

from aurora_jax import config_files
from aurora_jax.errors import UserError

GOOD = """
from aurora_jax import config_files
def get_config(variant=""):
  config = config_files.defaults()
  config.name = "small" + variant
  return config
"""


def load(path, *overrides):
  return config_files.load([f"--config={path}", *overrides])


@pytest.mark.parametrize(
  "content, message",
  [
    ("import nosuchmodule\n", "line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
    ("x = 1\ndef get_config(v='')\n", "line 2: expected ':'"),
    ("x = 1\n", "has no function get_config"),
    ("def get_config(v=''):\n  return 3\n", "returns no ConfigDict, but 3"),
    ("def get_config(v=''):\n  x = {}\n  return x['a']\n", "line 3: KeyError: 'a'"),
    ("def get_config(v=''):\n  raise ValueError('two\\nlines')\n", "line 2: two\\nlines"),
    ("def get_config():\n  raise SystemExit(3)\n", "line 2: SystemExit: 3"),
    ("get_config = 5\n", "has no function get_config"),
    ("x = '\\udcff'\ny = 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
    (b"\xff\xfex\0=\0", "config: "),
    (b"name = '\xe9'\n", "utf-8"),
    (b"\xef\xbb\xbfx = 1\n", "has no function get_config"),
  ],
)
def test_a_file_at_fault(tmp_path, content, message):
  path = tmp_path / "my config #1.py"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(UserError) as error:
    load(path)
  assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)
  assert sorted(entry.name for entry in tmp_path.iterdir()) == ["my config #1.py"]  # and no __pycache__


def test_a_syntax_error_in_a_module_that_it_imports(tmp_path, monkeypatch):
  (tmp_path / "broken_sibling.py").write_text("x = (\n")
  (tmp_path / "config.py").write_text("import broken_sibling\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(UserError, match="broken_sibling.py, line 1: '\\(' was never closed"):
    load(tmp_path / "config.py")


def test_places(tmp_path):
  with pytest.raises(UserError, match="is a folder"):
    load(tmp_path)
  with pytest.raises(UserError, match="config file not found: nowhere.py"):
    load("nowhere.py:variant")
  (tmp_path / "a:b.py").write_text(GOOD)
  assert load(tmp_path / "a:b.py").name == "small"
  assert load(f"{tmp_path / 'a:b.py'}:x:y").name == "smallx:y"


def test_overrides(tmp_path):
  (tmp_path / "config.py").write_text(GOOD)
  assert load(tmp_path / "config.py", "--config.train.total_steps=7", "--config.name=x").train.total_steps == 7
  for flag, message in (
    ("--config.train.total_stepz=3", "config: no field 'total_stepz'; Did you mean \"total_steps\""),
    ("--config.trian.total_steps=3", "config: no field 'trian'; Did you mean \"train\""),
    ("--config.train.total_steps=x", "invalid literal for int() with base 10: 'x'"),
  ):
    with pytest.raises(UserError) as error:
      load(tmp_path / "config.py", flag)
    assert message in str(error.value)


def test_home_in_values(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "config.py").write_text(GOOD.replace("return", "config.text.clip = '~/clip'\n  return"))
  experiment = load("~/config.py", "--config.data.path=~/data")
  assert (experiment.data.path, experiment.text.clip) == (f"{tmp_path}/data", f"{tmp_path}/clip")
