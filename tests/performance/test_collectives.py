"""Collectives counted in hand-made programs with known answers, and in a real one."""

import os
import pathlib
import subprocess
import sys

import pytest

from aurora_jax.performance import collectives
from aurora_jax.performance.collectives import Collective

MESH = {"data": 2, "expert0": 2, "expert1": 2}

_PROGRAM = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]) parameter(0)
  %ar = f32[4,8]{1,0} all-reduce(%v), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add, metadata={op_name="all_gather"}
  ROOT %t = (s32[], f32[4,8]) tuple(%i, %ar)
}

%inner_condition (p: (s32[], f32[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%outer_body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %w = (s32[], f32[4,8]) while(%p), condition=%inner_condition, body=%inner_body
  ROOT %ag = f32[8,8]{1,0} all-gather(%v), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%outer_condition (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt = pred[] custom-call(%p)
}

%exchanged (p: f32[8,4]) -> f32[8,4] {
  ROOT %a2a = f32[8,4]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%gathered (p: f32[8,4]) -> f32[8,4] {
  %big = f32[800,4]{1,0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %fused = f32[8,4] fusion(%big), kind=kLoop, calls=%add
}

%all-reduce-scatter.1 (input: bf16[4,8]) -> bf16[1,8] {
  %ars = bf16[4,8]{1,0} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %cut = bf16[1,8]{1,0} dynamic-slice(%ars, %device, %zero), dynamic_slice_sizes={1,8}
}

ENTRY %main (p0: f32[4,8]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %w = (s32[], f32[4,8]) while(%t), condition=%outer_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %c = f32[8,4] conditional(%pred, %t, %t), branch_computations={%gathered, %exchanged}, metadata={op_name="cond"}
  %start = ((bf16[2,16]{1,0}), bf16[16,16]{1,0}) all-gather-start(%p0), replica_groups={}, dimensions={0}
  %done = bf16[16,16]{1,0} all-gather-done(%start)
  %piece = bf16[1,8]{1,0} fusion(%p0), kind=kCustom, calls=%all-reduce-scatter.1
  %rs = (f32[1,8]{1,0}, f32[2]{0}) reduce-scatter(%a, %b), replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={0}
  %permute = (f32[10]{0}, f32[10]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p0), source_target_pairs={{0,4},{4,0}}
  ROOT %out = f32[4,8] copy(%p0)
}
"""  # noqa: E501


def _by(found, kind, fallback=False):
  matching = [(item, times) for item, times in found.items() if item.kind == kind and item.fallback == fallback]
  assert len(matching) == 1, matching
  return matching[0]


def test_kinds_sizes_axes_and_times():
  found, unknown = collectives.of_program(_PROGRAM, MESH)
  assert unknown == 0

  reduced, times = _by(found, "all-reduce")
  assert times == 3 * 5  # a loop of 5 by its condition, in one of 3 by the compiler's note
  assert (reduced.axes, reduced.size, reduced.received) == (("expert1",), 128, 128)  # 2 * 128 * 1/2

  permuted, times = _by(found, "collective-permute")
  assert (permuted.axes, permuted.size, permuted.received, times) == (("data",), 40, 40, 1)

  scattered = {
    item.axes: (item.size, item.received, times) for item, times in found.items() if item.kind == "reduce-scatter"
  }
  assert scattered == {
    ("data",): (80, 40, 1),  # results are halves of 64 + 16
    ("expert0", "expert1"): (64, 48, 1),
  }  # a TPU's fusion: 4 x 8 of two bytes, three quarters of it

  gathers = {
    item.axes: (item.size, item.received, times)
    for item, times in found.items()
    if item.kind == "all-gather" and not item.fallback
  }
  assert gathers == {("data",): (256, 128, 3), ("data", "expert0", "expert1"): (512, 448, 1)}


def test_of_a_conditional_the_exchange_counts_and_the_rest_is_its_fallback():
  found, _ = collectives.of_program(_PROGRAM, MESH)
  exchange, times = _by(found, "all-to-all")
  assert (exchange.axes, exchange.size, exchange.received, times) == (("expert0", "expert1"), 128, 96, 1)
  fallback, _ = _by(found, "all-gather", fallback=True)
  assert fallback.size == 800 * 4 * 4  # larger, and yet not what counts


def test_a_loop_without_a_known_length_counts_once_and_is_told():
  text = _PROGRAM.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
  found, unknown = collectives.of_program(text, MESH)
  assert unknown == 1 and _by(found, "all-reduce")[1] == 5


@pytest.mark.parametrize(
  "groups, expected",
  [
    ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
    ("[2,2]<=[4]", ((0, 1), (2, 3))),
    ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("mesh['x'=2,'y'=2] {'y'}", ((0, 1), (2, 3))),
    ("mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
    ("mesh['x'=2,'y'=2] {'x','y'}", ((0, 1, 2, 3),)),
    ("mesh['x'=4] {'x':(1)2}", ((0, 2), (1, 3))),
    ("mesh['x'=4] {'x':(2)2}", ((0, 1), (2, 3))),
    ("mesh['x'=2,'y'=1,'z'=2], device_ids=([2,2]T(1,0)) {'x'}", ((0, 1), (2, 3))),
    ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", ((0, 2), (1, 3))),
  ],
)
def test_every_way_of_writing_groups(groups, expected):
  text = f"""ENTRY %main (p: f32[4]) -> f32[4] {{
  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}"""
  found, _ = collectives.of_program(text, {"data": 4})
  assert next(iter(found)).groups == expected


def test_an_unknown_way_of_writing_groups_is_said():
  text = "ENTRY %m (p: f32[]) -> f32[] {\n  %r = f32[] all-reduce(%p), replica_groups=torus(4)\n}"
  with pytest.raises(ValueError, match="unknown form: replica_groups=torus"):
    collectives.of_program(text, {"data": 4})
  with pytest.raises(ValueError, match="no ENTRY"):
    collectives.of_program("hello", {"data": 4})


def test_bytes_received_are_those_of_a_ring():
  groups = ((0, 1, 2, 3),)
  received = {kind: Collective(kind, ("data",), 1000, groups).received for kind in collectives.KINDS}
  assert received["all-gather"] == received["reduce-scatter"] == received["all-to-all"] == 750
  assert received["all-reduce"] == 1500 and received["collective-permute"] == 1000


_REAL = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from aurora_jax.performance import collectives, flop_count

mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)

def body(x, w):
  def turn(x, _):
    return jax.lax.psum(x @ w, "expert"), None
  x, _ = jax.lax.scan(turn, x, None, length=7)
  return jax.lax.all_gather(x, "data", tiled=True)

f = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), check_vma=False)
shape = lambda s, p: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, p))
traced = jax.jit(f).trace(shape((32, 16), P("data")), shape((16, 16), P()))
# Every device does its share, along `expert` all the same one.
assert flop_count.of_jaxpr(traced.jaxpr.jaxpr) == 8 * 7 * 2 * 16 * 16 * 16
found, unknown = collectives.of_program(traced.lower().compile().as_text(), dict(mesh.shape))
rows = {(item.kind, item.axes): (item.size, times) for item, times in found.items()}
assert rows == {("all-reduce", ("expert",)): (1024, 7), ("all-gather", ("data",)): (2048, 1)}, rows
assert unknown == 0
print("as expected")
"""


def test_a_collective_that_runs_beside_several_computations_counts_once():
  gather = (
    "  %g = f32[8,8]{1,0} all-gather(%p), channel_id=CHANNEL, replica_groups={{0,4},{1,5},{2,6},{3,7}}, "
    'dimensions={0}, frontend_attributes={chain_id="CHAIN"}\n'
  )
  fused = lambda name, chain: (
    f"%{name} (p: f32[4,8]) -> f32[8,8] {{\n" + gather.replace("CHAIN", chain).replace("CHANNEL", "3" + chain) + "}\n\n"
  )
  calls = "".join(f"  %c{i} = f32[8,8] fusion(%p0), kind=kOutput, calls=%{name}\n" for i, name in enumerate("abc"))
  text = (
    fused("a", "1")
    + fused("b", "1")
    + fused("c", "2")
    + "ENTRY %main (p0: f32[4,8]) -> f32[4,8] {\n  %p0 = f32[4,8]{1,0} parameter(0)\n"
    + calls
    + "}\n"
  )
  item, times = _by(collectives.of_program(text, MESH)[0], "all-gather")
  assert (item.axes, item.size, times) == (("data",), 256, 2)


@pytest.mark.slow
def test_a_real_program_on_eight_devices():
  done = subprocess.run(
    [sys.executable, "-c", _REAL],
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
    cwd=pathlib.Path(__file__).parents[2],
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
  )
  assert done.stdout.strip() == "as expected", done.stderr[-3000:]
