"""The public StyleGAN-T code's numbers (tests/goldens/stylegan_t) in our layout, and how they are compared."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

FOLDER = pathlib.Path(__file__).parents[2] / "goldens" / "stylegan_t"
OUTPUT = 1e-5  # relative to an array's largest entry
GRADIENT = 1e-3


def arrays(name):
  """The arrays of `NAME.safetensors`."""
  return load_file(FOLDER / f"{name}.safetensors")


def config(name):
  """`NAME.config.json`."""
  return json.loads((FOLDER / f"{name}.config.json").read_text())


def nhwc(array):
  return array.transpose(0, 2, 3, 1)


def relative(ours, theirs):
  """Largest difference over the largest entry."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def starting(mapping, prefix):
  """The entries whose name begins with `prefix`, without it."""
  return {name.removeprefix(prefix): value for name, value in mapping.items() if name.startswith(prefix)}
