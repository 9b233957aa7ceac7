"""One-to-one maps between our variables and the state dict of a PyTorch twin.

A twin is the PyTorch form of a generator of ours, `systems/NAME/modeling_NAME.py`. Every array of ours is one tensor of
the twin, under another name and in another layout. Layouts are permutations, so a round trip is exact to the bit.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop import name_map
from aurora_jax.interop.name_map import DENSE, SAME, Layout

__all__ = ["DENSE", "SAME", "Entry", "Layout", "Path", "check", "from_torch", "permuted", "shapes", "table", "to_torch"]

Path = tuple[str, ...]


def permuted(*axes: int) -> Layout:
  """The twin's axes in terms of ours: `numpy.transpose` and its inverse."""
  inverse = tuple(int(axis) for axis in np.argsort(axes))
  return Layout(to_ours=lambda array: array.transpose(inverse), to_theirs=lambda array: array.transpose(axes))


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array.

  Attributes:
    name: in the twin's state dict.
    path: the keys of our leaf, the collection first.
    layout: the change of layout.
    shape: in the twin.
    dtype: of ours, and of the twin's: float32, or an integer type.
    part: (i, L) if the tensor is part i of a leaf with a leading axis of L; None: it is the whole leaf.
  """

  name: str
  path: Path
  layout: Layout
  shape: tuple[int, ...]
  dtype: np.dtype
  part: tuple[int, int] | None = None

  @property
  def values(self) -> int:
    """Number of values in the tensor."""
    return math.prod(self.shape)


def table(abstract: Mapping[str, Any], place: Callable[[Path, int], tuple[str, Layout]]) -> list[Entry]:
  """The map of a generator.

  Args:
    abstract: the variables' tree with anything that has a shape and a dtype for leaves, such as `jax.ShapeDtypeStruct`.
    place: gives the twin's name and layout of a leaf by its path, the collection first, and its number of axes. A name
      with "{}" in it means one tensor for every index of the leaf's first axis, and the layout is that of one.

  Returns:
    All entries, leaf by leaf.

  Raises:
    ValueError: `place` gives two leaves the same name.
  """
  entries = []
  for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
    path = tuple(key.key for key in keys)
    name, layout = place(path, len(leaf.shape))
    parts = [(i, leaf.shape[0]) for i in range(leaf.shape[0])] if "{}" in name else [None]
    # A strided view of one element costs nothing, whatever its shape.
    probe = np.broadcast_to(np.zeros((), np.float32), leaf.shape if parts == [None] else leaf.shape[1:])
    shape = layout.to_theirs(probe).shape
    entries += [Entry(name.format(*part or ()), path, layout, shape, np.dtype(leaf.dtype), part) for part in parts]
  names = [entry.name for entry in entries]
  if len(set(names)) < len(names):
    raise ValueError(f"two arrays have the same name: {sorted(name for name in set(names) if names.count(name) > 1)}")
  return entries


def shapes(entries: Sequence[Entry]) -> dict[str, tuple[int, ...]]:
  """{name: shape} of the twin's state dict."""
  return {entry.name: entry.shape for entry in entries}


def to_torch(variables: Mapping[str, Any], entries: Sequence[Entry]) -> Iterator[tuple[str, np.ndarray]]:
  """Our variables as the twin's, one array at a time.

  Args:
    variables: a tree with at least the arrays of the map; more are ignored, such as those of later stages.
    entries: as of `table`.

  Yields:
    (name, contiguous array).

  Raises:
    UserError: an array is missing or of another shape.
  """
  for entry in entries:
    leaf = variables
    for key in entry.path:
      leaf = leaf.get(key) if isinstance(leaf, Mapping) else None
    array = None if leaf is None else np.asarray(leaf)
    if array is not None and entry.part:
      array = array[entry.part[0]] if array.ndim and len(array) == entry.part[1] else None
    found = "missing" if array is None else f"of shape {array.shape}"
    try:
      array = None if array is None else entry.layout.to_theirs(array)
    except (ValueError, IndexError):  # too few axes
      array = None
    if array is None or array.shape != entry.shape:
      raise UserError(f"the weights do not fit the configuration: {'/'.join(entry.path)} is {found}")
    yield entry.name, np.array(array, entry.dtype, order="C")


def from_torch(state_dict: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
  """The inverse of `to_torch`, exact to the bit.

  Args:
    state_dict: name -> array (anything with a shape that `np.asarray` takes, `interop.stored_array.StoredArray` too).
      Arrays are taken one at a time.
    entries: as of `table`.

  Returns:
    The variables, numpy arrays of their own.

  Raises:
    UserError: lists what is missing, left over or misshapen.
  """
  check(state_dict, entries)
  variables: dict[str, Any] = {}
  for entry in entries:
    node = variables
    for key in entry.path[:-1]:
      node = node.setdefault(key, {})
    array = np.array(entry.layout.to_ours(np.asarray(state_dict[entry.name])), entry.dtype, order="C")
    if entry.part is None:
      node[entry.path[-1]] = array
    else:
      index, count = entry.part
      node.setdefault(entry.path[-1], np.empty((count, *array.shape), entry.dtype))[index] = array
  return variables


def check(state_dict: Mapping[str, Any], entries: Sequence[Entry]) -> None:
  """Raises a UserError, as `from_torch` does, without reading an array."""
  name_map.check("the weights do not fit the configuration", name_map.shapes(state_dict), shapes(entries))
