"""Flags as all commands read them: paths with `~`, seeds, and a wrong flag as one line."""

import argparse
from typing import NoReturn

from aurora_jax import text
from aurora_jax.errors import UserError

LARGEST_SEED = 2**32 - 1


class Parser(argparse.ArgumentParser):
  """An argument parser whose complaint is one line, a `UserError`, without the usage."""

  def error(self, message: str) -> NoReturn:
    if message.endswith("expected one argument"):
      message += " (a value that begins with - is given as --flag=VALUE)"
    raise UserError(f"{message}; --help lists the flags")


def path(value: str) -> str:
  """A path of a flag, `~` and `~user` expanded.

  Raises:
    argparse.ArgumentTypeError: it is empty, holds a null byte, or `~` means nothing here.
  """
  try:
    return text.expand_home(value)
  except UserError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def seed(value: str) -> int:
  """A seed of 32 bits, all of which count: JAX would cut a longer one, and two seeds would give the same images."""
  return _integer(value, LARGEST_SEED)


def long_seed(value: str) -> int:
  """A seed of any size, for NumPy, which uses all of its bits."""
  return _integer(value, None)


def _integer(value: str, largest: int | None) -> int:
  try:
    number = int(value)
  except ValueError:
    raise argparse.ArgumentTypeError(f"'{text.printable(value, 40)}' is no whole number") from None
  if number < 0 or (largest is not None and number > largest):
    limit = "0 or more" if largest is None else f"from 0 to {largest}"
    raise argparse.ArgumentTypeError(f"a seed must be {limit}, got {text.printable(value, 40)}")
  return number
