"""A run that the first version wrote: its configuration, checkpoint and metrics are read, sampled from and gone on
with.
"""

import dataclasses
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest
import random_run
from PIL import Image
from safetensors.numpy import load_file

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.data import build, sources
from aurora_jax.errors import UserError
from aurora_jax.evaluation import trained_generator
from aurora_jax.runs import checkpoint_manager, checkpoint_reader, config_check, fingerprint, metrics, workdir
from aurora_jax.runs import format as state_format
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import initialize, loop, setup, stopping
from aurora_jax.training import step as step_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "format1_run"
CONFIG = pathlib.Path(__file__).with_name("format1.py")
FINGERPRINT = "86293f493f1743d035464b21b7a43238b1dedec92d96293d294281ecff720c42"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """The folder in which the run was started: run, data and clip."""
  home = tmp_path_factory.mktemp("home")
  with tarfile.open(GOLDEN / "run.tar.xz") as archive:
    archive.extractall(home, filter="data")
  (home / "images").mkdir()
  rng = np.random.default_rng(0)
  for i in range(8):
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(home / f"images/{i}.png")
    (home / f"images/{i}.txt").write_text(f"{' '.join(str(i) * 2)} red\n")
  build.build(sources.folder(home / "images"), home / "data", resolution=8, shards=2, heldout_fraction=0, name="small")
  random_run.make_clip(home / "clip")
  return home


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
  monkeypatch.chdir(home)


@pytest.fixture
def run(home):
  return workdir.RunFolder(home / "run")


@pytest.fixture(scope="module")
def experiment():
  return config_files.load([f"--config={CONFIG}"])


@pytest.fixture(scope="module")
def abstract(experiment):
  return step_lib.abstract_state(System(experiment))


def test_its_configuration_is_todays(run, experiment):
  stored = workdir.read_json(run.config)
  assert "optimizer" in stored and "generator_lr" in stored["optimizer"] and "system" not in stored  # of that version
  assert run.experiment() == experiment
  assert config_check.config_changes(stored, experiment) == {}
  assert config_files.from_stored(checkpoint_reader.stored_config(run.checkpoints)) == experiment
  longer = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, total_steps=4))
  assert config_check.refuse_changes(run, longer) == {"train.total_steps": (2, 4)}
  optimizers = dataclasses.replace(
    experiment.optimizer, generator=dataclasses.replace(experiment.optimizer.generator, learning_rate=0.004)
  )
  with pytest.raises(UserError, match="optimizer.generator.learning_rate 0.003 -> 0.004"):
    config_check.refuse_changes(run, dataclasses.replace(experiment, optimizer=optimizers))


@pytest.mark.slow
def test_leaves_have_todays_names(run, abstract):
  assert set(checkpoint_reader.stored_tree(run.checkpoints / "2")) == {
    *("step", "generator", "buffers", "ema", "discriminator", "generator_opt", "discriminator_opt")
  }
  wanted = {
    checkpoint_reader.leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)
  }
  assert {name: leaf.shape for name, leaf in checkpoint_reader.shapes(run.checkpoints).items()} == wanted
  assert set(checkpoint_reader.describe(run.checkpoints)) == {
    "step",
    *(f"generator/{part}" for part in ("params", "variables", "opt_state", "ema")),
    *(f"discriminator/{part}" for part in ("params", "opt_state")),
  }


def test_formats_are_told_apart_by_their_parts():
  assert state_format.of_tree({"step": 0, "generator": {}, "ema": {}}) == 1
  assert state_format.of_tree({"step": 0, "networks": {}}) == state_format.NEWEST == 2
  assert state_format.of_tree({"step": 0, "params": {}}) == 2  # of something else
  assert state_format.name("generator_opt/0/nu/a/b", 1) == "networks/generator/opt_state/0/nu/a/b"
  assert state_format.name("step", 1) == "step" and state_format.name("networks/x/params", 2) == "networks/x/params"


