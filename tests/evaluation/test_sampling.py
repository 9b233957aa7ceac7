"""The sampler around a generator whose every picture tells what it was made of."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.evaluation import sampling

Z = 3
VARIABLES = {"params": {"gain": jnp.float32(2.0)}, "buffers": {"w_avg": jnp.array([0.5, -0.5, 1.0])}}


class FakeGenerator:
  """w = gain * tanh(z) + global text; a picture [2, 2, 3] shows w everywhere; one routing layer tells the prompt."""

  def __init__(self):
    self.traces = self.mapped = self.drawn = 0

  def apply(self, variables, *arguments, method):
    return getattr(self, method)(variables, *arguments)

  def encode_text(self, variables, features, eot):
    self.traces += 1
    row = jnp.arange(len(eot))
    return features[row, eot], features[:, 1:]

  def map_latents(self, variables, z, global_text):
    self.mapped += 1
    return variables["params"]["gain"] * jnp.tanh(z) + global_text

  def synthesize(self, variables, w, local_text):
    self.drawn += 1
    image = jnp.broadcast_to(w[:, None, None], (len(w), 2, 2, 3)) + 0 * local_text.sum()
    expert = jnp.broadcast_to(jnp.rint(local_text[:, 0, :1]).astype(jnp.int32), (len(w), 4))
    return types.SimpleNamespace(image=image, routing={"attn_8_0": types.SimpleNamespace(expert=expert)})


def make_prompts(count):
  features = np.zeros((count, 4, Z), np.float32)
  features[:, 1] = np.arange(count)[:, None]
  features[:, 2] = 10 * np.arange(count)[:, None]
  return sampling.Prompts(features, np.full(count, 2, np.int32))


def sample(count=3, batch_size=4, **arguments):
  return sampling.make_sampler(FakeGenerator(), Z, batch_size)(VARIABLES, make_prompts(count), **arguments)


def test_shapes_and_order():
  result = sample(latents=2, routing=True)
  assert result.images.shape == (3, 2, 2, 2, 3) and result.images.dtype == np.float32
  offset = result.images[:, :, 0, 0] - 10 * np.arange(3)[:, None, None]
  assert np.abs(offset).max() <= 2.0  # 2 * tanh(z): every row got its own prompt's text
  assert result.routing["attn_8_0"].shape == (3, 2, 4)
  assert (result.routing["attn_8_0"] == np.arange(3)[:, None, None]).all()
  assert sample(latents=2).routing == {}


def test_latents_differ_between_latents_prompts_and_seeds():
  z = lambda result: (result.images[:, :, 0, 0] - 10 * np.arange(3)[:, None, None]).reshape(-1, Z)
  rows = np.concatenate([z(sample(latents=2)), z(sample(latents=2, seed=1))])
  distance = np.abs(rows[:, None] - rows[None]).max(-1) + 9 * np.eye(len(rows))
  assert distance.min() > 1e-3


@pytest.mark.parametrize("psi", [1.0, 0.3])
def test_a_picture_does_not_depend_on_the_batch(psi):
  whole = sample(5, batch_size=16, latents=3, psi=psi, seed=7)
  split = sample(5, batch_size=2, latents=3, psi=psi, seed=7)
  np.testing.assert_allclose(whole.images, split.images, rtol=1e-6)
  more = sample(5, batch_size=4, latents=4, psi=psi, seed=7)
  np.testing.assert_allclose(more.images[:, :3], whole.images, rtol=1e-6)


def test_a_long_list_in_parts():
  whole = sample(5, latents=2, psi=0.5)
  prompts = make_prompts(5)
  part = sampling.make_sampler(FakeGenerator(), Z, 4)(
    VARIABLES, sampling.Prompts(prompts.features[3:], prompts.eot[3:]), latents=2, psi=0.5, first_prompt=3
  )
  np.testing.assert_allclose(part.images, whole.images[3:], rtol=1e-6)


def test_one_compile_for_all_batches():
  generator = FakeGenerator()
  sampler = sampling.make_sampler(generator, Z, batch_size=4)
  for count, seed, psi in ((3, 0, 0.5), (7, 1, 0.2), (1, 2, 0.0)):
    sampler(VARIABLES, make_prompts(count), latents=3, seed=seed, psi=psi)
  assert generator.traces == 1
  other = {**VARIABLES, "params": {"gain": jnp.float32(0.0)}}
  assert (sampler(other, make_prompts(2), psi=0.5).images != sampler(VARIABLES, make_prompts(2), psi=0.5).images).any()
  assert generator.traces == 1  # the weights are an argument, not a constant


def test_psi_one_is_no_truncation():
  expected = 2 * np.tanh(latents_lib.draw(0, range(3), 1, 0, Z).z[:, 0]) + 10 * np.arange(3)[:, None]
  np.testing.assert_allclose(sample().images[:, 0, 0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("psi", [0.0, 0.05, 0.2, 0.7])
def test_truncation_is_the_released_one(psi):
  """w'' = (1 - psi) mean + psi (1 - psi) w_avg + psi^2 w, as aurora.md writes it out."""
  text = 10 * np.arange(3)[:, None]
  drawn = latents_lib.draw(5, range(3), 1, 16, Z)
  w, z = 2 * np.tanh(drawn.z[:, 0]) + text, drawn.mean_z
  mean = (2 * np.tanh(z) + text[:, None]).mean(1)
  expected = (1 - psi) * mean + psi * (1 - psi) * np.array(VARIABLES["buffers"]["w_avg"]) + psi**2 * w
  np.testing.assert_allclose(sample(psi=psi, seed=5).images[:, 0, 0, 0], expected, rtol=1e-5, atol=1e-5)


def test_several_psi_are_an_axis_of_their_own_in_one_program():
  generator = FakeGenerator()
  sampler = sampling.make_sampler(generator, Z, batch_size=4)
  sweep = (0.0, 0.2, 0.9, 1.0)
  together = sampler(VARIABLES, make_prompts(3), latents=2, psi=sweep, routing=True)
  assert together.images.shape == (3, 2, 4, 2, 2, 3) and together.routing["attn_8_0"].shape == (3, 2, 4, 4)
  for k, psi in enumerate(sweep):
    np.testing.assert_allclose(together.images[:, :, k], sample(latents=2, psi=psi).images, rtol=1e-6)
  assert generator.traces == generator.drawn == 1 and generator.mapped == 2  # the latents and those of the mean


def test_no_mean_latents_is_one_truncation_only():
  w = sample(latents=2).images
  expected = 0.3 * w + 0.7 * np.array(VARIABLES["buffers"]["w_avg"])
  np.testing.assert_allclose(sample(latents=2, psi=0.3, mean_latents=0).images, expected, rtol=1e-5, atol=1e-6)


def test_given_latents_are_used():
  given = latents_lib.draw(9, range(3), 2, 5, Z)
  result = sample(3, batch_size=4, given=given, psi=0.4).images[..., 0, 0, :]
  text = 10 * np.arange(3)[:, None, None]
  mean = (2 * np.tanh(given.mean_z) + text).mean(1, keepdims=True)
  w = 2 * np.tanh(given.z) + text
  expected = 0.6 * mean + 0.24 * np.array(VARIABLES["buffers"]["w_avg"]) + 0.16 * w
  np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts_at_once", [1, 2, 5, 8])
def test_prompts_in_groups_are_the_same(prompts_at_once):
  seen = []
  sampler = sampling.make_sampler(FakeGenerator(), Z, 4, prompts_at_once)
  result = sampler(VARIABLES, make_prompts(5), latents=3, psi=0.5, on_batch=lambda *progress: seen.append(progress))
  np.testing.assert_allclose(result.images, sample(5, latents=3, psi=0.5).images, rtol=1e-6)
  assert seen[-1] == (15, 15) and [d for d, _ in seen] == sorted({d for d, _ in seen})
  texts = sampler.read(VARIABLES, make_prompts(5))
  np.testing.assert_array_equal(texts.global_text[:, 0], 10 * np.arange(5))
  assert texts.local_text.shape == (5, 3, Z)


def test_progress_counts_rows_to_the_end():
  seen = []
  sample(3, batch_size=2, latents=3, on_batch=lambda done, total: seen.append((done, total)))
  assert seen[-1] == (9, 9) and [d for d, _ in seen] == sorted({d for d, _ in seen})


@pytest.mark.parametrize(
  "arguments", [{"count": 0}, {"latents": 0}, {"psi": -0.1}, {"psi": 1.1}, {"psi": float("nan")}]
)
def test_bad_requests_name_the_value(arguments):
  value = str(list(arguments.values())[0])
  with pytest.raises(UserError, match=value.replace(".", r"\.")):
    sample(**arguments)


def test_prompts_through_a_real_clip(tiny_clip):
  encode = sampling.make_prompt_encoder(tiny_clip.bundle, batch_size=2)
  prompts = encode(tiny_clip.words)
  assert prompts.eot.tolist() == [3, 2, 4]
  np.testing.assert_allclose(prompts.features, tiny_clip.text.features, rtol=1e-4, atol=1e-5)
  with pytest.raises(UserError):
    encode([])
