"""The one check of names and shapes that every import of foreign weights uses."""

import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.interop import name_map

EXPECTED = {"a.weight": (2, 3), "a.bias": (3,), "scale": ()}


def test_a_state_dict_that_fits():
  found = {"scale": (), "a.bias": (3,), "a.weight": (2, 3)}
  name_map.check("does not fit", found, EXPECTED)
  name_map.check("does not fit", found, EXPECTED, others={"odd": []}, hint="never shown")
  name_map.check("does not fit", {}, {})


def test_all_kinds_are_in_one_error():
  found = {"a.weight": (3, 2), "a.bias": (3,), "z": (1,), "extra": (4,)}
  with pytest.raises(UserError) as raised:
    name_map.check("does not fit", found, EXPECTED, others={"unreadable": ["b", "c"]}, hint="try another")
  assert str(raised.value) == (
    "does not fit; 1 missing: scale; 2 left over: extra, z; 1 misshapen: a.weight is (3, 2), expected (2, 3); "
    "2 unreadable: b, c; try another"
  )


def test_the_order_is_that_of_the_table():
  with pytest.raises(UserError, match="^no; 3 missing: a.weight, a.bias, scale$"):
    name_map.check("no", {}, EXPECTED)


def test_optional_names_may_be_missing_but_not_misshapen():
  found = {"a.weight": (2, 3), "scale": ()}
  name_map.check("no", found, EXPECTED, optional=["a.bias"])
  with pytest.raises(UserError, match=r"^no; 1 misshapen: a.bias is \(4,\), expected \(3,\)$"):
    name_map.check("no", found | {"a.bias": (4,)}, EXPECTED, optional=["a.bias"])
  with pytest.raises(UserError, match="^no; 1 missing: scale$"):
    name_map.check("no", {"a.weight": (2, 3)}, EXPECTED, optional=["a.bias"])


def test_an_axis_of_one_is_a_shape_of_its_own():
  with pytest.raises(UserError, match=r"scale is \(1,\), expected \(\)"):
    name_map.check("no", {"scale": (1,)}, {"scale": ()})


def test_many_names_are_counted_and_cut():
  expected = {f"layer{i}": (1,) for i in range(20)}
  with pytest.raises(UserError) as raised:
    name_map.check("no", {}, expected)
  names = ", ".join(f"layer{i}" for i in range(name_map.NAMES_SHOWN))
  assert str(raised.value) == f"no; 20 missing: {names}, ..."
  assert name_map.shortened(["a"] * name_map.NAMES_SHOWN) == ", ".join(["a"] * name_map.NAMES_SHOWN)


def test_shapes_reads_no_array():
  class Unreadable:
    shape = (2, 5)

    def __array__(self, dtype=None, copy=None):
      raise AssertionError("read")

  assert name_map.shapes({"a": Unreadable(), "b": np.zeros(()), "c": [[1, 2]]}) == {"a": (2, 5), "b": (), "c": (1, 2)}


@pytest.mark.parametrize("layout", [name_map.SAME, name_map.DENSE, name_map.CONV])
def test_layouts_are_their_own_inverses(layout):
  array = np.arange(2 * 3 * 4 * 5).reshape((2, 3, 4, 5))
  array = array[:, :, 0, 0] if layout is name_map.DENSE else array
  np.testing.assert_array_equal(layout.to_theirs(layout.to_ours(array)), array)


def test_layouts_by_hand():
  assert name_map.DENSE.to_ours(np.array([[1, 2, 3], [4, 5, 6]])).tolist() == [[1, 4], [2, 5], [3, 6]]
  kernel = np.arange(2 * 3 * 4 * 5).reshape((2, 3, 4, 5))  # [O, I, h, w]
  ours = name_map.CONV.to_ours(kernel)
  assert ours.shape == (4, 5, 3, 2) and ours[3, 1, 2, 0] == kernel[0, 2, 3, 1]


def test_the_leaf_of_an_entry():
  tree = {"params": {"dense": {"kernel": np.ones((4, 2, 3))}}}
  entry = name_map.Entry("dense.1.weight", (3, 2), "params/dense/kernel", (1,), name_map.DENSE)
  assert entry.leaf(tree) is tree["params"]["dense"]["kernel"]
  assert entry.layout.to_theirs(entry.leaf(tree)[entry.index]).shape == entry.shape
