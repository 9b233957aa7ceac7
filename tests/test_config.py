"""Configurations: typed, checked, the same after JSON; every file in configs/ and its test variant."""

import pathlib

import pytest

from aurora_jax import config, config_files
from aurora_jax.errors import UserError

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("variant", ["", ":test"])
def test_every_config_loads_and_survives_json(path, variant):
  experiment = config_files.load([f"--config={path}{variant}"])
  assert experiment.name == path.stem
  assert config_files.from_json(config_files.to_json(experiment)) == experiment
  assert hash(config_files.from_json(config_files.to_json(experiment))) == hash(experiment)
  if variant:
    assert experiment.train.total_steps <= 10


def load(*flags):
  return config_files.load([f"--config={CONFIGS[0]}", *flags])


def test_command_line_overrides():
  experiment = load("--config.train.total_steps=20", "--config.loss.r1_gamma=3", "--config.data.path=x")
  assert (experiment.train.total_steps, experiment.loss.r1_gamma, experiment.data.path) == (20, 3.0, "x")


@pytest.mark.parametrize(
  "flags,words",
  [
    (["--config.train.totl_steps=20"], "totl_steps"),
    (["--config.trian.total_steps=20"], "trian"),
    (["--config.train.total_steps=many"], "many"),
    (["--config.train.batch_size=0"], "train.batch_size must be positive, got 0"),
    (["--config.generator.text_attention=both"], "'both'"),
    (["--config.generator.resolution=48"], "got 48"),
    (["--config.generator.experts[8]=2.5"], "2.5"),
    (["--config.generator.experts[8]=0"], "at least 1 (a dense feed-forward)"),
    (["--config.loss.r1_levels=(64, 24)"], "names 24"),
    (["--config.schedule.resolutions=(4, 16, 8, 64)"], "must ascend"),
    (["--config.schedule.resolutions=(4, 8, 16)"], "must end with generator.resolution 64"),
    (
      ["--config.schedule.resolutions=(4, 64)", "--config.schedule.max_images[4]=0"],
      "cap for the stage of 4 pixels, got none",
    ),
    (["--config.discriminator.input_resolutions=(64, 32, 8, 4)"], "the pictures of stage [16] do not enter"),
    (["--config.mesh.fsdp_over=data"], "mesh.fsdp_over must be 'all' or 'expert', got 'data'"),
    (["--config.mesh.fsdp_over=expert"], "cuts over the devices along the expert axis, mesh.expert is 1"),
    (["--config.schedule.features=vgg"], "must be 'clip' (the image tower of text.clip) or 'inception', got 'vgg'"),
    (["--config.schedule.features=inception"], "needs schedule.inception"),
    (["--config.schedule.factor=0.0"], "schedule.factor must be positive, got 0.0"),
    (["--config.discriminator.resolution=32"], "(64, 32, 16, 8, 4) must be some of (32, 16, 8, 4)"),
    (["--config.generator.output_resolutions=(4, 8)"], "[16, 32, 64], which the generator does not give"),
  ],
)
def test_bad_values_are_named_in_one_line(flags, words):
  with pytest.raises(UserError) as error:
    load(*flags)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_no_config_and_no_such_config():
  with pytest.raises(UserError, match="which config"):
    config_files.load([])
  with pytest.raises(UserError, match="nowhere.py"):
    config_files.load(["--config=nowhere.py"])
  with pytest.raises(UserError, match="no variant 'large'"):
    config_files.load([f"--config={CONFIGS[0]}:large"])


def test_unknown_field_in_stored_json_is_named():
  values = config_files.to_mapping(config.Experiment())
  values["train"]["sed"] = 1
  with pytest.raises(UserError, match="no field 'train.sed'; did you mean 'seed'"):
    config_files.from_mapping(values)


def test_the_experiment_at_a_stage_ends_at_its_resolution():
  whole = load("--config.loss.r1_levels=(64, 32)")
  stage = config.at_stage(whole, 8)
  assert (stage.generator.resolution, stage.generator.output_resolutions) == (8, (4, 8))
  assert dict(stage.generator.attention_depth) == {8: 2} and dict(stage.discriminator.attention_depth) == {8: 2}
  assert (stage.discriminator.input_resolutions, stage.discriminator.exit_resolutions) == ((8, 4), (4, 1))
  assert stage.loss.clip_weight == 0 and stage.loss.r1_levels == ()  # none of their levels is there
  later = config.at_stage(whole, 32)
  assert later.loss.clip_weight == whole.loss.clip_weight and later.loss.r1_levels == (32,)
  assert config.at_stage(whole, 64) == whole
  assert stage.schedule == whole.schedule and stage.optimizer == whole.optimizer and stage.train == whole.train
  assert config.at_stage(whole, 4).discriminator.exit_resolutions == (1,)


def test_pairs_need_room_in_the_batch():
  with pytest.raises(UserError, match="data.pairs 5 are more than half of train.batch_size 8"):
    config_files.load(["--config=configs/openmoji_32.py", "--config.data.pairs=5"])
  with pytest.raises(UserError, match="data.visit must be 'pictures' or 'captions', got 'words'"):
    config_files.load(["--config=configs/openmoji_32.py", "--config.data.visit=words"])


def test_variants_of_openmoji():
  growing = config_files.load(["--config=configs/openmoji_32.py:progressive"])
  assert growing.schedule.resolutions == (8, 16, 32) and growing.name == "openmoji_32_progressive"
  plain = config_files.load(["--config=configs/openmoji_32.py:progressive", "--config.schedule.resolutions=()"])
  assert plain.schedule.resolutions == () and plain.discriminator == growing.discriminator
  tones = config_files.load(["--config=configs/openmoji_32.py:tones"])
  assert tones.discriminator.compare_pairs and (tones.data.visit, tones.data.pairs) == ("captions", 2)
  assert dict(config_files.load(["--config=configs/openmoji_32.py:dense"]).generator.experts) == {4: 1, 8: 1}
