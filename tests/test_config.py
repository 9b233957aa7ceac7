"""Configurations: typed, checked, the same after JSON; every file in configs/ and its test variant."""

import pathlib
import subprocess
import sys

import pytest

from aurora_jax import config_files, config_migration
from aurora_jax.errors import UserError
from aurora_jax.systems.aurora import config as aurora

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
    (["--config.discriminator.input_resolutions=(64, 32, 8, 4)"], "the images of stage [16] do not enter"),
    (["--config.mesh.fsdp_over=data"], "mesh.fsdp_over must be 'all' or 'expert', got 'data'"),
    (["--config.mesh.fsdp_over=expert"], "shards over the devices along the expert axis, mesh.expert is 1"),
    (["--config.schedule.features=vgg"], "must be 'clip' (the image tower of text.clip) or 'inception', got 'vgg'"),
    (["--config.schedule.features=inception"], "needs schedule.inception"),
    (["--config.schedule.factor=0.0"], "schedule.factor must be positive, got 0.0"),
    (["--config.discriminator.resolution=32"], "(64, 32, 16, 8, 4) must be some of (32, 16, 8, 4)"),
    (["--config.generator.output_resolutions=(4, 8)"], "[16, 32, 64], which the generator does not produce"),
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
  values = config_files.to_mapping(aurora.Experiment())
  values["train"]["sed"] = 1
  with pytest.raises(UserError, match="no field 'train.sed'; did you mean 'seed'"):
    config_files.from_mapping(values)


def test_the_experiment_at_a_stage_ends_at_its_resolution():
  whole = load("--config.loss.r1_levels=(64, 32)")
  stage = whole.at_stage(8)
  assert (stage.generator.resolution, stage.generator.output_resolutions) == (8, (4, 8))
  assert dict(stage.generator.attention_depth) == {8: 2} and dict(stage.discriminator.attention_depth) == {8: 2}
  assert (stage.discriminator.input_resolutions, stage.discriminator.exit_resolutions) == ((8, 4), (4, 1))
  assert stage.loss.clip_weight == 0 and stage.loss.r1_levels == ()  # none of their levels is there
  later = whole.at_stage(32)
  assert later.loss.clip_weight == whole.loss.clip_weight and later.loss.r1_levels == (32,)
  assert whole.at_stage(64) == whole
  assert stage.schedule == whole.schedule and stage.optimizer == whole.optimizer and stage.train == whole.train
  assert whole.at_stage(4).discriminator.exit_resolutions == (1,)


def test_pairs_need_room_in_the_batch():
  with pytest.raises(UserError, match="data.pairs 5 are more than half of train.batch_size 8"):
    config_files.load(["--config=configs/openmoji_32.py", "--config.data.pairs=5"])
  with pytest.raises(UserError, match="data.epoch_unit must be 'image' or 'caption', got 'words'"):
    config_files.load(["--config=configs/openmoji_32.py", "--config.data.epoch_unit=words"])


def test_variants_of_openmoji():
  growing = config_files.load(["--config=configs/openmoji_32.py:progressive"])
  assert growing.schedule.resolutions == (8, 16, 32) and growing.name == "openmoji_32_progressive"
  plain = config_files.load(["--config=configs/openmoji_32.py:progressive", "--config.schedule.resolutions=()"])
  assert plain.schedule.resolutions == () and plain.discriminator == growing.discriminator
  tones = config_files.load(["--config=configs/openmoji_32.py:tones"])
  assert tones.discriminator.compare_pairs and (tones.data.epoch_unit, tones.data.pairs) == ("caption", 2)
  assert dict(config_files.load(["--config=configs/openmoji_32.py:dense"]).generator.experts) == {4: 1, 8: 1}


OLD = {
  "name": "openmoji_32",
  "optimizer": {
    "method": "muon",
    "generator_lr": 0.012,
    "discriminator_lr": 0.01,
    "attention_weight_decay": 0.0,
    "ema_half_life_images": 5000.0,
    "ema_ramp_up": 0.05,
    "w_average_decay": 0.99,
    "muon_momentum": 0.8,
  },
  "data": {"visit": "captions", "tolerate_damage": True},
  "mesh": {"exchange_capacity": 3.0},
  "watch": {"logit_gap": 40.0},
}


def test_a_configuration_of_an_earlier_version_loads():
  experiment = config_files.from_stored(OLD)
  assert (
    experiment.system == "aurora" and experiment.data.epoch_unit == "caption" and experiment.data.tolerate_corruption
  )
  generator, discriminator = experiment.optimizer.generator, experiment.optimizer.discriminator
  assert (generator.learning_rate, discriminator.learning_rate) == (0.012, 0.01)
  assert {(o.method, o.weight_decay, o.momentum) for o in (generator, discriminator)} == {("muon", 0.0, 0.8)}
  assert (experiment.ema.half_life_images, experiment.generator.w_average_decay) == (5000.0, 0.99)
  assert (experiment.mesh.capacity_factor, experiment.health.logit_gap) == (3.0, 40.0)
  assert config_files.from_stored(config_files.to_mapping(experiment)) == experiment
  assert OLD["data"] == {"visit": "captions", "tolerate_damage": True}  # what was given stays as it is


@pytest.mark.parametrize(
  "flag, words",
  [
    ("--config.optimizer.generator_lr=0.1", "it is optimizer.generator.learning_rate now"),
    ("--config.optimizer.method=muon", "it is optimizer.generator.method and optimizer.discriminator.method now"),
    ("--config.watch.logit_gap=3.0", "it is health.logit_gap now"),
    ("--config.data.visit=captions", "it is data.epoch_unit now"),
  ],
)
def test_an_old_name_is_refused_with_the_new_one(flag, words):
  with pytest.raises(UserError) as error:
    load(flag)
  assert words in str(error.value) and "\n" not in str(error.value)


def test_a_system_that_is_none_is_named():
  with pytest.raises(UserError, match="no system 'auroa'; did you mean 'aurora'"):
    config_files.from_mapping({"system": "auroa"})
  with pytest.raises(UserError, match="system 'megan' has no progressive growing"):
    config_files.load(
      [
        "--config=configs/megan_cifar10.py:test",
        "--config.schedule.resolutions=(16, 32)",
        "--config.schedule.max_images={16: 8}",
      ]
    )


def test_every_old_name_is_gone_and_leads_to_fields_that_are_there():
  values = config_files.to_mapping(aurora.Experiment())

  def has(name):
    group, *rest = name.split(".")
    found = values.get(group, {})
    for part in rest[:-1]:
      found = found[part]
    return rest[-1] in found

  assert len(config_migration.RENAMED) > 15
  for old, names in config_migration.RENAMED.items():
    assert not has(old) and all(has(name) for name in names), old
    with pytest.raises(UserError, match=f"no field '{old}'; it is {' and '.join(names)} now"):
      load(f"--config.{old}=1")


def test_the_shipped_configs_load_without_jax():
  """`compile` sets what JAX's plugins read after it has read the experiment, and a wrong value is refused at once."""
  code = """
import pathlib, sys
from aurora_jax import config_files
paths = sorted(pathlib.Path("configs").glob("[!_]*.py"))
for path in paths:
  config_files.load([f"--config={path}"])
print(len(paths), sorted(set(sys.modules) & {"jax", "numpy", "flax", "orbax"}))
"""
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS[0].parents[1], check=True
  )
  count, found = done.stdout.split(maxsplit=1)
  assert int(count) > 15 and found.strip() == "[]"
