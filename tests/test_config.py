"""Configurations: typed, checked, the same after JSON; every file in configs/ and its test variant."""

import pathlib

import pytest

from aurora_jax import config
from aurora_jax.errors import UserError

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", ["", ":test"])
def test_every_config_loads_and_survives_json(path, variant):
  experiment = config.load([f"--config={path}{variant}"])
  assert experiment.name == path.stem
  assert config.from_json(config.to_json(experiment)) == experiment
  assert hash(config.from_json(config.to_json(experiment))) == hash(experiment)
  if variant:
    assert experiment.train.total_steps <= 10


def load(*flags):
  return config.load([f"--config={CONFIGS[0]}", *flags])


def test_command_line_overrides():
  experiment = load("--config.train.total_steps=20", "--config.loss.r1_gamma=3", "--config.data.path=x")
  assert (experiment.train.total_steps, experiment.loss.r1_gamma, experiment.data.path) == (20, 3.0, "x")


@pytest.mark.parametrize("flags,words", [
    (["--config.train.totl_steps=20"], "totl_steps"),
    (["--config.trian.total_steps=20"], "trian"),
    (["--config.train.total_steps=many"], "many"),
    (["--config.train.batch_size=0"], "train.batch_size must be positive, got 0"),
    (["--config.generator.text_attention=both"], "'both'"),
    (["--config.generator.resolution=48"], "got 48"),
    (["--config.generator.experts[8]=2.5"], "2.5"),
    (["--config.discriminator.resolution=32"], "(64, 32, 16, 8, 4) must be some of (32, 16, 8, 4)"),
    (["--config.generator.output_resolutions=(4, 8)"], "[16, 32, 64], which the generator does not give"),
])
def test_bad_values_are_named_in_one_line(flags, words):
  with pytest.raises(UserError) as error:
    load(*flags)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_no_config_and_no_such_config():
  with pytest.raises(UserError, match="which config"):
    config.load([])
  with pytest.raises(UserError, match="nowhere.py"):
    config.load(["--config=nowhere.py"])
  with pytest.raises(UserError, match="no variant 'large'"):
    config.load([f"--config={CONFIGS[0]}:large"])


def test_unknown_field_in_stored_json_is_named():
  values = config.to_mapping(config.Experiment())
  values["train"]["sed"] = 1
  with pytest.raises(UserError, match="no field 'train.sed'; did you mean 'seed'"):
    config.from_mapping(values)
