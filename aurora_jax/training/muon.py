"""Muon (K. Jordan, 2024): the momentum of a matrix, orthogonalised, so that a step moves all its directions alike.

Every weight of the networks is a matrix from inputs (of a convolution: rows, columns and channels) to outputs, or a stack
of such, one for each kernel or expert. An update has a root mean square of 1, about that of Adam's (arXiv 2502.16982),
whatever the matrix's shape: the same learning rate serves both.
"""

import math

import jax
import jax.numpy as jnp
import optax

_MATRIX, _OTHER = "matrix", "other"


def for_matrices(cfg, in_use, others):
  """Muon for all weights, `others` for biases, norms and what else there is.

  Args:
    cfg: `config.Optimizer`.
    in_use: key path -> whether the parameter is trained at present; the others' gradients are not looked at.
    others: optax transformation.

  Returns:
    `optax.GradientTransformationExtraArgs` whose updates are the direction of ascent; `keep` is as of `state.update`.
  """
  orthogonalized = optax.contrib.scale_by_muon(
      ns_steps=cfg.muon_iterations, beta=cfg.muon_momentum,
      weight_dimension_numbers=lambda weights: jax.tree.map(_dimensions, weights))

  def rescale(gradients, state, params=None, *, keep):
    del params
    used = jax.tree_util.tree_map_with_path(lambda path, g: g if in_use(path) else jnp.zeros_like(g), gradients)
    updates, new_state = orthogonalized.update(used, state)
    return jax.tree.map(_to_unit_size, updates), jax.tree.map(keep, new_state, state)

  def labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _MATRIX if path[-1].key.endswith("weight") else _OTHER, params)

  matrices = optax.GradientTransformationExtraArgs(orthogonalized.init, rescale)
  return optax.partition({_MATRIX: matrices, _OTHER: others}, labels)


def _dimensions(weight):
  """Inputs and outputs among the axes: [..., I, O] with one axis more in front where matrices are stacked."""
  return optax.contrib.MuonDimensionNumbers(tuple(range(weight.ndim % 2, weight.ndim - 1)), weight.ndim - 1)


def _to_unit_size(update):
  """Orthogonal rows or columns, whichever are fewer, to a root mean square of 1."""
  inputs = math.prod(update.shape[update.ndim % 2:-1])
  return update * math.sqrt(max(inputs, update.shape[-1]))