@pytest.mark.slow
def test_its_fingerprint_is_that_of_the_same_state_in_todays_format(run, abstract, experiment, tmp_path, capsys):
  step, digits = fingerprint.of_checkpoint(run.checkpoints)
  assert (step, digits) == (2, FINGERPRINT)
  _, state = checkpoint_reader.read(run.checkpoints, abstract, whole=True)
  with checkpoint_manager.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(2, state, config_files.to_mapping(experiment))
  assert set(checkpoint_reader.stored_tree(tmp_path / "2")) == {"step", "networks"}
  assert fingerprint.of_checkpoint(tmp_path) == (2, FINGERPRINT)
  assert main.main(["inspect", str(run.path), "--fingerprint"]) == 0
  assert capsys.readouterr().out.split()[-1].endswith(FINGERPRINT)


@pytest.mark.slow
def test_it_makes_the_images_that_it_made(run):
  golden = load_file(GOLDEN / "images.safetensors")
  inputs = golden["z"], golden["text"], golden["eot"]
  trained = trained_generator.load(run.path)
  assert trained.step == 2
  averaged = trained.weights.networks["generator"]
  _, found = checkpoint_reader.read_parts(run.checkpoints, ["networks/generator/params"])
  parameters = {**averaged, "params": found["networks/generator/params"]}
  apply = jax.jit(lambda variables: trained.system.generator.apply(variables, *inputs).image)
  scale = np.abs(golden["image"]).max()
  for name, variables in (("image", averaged), ("raw_image", parameters)):
    np.testing.assert_allclose(apply(variables), golden[name], rtol=0, atol=1e-5 * scale)
  assert np.abs(golden["image"] - golden["raw_image"]).max() > 1e-4 * scale  # which of them it was would be seen
  sampled = trained.sample(["a red circle", "a blue one"], latents_per_prompt=2).images
  assert sampled.shape == (2, 2, 8, 8, 3) and np.isfinite(sampled).all()
  assert np.abs(sampled[0] - sampled[1]).max() > 1e-4 < np.abs(sampled[:, 0] - sampled[:, 1]).max()


@pytest.mark.slow
def test_it_goes_on_and_is_saved_in_todays_format(run, experiment, tmp_path, capsys):
  run = workdir.RunFolder(shutil.copytree(run.path, tmp_path / "run"))
  _, before = checkpoint_reader.read_parts(run.checkpoints, ["networks"])
  prepared = dataclasses.replace(setup.prepare(experiment), sample=None)

  def train(total_steps):
    length = dataclasses.replace(experiment.train, total_steps=total_steps)
    started = []
    hooks = loop.Hooks(on_start=lambda step, state: started.append(jax.device_get(state)))
    changed = dataclasses.replace(prepared, experiment=dataclasses.replace(experiment, train=length))
    return loop.run(changed, run.path, hooks=hooks), started[0]

  outcome, started = train(4)
  assert (outcome.step, outcome.reason) == (4, stopping.DONE)
  assert "going on from the checkpoint of step 2, to 4" in capsys.readouterr().out
  assert int(started.step) == 2
  leaves = lambda tree: {
    checkpoint_reader.leaf_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  expected, found = leaves(before["networks"]), leaves(started.networks)
  assert expected.keys() == found.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)
  networks = outcome.state.networks
  assert int(networks["generator"].opt_state[0].count) == 4
  assert int(networks["discriminator"].opt_state[0].count) == 4 + 2  # R1 at steps 0 and 2
  assert checkpoint_reader.steps(run.checkpoints) == [2, 4]
  assert set(checkpoint_reader.stored_tree(run.checkpoints / "4")) == {"step", "networks"}
  rows = metrics.history(run.metrics)
  assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
  assert workdir.read_json(run.config)["system"] == "aurora"
  seconds = [row["seconds"] for row in rows if row["kind"] == "train"]
  assert seconds == sorted(seconds) and seconds[2] > 5.8  # what the first version had trained is counted on
  assert train(5)[0].step == 5  # and once more, from today's format


@pytest.mark.slow
def test_a_run_can_begin_with_it(run, experiment, abstract):
  beginning = dataclasses.replace(experiment.train, init_from=str(run.checkpoints / "2"))
  other = dataclasses.replace(experiment, train=beginning)
  initialize.check(other)
  state, message = initialize.first_state(System(other), abstract)
  assert message.endswith("discriminator from there too") and int(state.step) == 0
  _, old = checkpoint_reader.read(run.checkpoints, abstract, 2)
  for name, network in old.networks.items():
    for part in ("params", "variables", "ema"):
      jax.tree.map(np.testing.assert_array_equal, getattr(state.networks[name], part), getattr(network, part))
