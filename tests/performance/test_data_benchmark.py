"""`bench data`: the same images from every pipeline, and one line on bad flags."""

import io

import numpy as np
import pytest
from PIL import Image

from aurora_jax.cli import main
from aurora_jax.data import decode
from aurora_jax.performance import data_benchmark

SETTINGS = data_benchmark.Settings(images=32, side=32, resolution=8, batch_size=8, repeats=2, latency=0.001)


@pytest.fixture(autouse=True)
def _without_tensorflow(monkeypatch):
  """TensorFlow takes seconds to import."""
  monkeypatch.setattr(data_benchmark, "_installed", lambda name: name != "tensorflow")


@pytest.mark.slow
def test_every_pipeline_gives_every_image(tmp_path):
  folder, encoded = data_benchmark._inputs(tmp_path, SETTINGS, "")
  assert Image.open(io.BytesIO(encoded[0])).size == (32, 32)
  expected = sorted(decode.square_pixels(image, 8, None, True).tobytes() for image in encoded)
  for name, arm in data_benchmark._arms(tmp_path, folder, encoded, SETTINGS).items():
    batches = arm()
    made = []
    while sum(map(len, made)) < 32:
      made.append(next(batches))
    batches.close()
    assert all(batch.shape[1:] == (8, 8, 3) and batch.dtype == np.uint8 for batch in made), name
    if "every pixel" not in name and "webdataset" not in name:  # that one repeats before its buffer is empty
      assert sorted(image.tobytes() for batch in made for image in batch) == expected, name


@pytest.mark.slow
def test_the_table(capsys, monkeypatch):
  monkeypatch.setattr(data_benchmark, "Settings", lambda **given: SETTINGS)
  assert main.main(["bench", "data"]) == 0
  rows = capsys.readouterr().out.splitlines()
  assert rows[0].startswith("32 images per round, 2 threads each") and len(rows) >= 6
  assert rows[2].startswith("aurora_jax ") and rows[2].split()[2] == "1.00"


@pytest.mark.parametrize(
  "flags, words",
  [
    (["data", "--images", "-1"], "images must be at least 1, got -1"),
    (["data", "--latency-ms", "-5"], "the latency must be from 0 to 60,000 ms, got -5"),
    (["data", "--data", "nowhere"], "data set nowhere does not exist"),
    (["data", "--config", "configs/openmoji_32.py"], "bench data takes no config"),
    (["sample", "--images", "5", "--config", "configs/openmoji_32.py"], "--images is for `bench data`"),
  ],
)
def test_bad_flags(flags, words, capsys):
  assert main.main(["bench", *flags]) == 2
  assert words in capsys.readouterr().err
