"""Exchange of weights and keywords with the public code."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from systems.stylegan_t import goldens

from aurora_jax.errors import UserError
from aurora_jax.models.dino import DinoConfig
from aurora_jax.systems.stylegan_t import config, discriminator, generator, released


@pytest.fixture(scope="module")
def networks():
  """Per network: configuration, state dict, import, export, abstract variables."""
  return {
    "generator": (
      released.config_from_released(goldens.config("g_tiny32")["generator"]),
      goldens.arrays("g_tiny32.state_dict"),
      released.import_generator,
      released.export_generator,
      generator.abstract_variables,
    ),
    "discriminator": (
      released.discriminator_config_from_released(goldens.config("d_tiny")["discriminator"]),
      goldens.arrays("d_tiny.state_dict"),
      released.import_discriminator,
      released.export_discriminator,
      discriminator.abstract_variables,
    ),
  }


def same(ours, theirs):
  assert set(ours) == set(theirs)
  for name, array in theirs.items():
    assert ours[name].dtype == array.dtype and ours[name].shape == array.shape, name
    np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_round_trip_is_the_identity_bitwise(networks, name):
  cfg, state_dict, to_ours, to_theirs, abstract = networks[name]
  variables = to_ours(state_dict, cfg)
  shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
  assert shapes(variables) == shapes(abstract(cfg))
  same(to_theirs(variables, cfg), state_dict)


def random_round_trip(cfg, abstract, to_ours, to_theirs):
  """Ours to theirs and back; the released names with their shapes."""
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract(cfg))
  exported = to_theirs(variables, cfg)
  jax.tree.map(np.testing.assert_array_equal, to_ours(exported, cfg), variables)
  return {name: array.shape for name, array in exported.items()}


def test_text_encoder_both_ways():
  tower = config.TextTower(layers=2, width=8, heads=2, mlp_width=12, vocabulary_size=30, context_length=7)
  cfg = config.Generator(
    resolution=8,
    z_dim=4,
    text_dim=6,
    channels_base=64,
    channels_max=8,
    residual_blocks=3,
    norm_groups=4,
    text_tower=tower,
  )
  shapes = random_round_trip(cfg, generator.abstract_variables, released.import_generator, released.export_generator)
  assert shapes["mapping.clip.model.transformer.resblocks.1.attn.in_proj_weight"] == (24, 8)
  assert shapes["mapping.clip.model.text_projection"] == (8, 6)
  assert shapes["mapping.clip.model.logit_scale"] == ()
  state_dict = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  assert released.text_tower_from_released(state_dict, heads=2) == tower
  assert released.text_tower_from_released(state_dict).heads == 1  # one per 64 channels
  without = dataclasses.replace(cfg, text_tower=config.TextTower())
  assert (
    released.text_tower_from_released(released.export_generator(generator_zeros(without), without))
    == config.TextTower()
  )
  with pytest.raises(UserError, match="left over: mapping.clip.model.*give the configuration the text_tower"):
    released.import_generator(state_dict, without)


def generator_zeros(cfg):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), generator.abstract_variables(cfg))


def test_unconditional_and_other_sizes_both_ways():
  cfg = config.Generator(
    resolution=16, z_dim=4, text_dim=0, channels_base=128, channels_max=12, residual_blocks=1, norm_groups=2
  )
  shapes = random_round_trip(cfg, generator.abstract_variables, released.import_generator, released.export_generator)
  assert shapes["synthesis.b16.conv0.weight"] == (8, 12, 3, 3)
  assert shapes["synthesis.b16.conv0.affine.proj.weight"] == (36, 4)
  assert not any(".clip." in name for name in shapes)
  dino = DinoConfig(image_size=16, patch=4, width=6, depth=2, heads=2, mlp_width=24)
  d_cfg = config.Discriminator(dino=dino, image_size=16, taps=(1,), text_dim=0, kernel_size=3)
  shapes = random_round_trip(
    d_cfg, discriminator.abstract_variables, released.import_discriminator, released.export_discriminator
  )
  assert shapes["heads.1.cls.weight_orig"] == (1, 6, 1) and shapes["heads.1.main.1.fn.0.weight_v"] == (18,)
  assert not any("cmapper" in name or name.startswith("heads.2") for name in shapes)


@pytest.mark.parametrize("name", ["generator", "discriminator"])
def test_missing_left_over_and_misshapen_entries_are_one_error(networks, name):
  cfg, state_dict, to_ours, _, _ = networks[name]
  first, second = sorted(state_dict)[:2]
  broken = {key: value for key, value in state_dict.items() if key != first}
  broken["visual.proj"] = np.zeros(3, np.float32)
  broken[second] = np.zeros((7, 7), np.float32)
  with pytest.raises(UserError) as error:
    to_ours(broken, cfg)
  message = str(error.value)
  assert f"1 missing: {first}" in message and "1 left over: visual.proj" in message
  assert f"1 misshapen: {second} is (7, 7), expected" in message and "\n" not in message


def test_another_filter_is_refused(networks):
  cfg, state_dict, to_ours, _, _ = networks["generator"]
  name = "synthesis.b16.conv0.resample_filter"
  with pytest.raises(UserError, match=f"1 not the filter .*: {name}"):
    to_ours({**state_dict, name: state_dict[name] * 2}, cfg)


def test_keywords():
  kwargs = goldens.config("g_tiny32")
  cfg = released.config_from_released(kwargs["generator"])
  assert cfg == released.config_from_released(kwargs)  # the whole file does as well
  assert (cfg.resolution, cfg.z_dim, cfg.text_dim, cfg.norm_groups, cfg.num_ws) == (32, 12, 20, 8, kwargs["num_ws"])
  assert cfg.w_dim == kwargs["w_dim"] and [cfg.channels(r) for r in cfg.resolutions] == [24, 24, 16]
  assert set(kwargs["random_noise_order"]) == {
    name.removeprefix("in.noise.") for name in goldens.arrays("g_tiny32.io") if name.startswith("in.noise.")
  }
  layers = {"channel_base": 65536, "channel_max": 2048, "architecture": "skip"}
  full = released.config_from_released({"c_dim": 768, "img_resolution": 64, "synthesis_kwargs": layers})
  assert full == config.full(64)
  tower = {"layers": 1, "width": 8, "heads": 2, "mlp_width": 4, "vocabulary_size": 5, "context_length": 6}
  assert released.config_from_released({**kwargs["generator"], "text_tower": tower}).text_tower == config.TextTower(
    **tower
  )
  d_cfg = released.discriminator_config_from_released(goldens.config("d_tiny"))
  assert d_cfg.dino == DinoConfig(width=24, heads=2, mlp_width=96) and d_cfg.taps == (2, 5, 8, 11)
  assert released.discriminator_config_from_released({"c_dim": 768}) == config.Discriminator()
  assert released.discriminator_config_from_released({"c_dim": 0}).text_dim == 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"img_channels": 1}, "img_channels=1 is not supported, only 3"),
    ({"synthesis_kwargs": {"channel_base": 64, "channel_max": 8}}, "architecture='orig' is not supported, only 'skip'"),
    ({"synthesis_kwargs": {"architecture": "skip", "channel_max": 8}}, "the keyword 'channel_base' is missing"),
    ({"w_dim": 3}, "no keyword 'w_dim', there are z_dim, c_dim, img_resolution"),
  ],
)
def test_unsupported_keywords_are_named(changes, message):
  with pytest.raises(UserError, match=message):
    released.config_from_released({**goldens.config("g_tiny32")["generator"], **changes})


def test_state_dicts_in_files(networks, tmp_path):
  cfg, state_dict, to_ours, _, _ = networks["generator"]
  save_file(state_dict, tmp_path / "g.safetensors")
  loaded = released.load_state_dict(tmp_path / "g.safetensors")
  expected = to_ours(state_dict, cfg)
  jax.tree.map(np.testing.assert_array_equal, to_ours(loaded, cfg), expected)
  tensors = {name: torch.tensor(value) for name, value in state_dict.items()}
  torch.save({"G": {"odd": torch.zeros(1)}, "G_ema": tensors}, tmp_path / "both.pth")
  jax.tree.map(np.testing.assert_array_equal, to_ours(released.load_state_dict(tmp_path / "both.pth"), cfg), expected)
  assert set(released.load_state_dict(tmp_path / "both.pth", "G")) == {"odd"}
  with pytest.raises(UserError, match="both.pth has no 'D', only G_ema, G"):
    released.load_state_dict(tmp_path / "both.pth", "D")


class Module:
  """Stands for a network of the released code, which a snapshot holds whole."""

  def __reduce__(self):
    return print, ("run",)


@pytest.mark.parametrize("name", ["network-snapshot.pkl", "network-snapshot.pth"])
def test_a_snapshot_of_whole_modules_is_refused_in_one_line(tmp_path, capsys, name):
  (tmp_path / name).write_bytes(pickle.dumps({"G_ema": Module()}))
  with pytest.raises(UserError) as error:
    released.load_state_dict(tmp_path / name)
  message = str(error.value)
  assert name in message and "open it there and save what is in it, torch.save({" in message and "\n" not in message
  assert "\n" not in message and capsys.readouterr().out == ""
