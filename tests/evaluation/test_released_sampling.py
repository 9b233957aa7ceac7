"""Sampling and interpolation against the released generator's numbers and against the released scripts' recipe, written
out plainly: one prompt, one latent, one step at a time through `Generator.apply`."""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from aurora_jax.errors import UserError
from aurora_jax.evaluation import interpolation, latents, sampling
from aurora_jax.reporting import image_sheets
from aurora_jax.systems.aurora import convert
from aurora_jax.systems.aurora import generator as generator_lib
from aurora_jax.systems.aurora import released as released_lib
from aurora_jax.systems.aurora import system as system_lib

pytestmark = pytest.mark.slow

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def relative(ours, theirs):
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


class Plain:
  """The released scripts' functions of a batch of one."""

  def __init__(self, cfg, variables):
    model = generator_lib.Generator(cfg)
    # As an argument: XLA would compute with constants, and takes long to.
    run = lambda method: functools.partial(jax.jit(functools.partial(model.apply, method=method)), variables)
    self.encode, self._map, self._synthesize = (run(m) for m in ("encode_text", "map_latents", "synthesize"))
    self.average = np.asarray(variables["buffers"]["w_avg"], np.float64)

  def w(self, z, global_text):
    return np.asarray(self._map(z[None], global_text), np.float64)[0]

  def image(self, w, local_text):
    return np.asarray(self._synthesize(w[None].astype(np.float32), local_text).image)[0]


@pytest.fixture(scope="module")
def golden():
  cfg = released_lib.config_from_released(json.loads((GOLDENS / "tiny16.config.json").read_text()))
  variables = released_lib.import_generator(load_file(GOLDENS / "tiny16.state_dict.safetensors"), cfg)
  return cfg, variables, load_file(GOLDENS / "tiny16.io.safetensors")


class Scripted(NamedTuple):
  """A sampler and the text head's output for the golden's two texts, each encoded by itself as in the release."""

  sampler: sampling.Sampler
  weights: sampling.Weights
  conditions: dict
  eot: np.ndarray
  text: np.ndarray
  plain: Plain

  def sample(self, drawn, **options):
    return self.sampler.sample_conditions(self.weights, self.conditions, drawn, **options)

  def walk(self, drawn, *, steps=9, move_all=False, psi):
    path = interpolation.path(self.conditions, steps, () if move_all else self.sampler.system.fixed_text)
    spread = lambda part: {name: np.broadcast_to(v, (steps, *v.shape[1:])) for name, v in part.items()}
    noise = latents.Latents(spread(drawn.values), spread(drawn.means))
    return self.sampler.sample_conditions(self.weights, path, noise, psi=psi).images.swapaxes(0, 1)


def system_of(cfg):
  experiment = convert.experiment_of(cfg, "golden")
  return system_lib.System(experiment)


@pytest.fixture(scope="module")
def scripted(golden):
  cfg, variables, io = golden
  system = system_of(cfg)
  plain = Plain(cfg.for_sampling("cpu"), variables)
  eot = io["in.eot"].astype(np.int32)
  texts = [plain.encode(io["in.text"][p : p + 1], eot[p : p + 1]) for p in range(2)]
  conditions = {
    name: np.concatenate([np.asarray(text[i]) for text in texts])
    for i, name in enumerate(("global_text", "local_text"))
  }
  sampler = sampling.Sampler(system, batch_size=3, prompts_at_once=2)
  return Scripted(sampler, sampling.Weights({"generator": variables}, {}), conditions, eot, io["in.text"], plain)


def test_the_goldens_latents_give_the_goldens_images(golden, scripted):
  cfg, variables, io = golden
  model = generator_lib.Generator(cfg)  # not `for_sampling`: the golden's two texts saw each other
  texts = jax.jit(lambda *a: model.apply(variables, *a, method="encode_text"))(
    io["in.text"], io["in.eot"].astype(np.int32)
  )
  conditions = {"global_text": np.asarray(texts[0]), "local_text": np.asarray(texts[1])}
  drawn = latents.Latents({"z": io["in.z"][:, None]}, {})
  images = scripted._replace(conditions=conditions).sample(drawn, psi=[0.7, 1.0]).images
  for k, name in enumerate(("out.image_trunc0.7", "out.image")):
    released = io[name].transpose(0, 2, 3, 1)
    assert relative(images[:, 0, k], released) < 1e-5


def draw(scripted, seed, prompts, count, means):
  return latents.draw(scripted.sampler.system.draw_latents, seed, range(prompts), count, means)


