"""Rules of the code that no linter knows: annotations, the size of files, the direction of imports, names of
systems.
"""

import ast
import io
import pathlib
import re
import tokenize

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "aurora_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
LINES = 400
# From the top down: a folder imports itself and those after it.
FOLDERS = (
  "cli",
  "performance",
  "reporting",
  "training",
  "evaluation",
  "systems",
  "runs",
  "interop",
  "parallel",
  "data",
  "models",
  "ops",
)
GENERIC = ("models", "ops", "parallel", "data", "interop", "runs")  # they know no system
BY_INTERFACE = ("training", "evaluation", "performance")  # they know the files of systems/, not the folders in it
SYSTEM_FOLDERS = sorted(path.parent.name for path in (PACKAGE / "systems").glob("*/__init__.py"))
# Former names that keep re-exporting.
RE_EXPORTS = ("interop/aurora_torch.py", "models/generator.py")
# PyTorch files that an export copies as they are: each is one file for its reader.
SINGLE_FILES = re.compile(r"systems/\w+/modeling_\w+\.py")


def name_of(path):
  return path.relative_to(PACKAGE).as_posix()


def parse(path):
  return ast.parse(path.read_text(encoding="utf-8"))


def in_folders(folders):
  return [path for path in FILES if name_of(path).split("/")[0] in folders and name_of(path) not in RE_EXPORTS]


def public_functions(body, prefix=""):
  """(qualified name, node) of the public functions and methods; special methods other than these two have known
  types.
  """
  for node in body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      yield from public_functions(node.body, f"{prefix}{node.name}.")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
        yield prefix + node.name, node


def unannotated(node):
  """What a function leaves without a type."""
  signature = node.args
  arguments = [*signature.posonlyargs, *signature.args, *signature.kwonlyargs, signature.vararg, signature.kwarg]
  missing = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
  return missing + ["return"] * (node.returns is None and node.name != "__init__")


def imports(path):
  """(line, module or module.name) of all imports of the package, also those inside functions."""
  for node in ast.walk(parse(path)):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("aurora_jax."))
    if isinstance(node, ast.ImportFrom):
      assert not node.level, f"{name_of(path)}:{node.lineno}: a relative import"
      if (node.module or "").split(".")[0] == "aurora_jax":
        yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_of(module, known):
  return module == known or module.startswith(f"{known}.")


def words_of(path):
  """(line, text) of identifiers and strings, without imports and docstrings."""
  tree = parse(path)
  left_out = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      left_out.update(range(node.lineno, node.end_lineno + 1))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
      left_out.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
  for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
    if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE) and token.start[0] not in left_out:
      yield token.start[0], token.string


def test_public_functions_are_annotated():
  found = [
    f"{name_of(path)}:{node.lineno} {name}: {', '.join(unannotated(node))}"
    for path in FILES
    for name, node in public_functions(parse(path).body)
    if unannotated(node)
  ]
  assert not found, "\n".join(found)


def test_files_are_read_in_one_sitting():
  lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
  assert not {name: lines for name, lines in lengths.items() if lines > LINES and not SINGLE_FILES.fullmatch(name)}
  assert not [name for name in lengths if pathlib.PurePath(name).stem in ("utils", "util", "helpers")]


def test_every_folder_has_its_place():
  """A new folder is written down in FOLDERS, so that its imports are looked at."""
  assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_down(folder):
  above = FOLDERS[: FOLDERS.index(folder)]
  found = [
    f"{name_of(path)}:{line} imports {module}"
    for path in in_folders([folder])
    for line, module in imports(path)
    if module.split(".")[1] in above
  ]
  assert not found, "\n".join(found)


def test_files_beside_the_folders_are_below_them():
  """config.py and the like import no folder. config_files.py asks the registry for a system's dataclasses."""
  found = [
    f"{name_of(path)}:{line} imports {module}"
    for path in PACKAGE.glob("*.py")
    if path.name != "__main__.py"
    for line, module in imports(path)
    if module.split(".")[1] in FOLDERS and (path.name, module) != ("config_files.py", "aurora_jax.systems.registry")
  ]
  assert not found, "\n".join(found)


def test_systems_are_known_by_their_interface():
  found = [
    f"{name_of(path)}:{line} imports {module}"
    for path in in_folders(BY_INTERFACE)
    for line, module in imports(path)
    if any(is_of(module, f"aurora_jax.systems.{system}") for system in SYSTEM_FOLDERS)
  ]
  assert not found, "\n".join(found)


def test_systems_do_not_know_each_other():
  found = [
    f"{name_of(path)}:{line} imports {module}"
    for path in in_folders(["systems"])
    for line, module in imports(path)
    for system in SYSTEM_FOLDERS
    if is_of(module, f"aurora_jax.systems.{system}") and name_of(path).split("/")[1] != system
  ]
  assert not found, "\n".join(found)


def test_generic_code_names_no_system():
  """Docstrings and comments may name a system as the source of a formula; code may not."""
  name = re.compile(rf"(?<![a-z0-9])({'|'.join(SYSTEM_FOLDERS)})(?![a-z0-9])", re.IGNORECASE)
  found = [
    f"{name_of(path)}:{line}: {text}"
    for path in in_folders((*GENERIC, *BY_INTERFACE))
    for line, text in words_of(path)
    if name.search(text.replace("aurora_jax", "").replace("aurora-jax", ""))
  ]
  assert not found, "\n".join(found)


def test_training_does_not_speak_of_aurora():
  """Not even in comments and docstrings: every system trains by this code."""
  found = [
    f"{name_of(path)}:{number}: {line}"
    for path in in_folders(["training"])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    if "aurora" in re.sub(r"aurora_jax|AURORA_JAX|aurora-jax", "", line).lower()
  ]
  assert not found, "\n".join(found)
