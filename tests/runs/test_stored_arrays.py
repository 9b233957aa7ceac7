"""Reading parts of a checkpoint without Orbax gives what Orbax gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_manager, checkpoint_reader, stored_arrays

PREFIXES = ("networks/generator/ema", "networks/generator/variables")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "checkpoints"
  ema = {"a": {"weight": jnp.arange(6.0).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16)}, "scalar": jnp.float32(2)}
  generator = {"ema": ema, "params": {"b": jnp.zeros(2)}, "variables": {}, "opt_state": (jnp.int32(3), None)}
  with checkpoint_manager.Checkpoints(folder) as checkpoints:
    checkpoints.save(5, {"step": jnp.int32(5), "networks": {"generator": generator}}, {})
  return folder


def by_orbax(monkeypatch, folder):
  monkeypatch.setattr(stored_arrays, "read", lambda *_: None)
  return checkpoint_reader.read_parts(folder, PREFIXES)


def test_the_same_as_by_orbax(folder, monkeypatch):
  names = stored_arrays.read(folder / "5", PREFIXES, lambda array: array)
  assert sorted(names) == [f"networks/generator/ema/{name}" for name in ("a/half", "a/weight", "scalar")]
  step, found = checkpoint_reader.read_parts(folder, PREFIXES)
  other_step, other = by_orbax(monkeypatch, folder)
  assert step == other_step == 5 and jax.tree.structure(found) == jax.tree.structure(other)
  for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(other)):
    assert one.dtype == two.dtype and one.sharding == two.sharding and np.array_equal(one, two)


def test_what_it_cannot_read_is_left_to_orbax(folder, tmp_path):
  assert stored_arrays.read(tmp_path, PREFIXES, lambda array: array) is None
  (tmp_path / "5" / "state").mkdir(parents=True)
  (tmp_path / "5" / "state" / "_METADATA").write_text("{")
  assert stored_arrays.read(tmp_path / "5", PREFIXES, lambda array: array) is None
  with pytest.raises(UserError, match="cannot be read"):
    checkpoint_reader.read_parts(tmp_path, PREFIXES)


def test_a_damaged_store(folder, tmp_path):
  import shutil

  shutil.copytree(folder / "5", tmp_path / "5")
  for path in (tmp_path / "5" / "state" / "d").iterdir():
    path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match="cannot be read"):
    checkpoint_reader.read_parts(tmp_path, PREFIXES)
