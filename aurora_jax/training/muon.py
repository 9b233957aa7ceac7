"""Muon (K. Jordan, 2024): orthogonalizes the momentum of each matrix, so that all its singular values move alike.

Every weight of the networks is a matrix from inputs (of a convolution: rows, columns and channels) to outputs, or a
stack of matrices, one for each kernel or expert. The root mean square of an update is about 1, as with Adam (arXiv
2502.16982),
for all shapes: one learning rate fits both.

The Newton-Schulz iteration X <- (a + b X X' + c (X X')^2) X needs products as large as X each time. Here it runs on
X X' (the smaller side squared) only, with all matrices of equal size in one batch. X is read at the start and at the
end.

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
  """Muon for the matrices, another optimizer for all other parameters.

  Args:
    cfg: the configuration.
    label: labels of the parameters; their `matrix` selects the matrices.
    in_use: key path -> whether the parameter is trained at present; gradients of others are ignored.
    others: the optimizer of the other parameters.

  Returns:
    A transformation whose updates point along the gradient. It takes `keep` as that of `optimizers.make` does.
  """
  beta = cfg.momentum

  def init(params):
    return MomentumState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None, **extra_args):
    del params
    keep = extra_args["keep"]
    used = jax.tree_util.tree_map_with_path(lambda path, g: g if in_use(path) else jnp.zeros_like(g), updates)
    mean = lambda momentum, gradient: beta * momentum + (1 - beta) * gradient
    momentum = jax.tree.map(mean, state.momentum, used)
    # Nesterov's momentum. It does not go through `keep`, which would wait for every gradient.
    updates = orthogonalize(jax.tree.map(mean, momentum, used), cfg.iterations)
    return updates, MomentumState(jax.tree.map(keep, momentum, state.momentum))

  def labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: _MATRIX if label(path).matrix else _OTHER, params)

  return optax.partition({_MATRIX: optax.GradientTransformationExtraArgs(init, update), _OTHER: others}, labels)


def orthogonalize(tree: Any, iterations: int) -> Any:
  """Approximates, for every matrix of a tree, the nearest matrix with orthogonal rows or columns, with root mean square
  1.

  Args:
    tree: weights [..., I, O]; with an odd number of axes the first one is a stack.
    iterations: Newton-Schulz iterations; singular values below about 4**-iterations of a matrix's norm stay small.

  Returns:
    A tree of the same shapes; zero where a matrix is zero.
  """
  weights, structure = jax.tree.flatten(tree)
  stacks = [_unit_norm(_as_stack(weight)) for weight in weights]
  sizes: dict[int, list[int]] = collections.defaultdict(list)  # {padded D: numbers of weights}
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
  """Scales matrices to a norm of 1, or below 1 if the norm is less than `_SMALLEST`.

  So the momentum of an expert or kernel that is no longer used fades away, and no norm of zero is divided by.
  """
  norm = jnp.sqrt(jnp.sum(jnp.square(stack), axis=(1, 2), keepdims=True))
  return stack / jnp.maximum(norm, _SMALLEST)


def _product(left, right):
  """Batched matrix product in full precision: in X X' a small singular value of X is in the last digits."""
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
  polynomial = lambda square: a * identity + b * square + c * _product(square, square)
  root = factor = polynomial(square)
  for _ in range(iterations - 1):
    square = _product(factor, _product(square, factor))
    factor = polynomial(square)
    root = _product(factor, root)
  return root
