"""`compile` gives the programs the same arguments as `train`: the same shapes, types and shardings."""

import dataclasses
import pathlib

import jax
import pytest
from parallel import tiny_clip
from PIL import Image

from aurora_jax import config_files
from aurora_jax.data import build, sources
from aurora_jax.systems.aurora import system as system_lib
from aurora_jax.training import batch_feed, setup
from aurora_jax.training import step as step_lib

_TINY = pathlib.Path(__file__).parents[1] / "parallel/tiny_pod.py"
_CAPTIONS = ("red dot", "blue dot", "grey dot")


@pytest.fixture(name="experiment", scope="module")
def _experiment(tmp_path_factory):
  """The tiny experiment on one device, with a data set of three images and a CLIP of random weights."""
  tmp_path = tmp_path_factory.mktemp("home")
  images = tmp_path / "images"
  images.mkdir()
  for i, name in enumerate(_CAPTIONS):
    Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(images / f"{name}.png")
    (images / f"{name}.txt").write_text(name)
  build.build(sources.folder(str(images)), str(tmp_path / "data"), resolution=8, shards=1, heldout_fraction=0.0)
  tiny_clip.save(tmp_path / "clip", _CAPTIONS)
  return config_files.load(
    [
      f"--config={_TINY}",
      "--config.mesh.expert=1",
      f"--config.data.path={tmp_path / 'data'}",
      f"--config.text.clip={tmp_path / 'clip'}",
      "--config.loss.clip_bank=3",
    ]
  )


def _described(tree):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)


@pytest.mark.slow
def test_the_arguments_are_those_of_train(experiment, monkeypatch):
  frozen, steps = [], []
  finish = system_lib.System.finish_frozen
  monkeypatch.setattr(system_lib.System, "finish_frozen", lambda *args: frozen.append(finish(*args)) or frozen[0])
  build_step = step_lib.build
  monkeypatch.setattr(step_lib, "build", lambda *args: steps.append(build_step(*args)) or steps[-1])
  prepared = setup.prepare(experiment)
  ours = system_lib.System(experiment, prepared.system.layout)
  state, abstract_frozen, batch, *_ = build_step(ours).abstract_arguments(ours.abstract_frozen())
  assert ours.frozen_note == f"CLIP: of {experiment.text.clip}"

  assert _described(abstract_frozen) == _described(dict(frozen[0]))
  theirs = batch_feed.put(next(prepared.batches(0)), prepared.batch_sharding)
  assert _described(batch) == _described({name: theirs[name] for name in batch})
  assert _described(state) == _described(prepared.abstract_state)
  # `compile` lowers what `train` compiles.
  lowered = [step.trace(0, ours.abstract_frozen()).lower().as_text() for step in (steps[0], build_step(ours))]
  assert lowered[0] == lowered[1]


@pytest.mark.slow
def test_without_r1_there_is_one_program_less(experiment):
  shares = lambda experiment: {
    program.name: program.runs_per_step for program in step_lib.build(system_lib.System(experiment)).programs
  }
  assert shares(experiment) == {"networks": 1.0, "r1": 0.5}
  without = dataclasses.replace(experiment, loss=dataclasses.replace(experiment.loss, r1_gamma=0.0))
  assert shares(without) == {"networks": 1.0}
