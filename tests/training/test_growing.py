"""Progressive growing of the whole system at a toy size: the real loop through two changes of stage."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import random_run
import safetensors.numpy
from drawn_on_host import drawn_on_host
from PIL import Image

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.data import build, loader, sources
from aurora_jax.interop import inception_torch
from aurora_jax.models import inception
from aurora_jax.ops import frechet, resample
from aurora_jax.runs import checkpoint_reader
from aurora_jax.runs import fingerprint as fingerprint_lib
from aurora_jax.systems.aurora.labels import label
from aurora_jax.training import loop, setup, stopping

pytestmark = pytest.mark.slow

RECORDS, SET = 11, 5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A data set of random images, one caption each, and a CLIP."""
  home = tmp_path_factory.mktemp("home")
  (home / "images").mkdir()
  rng = np.random.default_rng(0)
  for i in range(RECORDS):
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(home / f"images/{i}.png")
    (home / f"images/{i}.txt").write_text(f"{' '.join(str(i) * 2)} red\n")
  build.build(sources.folder(home / "images"), home / "data", resolution=16, shards=2, heldout_fraction=0, name="small")
  random_run.make_clip(home / "clip")
  return home


def experiment(home, total_steps=6):
  """4 pixels for two steps, 8 for two, 16 for two: nothing beats its reference."""
  flags = {
    "generator.text_layers": 0,
    "generator.mapping_layers": 1,
    "generator.deformable_max_resolution": 0,
    "generator.experts[16]": 2,
    "generator.moe_backend": "dense",
    "discriminator.text_layers": 0,
    "loss.r1_gamma": 0.0,
    "loss.clip_weight": 0.0,
    "schedule.resolutions": (4, 8, 16),
    "schedule.factor": 1e-9,
    "train.total_steps": total_steps,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 0,
    "train.sample_prompts": (),
    "data.path": home / "data",
    "text.clip": home / "clip",
    "optimizer.generator.weight_decay": 0.1,
    "optimizer.discriminator.weight_decay": 0.1,
  }
  values = config_files.to_mapping(config_files.load([f"--config={random_run.ROOT / 'configs/aurora_64.py'}:test"]))
  for name, value in flags.items():
    *path, field = name.split(".")
    group = functools.reduce(lambda inner, part: inner[part], path, values)
    if field == "experts[16]":
      group["experts"], group["attention_depth"] = {16: value}, {16: 1}
    else:
      group[field] = str(value) if isinstance(value, pathlib.Path) else value
  values["generator"]["adaptive_kernels"] = {4: 1, 8: 1, 16: 1}
  values["discriminator"] |= {"attention_depth": {}, "exit_resolutions": (4, 1)}
  return config_files.from_mapping(values)


@pytest.fixture(scope="module")
def whole(home):
  """(folder, Prepared) of six steps without a stop. Every stage and the first state are made once for all tests."""
  prepared = setup.prepare(experiment(home))
  with drawn_on_host():
    first = prepared.init()
  prepared = dataclasses.replace(prepared, at_stage=functools.cache(prepared.at_stage), init=lambda: first)
  for name in ("_real_program", "_generator_program"):  # of a resolution; a run forgets those of earlier stages
    setattr(prepared.distances, name, functools.cache(getattr(prepared.distances, name)))
  outcome = loop.run(prepared, home / "whole")
  assert (outcome.step, outcome.reason) == (6, stopping.DONE)
  return home / "whole", prepared


def states(whole):
  """{step: networks} of the first state and of every change of stage, on the host."""
  folder, run = whole
  wanted = {"networks": run.abstract_state.networks}
  found = {0: run.init().networks}
  for step in (2, 4, 6):
    found[step] = checkpoint_reader.read(folder / "checkpoints", wanted, step)[1]["networks"]
  return jax.tree.map(np.asarray, found)


