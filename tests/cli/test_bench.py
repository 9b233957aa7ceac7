"""`bench`, as a user runs it; what it measures is not asserted, only that the figures belong together."""

import pytest

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.performance import benchmarks

pytestmark = pytest.mark.slow


def test_bench_sample(capsys):
  small = ("--config.generator.text_layers=0", "--config.generator.attention_depth={}", "--config.generator.experts={}")
  command = ["bench", "sample", "--config", "configs/aurora_64.py:test", *small, "--batch", "2", "--repeats", "1"]
  assert main.main(command) == 0
  *_, heads, row = capsys.readouterr().out.splitlines()
  assert "floor" in heads
  numbers = [float(word) for word in row.split() if word not in ("s", "GF")]
  batch, _, seconds, per_image, _, floor, ratio, _ = numbers
  assert batch == 2 and seconds > floor > 0
  assert per_image == pytest.approx(seconds / 2, rel=2e-3) and ratio == pytest.approx(seconds / floor, rel=2e-3)


@pytest.mark.parametrize("config", ["aurora_64.py:test", "stylegan_t_64.py:test", "megan_cifar10.py:test"])
def test_bench_torch(config, capsys):
  pytest.importorskip("torch")
  assert main.main(["bench", "torch", "--config", f"configs/{config}", "--batch", "2", "--repeats", "1"]) == 0
  *_, row = capsys.readouterr().out.splitlines()
  batch, seconds, per_image, speed, memory = (float(word) for word in row.split() if word != "s")
  assert batch == 2 and per_image == pytest.approx(seconds / 2, rel=2e-3) and memory > 1
  assert speed == pytest.approx(1 / per_image, rel=1e-2)


def test_useful_work_of_the_released_generator():
  """249 GF by PyTorch's counter, which sees neither its distances (2 N^2 D per head, 38 GF) nor deformable convolutions
  (26 GF): the count here has both."""
  experiment = config_files.load(["--config=configs/aurora_64.py"])
  cfg = experiment.generator
  distances = sum(
    2 * cfg.blocks[r] * depth * r**4 * cfg.heads * cfg.head_dim for r, depth in cfg.attention_depth.items()
  )
  deformed = sum(2 * cfg.blocks[r] * 9 * r**2 * cfg.channels(r) ** 2 for r in (4, 8, 16))
  assert benchmarks.useful_flops(experiment) == pytest.approx(249e9 + distances + deformed, rel=0.02)


@pytest.mark.parametrize("flags,word", [(["--batch", "0"], "0"), (["--repeats", "0"], "0")])
def test_bad_numbers(flags, word, capsys):
  assert main.main(["bench", "sample", "--config", "configs/aurora_64.py:test", *flags]) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and word in said
