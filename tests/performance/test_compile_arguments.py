"""`compile` gives the programs the very arguments that `train` does: same shapes, types and places."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from aurora_jax import config_files
from aurora_jax.data import build, sources
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.interop import clip_hf
from aurora_jax.models import clip as clip_lib
from aurora_jax.parallel import mesh
from aurora_jax.performance import compile_report as training_compile
from aurora_jax.training import ahead, placed, setup

_TINY = pathlib.Path(__file__).parents[1] / "parallel/tiny_pod.py"
_CAPTIONS = ("red dot", "blue dot", "grey dot")


@pytest.fixture(name="experiment")
def _experiment(tmp_path):
  """The tiny experiment on one device, with a data set of three pictures and a CLIP of random weights."""
  pictures = tmp_path / "pictures"
  pictures.mkdir()
  for i, name in enumerate(_CAPTIONS):
    Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(pictures / f"{name}.png")
    (pictures / f"{name}.txt").write_text(name)
  build.build(sources.folder(str(pictures)), str(tmp_path / "data"), resolution=8, shards=1, heldout_fraction=0.0)
  tokenizer = Tokenizer.train(list(_CAPTIONS), 520, 12)
  sizes = clip_lib.ClipConfig(
    text=clip_lib.TextConfig(
      width=32,
      layers=1,
      heads=2,
      mlp_width=64,
      vocabulary_size=tokenizer.vocabulary_size,
      context_length=12,
      eot_id=tokenizer.end_id,
    ),
    image=clip_lib.ImageConfig(width=32, layers=1, heads=2, mlp_width=64, size=16, patch=8),
    embedding_width=16,
  )
  weights = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), clip_lib.abstract_variables(sizes))
  clip_hf.save(tmp_path / "clip", clip_hf.ClipBundle(sizes, weights, tokenizer))
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


def test_the_arguments_are_those_of_train(experiment, monkeypatch):
  frozen = []
  made = setup._freeze
  monkeypatch.setattr(setup, "_freeze", lambda *args: frozen.append(made(*args)) or frozen[0])
  prepared = setup.prepare(experiment)
  layout = mesh.build(experiment)
  sizes, words = training_compile.clip_config(experiment)
  assert words == f"of {experiment.text.clip}" and sizes == prepared.clip.config

  assert _described(training_compile.abstract_frozen(experiment, sizes, layout)) == _described(frozen[0])
  theirs = {
    name: jax.make_array_from_process_local_data(prepared.batch_sharding, value)
    for name, value in next(prepared.batches(0)).items()
    if isinstance(value, np.ndarray)
  }
  ours = ahead.abstract_batch(experiment, sizes, layout)
  assert _described(ours) == _described({name: theirs[name] for name in ours})
  assert set(ours) == set(ahead.INPUTS)  # what else a batch has, no program reads
  again = placed.place(experiment, clip_lib.Clip(sizes), layout)
  assert _described(again.abstract_state) == _described(prepared.abstract_state)


def test_without_r1_there_is_one_program_less(experiment):
  measured = {"snapshot": 1 / experiment.train.log_every, "moved": 1 / experiment.train.log_every}
  assert ahead.programs(experiment) == dict.fromkeys(ahead.STEP, 1.0) | {"r1_step": 0.5} | measured
  without = dataclasses.replace(experiment, loss=dataclasses.replace(experiment.loss, r1_gamma=0.0))
  assert ahead.programs(without) == dict.fromkeys(ahead.STEP, 1.0) | measured
  unguarded = dataclasses.replace(without, train=dataclasses.replace(without.train, guard=False))
  assert ahead.programs(unguarded) == dict.fromkeys(ahead.STEP, 1.0)
