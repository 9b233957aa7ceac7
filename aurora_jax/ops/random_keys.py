"""Random keys by purpose: every use of randomness folds its own name into the run's key, so that no two uses share numbers."""

import zlib

import jax


def fold(key: jax.Array, purpose: str, *numbers: int | jax.Array) -> jax.Array:
  """A key for one purpose.

  Args:
    key: a PRNG key.
    purpose: what it is for, such as "init/generator". Distinct purposes give independent keys.
    numbers: further integers, such as the step; traced ones will do.

  Returns:
    A PRNG key.
  """
  key = jax.random.fold_in(key, zlib.crc32(purpose.encode()))
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key
