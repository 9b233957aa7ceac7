"""The released constructor's keyword arguments and our configuration, both ways."""

import dataclasses
import json
import pathlib

import pytest

from aurora_jax.config import PerResolution
from aurora_jax.errors import UserError
from aurora_jax.systems.aurora import config
from aurora_jax.systems.aurora import released as released_lib

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"


def released(cfg):
  """The configuration after a way there and back, through JSON."""
  return released_lib.config_from_released(json.loads(json.dumps(released_lib.config_to_released(cfg))))


def test_there_and_back():
  tiny = released_lib.config_from_released(json.loads((GOLDENS / "tiny16.config.json").read_text()))
  full = dataclasses.replace(config.Generator(), text_attention="uniform")
  per = PerResolution
  odd = dataclasses.replace(
    tiny,
    experts=per({8: 1, 16: 3}),
    attention_depth=per({16: 2}),
    deformable_max_resolution=0,
    text_layers=0,
    zero_init_attention=False,
    mapping_lr_multiplier=0.5,
    output_resolutions=(4, 8),
    heads=2,
    text_heads=2,
  )
  for cfg in (tiny, full):
    assert released(cfg) == cfg
  # Of resolutions without attention nothing is said.
  assert released(odd) == dataclasses.replace(odd, experts=per({16: 3}))
  runtime = dataclasses.replace(
    tiny, moe_backend="grouped", compute_dtype="bfloat16", remat=True, loop_layers=True, attention_chunk=7
  )
  assert released(runtime) == tiny
  assert {"moe_backend", "compute_dtype", "remat", "loop_layers", "attention_chunk"} < config.RUNTIME_FIELDS


def test_deformable_up_to_any_resolution_that_makes_no_difference():
  tiny = released_lib.config_from_released(json.loads((GOLDENS / "tiny16.config.json").read_text()))
  assert released_lib.config_to_released(dataclasses.replace(tiny, deformable_max_resolution=64))["mtm"] is True
  assert released_lib.config_to_released(dataclasses.replace(tiny, deformable_max_resolution=2))["mtm"] is False


def test_what_the_released_code_says_of_the_released_model():
  """`g_config` of run_synthesize.py."""
  kwargs = released_lib.config_to_released(config.Generator())
  assert kwargs["num_adaptive_kernels"] == {"4": 1, "8": 1, "16": 2, "32": 4, "64": 8}
  assert list(kwargs["num_block_per_res"]) == ["4", "8", "16", "32", "64"]  # the order counts there
  assert kwargs["num_experts"] == {"8": 4, "16": 8, "32": 16, "64": 16}
  assert kwargs["attn_resolutions"] == ["8", "16", "32", "64"]
  expected = {
    "resolution": 64,
    "z_dim": 128,
    "w_dim": 1024,
    "mapping_fmaps": 1024,
    "context_dim": 1024,
    "clip_out_dim": 768,
    "head_dim": 64,
    "fmaps_max": 1600,
    "attn_gain": 0.3,
    "residual_gain": 0.4,
    "tie": False,
    "scale_in": False,
    "mtm": True,
    "skip_connection": True,
    "ms_training_res": ["4", "8", "16", "32", "64"],
  }
  assert {name: kwargs[name] for name in expected} == expected


def test_every_field_that_cannot_be_expressed_is_named():
  cfg = dataclasses.replace(
    config.Generator(), text_attention="scaled", text_heads=4, feed_forward_ratio=2, deformable_max_resolution=8
  )
  with pytest.raises(UserError) as error:
    released_lib.config_to_released(cfg)
  message = str(error.value)
  assert "\n" not in message
  for words in (
    "generator.text_attention is 'scaled'",
    "generator.text_heads is 4",
    "generator.feed_forward_ratio is 2",
    "generator.deformable_max_resolution is 8, there it can only be 16 or 0",
  ):
    assert words in message
