"""Random keys by purpose: each use of randomness has a name, so no two uses share numbers."""

import zlib

import jax


def fold(key: jax.Array, purpose: str, *numbers: int | jax.Array) -> jax.Array:
  """A key for one purpose.

  Args:
    key: PRNG key.
    purpose: name of the purpose, such as "init/generator". Distinct purposes give independent keys.
    numbers: additional integers, such as the step; they may be traced.

  Returns:
    A PRNG key.
  """
  key = jax.random.fold_in(key, zlib.crc32(purpose.encode()))
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key
