"""docs/quickstart.ipynb as it is stored. test_end_to_end.py runs it."""

import json
import re

import pytest
import quickstart_notebook
from quickstart_notebook import PATH

CODE = [source for kind, source in quickstart_notebook.cells() if kind == "code"]
MARKDOWN = [source for kind, source in quickstart_notebook.cells() if kind == "markdown"]


def test_it_is_stored_without_results():
  notebook = json.loads(PATH.read_text(encoding="utf-8"))
  assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
  assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
  stored = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
  assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in stored)
  assert PATH.stat().st_size < 200_000


def test_its_cells_are_short():
  assert CODE and max(len(source.splitlines()) for source in CODE) <= 16
  assert max(len(line) for source in CODE + MARKDOWN for line in source.splitlines()) <= 120


@pytest.mark.parametrize("source", CODE)
def test_its_code_compiles(source):
  compile(source, PATH.name, "exec")


def test_its_links_lead_somewhere():
  targets = re.findall(r"\]\(([^)#]+)", "\n".join(MARKDOWN))
  assert targets and [target for target in targets if not (PATH.parent / target).is_file()] == []
