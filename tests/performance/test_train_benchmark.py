"""`bench train`: two runs of a tiny experiment on equal images, judged; and what it refuses."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import random_run
from PIL import Image

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.data import build, sources
from aurora_jax.performance import train_benchmark
from aurora_jax.runs import metrics
from aurora_jax.training import stopping

CONFIG = pathlib.Path(__file__).parent / "tiny_experts.py"
COLORS = {"red": (220, 30, 30), "blue": (40, 60, 220)}


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory):
  """data, clip, judge."""
  home = tmp_path_factory.mktemp("home")
  (home / "images").mkdir()
  for number in range(8):
    color = list(COLORS)[number % 2]
    image = np.full((16, 16, 3), 255, np.uint8)
    image[: 2 + number, : 2 + number] = COLORS[color]
    Image.fromarray(image).save(home / f"images/{number}.png")
    (home / f"images/{number}.txt").write_text(f"{color} circle {number // 4}")
  build.build(sources.folder(home / "images"), home / "data", resolution=16, shards=1, heldout_fraction=0)
  random_run.make_clip(home / "clip")
  random_run.make_clip(home / "judge", 48)
  return home


@pytest.fixture(name="flags")
def _flags(home):
  paths = {f"--{name}": str(home / name) for name in ("data", "clip", "judge", "out")}
  return lambda **changed: [
    "bench",
    "train",
    *(
      word
      for name, path in (paths | {f"--{k}": v for k, v in changed.items()}).items()
      if path
      for word in (name, path)
    ),
  ]


@pytest.mark.slow
def test_both_train_on_equal_images_and_are_judged(home, flags, capsys):
  steps = ["--config", str(CONFIG), "--config.train.total_steps=4"]
  assert main.main([*flags(minutes="30"), *steps]) == 0
  found = json.loads((home / "out/train.json").read_text())
  experts, dense = found["runs"]["experts"], found["runs"]["dense"]
  assert found["complete"] and (experts["images"], dense["images"]) == (16, 16)
  assert experts["images_per_second"] > 0 and dense["images_per_second"] > 0
  # Of 2 experts one remains, and no router; the discriminator is the same.
  assert experts["parameters"]["generator"] > dense["parameters"]["generator"]
  assert experts["parameters"]["discriminator"] == dense["parameters"]["discriminator"]
  assert all("judge/frechet" in run["figures"] and "judge/top1_of_all" in run["figures"] for run in (experts, dense))
  said = capsys.readouterr().out
  table = (home / "out/train.md").read_text()
  assert "training with dense, for 4 steps" in said and all(line in said for line in table.splitlines())
  row = next(line for line in table.splitlines() if "Frechet" in line)
  assert [f"{run['figures']['judge/frechet']:.4g}" for run in (experts, dense)] == [
    cell.strip() for cell in row.split("|")[2:4]
  ]
  # Both runs saw the same images in the same order, from the same first discriminator.
  rows = [metrics.history(home / f"out/{name}/metrics.jsonl") for name in train_benchmark.NAMES]
  losses = [next(row for row in run if row.get("step") == 1) for run in rows]
  shared = set(losses[0]) & set(losses[1])
  assert any(name.startswith("loss/") for name in shared)
  assert main.main([*flags(minutes="30"), *steps]) == 2
  assert "is a run already: --out another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_second_run_keeps_the_planned_learning_rate(home, tmp_path, monkeypatch):
  """It ends after as many steps as the first, but the learning rate follows the experiment's number of steps."""
  seen = {}

  def run(prepared, folder, *, started):
    seen["loop"], seen["program"] = prepared.experiment.train.total_steps, prepared.system.experiment.train.total_steps
    return stopping.Outcome(prepared.experiment.train.total_steps, stopping.DONE)

  monkeypatch.setattr(train_benchmark.loop, "run", run)
  experiment = config_files.load([f"--config={CONFIG}"])
  experiment = dataclasses.replace(
    experiment,
    data=dataclasses.replace(experiment.data, path=str(home / "data")),
    text=dataclasses.replace(experiment.text, clip=str(home / "clip")),
  )
  found = train_benchmark._train(experiment, tmp_path / "run", 1.0, 3)
  assert (found["steps"], found["images"], seen) == (3, 12, {"loop": 3, "program": 6})
  assert found["images_per_second"] is None


@pytest.mark.parametrize(
  "changed, config, said",
  [
    ({"judge": ""}, CONFIG, "needs --judge DIR"),
    ({"judge": "CLIP"}, CONFIG, "is the CLIP that the runs train with"),
    ({"clip": "nowhere"}, CONFIG, "--clip: no CLIP folder at 'nowhere'"),
    ({"out": ""}, CONFIG, "where to? --out DIR"),
    ({"part": "device"}, CONFIG, "--part is for `bench accelerator`"),
    ({}, "configs/openmoji_32.py:dense", "no generator.experts of more than 1"),
    ({}, "configs/megan_cifar10.py", "no generator.experts of more than 1"),
  ],
)
def test_what_it_refuses(changed, config, said, home, flags, capsys):
  changed = {name: str(home / "clip") if value == "CLIP" else value for name, value in changed.items()}
  assert main.main([*flags(**changed), "--config", str(config)]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and said in error


def test_speed_does_not_count_the_first_steps(monkeypatch):
  @dataclasses.dataclass(frozen=True)
  class Prepared:
    step: object

  times = iter([0.0, 60.0, *(60.0 + 0.5 * number for number in range(1, 30))])
  monkeypatch.setattr(train_benchmark.time, "monotonic", lambda: next(times))
  watched, per_second = train_benchmark._timed(Prepared(lambda number, state, batches: (number, state)))
  for number in range(30):
    assert watched.step(number, "state", None) == (number, "state")
  assert per_second() == pytest.approx(2.0)
