"""Checkpoints: exact, on any mesh, complete or not at all."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aurora_jax.errors import UserError
from aurora_jax.runs import checkpoint_manager, checkpoint_reader, fingerprint, retention

_ROOT = pathlib.Path(__file__).parents[2]


@flax.struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt: object
  key: jax.Array


def _init(width=64):
  params = {
    "a": {"kernel": jax.random.normal(jax.random.key(1), (width, 33)), "bias": jnp.zeros(33, jnp.bfloat16)},
    "b": (jnp.arange(5, dtype=jnp.uint8), jnp.float32(3.5)),
  }
  opt = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params["a"])
  return State(jnp.int32(0), params, opt, jax.random.key(7))


@functools.partial(jax.jit, donate_argnums=0)
def _advance(state):
  kernel = jnp.sin(state.params["a"]["kernel"] * 1.7 + state.step)
  return state.replace(step=state.step + 1, params=state.params | {"a": state.params["a"] | {"kernel": kernel}})


def _raw(tree):
  """A copy as numpy arrays; typed keys by their data."""

  def raw(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    return np.array(leaf, copy=True)

  return jax.tree.map(raw, tree)


def _assert_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@pytest.mark.slow
def test_saved_while_the_state_is_donated_on(tmp_path):
  """The next steps write into the very buffers that are being saved."""
  state = jax.jit(_init)()
  copies = {}
  with checkpoint_manager.Checkpoints(tmp_path, retention.Policy(newest=0)) as checkpoints:
    for step in range(1, 31):
      state = _advance(state)
      if step % 5 == 0:
        copies[step] = _raw(state)
        checkpoints.save(step, state, {"name": "x"}, {"at": step})
    checkpoints.wait()
    assert checkpoint_reader.steps(tmp_path) == sorted(copies)
    for step, expected in copies.items():
      restored, progress = checkpoints.restore(jax.eval_shape(_init), step)
      assert isinstance(restored, State) and progress == {"at": step}
      _assert_equal(_raw(restored), expected)
      assert jnp.array_equal(jax.random.normal(restored.key), jax.random.normal(jax.random.key(7)))
  assert checkpoint_reader.stored_config(tmp_path) == {"name": "x"}
  step, parts = checkpoint_reader.read(tmp_path, {"params": jax.eval_shape(_init).params})
  assert step == 30 and list(parts) == ["params"]
  restored, expected = parts["params"], copies[30].params
  _assert_equal(_raw(restored["a"]), expected["a"])
  _assert_equal(_raw(tuple(restored["b"])), expected["b"])


def test_the_newest_are_kept(tmp_path):
  state = jax.jit(_init)()
  with checkpoint_manager.Checkpoints(tmp_path, retention.Policy(newest=2)) as checkpoints:
    for step in (3, 5, 8, 9):
      checkpoints.save(step, state, {})
      checkpoints.save(step, state, {})  # again: nothing happens
  assert checkpoint_reader.steps(tmp_path) == [8, 9]
  assert checkpoint_reader.newest(tmp_path) == 9
  assert checkpoint_reader.size_bytes(tmp_path, 9) > 0
  assert checkpoint_reader.newest(tmp_path / "missing") is None


def test_remains_of_a_cut_off_save_are_not_taken_for_a_checkpoint(tmp_path):
  state = jax.jit(_init)()
  with checkpoint_manager.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(4, state, {})
  half = tmp_path / "8.orbax-checkpoint-tmp"
  (half / "state.orbax-checkpoint-tmp").mkdir(parents=True)
  (half / "_CHECKPOINT_METADATA").write_text(
    (tmp_path / "4/_CHECKPOINT_METADATA").read_text().replace("commit_timestamp_nsecs", "nothing")
  )
  assert checkpoint_reader.newest(tmp_path) == 4
  with checkpoint_manager.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.newest() == 4
    checkpoints.save(8, state, {})
  assert checkpoint_reader.steps(tmp_path) == [4, 8]


def test_fingerprint_depends_on_every_bit_and_on_nothing_else(tmp_path):
  state = jax.jit(_init)()
  bias = state.params["a"]["bias"].at[3].set(-0.0)  # equal in value, not in its bits
  other = state.replace(params=state.params | {"a": state.params["a"] | {"bias": bias}})
  for name, what, progress in (("one", state, {"x": 1}), ("two", state, {"x": 2}), ("other", other, {"x": 1})):
    with checkpoint_manager.Checkpoints(tmp_path / name) as checkpoints:
      checkpoints.save(1, what, {"name": name}, progress)
  one, two, other = (fingerprint.of_checkpoint(tmp_path / name)[1] for name in ("one", "two", "other"))
  assert one == two and one != other and len(one) == 64


def test_another_architecture_is_named(tmp_path):
  with checkpoint_manager.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, jax.jit(_init)(), {})
    with pytest.raises(UserError, match=r"params/a/kernel has shape \(64, 33\), wanted \(65, 33\)"):
      checkpoints.restore(jax.eval_shape(lambda: _init(65)))
    abstract = jax.eval_shape(_init)
    renamed = abstract.replace(params={"a": {"kern": abstract.params["a"]["kernel"]}, "b": abstract.params["b"]})
    with pytest.raises(UserError, match="it has no params/a/kern; it has params/a/bias besides; it has params/a/ker"):
      checkpoints.restore(renamed)


def test_what_cannot_be_read_is_named(tmp_path):
  with checkpoint_manager.Checkpoints(tmp_path) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, jax.jit(_init)(), {})
  abstract = jax.eval_shape(_init)
  for path in (tmp_path / "2/state").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      path.write_bytes(path.read_bytes()[:-200])
  with checkpoint_manager.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match="checkpoint .*/2 cannot be read: .*remove that folder") as error:
      checkpoints.restore(abstract)
    assert "\n" not in str(error.value)
    checkpoints.restore(abstract, 1)
    with pytest.raises(UserError, match="no checkpoint of step 5 in"):
      checkpoints.restore(abstract, 5)
  with pytest.raises(UserError, match="cannot be read"):
    fingerprint.of_checkpoint(tmp_path)
  with pytest.raises(UserError, match="no checkpoint in"):
    checkpoint_reader.read(tmp_path / "empty", {"params": abstract.params})


@pytest.mark.slow
def test_restored_on_other_meshes(tmp_path):
  """Saved on one device, on a mesh of 4 and on one of 2 x 2 by processes of four devices: bitwise the same state."""
  state = jax.jit(_init)()
  with checkpoint_manager.Checkpoints(tmp_path / "one") as checkpoints:
    checkpoints.save(1, state, {})
  code = """
