"""docs/quickstart.ipynb, read and run section by section."""

import contextlib
import io
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator

PATH = pathlib.Path(__file__).parents[2] / "docs" / "quickstart.ipynb"
# Files of an exported folder that the notebook imports. They are not among installed modules.
_IMPORTED = ("pipeline", "modeling_aurora")


def cells() -> list[tuple[str, str]]:
  """(kind, text) of every cell; the kind is "markdown" or "code"."""
  stored = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
  return [(cell["cell_type"], "".join(cell["source"])) for cell in stored]


class Notebook:
  """A notebook that runs in this process and the current folder.

  Attributes:
    variables: its variables so far.
  """

  def __init__(self):
    self.variables = {"__name__": "quickstart"}
    self._waiting = iter(list(enumerate(cells())))

  def run_to(self, heading: str) -> str:
    """Runs all cells that have not run yet, up to the end of the section `heading`. Returns what they print."""
    printed, reached = io.StringIO(), False
    for number, (kind, source) in self._waiting:
      if kind == "markdown" and source.startswith("#"):
        if reached:
          self._waiting = itertools.chain([(number, (kind, source))], self._waiting)
          break
        reached = source.splitlines()[0].lstrip("# ") == heading
      if kind == "code":
        with contextlib.redirect_stdout(printed):
          exec(compile(source, f"{PATH}, cell {number}", "exec"), self.variables)
    return printed.getvalue()


@contextlib.contextmanager
def notebook() -> Iterator[Notebook]:
  """The notebook. What it imports from its export is forgotten afterwards."""
  path = list(sys.path)
  try:
    yield Notebook()
  finally:
    sys.path[:] = path
    for name in _IMPORTED:
      sys.modules.pop(name, None)
