"""Exchange of weights under the released names."""

import dataclasses

import jax
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.systems.megan import config, generator, released


def files(golden):
  return {file: dict(golden.state_dicts[file]) for file in ("G", "Gum")}


def assert_same(ours, theirs):
  assert set(ours) == set(theirs)
  for name, array in theirs.items():
    assert ours[name].dtype == array.dtype and ours[name].shape == array.shape, name
    assert ours[name].tobytes() == array.tobytes(), name


def test_round_trip_is_the_identity_bitwise(golden):
  back = released.export_generator(golden.variables, golden.cfg)
  assert set(back) == {"G", "Gum"}
  for file in back:
    assert_same(back[file], golden.state_dicts[file])
  assert_same(released.export_discriminator(golden.d_variables, golden.d_cfg), golden.state_dicts["D"])


@pytest.mark.parametrize(("resolution", "generators", "channels"), [(64, 2, 3), (16, 1, 1), (128, 4, 1)])
def test_our_variables_come_back_in_other_sizes(resolution, generators, channels):
  cfg = config.Generator(resolution=resolution, z_dim=5, channels=channels, generators=generators)
  rng = np.random.default_rng(0)

  def draw(leaf):
    if leaf.dtype == np.int32:
      return rng.integers(0, 2**31 - 1, leaf.shape).astype(np.int32)
    return rng.normal(size=leaf.shape).astype(np.float32)

  variables = jax.tree.map(draw, generator.abstract_variables(cfg))
  back = released.import_generator(released.export_generator(variables, cfg), cfg)
  jax.tree.map(np.testing.assert_array_equal, back, variables)
  assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda leaf: leaf.dtype, variables)


@pytest.mark.parametrize(("resolution", "count"), [(32, 255), (64, 332)])
def test_the_released_generator_has_its_entries(resolution, count):
  entries = [e for e in released.generator_entries(config.Generator(resolution=resolution)) if e.file == "G"]
  names = [name for entry in entries for name in (entry.name, entry.alias) if name]
  assert len(names) == len(set(names)) == count


def test_missing_left_over_and_misshapen_entries_of_both_files_are_one_error(golden):
  broken = files(golden)
  del broken["G"]["all_layers.1.3.weight"], broken["G"]["main2.0.bias"], broken["Gum"]["mlp.0.bias"]
  broken["G"]["visual.proj"] = broken["Gum"]["mlp.9.weight"] = np.zeros(3, np.float32)
  broken["G"]["sum_linear.weight"] = np.zeros((8, 511), np.float32)
  with pytest.raises(UserError) as error:
    released.import_generator(broken, golden.cfg)
  message = str(error.value)
  assert "\n" not in message
  assert "3 missing: G all_layers.1.3.weight, G main2.0.bias, Gum mlp.0.bias" in message
  assert "2 left over: G visual.proj, Gum mlp.9.weight" in message
  assert "1 misshapen: G sum_linear.weight is (8, 511), expected (8, 512)" in message


def test_a_file_that_is_not_there_and_one_too_many(golden):
  broken = files(golden)
  broken["D"] = broken.pop("Gum")
  with pytest.raises(UserError, match="14 missing: Gum mlp.*16 left over: D mlp"):
    released.import_generator(broken, golden.cfg)


def test_a_discriminator_s_misfits_are_one_error(golden):
  broken = dict(golden.state_dicts["D"])
  del broken["last.bias"]
  broken["main.0.weight"] = np.zeros((6, 3, 3, 3), np.float32)
  with pytest.raises(UserError, match=r"1 missing: D last.bias; 1 misshapen: D main.0.weight is \(6, 3, 3, 3\)"):
    released.import_discriminator(broken, golden.d_cfg)


def test_the_last_generator_s_second_names_must_agree(golden):
  broken = files(golden)
  broken["G"]["main1.3.bias"] = broken["G"]["main1.3.bias"] + 1
  with pytest.raises(UserError, match="all_layers.2.3.bias and main1.3.bias should be the same tensor"):
    released.import_generator(broken, golden.cfg)


def test_files_of_pytorch_031_count_no_batches(golden):
  old = {
    file: {name: array for name, array in state_dict.items() if not name.endswith("num_batches_tracked")}
    for file, state_dict in files(golden).items()
  }
  variables = released.import_generator(old, golden.cfg)
  assert not variables["batch_stats"]["generators"]["r4"]["norm"]["count"].any()
  jax.tree.map(np.testing.assert_array_equal, variables["params"], golden.variables["params"])
  back = released.export_generator(variables, golden.cfg)
  assert back["Gum"]["mlp.1.num_batches_tracked"] == 0 and set(back["G"]) == set(golden.state_dicts["G"])


def test_a_counter_that_does_not_fit_is_named(golden):
  broken = files(golden)
  broken["Gum"]["mlp.1.num_batches_tracked"] = np.int64(2**31)
  with pytest.raises(UserError, match="Gum mlp.1.num_batches_tracked is 2147483648"):
    released.import_generator(broken, golden.cfg)


def test_import_copies(golden):
  mine = files(golden)
  mine["Gum"]["mlp.6.bias"] = mine["Gum"]["mlp.6.bias"].copy()
  variables = released.import_generator(mine, golden.cfg)
  mine["Gum"]["mlp.6.bias"] += 1
  np.testing.assert_array_equal(variables["params"]["gate"]["logits"]["bias"], golden.state_dicts["Gum"]["mlp.6.bias"])


def test_variables_of_another_configuration_are_not_exported(golden):
  with pytest.raises(UserError, match=r"generators/r4/kernel is \(3, 8, 4, 4, 16\), expected \(4, 8, 4, 4, 16\)"):
    released.export_generator(golden.variables, dataclasses.replace(golden.cfg, generators=4))
  with pytest.raises(UserError, match="batch_stats/generators/r4/norm/mean is missing"):
    released.export_generator({"params": golden.variables["params"]}, golden.cfg)


def test_configurations_from_released_keywords(golden):
  assert golden.cfg == config.Generator(resolution=32, z_dim=8, channels=4, generators=3)
  assert golden.d_cfg == config.Discriminator(resolution=32, channels=6)
  kwargs = released.config_to_released(golden.cfg, golden.d_cfg)
  assert kwargs == {"image_size": 32, "z_dim": 8, "g_conv_dim": 4, "num_gen": 3, "d_conv_dim": 6}
  assert released.config_from_released({}) == config.Generator()
  with pytest.raises(UserError, match="no keyword 'generators'"):
    released.config_from_released({"generators": 3})
  with pytest.raises(UserError, match="num_gen must be an integer, got 2.5"):
    released.config_from_released({"num_gen": 2.5})
  with pytest.raises(UserError, match="discriminator.resolution must be a power of two, 16 or more, got 48"):
    released.discriminator_config_from_released({"image_size": 48})