import json, sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
sys.path.insert(0, sys.argv[2])
import test_checkpoint_manager as t
from aurora_jax.runs import checkpoint_manager
def abstract(mesh, spec):
  def place(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                sharding=NamedSharding(mesh, spec if leaf.shape == (64, 33) else P()))
  return jax.tree.map(place, jax.eval_shape(t._init))
flat = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
square = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
root = sys.argv[1]
for source, target, mesh, spec in (("one", "flat", flat, P("data")), ("flat", "square", square, P(("expert", "data")))):
  folders = (checkpoint_manager.Checkpoints(f"{root}/{name}") for name in (source, target))
  with next(folders) as old, next(folders) as new:
    state, _ = old.restore(abstract(mesh, spec))
    assert len(state.params["a"]["kernel"].sharding.device_set) == 4
    new.save(1, state, {})
"""
  subprocess.run(
    [sys.executable, "-c", code, str(tmp_path), str(pathlib.Path(__file__).parent)],
    check=True,
    timeout=120,
    env=os.environ | {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
  )
  with checkpoint_manager.Checkpoints(tmp_path / "square") as checkpoints:
    restored, _ = checkpoints.restore(jax.eval_shape(_init))
  _assert_equal(_raw(restored), _raw(state))
  assert len({fingerprint.of_checkpoint(tmp_path / name)[1] for name in ("one", "flat", "square")}) == 1


def test_config_item_carries_its_fingerprint(tmp_path):
  with checkpoint_manager.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, jax.jit(_init)(), {"b": 1, "a": [1, 2]})
  stored = json.loads((tmp_path / "1/config/metadata").read_text())
  assert stored["experiment"] == {"b": 1, "a": [1, 2]} and len(stored["fingerprint"]) == 64
