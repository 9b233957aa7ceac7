"""The published sizes, counted without allocating them, and what configurations refuse."""

import dataclasses
import math

import jax
import pytest

from aurora_jax.errors import UserError
from aurora_jax.models import dino
from aurora_jax.systems.stylegan_t import config, discriminator, generator


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("build", "expected"),
  [
    (
      config.full,
      {64: (975_556_011, 29), 128: (1_005_955_509, 36), 256: (1_016_436_671, 43), 512: (1_020_497_609, 50)},
    ),
    (config.lite, {64: (74_556_835, 21), 128: (82_577_579, 26), 256: (85_703_219, 31), 512: (87_044_859, 36)}),
  ],
)
def test_parameters_and_slots_of_the_generators(build, expected):
  """One abstract model of 512 pixels counts for all: a smaller one is a prefix of it (below)."""
  params = generator.abstract_variables(build(512))["params"]
  total = count(params["mapping"])
  for r in build(512).resolutions:
    total += count(params["synthesis"][f"b{r}"])
    if r in expected:
      assert (total, build(r).num_ws) == expected[r], r
  assert total == count(params)


def test_a_smaller_model_is_a_prefix_of_a_larger_one():
  shapes = lambda cfg: jax.tree.map(lambda leaf: leaf.shape, generator.abstract_variables(cfg)["params"])
  smallest, larger = shapes(config.lite(16)), shapes(config.lite(32))
  assert set(larger["synthesis"]) - set(smallest["synthesis"]) == {"b32"}
  assert smallest == {**larger, "synthesis": {name: larger["synthesis"][name] for name in smallest["synthesis"]}}


def test_the_readmes_small_generator():
  cfg = config.custom(64)
  assert [cfg.channels(r) for r in cfg.resolutions] == [256, 256, 256, 256]
  assert cfg.num_ws == 13


def test_parameters_of_the_discriminator():
  variables = discriminator.abstract_variables(config.Discriminator())
  assert count(variables["params"]) == 7_753_600 == 5 * 1_550_720
  assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves(variables["params"]))
  assert count(variables["dino"]) == 21_665_664
  assert count(dino.abstract_variables(dino.dino_vit_s16())) == 21_665_664
  assert config.Discriminator().heads * config.Discriminator().tokens == 980


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(resolution=48), "generator.resolution must be a power of two, 8 or more, got 48"),
    (dict(norm_groups=48), "norm_groups 48 does not divide the 2048 channels at 8 pixels"),
    (dict(residual_blocks=0), "residual_blocks must be at least 1, got 0"),
    (dict(text_dim=-1), "text_dim must be positive, or 0 for no text, got -1"),
    (dict(compute_dtype="float16"), "generator.compute_dtype must be 'float32' or 'bfloat16', got 'float16'"),
    (dict(w_average_decay=1.0), "w_average_decay must be from 0 to below 1, got 1.0"),
    (dict(text_dim=0, text_tower=config.TextTower(layers=2)), "text_tower has 2 layers, generator.text_dim is 0"),
  ],
)
def test_impossible_generators_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(config.Generator(), **changes)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: config.Discriminator(image_size=200), "image_size 200 is not a multiple of discriminator.dino.patch 16"),
    (lambda: config.Discriminator(taps=(2, 12)), r"taps has \[12\], discriminator.dino has blocks 0 to 11"),
    (lambda: config.Discriminator(kernel_size=8), "kernel_size must be odd"),
    (lambda: config.Discriminator(augment=("color",)), r"augment has \['color'\], there are brightness"),
    (lambda: config.Discriminator(compute_dtype="half"), "discriminator.compute_dtype must be"),
    (lambda: config.Loss(clip_weight=-1.0), "loss.clip_weight must not be negative, got -1.0"),
    (lambda: config.Loss(clip_crop=0), "loss.clip_crop must be at least 1, got 0"),
    (lambda: config.TextTower(layers=1, heads=5), "heads 5 does not divide its width 768"),
    (lambda: config.TextTower(layers=1, activation="relu"), "activation must be one of quick_gelu"),
    (lambda: dino.DinoConfig(heads=5), "dino.width 384 is not a multiple of dino.heads 5"),
    (lambda: dino.DinoConfig(position_resize="nearest"), "dino.position_resize must be one of bilinear"),
  ],
)
def test_other_impossible_values_are_refused(build, message):
  with pytest.raises(UserError, match=message):
    build()