def leaves(tree):
  """{name: (the stage that needs it, leaf)} of parameters or of what is shaped like them."""
  return {
    jax.tree_util.keystr(path): (label(path).stage, leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def test_what_is_not_in_use_stays_bit_by_bit_and_then_moves(whole):
  found = states(whole)
  parts = [("generator", "params"), ("generator", "ema"), ("discriminator", "params")]
  of = lambda step, network, part: leaves(getattr(found[step][network], part))
  nu = lambda step, network: leaves(found[step][network].opt_state[0].nu)
  for step, reached in ((2, 4), (4, 8)):
    unused = 0
    for part in parts:
      for name, (resolution, leaf) in of(step, *part).items():
        if resolution > reached:
          unused += 1
          np.testing.assert_array_equal(leaf, of(0, *part)[name][1], err_msg=f"{part} {name}")
    assert unused > 20
    for network in ("generator", "discriminator"):
      assert all(not leaf.any() for resolution, leaf in nu(step, network).values() if resolution > reached)
  moved = lambda part, name, before, after: not np.array_equal(*(of(step, *part)[name][1] for step in (before, after)))
  for part, names in zip(parts, (*["['synthesis']['r{}_rgb']['weight']"] * 2, "['r{}_from_rgb']['weight']")):
    # What was trained before is trained on.
    assert [[moved(part, names.format(r), step, step + 2) for r in (4, 8, 16)] for step in (0, 2, 4)] == [
      [True, False, False],
      [True, True, False],
      [True, True, True],
    ]
  for network in ("generator", "discriminator"):
    assert found[6][network].opt_state[0].count.tolist() == [6, 4, 2]
  # The second moments of layers trained before go on: a change of stage begins none of them anew.
  first = lambda step: nu(step, "discriminator")["['r4_from_rgb']['weight']"][1]
  assert first(2).any() and (first(4) > 0.9 * first(2)).all()


@pytest.mark.parametrize("stop", [2, 3])
def test_resumed_across_a_change_of_stage_equals_uninterrupted(home, whole, stop):
  """Stopped where the stage has just changed, and between two changes."""
  folder = home / f"stopped-{stop}"
  assert loop.run(dataclasses.replace(whole[1], experiment=experiment(home, stop)), folder).step == stop
  assert loop.run(whole[1], folder).reason == stopping.DONE
  assert fingerprint_lib.of_checkpoint(folder / "checkpoints") == fingerprint_lib.of_checkpoint(
    whole[0] / "checkpoints"
  )
  stored = [checkpoint_reader.stored_progress(path / "checkpoints", 6)["schedule"] for path in (folder, whole[0])]
  assert stored[0] == stored[1]
  assert [(stage["resolution"], stage["step"], stage["reason"]) for stage in stored[0]["stages"]] == [
    (4, 0, "start"),
    (8, 2, "cap"),
    (16, 4, "cap"),
  ]
  assert [(one["step"], one["resolution"]) for one in stored[0]["measurements"]] == [(2, 4), (4, 8), (6, 16)]


def test_reference_is_the_distance_between_two_disjoint_sets(whole):
  run = whole[1]
  distances = run.distances
  assert distances.count == SET
  numbers = distances._places(np.arange(2 * SET))
  assert len(set(numbers.tolist())) == 2 * SET
  images = loader.to_float(loader.load_images(run.dataset, 16, numbers))
  small = resample.image_pyramid(images, (8,))[8]
  features = np.asarray(run.system.clip.apply(run.distances._variables, small, method="encode_image"))
  sets = [frechet.Moments(features.shape[1]) for _ in range(2)]
  for moments, part in zip(sets, (features[:SET], features[SET:])):
    moments.add(part)
  found = distances.reference(8, lambda: True)
  assert found == pytest.approx(frechet.distance(*sets), rel=1e-4)
  asked = iter([True, False])
  assert distances.reference(8, lambda: next(asked)) is None  # given up between two batches


def test_a_generator_that_drew_the_second_set_would_have_the_references_distance(whole, monkeypatch):
  """It is asked for the captions of the second set, in order, and the rest of the last batch does not count."""
  run = whole[1]
  reference = run.distances.reference(8, lambda: True)
  numbers = run.distances._places(np.arange(SET, 2 * SET))
  images = loader.to_float(loader.load_images(run.dataset, 16, numbers))
  small = resample.image_pyramid(images, (8,))[8]
  features = np.asarray(run.system.clip.apply(run.distances._variables, small, method="encode_image"))
  tokens = run.system.tokenizer([run.dataset[int(number)].captions[0] for number in numbers])
  own = {row.tobytes(): feature for row, feature in zip(np.asarray(tokens, np.int32), features)}
  drawn = lambda weights, extractor, tokens, number, key: np.stack([own[row.tobytes()] for row in np.asarray(tokens)])
  monkeypatch.setattr(run.distances, "_generator", {8: drawn})
  assert run.distances.generated(8, run.init(), lambda: True) == pytest.approx(reference, rel=1e-4)


@pytest.fixture(scope="module")
def inception_file(home):
  """Weights with random convolutions, as a safetensors file."""
  rng = np.random.default_rng(0)
  kernels = {name: leaves["kernel"].shape for name, leaves in inception.abstract_variables()["params"].items()}
  constant = {"bn.weight": 1, "bn.bias": 0, "bn.running_mean": 0, "bn.running_var": 1}
  state = {"fc.weight": np.zeros((1008, 2048), np.float32), "fc.bias": np.zeros(1008, np.float32)}
  for name, (rows, columns, given, width) in kernels.items():
    state[f"{name}.conv.weight"] = rng.standard_normal((width, given, rows, columns), np.float32) * np.float32(
      (2 / (given * rows * columns)) ** 0.5
    )
    state |= {f"{name}.{part}": np.full(width, value, np.float32) for part, value in constant.items()}
  safetensors.numpy.save_file(state, home / "inception.safetensors")
  return home / "inception.safetensors"


def by_inception(home, path):
  given = experiment(home)
  return dataclasses.replace(
    given, schedule=dataclasses.replace(given.schedule, features="inception", inception=str(path))
  )


def test_distances_by_inception(home, whole, inception_file, monkeypatch):
  """Both sets' and the generator's moments are those of Inception's features, and the number says so."""
  monkeypatch.setattr(inception, "resize", functools.partial(inception.resize, side=75))  # a sixteenth of the work
  run, state = setup.prepare(by_inception(home, inception_file)), whole[1].init()
  distances = run.distances
  assert (distances.name, distances.features) == ("frechet_inception", f"Inception 2015-12-05 {inception_file}")
  seen = []
  monkeypatch.setattr(frechet, "distance", lambda *moments: seen.append(moments) or 1.5)  # seconds in this width
  assert distances.reference(8, lambda: True) == distances.generated(8, state, lambda: True) == 1.5
  (first, second), (again, generated) = seen
  assert again is first and generated.count == first.count == second.count == SET
  variables = inception_torch.load(inception_file)
  features = jax.jit(inception.Inception().apply)
  numbers = distances._places(np.arange(2 * SET))
  images = loader.to_float(loader.load_images(run.dataset, 16, numbers))
  expected = np.asarray(features(variables, resample.image_pyramid(images, (8,))[8]))
  for moments, part in zip((first, second), (expected[:SET], expected[SET:])):
    np.testing.assert_allclose(moments.mean, part.mean(0), atol=1e-4 * expected.max())
  assert np.abs(generated.mean - first.mean).max() > 1e-2 * expected.max()


def test_inception_is_read_when_a_run_is_prepared(home, capsys):
  fields = {
    "schedule.features": "inception",
    "schedule.inception": home / "nowhere.pth",
    "data.path": home / "data",
    "text.clip": home / "clip",
  }
  flags = [
    f"--config={random_run.ROOT / 'configs/aurora_64.py'}:test",
    *(f"--config.{name}={value}" for name, value in fields.items()),
  ]
  assert main.main(["train", *flags, "--config.schedule.resolutions=(4, 8, 16)", f"--workdir={home / 'none'}"]) == 2
  error = capsys.readouterr().err
  assert error == f"aurora_jax train: {home / 'nowhere.pth'} cannot be read: No such file or directory\n"
  assert not (home / "none").exists()
  assert setup.prepare(config_files.load(flags)).distances is None  # nothing grows, nothing is read
