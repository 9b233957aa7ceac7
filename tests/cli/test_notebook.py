"""docs/quickstart.ipynb: its code cells run in order, in one process and an empty folder."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def cells(kind):
  notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
  return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_small_and_explained():
  assert NOTEBOOK.stat().st_size < 200_000 and len(cells("markdown")) >= len(cells("code")) - 1
  assert max(len(cell.splitlines()) for cell in cells("code")) <= 16


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
  pytest.importorskip("torch")
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  code = "import torch\ntorch.set_num_threads(1)\n" + "\n\n".join(cells("code"))
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
  work = tmp_path / "quickstart"
  with Image.open(work / "pytorch.png") as sheet, Image.open(work / "samples.png") as samples:
    assert sheet.size == (128, 64) and np.asarray(sheet).std() > 1 and samples.width > 128
  assert (work / "exported" / "README.md").is_file()
