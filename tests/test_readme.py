"""README and docs: their commands are real, their links lead somewhere, their config fields and names exist."""

import argparse
import ast
import importlib
import pathlib
import re
import shlex

import pytest

from aurora_jax import config_files, config_search
from aurora_jax.cli import flag_types, main
from aurora_jax.systems import registry

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCSTRINGS = sorted((ROOT / "configs").glob("*.py"))
COMMAND = re.compile(r"(?:aurora-jax|python -m aurora_jax) ([a-z-]+) (.*)")


def commands(text):
  """[(command, arguments)] of the code in a text; a line that ends with a backslash goes on."""
  found = []
  for line in re.sub(r"\\\n\s*", " ", text).splitlines():
    match = COMMAND.search(line)
    if match and match[1] in main.COMMANDS and "..." not in match[2] and not match[2].startswith("COMMAND"):
      found.append((match[1], [word for word in shlex.split(match[2], comments=True) if word != "&"]))
  return found


def blocks(page, language):
  return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def check(command, arguments):
  """Reads the arguments as the command does, its config with all overrides included."""
  module = importlib.import_module(f"aurora_jax.cli.{command.replace('-', '_')}")
  parser = flag_types.Parser(prog=command)
  module.add_arguments(parser)
  config_argv, rest = main.split_config_flags(arguments)
  parsed = parser.parse_args(rest)
  if any(argument.startswith("--config=") for argument in config_argv):
    config_files.load(config_argv)
  return parsed


def id_of(path):
  return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_commands_are_real(page):
  for block in blocks(page, "bash"):
    for command, arguments in commands(block):
      assert isinstance(check(command, arguments), argparse.Namespace)


@pytest.mark.parametrize("path", DOCSTRINGS, ids=id_of)
def test_commands_of_configs_are_real(path):
  found = commands(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
  assert "train" in [command for command, _ in found]
  for command, arguments in found:
    check(command, arguments)


def test_there_are_commands_to_check():
  everything = [command for page in PAGES for block in blocks(page, "bash") for command, _ in commands(block)]
  assert set(everything) >= {
    "build-data",
    "train-clip",
    "train",
    "sample",
    "interpolate",
    "evaluate",
    "convert",
    "inspect",
  }
  assert set(everything) >= {"compile"} and len(everything) > 20


def test_the_table_has_every_command():
  rows = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
  assert sorted(rows) == sorted(main.COMMANDS)


def test_the_experiments_are_all_listed():
  text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
  assert [name for name in config_search.names() if f"`configs/{name}.py`" not in text] == []


def anchor(heading):
  """A heading's anchor as GitHub makes it."""
  return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=id_of)
def test_links_lead_somewhere(page):
  text = page.read_text(encoding="utf-8")
  for target in re.findall(r"\]\(([^)]+)\)", text):
    if target.startswith(("http://", "https://")):
      continue
    name, _, fragment = target.partition("#")
    path = page.parent / name if name else page
    assert path.is_file(), target
    if fragment:
      headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
      assert fragment in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_named_files_are_there(page):
  for name in re.findall(r"(?:configs|launch|tests|aurora_jax)/[\w/.]+\.(?:py|sh|yaml|sbatch)", page.read_text()):
    if name not in ("configs/mine.py", "configs/NAME.py") and "/NAME/" not in name:
      assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_named_config_fields_are_there(page):
  """`group.field` in code: of any system's experiment."""
  groups = {}
  for system in registry.SYSTEMS:
    for group, fields in config_files.to_mapping(config_files.from_mapping({"system": system})).items():
      if isinstance(fields, dict):
        groups.setdefault(group, set()).update(fields)
  for group, field in re.findall(r"`(?:--config\.)?([a-z]+)\.([a-z_]+)[=`]", page.read_text(encoding="utf-8")):
    if group in groups and field not in ("py", "json", "jsonl", "npz"):
      assert field in groups[group], f"{group}.{field}"


@pytest.mark.parametrize("page", PAGES, ids=id_of)
def test_python_compiles_and_its_imports_work(page):
  for block in blocks(page, "python"):
    try:
      tree = ast.parse(block)
    except IndentationError:  # the inside of a class
      continue
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom) and node.module.startswith("aurora_jax"):
        module = importlib.import_module(node.module)
        for alias in node.names:
          if not hasattr(module, alias.name):
            importlib.import_module(f"{node.module}.{alias.name}")
