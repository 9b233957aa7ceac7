"""Sampling from MEGAN's stored networks: who made an image, and by which statistics."""

import dataclasses

import jax
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.evaluation import sampling
from aurora_jax.systems.megan import generator, system


def sampler_of(golden, batch_size=4, **fields):
  """(Sampler, weights) of the stored networks with fields of the generator's configuration changed."""
  cfg = dataclasses.replace(golden.cfg, **fields)
  experiment = dataclasses.replace(golden.experiment(), generator=cfg)
  rest, gate = generator.split_gate(golden.variables)
  weights = sampling.Weights({"generator": rest, "gate": gate}, {})
  return sampling.Sampler(system.System(experiment), batch_size), weights


@pytest.fixture(scope="module")
def fixed_latents():
  """Latents of six images, as a file would give them."""
  rng = np.random.default_rng(3)
  values = {"z": rng.standard_normal((1, 6, 8)).astype(np.float32), "uniform": rng.random((1, 6, 3), np.float32)}
  return latents_lib.Latents(values, {})


@pytest.fixture(scope="module")
def running(golden):
  return sampler_of(golden, bn_at_eval="running")


@pytest.fixture(scope="module")
def everything(golden, fixed_latents):
  """All generators' images [6, n, S, S, 3] of these latents, by the running statistics."""
  model = generator.Generator(dataclasses.replace(golden.cfg, bn_at_eval="running"))
  sample = jax.jit(lambda z, uniform: model.apply(golden.variables, z, uniform, 1.0, method="sample"))
  return sample(fixed_latents.values["z"][0], fixed_latents.values["uniform"][0])


def test_choices_name_the_generator_that_made_the_image(running, fixed_latents, everything):
  sampler, weights = running
  found = sampler(weights, [""], latents=fixed_latents, choices=True)
  makers, count = sampling.makers(sampler.system, found)
  assert count == 3 and makers.shape == (1, 6) and len(set(makers[0])) > 1
  for image, maker, images in zip(found.images[0], makers[0], np.asarray(everything.images)):
    np.testing.assert_allclose(image, images[maker], rtol=0, atol=1e-6)
    assert min(abs(image - images[other]).max() for other in range(3) if other != maker) > 1e-2


def test_by_running_statistics_an_image_does_not_depend_on_its_batch(running, fixed_latents):
  sampler, weights = running
  whole = sampler(weights, [""], latents=fixed_latents).images
  turned = latents_lib.Latents({name: values[:, ::-1] for name, values in fixed_latents.values.items()}, {})
  np.testing.assert_allclose(sampler(weights, [""], latents=turned).images[:, ::-1], whole, rtol=0, atol=1e-6)


def test_by_the_batch_s_statistics_it_does(golden, running, fixed_latents):
  sampler, weights = sampler_of(golden, batch_size=6, bn_at_eval="batch")
  images = sampler(weights, [""], latents=fixed_latents).images
  other = {name: np.concatenate([values[:, :5], values[:, :1]], 1) for name, values in fixed_latents.values.items()}
  changed = sampler(weights, [""], latents=latents_lib.Latents(other, {})).images
  assert abs(changed[:, :5] - images[:, :5]).max() > 1e-2
  assert abs(images - running[0](weights, [""], latents=fixed_latents).images).max() > 1e-2


def test_the_likeliest_generator_is_chosen_whatever_the_noise(golden, fixed_latents, everything):
  sampler, weights = sampler_of(golden, bn_at_eval="running", gate_at_eval="argmax")
  likeliest = np.argmax(everything.logits, axis=-1)
  for uniform in (fixed_latents.values["uniform"], fixed_latents.values["uniform"][..., ::-1]):
    latents = latents_lib.Latents(fixed_latents.values | {"uniform": uniform}, {})
    found = sampler(weights, [""], latents=latents, choices=True)
    np.testing.assert_array_equal(found.choices["generator"][0], likeliest)
  assert (np.argmax(everything.gate, axis=-1) != likeliest).any()  # a draw takes others too


def test_truncation_is_refused(running, fixed_latents):
  sampler, weights = running
  with pytest.raises(UserError, match=r"system 'megan' has no truncation: psi must be 1, got 0\.5"):
    sampler(weights, [""], latents=fixed_latents, psi=0.5)


def test_a_latents_file_holds_both_latents(running, fixed_latents, tmp_path):
  sampler, weights = running
  path, draw_one = str(tmp_path / "latents.npz"), sampler.system.draw_latents
  latents_lib.save(fixed_latents, path)
  read = latents_lib.fit(latents_lib.load(path), path, 1, draw_one)
  jax.tree.map(np.testing.assert_array_equal, read.values, fixed_latents.values)
  np.testing.assert_array_equal(
    sampler(weights, [""], latents=read).images, sampler(weights, [""], latents=fixed_latents).images
  )
  np.savez(path, z=fixed_latents.values["z"])
  with pytest.raises(UserError, match="must hold uniform, z and perhaps .* it holds z$"):
    latents_lib.fit(latents_lib.load(path), path, 1, draw_one)
  np.savez(path, z=fixed_latents.values["z"], uniform=fixed_latents.values["uniform"][..., :2])
  with pytest.raises(UserError, match="'uniform' is 2 wide, the generator's latents are 3"):
    latents_lib.fit(latents_lib.load(path), path, 1, draw_one)


@pytest.mark.slow
def test_drawn_latents_are_those_of_their_position(running):
  sampler, weights = running
  two, five = (sampler(weights, [""], latents_per_prompt=count, seed=4).images for count in (2, 5))
  np.testing.assert_allclose(two, five[:, :2], rtol=0, atol=1e-6)
  assert abs(two - sampler(weights, [""], latents_per_prompt=2, seed=5).images).max() > 1e-2
