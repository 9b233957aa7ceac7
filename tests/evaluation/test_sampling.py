"""The sampler around a system whose every image tells what it was made of."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.evaluation import sampling
from aurora_jax.systems import base

pytestmark = pytest.mark.slow

Z = 3
AVERAGE = np.array([0.5, -0.5, 1.0], np.float32)
LABEL = lambda path: base.ParamLabel()
WEIGHTS = sampling.Weights({"generator": {"params": {"gain": jnp.float32(2.0)}}}, {"text": jnp.float32(10.0)})


class FakeSystem(base.System):
  """w = gain * tanh(z) + text. Every pixel of an image [2, 2, 3] is w. The choices are the number of the prompt."""

  networks = {"generator": base.Network("g", None, LABEL)}
  sampling_batch_size = 4

  def __init__(self):
    super().__init__(types.SimpleNamespace(system="fake"))
    self.conditions = self.centers = self.samples = 0

  def inputs(self, prompts):
    return np.array([float(prompt) for prompt in prompts], np.float32)

  def condition(self, networks, frozen, inputs):
    self.conditions += 1
    return {"text": jnp.broadcast_to(frozen["text"] * inputs[:, None], (len(inputs), Z))}

  def draw_latents(self, key):
    return {"z": jax.random.normal(key, (Z,))}

  def center(self, networks, condition, latents):
    self.centers += 1
    w = networks["generator"]["params"]["gain"] * jnp.tanh(latents["z"]) + condition["text"][:, None]
    return condition | {"center": w.mean(axis=1)}

  def sample(self, networks, frozen, condition, latents, psi=1.0):
    self.samples += 1
    w = networks["generator"]["params"]["gain"] * jnp.tanh(latents["z"]) + condition["text"]
    psi = jnp.reshape(psi, (-1, 1))
    w = AVERAGE + psi * (w - AVERAGE)
    if "center" in condition:
      w = condition["center"] + psi * (w - condition["center"])
    image = jnp.broadcast_to(w[:, None, None], (len(w), 2, 2, 3))
    prompt = jnp.rint(condition["text"][:, :1] / 10).astype(jnp.int32)
    return base.Sample(image, {"layer": jnp.broadcast_to(prompt, (len(w), 4)), "maker": prompt[:, 0]})

  def choice_count(self, name):
    return {"layer": 4, "maker": 7}[name]


def prompts_of(count):
  return [str(number) for number in range(count)]


def sample(count=3, batch_size=4, **arguments):
  return sampling.Sampler(FakeSystem(), batch_size)(WEIGHTS, prompts_of(count), **arguments)


def draw(seed, prompts, latents, means):
  return latents_lib.draw(FakeSystem().draw_latents, seed, prompts, latents, means)


def test_shapes_and_order():
  result = sample(latents_per_prompt=2, choices=True)
  assert result.images.shape == (3, 2, 2, 2, 3) and result.images.dtype == np.float32
  offset = result.images[:, :, 0, 0] - 10 * np.arange(3)[:, None, None]
  assert np.abs(offset).max() <= 2.0  # 2 * tanh(z): every row got its own prompt's text
  assert result.choices["layer"].shape == (3, 2, 4) and result.choices["maker"].shape == (3, 2)
  assert (result.choices["layer"] == np.arange(3)[:, None, None]).all()
  assert sample(latents_per_prompt=2).choices == {}
  makers, count = sampling.makers(FakeSystem(), result)
  assert count == 7 and (makers == np.arange(3)[:, None]).all()


def test_latents_differ_between_latents_prompts_and_seeds():
  z = lambda result: (result.images[:, :, 0, 0] - 10 * np.arange(3)[:, None, None]).reshape(-1, Z)
  rows = np.concatenate([z(sample(latents_per_prompt=2)), z(sample(latents_per_prompt=2, seed=1))])
  distance = np.abs(rows[:, None] - rows[None]).max(-1) + 9 * np.eye(len(rows))
  assert distance.min() > 1e-3


@pytest.mark.parametrize("psi", [1.0, 0.3])
def test_an_image_does_not_depend_on_the_batch(psi):
  whole = sample(5, batch_size=16, latents_per_prompt=3, psi=psi, seed=7)
  split = sample(5, batch_size=2, latents_per_prompt=3, psi=psi, seed=7)
  np.testing.assert_allclose(whole.images, split.images, rtol=1e-5, atol=1e-5)
  more = sample(5, batch_size=4, latents_per_prompt=4, psi=psi, seed=7)
  np.testing.assert_allclose(more.images[:, :3], whole.images, rtol=1e-5, atol=1e-5)


def test_one_compilation_for_all_batches():
  system = FakeSystem()
  sampler = sampling.Sampler(system, batch_size=4)
  for count, seed, psi in ((3, 0, 0.5), (7, 1, 0.2), (1, 2, 0.0)):
    sampler(WEIGHTS, prompts_of(count), latents_per_prompt=3, seed=seed, psi=psi)
  assert (system.conditions, system.centers, system.samples) == (1, 1, 1)
  other = WEIGHTS._replace(networks={"generator": {"params": {"gain": jnp.float32(0.0)}}})
  images = [sampler(weights, prompts_of(2), latents_per_prompt=3, psi=0.5).images for weights in (other, WEIGHTS)]
  assert (images[0] != images[1]).any()
  assert system.samples == 1  # the weights are an argument, not a constant


def test_psi_one_is_no_truncation():
  expected = 2 * np.tanh(draw(0, range(3), 1, 0).values["z"][:, 0]) + 10 * np.arange(3)[:, None]
  np.testing.assert_allclose(sample().images[:, 0, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("psi", [0.0, 0.05, 0.2, 0.7])
def test_the_center_is_the_mean_of_latents_of_the_prompt(psi):
  text = 10 * np.arange(3)[:, None]
  drawn = draw(5, range(3), 1, 16)
  w, z = 2 * np.tanh(drawn.values["z"][:, 0]) + text, drawn.means["z"]
  mean = (2 * np.tanh(z) + text[:, None]).mean(1)
  expected = (1 - psi) * mean + psi * (1 - psi) * AVERAGE + psi**2 * w
  np.testing.assert_allclose(sample(psi=psi, seed=5).images[:, 0, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_several_psi_are_an_axis_of_their_own_in_one_program():
  system = FakeSystem()
  sampler = sampling.Sampler(system, batch_size=4)
  sweep = (0.0, 0.2, 0.9, 1.0)
  together = sampler(WEIGHTS, prompts_of(3), latents_per_prompt=2, psi=sweep, choices=True)
  assert together.images.shape == (3, 2, 4, 2, 2, 3) and together.choices["layer"].shape == (3, 2, 4, 4)
  for k, psi in enumerate(sweep):
    np.testing.assert_allclose(
      together.images[:, :, k], sample(latents_per_prompt=2, psi=psi).images, rtol=1e-5, atol=1e-5
    )
  assert (system.conditions, system.centers, system.samples) == (1, 1, 1)


def test_no_mean_latents_is_one_truncation_only():
  w = sample(latents_per_prompt=2).images
  expected = 0.3 * w + 0.7 * AVERAGE
  np.testing.assert_allclose(
    sample(latents_per_prompt=2, psi=0.3, mean_latents=0).images, expected, rtol=1e-5, atol=1e-6
  )


def test_drawn_latents_are_used():
  drawn = draw(9, range(3), 2, 5)
  result = sample(3, batch_size=4, latents=drawn, psi=0.4).images[..., 0, 0, :]
  text = 10 * np.arange(3)[:, None, None]
  mean = (2 * np.tanh(drawn.means["z"]) + text).mean(1, keepdims=True)
  w = 2 * np.tanh(drawn.values["z"]) + text
  expected = 0.6 * mean + 0.24 * AVERAGE + 0.16 * w
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts_at_once", [1, 2, 5, 8])
def test_prompts_in_groups_are_the_same(prompts_at_once):
  seen = []
  sampler = sampling.Sampler(FakeSystem(), 4, prompts_at_once)
  result = sampler(
    WEIGHTS, prompts_of(5), latents_per_prompt=3, psi=0.5, on_batch=lambda *progress: seen.append(progress)
  )
  np.testing.assert_allclose(result.images, sample(5, latents_per_prompt=3, psi=0.5).images, rtol=1e-5, atol=1e-5)
  assert seen[-1] == (15, 15) and [d for d, _ in seen] == sorted({d for d, _ in seen})
  conditions = sampler.read(WEIGHTS, prompts_of(5))
  np.testing.assert_array_equal(conditions["text"][:, 0], 10 * np.arange(5))
  again = sampler.sample_conditions(WEIGHTS, conditions, draw(0, range(5), 3, 16), psi=0.5)
  np.testing.assert_allclose(again.images, result.images, rtol=1e-5, atol=1e-5)


def test_progress_counts_rows_to_the_end():
  seen = []
  sample(3, batch_size=2, latents_per_prompt=3, on_batch=lambda done, total: seen.append((done, total)))
  assert seen[-1] == (9, 9) and [d for d, _ in seen] == sorted({d for d, _ in seen})


@pytest.mark.parametrize(
  "arguments", [{"count": 0}, {"latents_per_prompt": 0}, {"psi": -0.1}, {"psi": 1.1}, {"psi": float("nan")}]
)
def test_bad_requests_name_the_value(arguments):
  value = str(list(arguments.values())[0])
  with pytest.raises(UserError, match=value.replace(".", r"\.")):
    sample(**arguments)


def test_a_system_without_truncation_says_so():
  system = FakeSystem()
  system.truncates = False
  with pytest.raises(UserError, match=r"system 'fake' has no truncation: psi must be 1, got 0\.5"):
    sampling.Sampler(system, 4)(WEIGHTS, ["0"], psi=0.5)
