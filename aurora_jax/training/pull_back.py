"""A pull-back (vector-Jacobian product) that is made in one compiled program and used in another.

`jax.vjp`'s function is a pytree whose leaves, the residuals, are what the backward pass needs of the forward pass. Many
of them are arguments of the first program, parameters above all. `cut` leaves these out, so that only what was computed
crosses over; `join` puts the function together again where the second program has those arguments too.
"""

from typing import Any

import flax
import jax


@flax.struct.dataclass
class Residuals:
  """What crosses over.

  Attributes:
    computed: list of arrays.
    tree: of the pull-back's leaves.
    origins: per leaf, ("computed" or "shared", its place there).
  """

  computed: Any
  tree: Any = flax.struct.field(pytree_node=False)
  origins: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False)


def cut(pull_back, shared) -> Residuals:
  """Takes a pull-back apart, while the program that made it is traced.

  Args:
    pull_back: the function that `jax.vjp` gave.
    shared: a tree of arrays that the other program will have too.

  Returns:
    `Residuals`.
  """
  leaves, tree = jax.tree.flatten(pull_back)
  known = {id(leaf): ("shared", place) for place, leaf in enumerate(jax.tree.leaves(shared))}
  computed, origins = [], []
  for leaf in leaves:
    origins.append(known.get(id(leaf), ("computed", len(computed))))
    if id(leaf) not in known:
      computed.append(leaf)
  return Residuals(computed, tree, tuple(origins))


def join(residuals: Residuals, shared):
  """The pull-back again. `shared` is a tree as `cut` was given, with the same values."""
  sources = {"computed": residuals.computed, "shared": jax.tree.leaves(shared)}
  return jax.tree.unflatten(residuals.tree, [sources[name][place] for name, place in residuals.origins])