def test_double_truncation_is_the_released_scripts(scripted):
  plain = scripted.plain
  drawn, sweep = draw(scripted, 4, 2, 2, 16), (0.0, 0.05, 0.2, 0.8)
  images = scripted.sample(drawn, psi=sweep).images
  for p in range(2):
    global_text, local_text = plain.encode(scripted.text[p : p + 1], scripted.eot[p : p + 1])
    mean = sum(plain.w(z, global_text) for z in drawn.means["z"][p]) / 16
    for n in range(2):
      w = plain.w(drawn.values["z"][p, n], global_text)
      for k, psi in enumerate(sweep):
        once = plain.average + psi * (w - plain.average)
        twice = mean + psi * (once - mean)
        assert relative(images[p, n, k], plain.image(twice, local_text)) < 1e-5
        if 0 < psi:  # each of the two steps matters
          assert relative(images[p, n, k], plain.image(once, local_text)) > 1e-3


def bytes_that_differ(ours, released):
  """Share of the bytes that differ; by more than one none may."""
  difference = np.abs(image_sheets.to_uint8(ours).astype(int) - released)
  assert difference.max() <= 1 and released.std() > 20
  return (difference != 0).mean()


def test_the_released_sampling_script_showed_the_same_images(scripted, tmp_path):
  script = load_file(GOLDENS / "tiny16.scripts.safetensors")
  path = tmp_path / "latents.npz"
  np.savez(path, z=script["sample.z"], mean_z=script["sample.mean_z"])
  drawn = latents.fit(latents.load(path), path, 2, scripted.sampler.system.draw_latents)
  images = scripted.sample(drawn, psi=script["sample.psi"]).images
  assert bytes_that_differ(images, script["sample.images"]) < 1e-3


@pytest.mark.parametrize("name, move_all", [("local", False), ("global_mean", True)])
def test_the_released_interpolation_script_showed_the_same_images(scripted, name, move_all):
  script = load_file(GOLDENS / "tiny16.scripts.safetensors")
  drawn = latents.Latents({"z": script[f"{name}.z"][None]}, {"z": script[f"{name}.mean_z"][None]})
  images = scripted.walk(drawn, move_all=move_all, psi=float(script[f"{name}.psi"][0]))
  assert bytes_that_differ(images[0], script[f"{name}.images"]) < 1e-3


@pytest.mark.parametrize("move_all, means", [(False, 0), (True, 0), (False, 3), (True, 3)])
def test_interpolation_is_the_released_scripts(scripted, move_all, means):
  plain, steps, psi = scripted.plain, 9, 0.6  # as many steps as above: one program
  drawn = draw(scripted, 1, 1, 2, means)
  images = scripted.walk(drawn, steps=steps, move_all=move_all, psi=psi)
  assert images.shape == (2, steps, 16, 16, 3)
  (source, source_local), (target, target_local) = (
    map(np.asarray, plain.encode(scripted.text[p : p + 1], scripted.eot[p : p + 1])) for p in range(2)
  )
  assert scripted.eot[0] != scripted.eot[1]  # the texts are of different lengths; padding moves along
  for step, weight in enumerate(np.linspace(0, 1, steps)):
    local_text = (source_local + weight * (target_local - source_local)).astype(np.float32)
    global_text = (source + weight * (target - source)).astype(np.float32) if move_all else source
    for n in range(2):
      w = plain.average + psi * (plain.w(drawn.values["z"][0, n], global_text) - plain.average)
      if means:
        mean = sum(plain.w(z, global_text) for z in drawn.means["z"][0]) / means
        w = mean + psi * (w - mean)
      assert relative(images[n, step], plain.image(w, local_text)) < 1e-5
  twice = lambda part: {name: np.repeat(v, 2, 0) for name, v in part.items()}
  sampled = scripted.sample(latents.Latents(twice(drawn.values), twice(drawn.means)), psi=psi).images
  assert relative(images[:, 0], sampled[0]) < 1e-5
  at_the_end = relative(images[:, -1], sampled[1])
  assert at_the_end < 1e-5 if move_all else at_the_end > 1e-3


def test_a_path_through_several_texts():
  conditions = {
    "global_text": np.float32([[0], [4], [0]]),
    "local_text": np.float32([[[0], [8]], [[4], [0]], [[4], [-8]]]),
  }
  path = interpolation.path(conditions, 3)
  assert path["global_text"][:, 0].tolist() == [0, 2, 4, 2, 0]
  assert path["local_text"][:, :, 0].tolist() == [[0, 8], [2, 4], [4, 0], [4, -4], [4, -8]]
  assert interpolation.path(conditions, 3, ("global_text",))["global_text"][:, 0].tolist() == [0] * 5


@pytest.mark.parametrize("count, steps, words", [(1, 3, "two prompts, got 1"), (2, 1, "at least 2 steps .*, got 1")])
def test_paths_that_lead_nowhere(count, steps, words):
  with pytest.raises(UserError, match=words):
    interpolation.path({"text": np.zeros((count, 1))}, steps)
  with pytest.raises(UserError, match="no text to interpolate"):
    interpolation.path({}, 3)
