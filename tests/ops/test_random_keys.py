"""Keys by purpose: different purposes, different numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.ops import random_keys


def bits(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_purposes_numbers_and_seeds_give_keys_of_their_own():
  purposes = (
    "init",
    "latents",
    "clip_augment",
    "generator",
    "discriminator",
    "phase/networks",
    "phase/r1",
    "frechet",
    "",
  )
  numbers = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**31 - 1,)]
  cases = list(itertools.product((0, 1, 2**32 - 1), purposes, numbers))
  found = {bits(random_keys.fold(jax.random.key(seed), purpose, *more)) for seed, purpose, more in cases}
  assert len(found) == len(cases)
  assert not found & {bits(jax.random.key(seed)) for seed in (0, 1, 2**32 - 1)}


def test_numbers_of_two_purposes_have_nothing_to_do_with_each_other():
  draw = lambda purpose: jax.random.normal(random_keys.fold(jax.random.key(0), purpose), (20_000,))
  first, second = draw("latents"), draw("clip_augment")
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.03 and np.mean(first == second) < 1e-3


def test_nested_purposes_are_not_those_of_another_nesting():
  key = jax.random.key(0)
  a, b = random_keys.fold(key, "a"), random_keys.fold(key, "b")
  assert bits(random_keys.fold(a, "b")) != bits(random_keys.fold(b, "a")) != bits(random_keys.fold(key, "ab"))


def test_the_same_traced_or_not_and_in_every_version():
  """Resumed runs and seeds in papers depend on these numbers."""
  traced = jax.jit(lambda step: random_keys.fold(jax.random.key(3), "phase/r1", step, 2))(jnp.int32(7))
  assert bits(traced) == bits(random_keys.fold(jax.random.key(3), "phase/r1", 7, 2)) == (117780192, 519137140)
