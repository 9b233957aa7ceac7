"""What holds on eight devices; `test_eight_devices.py` runs it in a process that has them. The last test is the point:
one whole training step, R1 included, is the same on a mesh as on one device.

    python -m pytest tests/parallel/eight_devices.py        (in an environment with eight devices, see there)
    ALL_MESHES=1 python -m pytest ...                       every mesh with and without fsdp and with both exchanges
"""

import dataclasses
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax import config
from aurora_jax.models import clip as clip_lib
from aurora_jax.models import generator as generator_lib
from aurora_jax.models.clip import ClipConfig, ImageConfig, TextConfig
from aurora_jax.ops import moe
from aurora_jax.parallel import experts as experts_lib
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.training import checkpoint, placed, setup
from aurora_jax.training import step as step_lib

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "aurora_64.py"
BATCH, PROMPTS = 8, 3
TOKENS, WIDTH, HIDDEN = 256, 8, 12  # of the exchange by itself


def experiment(data=0, expert=1, fsdp=False, exchange="auto"):
  """Eight pixels; layers of 4 and of 8 experts, and whatever looks across the batch switched on.

  Rates are high and Adam's epsilon is too, so that an update shows the gradient it was made from: with the usual tiny
  epsilon the first update is only the gradient's sign, a coin toss where the true gradient is zero.
  """
  base, replace = config.load([f"--config={CONFIG}:test"]), dataclasses.replace
  return replace(
      base,
      generator=replace(
          base.generator, resolution=8, blocks={4: 1, 8: 1}, adaptive_kernels={4: 1, 8: 2}, output_resolutions=(4, 8),
          attention_depth={4: 1, 8: 1}, experts={4: 4, 8: 8}, text_attention="uniform", mapping_layers=1,
          deformable_max_resolution=4),
      discriminator=replace(
          base.discriminator, resolution=8, blocks={8: 1, 4: 1}, attention_depth={4: 1}, input_resolutions=(8, 4),
          exit_resolutions=(4, 1), minibatch_std=4),
      loss=replace(base.loss, clip_augment=True, clip_bank=3, clip_min_resolution=8, generator_matching_weight=0.5),
      optimizer=replace(base.optimizer, generator_lr=0.1, discriminator_lr=0.1, eps=1e-2),
      mesh=config.Mesh(data, expert, fsdp, exchange), train=replace(base.train, batch_size=BATCH))


@functools.cache
def clip_module():
  tower = dict(width=32, layers=1, heads=2, mlp_width=64)
  return clip_lib.Clip(ClipConfig(
      text=TextConfig(vocabulary_size=50, context_length=8, eot_id=49, **tower),
      image=ImageConfig(size=8, patch=4, **tower), embedding_width=16))


def to_host(tree):
  return jax.tree.map(np.asarray, tree)


@functools.cache
def inputs():
  """Frozen CLIP with a bank, and a batch; some captions occur twice."""
  keys = jax.random.split(jax.random.key(1), 3)
  tokens = np.array([[48, 3 + i // 2, 5 + i, 49, 0, 0, 0, 0] for i in range(BATCH)], np.int32)
  image = jax.random.uniform(keys[0], (BATCH, 8, 8, 3), minval=-1)
  bank = jax.random.normal(keys[2], (3, 16))
  frozen = step_lib.Frozen(clip_module().init(keys[1], tokens, image),
                           bank / jnp.linalg.norm(bank, axis=1, keepdims=True), jnp.array([0, 4, 20]))
  return to_host(frozen), {"image": np.asarray(image), "tokens": tokens, "index": np.arange(BATCH) // 2}


@functools.cache
def on_one_device():
  layout = mesh_lib.build(experiment(), jax.devices()[:1])
  return placed.place(experiment(), clip_module(), layout)


@functools.cache
def first_state(routing):
  """A state in which nothing is zero; with routing "all to one" every token's favourite is the same expert."""
  state = to_host(on_one_device().init(jax.random.key(0)))

  def stir(path, leaf):
    key = jax.random.fold_in(jax.random.key(2), hash_of(path))
    leaf = np.asarray(leaf + 0.3 * jax.random.normal(key, leaf.shape))
    if routing == "all to one" and "['router']['bias']" in jax.tree_util.keystr(path):
      leaf = leaf + 100 * (np.arange(leaf.size) == 2)
    return leaf.astype(np.float32)

  generator = jax.tree_util.tree_map_with_path(stir, state.generator)
  discriminator = jax.tree_util.tree_map_with_path(stir, state.discriminator)
  return state.replace(generator=generator, discriminator=discriminator, ema=state.generator)


def hash_of(path):
  return sum(ord(letter) * (i + 1) for i, letter in enumerate(jax.tree_util.keystr(path))) % 2**31


def one_step(programs, routing):
  """A step and then R1. Returns (state, metrics) on the host."""
  layout = programs.layout
  frozen, batch = inputs()
  state = jax.tree.map(lambda leaf, abstract: jax.device_put(leaf, abstract.sharding), first_state(routing),
                       programs.abstract_state)
  frozen, batch = jax.device_put(frozen, layout.replicated), jax.device_put(batch, layout.batch)
  state, metrics = programs.step(state, frozen, batch)
  state, more = programs.r1_step(state, frozen, batch)
  return state, to_host(metrics | more)


@functools.cache
def reference(routing):
  state, metrics = one_step(on_one_device(), routing)
  return to_host(state), metrics
