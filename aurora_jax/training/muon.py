"""Muon (K. Jordan, 2024): the momentum of a matrix, orthogonalised, so that a step moves all its directions alike.

Every weight of the networks is a matrix from inputs (of a convolution: rows, columns and channels) to outputs, or a stack
of such, one for each kernel or expert. An update has a root mean square of about 1, that of Adam's (arXiv 2502.16982),
whatever the matrix's shape: one learning rate serves both.

Newton and Schulz's iteration X <- (a + b X X' + c (X X')^2) X needs products as large as X each time. Here it runs on
X X' alone, the smaller side squared, where the matrices of all weights with as many rows go through it as one; X is read
at the beginning and at the end.

  S matrices of a stack, I inputs, O outputs, D the smaller of both, N matrices that are iterated together
"""

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aurora_jax.config import Optimizer
from aurora_jax.parallel.mesh import KeyPath, Label

_MATRIX, _OTHER = "matrix", "other"
_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan's: singular values to between 0.7 and 1.2, in few iterations
_SMALLEST = 1e-7  # as torch.optim.Muon
_SIDE = 16  # sides are filled up with zeros to multiples of it, so that there are few sizes


class MomentumState(NamedTuple):
  """momentum: decaying mean of the gradients, as the weights."""

  momentum: Any


def for_matrices(
  cfg: Optimizer, label: Label, in_use: Callable[[KeyPath], bool], others: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
  """Muon for all weights, `others` for biases, norms and what else there is.

  Args:
    cfg: its configuration.
    label: of the parameters; its `matrix` says which are weights.
    in_use: key path -> whether the parameter is trained at present; the others' gradients are not looked at.
    others: optax transformation.

  Returns:
    `optax.GradientTransformationExtraArgs` whose updates are the direction of ascent; `keep` is as of `optimizers.make`.
  """
  beta = cfg.momentum

  def init(weights):
    return MomentumState(jax.tree.map(jnp.zeros_like, weights))

  def rescale(gradients, state, params=None, *, keep):
    del params
    used = jax.tree_util.tree_map_with_path(lambda path, g: g if in_use(path) else jnp.zeros_like(g), gradients)
    mean = lambda momentum, gradient: beta * momentum + (1 - beta) * gradient
    momentum = jax.tree.map(mean, state.momentum, used)
    # Nesterov's: the gradient counts once more. What is kept is not waited for: that depends on every gradient.
    updates = orthogonalize(jax.tree.map(mean, momentum, used), cfg.iterations)
    return updates, MomentumState(jax.tree.map(keep, momentum, state.momentum))

  def labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: _MATRIX if label(path).matrix else _OTHER, params)

  return optax.partition({_MATRIX: optax.GradientTransformationExtraArgs(init, rescale), _OTHER: others}, labels)


def orthogonalize(tree, iterations):
  """The nearest matrix with orthogonal rows or columns to every matrix of a tree, nearly, with a root mean square of 1.

  Args:
    tree: of weights [..., I, O], stacked along one more axis in front where the number of axes is odd.
    iterations: of Newton and Schulz; singular values below about 4**-iterations of a matrix's norm stay small.

  Returns:
    The same of updates; zero where a matrix is zero.
  """
  weights, structure = jax.tree.flatten(tree)
  stacks = [_unit_norm(_as_stack(weight)) for weight in weights]
  sizes = collections.defaultdict(list)  # {padded D: numbers of weights}
  for number, stack in enumerate(stacks):
    sizes[-(-min(stack.shape[1:]) // _SIDE) * _SIDE].append(number)
  for side, numbers in sizes.items():
    squares = [_square(stacks[number]) for number in numbers]
    padded = [jnp.pad(square, ((0, 0), *[(0, side - square.shape[-1])] * 2)) for square in squares]
    roots = _inverse_root(jnp.concatenate(padded), iterations)
    begin = 0
    for number, square in zip(numbers, squares):
      count, rows = square.shape[:2]
      stacks[number] = _times(roots[begin : begin + count, :rows, :rows], stacks[number])
      begin += count
  updates = [
    (stack * math.sqrt(max(stack.shape[1:]))).reshape(weight.shape).astype(weight.dtype)
    for stack, weight in zip(stacks, weights)
  ]
  return jax.tree.unflatten(structure, updates)


def _as_stack(weight):
  """[..., I, O] -> [S, I, O] float32."""
  count = weight.shape[0] if weight.ndim % 2 else 1
  return weight.reshape(count, -1, weight.shape[-1]).astype(jnp.float32)


def _unit_norm(stack):
  """A matrix smaller than `_SMALLEST` stays below a norm of 1: what is left of the momentum of an expert or a kernel that
  nothing chooses any more fades away, and where squares are zero in float32 nothing is divided by their sum."""
  norm = jnp.sqrt(jnp.sum(jnp.square(stack), axis=(1, 2), keepdims=True))
  return stack / jnp.maximum(norm, _SMALLEST)


def _product(left, right):
  """Of batches of matrices, in full precision: a small singular value of X is its square's last digits in X X'."""
  return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _wide(stack):
  return stack.shape[1] <= stack.shape[2]


def _square(stack):
  """X X' or X' X, the smaller one. [S, I, O] -> [S, D, D]."""
  transposed = stack.swapaxes(1, 2)
  return _product(stack, transposed) if _wide(stack) else _product(transposed, stack)


def _times(root, stack):
  """root [S, D, D] on the side of [S, I, O] that is D long."""
  return _product(root, stack) if _wide(stack) else _product(stack, root)


def _inverse_root(square, iterations):
  """Nearly (X X')^(-1/2) of X X'. [N, D, D] -> [N, D, D]."""
  a, b, c = _COEFFICIENTS
  identity = jnp.eye(square.shape[-1])
  root = None
  for i in range(iterations):
    polynomial = a * identity + b * square + c * _product(square, square)
    root = polynomial if root is None else _product(polynomial, root)
    if i + 1 < iterations:
      square = _product(polynomial, _product(square, polynomial))
  return root
