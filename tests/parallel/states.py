"""Random states of networks without their initialization, and how far two states are apart."""

import zlib

import jax
import numpy as np

from aurora_jax.parallel import mesh as mesh_lib


def drawn(path, leaf, std=1.0, seed=""):
  """Random values of a parameter or buffer, of about the size that it has initially, and none of them zero.

  They are drawn by numpy: the networks' own initialization takes half a minute to compile.

  Args:
    path: key path.
    leaf: its shape.
    std: of weights; biases and scales have 0.1 around their initial value.
    seed: of the draw, beside the path.
  """
  names = mesh_lib.names_of(path)
  name, module = names[-1], names[-2]
  noise = np.random.default_rng(zlib.crc32(f"{seed}{'/'.join(names)}".encode())).standard_normal(leaf.shape)
  if name == "log_scale":  # of CLIP
    return np.float32(2.66)
  if name.endswith(("bias", "scale", "w_avg")):
    values = 0.1 * noise + (name == "scale" or (name == "bias" and module in ("style", "mix")))
    if module == "affine":
      values[0] += 1  # a rotation by zero
  elif name in ("freqs", "phases"):
    values = 0.5 * noise
  elif name == "transform":
    values = 0.1 * noise + np.eye(3)
  elif module == "affine" or (module == "out" and names[-3].endswith("_attention") and leaf.ndim == 2):
    values = 0.1 * noise  # initially zero
  else:
    values = std * noise
  if "text_head" in names or module.startswith("mapping"):
    values = 100 * values  # their learning-rate multiplier divides them
  return np.asarray(values, np.float32)


def relative(expected, got):
  """Largest difference relative to the largest entry."""
  expected, got = np.asarray(expected), np.asarray(got)
  return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))


def differences(expected, got):
  """(difference relative to the array's largest entry, name) of every leaf of (state, metrics), largest first.

  Second moments are compared by their roots, the gradients they were made of. To a gradient 1e-7 of the network's
  largest is allowed besides: it is the rounding error of sums that all but cancel.
  """
  leaves = [
    (jax.tree_util.keystr(path), a, b)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(got), strict=True)
  ]
  second = lambda name: ".nu" in name
  network = lambda name: name.split(".opt_state")[0]
  largest = {}
  for name, a, _ in leaves:
    if second(name):
      largest[network(name)] = max(largest.get(network(name), 0.0), np.sqrt(np.abs(a).max()))

  def one(name, a, b):
    if not second(name):
      return relative(a, b)
    error = np.abs(np.sqrt(a) - np.sqrt(b)).max() - 1e-7 * largest[network(name)]
    return float(max(error, 0.0) / max(np.sqrt(a.max()), 1e-30))

  return sorted(((one(*leaf), leaf[0]) for leaf in leaves), reverse=True)
