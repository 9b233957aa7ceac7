"""The configs for pods: one recipe, meshes that divide, commands that parse."""

import argparse
import ast
import json
import pathlib
import re
import shlex

import pytest

from aurora_jax import config_files
from aurora_jax.cli import main, train
from aurora_jax.parallel import mesh

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PODS = {"aurora_64_v5e_256": 256, "aurora_64_a100_32": 32, "aurora_64_a100_256": 256, "aurora_64_h100_64": 64}


def load(name, variant=""):
  return config_files.load([f"--config={CONFIGS / name}.py{variant}"])


def layout_of(experiment, devices):
  return mesh.build(experiment.mesh, experiment.train.batch_size, experiment.expert_counts, devices)


def flat(experiment):
  """{"group.field": value}."""
  values = json.loads(config_files.to_json(experiment))
  return {
    f"{group}.{field}": value
    for group, fields in values.items()
    if isinstance(fields, dict)
    for field, value in fields.items()
  }


@pytest.mark.parametrize("name,devices", PODS.items())
def test_the_mesh_divides_and_every_expert_has_a_device_of_its_own(name, devices):
  experiment = load(name)
  layout = layout_of(experiment, devices)
  assert layout.devices == devices and experiment.train.batch_size == 1024
  assert layout.size(layout.expert_axes(16)) == 16
  assert [layout.size(layout.expert_axes(count)) for count in (4, 8)] == [4, 8]


@pytest.mark.parametrize("name", PODS)
def test_it_is_the_recipe_of_aurora_64(name):
  recipe, pod = flat(load("aurora_64")), flat(load(name))
  looped = {"generator.loop_layers"} if "v5e" in name else set()
  assert {field for field in pod if pod[field] != recipe[field]} == looped | {
    "mesh.data",
    "mesh.expert",
    "mesh.fsdp",
    "mesh.fsdp_over",
    "data.workers",
    "generator.compute_dtype",
    "discriminator.compute_dtype",
    "discriminator.remat",
  }
  other = flat(load("aurora_64_v5e_256"))
  assert {field for field in pod if pod[field] != other[field]} <= {"mesh.data", "generator.loop_layers"}


@pytest.mark.parametrize("name", PODS)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_test_variant_fits_what_is_there(name, devices):
  assert layout_of(load(name, ":test"), devices).devices == devices


@pytest.mark.parametrize("name", PODS)
def test_the_docstring_has_a_target_a_cost_and_a_command_that_parses(name):
  words = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text()))
  assert "Target: " in words and "Cost" in words
  command = re.search(r"python -m aurora_jax train ((?:.*\\\n)*.*)", words)[1].replace("\\\n", " ")
  config_argv, rest = main.split_config_flags(shlex.split(command))
  parser = argparse.ArgumentParser()
  train.add_arguments(parser)
  flags = parser.parse_args(rest)
  assert config_files.load(config_argv).name == name and flags.require in ("tpu", "gpu")
