"""A run folder and a CLIP folder with random weights, made without training or compiling anything."""

import pathlib

import jax
import numpy as np

from aurora_jax import config_files
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.interop import clip_hf
from aurora_jax.models import clip as clip_lib
from aurora_jax.runs import checkpoint_manager
from aurora_jax.systems import registry
from aurora_jax.training import optimizers

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ["red circle", "blue square", "green bar", "a very blue circle"]


def _random(tree, scale, seed=0):
  """Normal values of the tree's shapes; nothing is zero, so nothing is without effect."""
  rng = np.random.default_rng(seed)
  draw = lambda leaf: np.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)
  return jax.tree.map(draw, tree)


def make_clip(folder, width=32):
  """A CLIP folder whose text features are `width` wide."""
  tower = dict(width=width, layers=1, heads=2, mlp_width=2 * width)
  tokenizer = Tokenizer.train(WORDS, 560, 10)
  sizes = clip_lib.ClipConfig(
    text=clip_lib.TextConfig(
      **tower, vocabulary_size=tokenizer.vocabulary_size, context_length=10, eot_id=tokenizer.end_id
    ),
    image=clip_lib.ImageConfig(**tower, size=16, patch=8),
    embedding_width=16,
  )
  params = _random(clip_lib.abstract_variables(sizes)["params"], 0.3)
  clip_hf.save(folder, clip_hf.ClipBundle(sizes, {"params": params}, tokenizer))
  return folder


def make_home(folder):
  """run, and its CLIP in clip; a CLIP of another width in wide. Returns the folder."""
  make_clip(folder / "clip")
  make_clip(folder / "wide", 48)
  make_run(folder / "run", folder / "clip")
  return folder


def make_run(folder, clip, *overrides, seed=0):
  """A run of configs/aurora_64.py:test with one checkpoint, of step 3."""
  # Weights of size 1 everywhere: text and latents have as much of a say as in a trained generator.
  factors = ("--config.generator.text_lr_multiplier=1.0", "--config.generator.mapping_lr_multiplier=1.0")
  experiment = config_files.load(
    [f"--config={ROOT / 'configs/aurora_64.py'}:test", f"--config.text.clip={clip}", *factors, *overrides]
  )
  system = registry.system_class(experiment.system)(experiment)
  abstract = jax.eval_shape(optimizers.init_state(system), jax.random.key(0))
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(config_files.to_json(experiment))
  with checkpoint_manager.Checkpoints(folder / "checkpoints") as checkpoints:
    checkpoints.save(3, jax.device_put(_random(abstract, 1.0, seed)), config_files.to_mapping(experiment))
  return folder
