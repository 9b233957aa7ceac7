"""The package as `pip install .` lays it out: a console script, configs within reach, types for type checkers."""

import importlib
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

from aurora_jax import config_search

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """A folder with what an installation copies, made by setuptools itself; the build leaves nothing in the checkout."""
  folder = tmp_path_factory.mktemp("installed")
  build = ["egg_info", "--egg-base", folder, "build", "--build-base", folder / "build", "--build-lib", folder / "lib"]
  subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True, capture_output=True, timeout=120)
  return folder / "lib"


def python(installed, folder, code):
  """The lines that `code` prints; run in `folder` with the installed package alone."""
  command = [sys.executable, "-P", "-c", code]
  environ = os.environ | {"PYTHONPATH": str(installed)}
  done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=120)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines()


def test_everything_is_copied(installed):
  package = installed / "aurora_jax"
  expected = {path.relative_to(ROOT / "aurora_jax") for path in (ROOT / "aurora_jax").rglob("*.py")}
  expected |= {path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.py")}
  assert expected == {path.relative_to(package) for path in package.rglob("*.py")}
  assert (package / "py.typed").is_file()
  page = ROOT / "aurora_jax" / "reporting" / "page"
  assert {path.name for path in page.iterdir()} == {path.name for path in (package / "reporting" / "page").iterdir()}
  assert [path.name for path in installed.iterdir()] == [
    "aurora_jax"
  ]  # no top-level package with a name like "configs"


def test_the_installed_configs_are_found(installed, tmp_path):
  code = """
from aurora_jax import config_files
for name in ("openmoji_64", "openmoji_32:tones", "openmoji_32.py:test", "configs/aurora_64_v5e_256.py:test"):
  print(config_files.load(["--config=" + name]).name)
"""
  assert python(installed, tmp_path, code) == ["openmoji_64", "openmoji_32_tones", "openmoji_32", "aurora_64_v5e_256"]


@pytest.mark.slow
def test_an_installed_package_exports(installed, tmp_path):
  """The PyTorch files are copied out of it."""
  code = """
import numpy as np, jax
from aurora_jax.interop.hub import folder
from aurora_jax.systems.megan import config, generator, torch_names
cfg = config.Generator(resolution=16, z_dim=4, channels=2, generators=2)
variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), generator.abstract_variables(cfg))
folder.write("out", torch_names.hub_model(variables, cfg), card="")
"""
  python(installed, tmp_path, code)
  for name in ("interop/hub/pipeline.py", "systems/megan/modeling_megan.py"):
    source = (installed / "aurora_jax" / name).read_text()
    copied = (tmp_path / "out" / pathlib.Path(name).name).read_text()
    assert len(copied) > 1000 and copied.splitlines()[-1] == source.splitlines()[-1]
  package = installed / "aurora_jax" / "systems"
  assert {path.name for path in package.glob("*/modeling_*.py")} >= {"modeling_aurora.py", "modeling_stylegan_t.py"}


def test_configs_of_the_current_folder_come_first(installed, tmp_path):
  """They may build on the installed ones."""
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "mine.py").write_text(
    "from configs import openmoji_32\n\ndef get_config():\n  config = openmoji_32.get_config()\n"
    "  config.name = 'mine'\n  return config\n"
  )
  (tmp_path / "configs" / "openmoji_64.py").write_text(
    "from configs import mine\n\ndef get_config():\n  return mine.get_config()\n"
  )
  code = """
import sys
from aurora_jax import config_files
for name in ("mine", "openmoji_64", "gigagan_64"):
  print(config_files.load(["--config=" + name]).name)
print([name for name in sys.modules if name.split(".")[0] == "configs"])
"""
  assert python(installed, tmp_path, code) == ["mine", "mine", "gigagan_64", "[]"]


def test_a_checkout_has_the_same_names():
  assert config_search.shipped_folder() == ROOT / "configs"
  assert config_search.names() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def test_the_console_script_is_the_command_line(installed, tmp_path):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  module, _, function = project["scripts"]["aurora-jax"].partition(":")
  assert callable(getattr(importlib.import_module(module), function))
  code = f"""
import sys
sys.argv = ["aurora-jax", "inspect", "--help"]
from {module} import {function}
{function}()
"""
  assert python(installed, tmp_path, code)[0].startswith("usage: ")
