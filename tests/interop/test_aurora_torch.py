"""Exchange of generator weights under the released names."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from aurora_jax import config
from aurora_jax.errors import UserError
from aurora_jax.interop import aurora_torch

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture(scope="module")
def released():
  cfg = aurora_torch.config_from_released(json.loads((GOLDENS / "tiny16.config.json").read_text()))
  return cfg, load_file(GOLDENS / "tiny16.state_dict.safetensors")


def test_round_trip_is_the_identity_bitwise(released):
  cfg, state_dict = released
  back = aurora_torch.export_generator(aurora_torch.import_generator(state_dict, cfg), cfg)
  assert set(back) == set(state_dict)
  for name, array in state_dict.items():
    np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert back[name].shape == array.shape


def test_released_state_dict_has_its_1353_entries_and_12_buffers():
  cfg = config.Generator()
  names = [name for entry in aurora_torch.entries(cfg) for name in entry.names]
  assert len(set(names)) == len(names)
  buffers = len(aurora_torch.fir_buffers(cfg)[0]) + 3  # and the Fourier frequencies, phases and transform
  assert buffers == 12
  assert len(names) - 3 == 1353


def test_missing_left_over_and_misshapen_entries_are_one_error(released):
  cfg, state_dict = released
  broken = dict(state_dict)
  del broken["mapping.dense0.weight"]
  broken["visual.proj"] = np.zeros(3, np.float32)
  broken["mapping.dense1.bias"] = np.zeros(7, np.float32)
  with pytest.raises(UserError) as error:
    aurora_torch.import_generator(broken, cfg)
  message = str(error.value)
  assert "1 missing: mapping.dense0.weight" in message
  assert "1 left over: visual.proj" in message
  assert "mapping.dense1.bias is (7,), expected (24,)" in message


def test_a_tensor_under_two_names_must_agree(released):
  cfg, state_dict = released
  broken = dict(state_dict)
  name = "text_head.transformer.res_blocks.0.mlp.c_fc.bias"
  broken[name] = broken[name] + 1
  with pytest.raises(UserError, match="should be the same tensor"):
    aurora_torch.import_generator(broken, cfg)


def test_unsupported_released_keywords_are_named():
  with pytest.raises(UserError, match="tie=True"):
    aurora_torch.config_from_released({"tie": True})
  with pytest.raises(UserError, match="no keyword 'experts'"):
    aurora_torch.config_from_released({"experts": 3})
