"""Name maps: where each tensor of another program's state dict stands in our variables, and whether a state dict fits.

A name map is a table of `Entry`. Import and export both follow it, so neither can forget what the other does.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from aurora_jax.errors import UserError

NAMES_SHOWN = 8  # of each kind in an error

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Converts an array from their layout to ours, and back. Both are permutations of its elements, hence exact."""

  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
DENSE = Layout(np.transpose, np.transpose)  # [out, in] <-> [in, out]
CONV = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # [O, I, h, w] <-> [h, w, I, O]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a state dict and its place in our variables.

  Attributes:
    name: its name in the state dict.
    shape: its shape there.
    path: the keys of our leaf, joined by "/".
    index: the part of our leaf that the tensor fills; () is all of it.
    layout: the change of layout.
  """

  name: str
  shape: Shape
  path: str
  index: tuple[Any, ...] = ()
  layout: Layout = SAME

  def leaf(self, tree: Mapping[str, Any]) -> Any:
    """Our leaf in a tree of nested dicts."""
    node: Any = tree
    for key in self.path.split("/"):
      node = node[key]
    return node


def check(
  message: str,
  found: Mapping[str, Shape],
  expected: Mapping[str, Shape],
  *,
  optional: Collection[str] = (),
  others: Mapping[str, Sequence[str]] | None = None,
  hint: str = "",
) -> None:
  """Compares names and shapes with those of a table. All misfits go into one error.

  Args:
    message: how the error begins, such as "the checkpoint does not fit the configuration".
    found: shapes of the tensors that are there, by name.
    expected: shapes of the tensors of the table, by name.
    optional: names of the table that may be missing.
    others: further kinds of misfits, {kind: names}, for the same error.
    hint: how the error ends.

  Raises:
    UserError: one line with the number and the first names of what is missing, left over or misshapen, and of `others`.
  """
  kinds = {
    "missing": [name for name in expected if name not in found and name not in optional],
    "left over": sorted(found.keys() - expected.keys()),
    "misshapen": [
      f"{name} is {tuple(found[name])}, expected {tuple(shape)}"
      for name, shape in expected.items()
      if name in found and tuple(found[name]) != tuple(shape)
    ],
    **(others or {}),
  }
  problems = [f"{len(names)} {kind}: {shortened(names)}" for kind, names in kinds.items() if names]
  if problems:
    raise UserError("; ".join([message, *problems] + [hint] * bool(hint)))


def shortened(items: Sequence[str]) -> str:
  """The first `NAMES_SHOWN` items, separated by commas; an ellipsis stands for the others."""
  return ", ".join(items[:NAMES_SHOWN]) + (", ..." if len(items) > NAMES_SHOWN else "")


def shapes(state_dict: Mapping[str, Any]) -> dict[str, Shape]:
  """The shape of every array, by name. No array is read."""
  return {name: tuple(np.shape(array)) for name, array in state_dict.items()}
