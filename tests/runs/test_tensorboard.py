"""Event files, as TensorBoard's own reader reads them."""

import pathlib
import resource
import signal
import subprocess
import sys
import types

import pytest
from PIL import Image

from aurora_jax.errors import UserError
from aurora_jax.runs import metrics, tensorboard
from aurora_jax.runs.workdir import RunFolder


@pytest.fixture
def accumulate(monkeypatch):
  """Reads a folder with TensorBoard's `EventAccumulator`."""
  # With a module of this name TensorBoard uses its own file functions and does not import TensorFlow, which is slow.
  monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
  from tensorboard.backend.event_processing import event_accumulator

  def read(folder):
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={"images": 0})
    return events.Reload()

  return read


def test_a_resumed_run(tmp_path, accumulate, monkeypatch):
  folder = RunFolder(tmp_path)
  first = metrics.Log(folder)
  for step in (10, 20, 30):
    first.train(step, 1.0, {"loss/g": step / 10, "word": "not a number", "flag": True})
  first.close()
  monkeypatch.setattr(tensorboard.time, "time", lambda: 2e9)  # a later file name
  second = metrics.Log(folder)
  second.note("resume", 20, 1.0)
  second.train(30, 2.0, {"loss/g": 7.0})
  second.image(30, "samples", Image.new("RGB", (6, 4), (255, 0, 0)))
  assert len(list(folder.tensorboard.iterdir())) == 2
  read = accumulate(folder.tensorboard)  # the events are in the file although it is still open
  second.close()
  assert read.Tags()["scalars"] == ["loss/g"]
  assert [(e.step, round(e.value, 5)) for e in read.Scalars("loss/g")] == [(10, 1.0), (20, 2.0), (30, 7.0)]
  (image,) = read.Images("samples")
  assert (image.step, image.width, image.height) == (30, 6, 4) and image.encoded_image_string[1:4] == b"PNG"


def test_tensorflow_is_not_imported(tmp_path):
  program = (
    "import sys; from aurora_jax.runs import tensorboard; w = tensorboard.EventWriter(sys.argv[1]);"
    "w.scalars(1, {'a': 1.0}); w.close(); assert 'tensorflow' not in sys.modules"
  )
  root = pathlib.Path(__file__).parents[2]
  subprocess.run([sys.executable, "-c", program, str(tmp_path / "new" / "folder")], check=True, cwd=root)
  assert len(list((tmp_path / "new" / "folder").iterdir())) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="file cannot be written: File exists"):
    tensorboard.EventWriter(tmp_path / "file")


def test_a_full_disk(tmp_path, capfd):
  writer = tensorboard.EventWriter(tmp_path)
  limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
  try:
    with pytest.raises(UserError, match="tfevents.* cannot be written: File too large"):
      writer.scalars(1, {f"loss/{n}": 1.0 for n in range(1000)})
    writer.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert "Traceback" not in capfd.readouterr().err
