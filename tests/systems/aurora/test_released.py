"""Exchange of generator weights under the released names."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from aurora_jax.errors import UserError
from aurora_jax.systems.aurora import config, generator
from aurora_jax.systems.aurora import released as released_lib

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"


@pytest.fixture(scope="module")
def released():
  cfg = released_lib.config_from_released(json.loads((GOLDENS / "tiny16.config.json").read_text()))
  return cfg, load_file(GOLDENS / "tiny16.state_dict.safetensors")


@pytest.mark.slow
def test_round_trip_is_the_identity_bitwise(released):
  cfg, state_dict = released
  back = released_lib.export_generator(released_lib.import_generator(state_dict, cfg), cfg)
  assert set(back) == set(state_dict)
  for name, array in state_dict.items():
    np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert back[name].shape == array.shape


def test_released_state_dict_has_its_1353_entries_and_12_buffers():
  cfg = config.Generator()
  names = [name for entry in released_lib.entries(cfg) for name in entry.names]
  assert len(set(names)) == len(names)
  buffers = len(released_lib.fir_buffers(cfg)[0]) + 3  # and the Fourier frequencies, phases and transform
  assert buffers == 12
  assert len(names) - 3 == 1353


@pytest.mark.slow
def test_gigagans_options_have_their_released_names_and_come_back(released):
  """Constant input, tied queries and keys, w as a token: the released code has them, switched off in the released
  model.
  """
  cfg, _ = released
  cfg = dataclasses.replace(cfg, fourier_input=False, tied_attention=True, w_token=True)
  kwargs = released_lib.config_to_released(cfg)
  assert (kwargs["fourier_feat"], kwargs["tie"], kwargs["use_w_cond"]) == (False, True, True)
  assert released_lib.config_from_released(kwargs) == cfg
  shapes = released_lib.expected_shapes(cfg)
  inner = cfg.heads * cfg.head_dim
  assert shapes["synthesis.net.0.0.const"] == (1, cfg.channels(2), 4, 4)
  of = lambda ending: {shape for name, shape in shapes.items() if name.endswith(ending)}
  assert of("attn_blocks.0.self_attn.to_qk.weight") == {(inner, inner)}
  assert of("attn_blocks.0.align_dim.weight") == {(cfg.text_dim, cfg.w_dim)}
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)
  variables = jax.tree.map(draw, generator.abstract_variables(cfg))
  back = released_lib.import_generator(released_lib.export_generator(variables, cfg), cfg)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.slow
def test_missing_left_over_and_misshapen_entries_are_one_error(released):
  cfg, state_dict = released
  broken = dict(state_dict)
  del broken["mapping.dense0.weight"]
  broken["visual.proj"] = np.zeros(3, np.float32)
  broken["mapping.dense1.bias"] = np.zeros(7, np.float32)
  with pytest.raises(UserError) as error:
    released_lib.import_generator(broken, cfg)
  message = str(error.value)
  assert "1 missing: mapping.dense0.weight" in message
  assert "1 left over: visual.proj" in message
  assert "mapping.dense1.bias is (7,), expected (24,)" in message


@pytest.mark.slow
def test_a_tensor_under_two_names_must_agree(released):
  cfg, state_dict = released
  broken = dict(state_dict)
  name = "text_head.transformer.res_blocks.0.mlp.c_fc.bias"
  broken[name] = broken[name] + 1
  with pytest.raises(UserError, match="should be the same tensor"):
    released_lib.import_generator(broken, cfg)


def test_unsupported_released_keywords_are_named():
  with pytest.raises(UserError, match="scale_in=True"):
    released_lib.config_from_released({"scale_in": True})
  with pytest.raises(UserError, match="no keyword 'experts'"):
    released_lib.config_from_released({"experts": 3})
