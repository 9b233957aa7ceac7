"""Meshes and sharding rules on abstract devices: meshes that fit, meshes that are refused, shardings of parameters."""

import dataclasses
import itertools
import math
import pathlib

import jax
import pytest
from jax.sharding import PartitionSpec

from aurora_jax import config, config_files
from aurora_jax.cli import main
from aurora_jax.errors import UserError
from aurora_jax.parallel import experts, mesh
from aurora_jax.systems.aurora import exchange_report
from aurora_jax.systems.aurora.labels import label
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import step

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def experiment(data=0, expert=1, fsdp=False, exchange="auto", counts=None, batch=64, over="all"):
  base = config_files.load([f"--config={CONFIGS / 'aurora_64.py'}"])
  generator = dataclasses.replace(base.generator, experts=config.PerResolution(counts)) if counts else base.generator
  return dataclasses.replace(
    base,
    generator=generator,
    mesh=config.Mesh(data, expert, fsdp, over, exchange),
    train=dataclasses.replace(base.train, batch_size=batch),
  )


def build(wanted, devices):
  return mesh.build(wanted.mesh, wanted.train.batch_size, wanted.expert_counts, devices)


@pytest.mark.parametrize(
  "size,counts,expected",
  [
    (16, (4, 8, 16, 16), (4, 2, 2)),
    (8, (4, 8, 16), (4, 2)),
    (4, (4, 8, 16), (4,)),
    (2, (4, 8, 16), (2,)),
    (1, (4, 8), (1,)),
    (16, (4, 8), (4, 2, 2)),
    (12, (3, 4), (3, 4)),
    (12, (4, 6), (4, 3)),
    (5, (4,), (5,)),
    (1, (), (1,)),
  ],
)
def test_sub_axes(size, counts, expected):
  assert mesh.sub_axes(size, counts) == expected
  assert math.prod(expected) == size


@pytest.mark.parametrize(
  "sizes,count,expected",
  [
    ((4, 2, 2), 16, (0, 3)),
    ((4, 2, 2), 8, (0, 2)),
    ((4, 2, 2), 4, (0, 1)),
    ((4, 2, 2), 12, (0, 1)),
    ((3, 4), 4, (1, 2)),
    ((3, 4), 12, (0, 2)),
    ((5,), 4, (0, 0)),
  ],
)
def test_longest_run(sizes, count, expected):
  assert mesh.longest_run(sizes, count) == expected


def test_rules_name_axes_and_find_collisions():
  rules = mesh.Rules(batch=("data", "expert0", "expert1"), experts=("expert0",), dense=("data",))
  assert rules.spec("batch") == PartitionSpec(("data", "expert0", "expert1"))
  assert rules.spec("experts", None) == PartitionSpec("expert0")
  assert rules.spec(None, "dense") == PartitionSpec(None, "data")
  assert rules.spec("experts", "dense") == PartitionSpec("expert0", "data")
  with pytest.raises(ValueError, match="'batch' and 'dense' of .* both lie along mesh axis 'data'"):
    rules.spec("batch", "dense")
  with pytest.raises(ValueError, match="no logical axis 'width'; there are batch, experts, dense"):
    rules.spec("width")


@pytest.mark.parametrize(
  "wanted,devices,parts",
  [
    (
      experiment(2, 3),
      8,
      [
        "mesh.data=2 x mesh.expert=3 makes 6 devices, there are 8",
        "experts 4 at 8 px, 8 at 16 px",
        "data x expert that fit: 8x1, 4x2, 2x4, 1x8",
      ],
    ),
    (experiment(2, 2), 1, ["mesh.data=2 x mesh.expert=2 makes 4 devices, there are 1", "fit: 1x1"]),
    (experiment(8, 1, batch=12), 8, ["train.batch_size=12 is no multiple of the 8 devices", "fit: none"]),
    (experiment(1, 6, batch=6), 6, ["mesh.expert=6 is 3 times what the experts can be spread over", "fit: 6x1, 3x2"]),
    (experiment(1, 5, batch=5), 5, ["mesh.expert=5 has no divisor in common with the 4 experts at 8 px", "fit: 5x1"]),
    (experiment(1, 32), 32, ["mesh.expert=32 is 2 times what the experts can be", "fit: 32x1, 16x2, 8x4, 4x8, 2x16"]),
    (experiment(4, 2, counts={8: 1, 16: 1, 32: 1, 64: 1}), 8, ["mesh.expert=2, but no layer has more than one expert"]),
    (experiment(0, 3), 8, ["mesh.data=2 x mesh.expert=3 makes 6 devices, there are 8"]),
  ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_the_table(wanted, devices, parts):
  with pytest.raises(UserError) as error:
    build(wanted, devices)
  assert "\n" not in str(error.value)
  for part in parts:
    assert part in str(error.value)


def test_data_takes_what_expert_leaves():
  assert dict(build(experiment(0, 16), 64).mesh.shape) == {"data": 4, "expert0": 4, "expert1": 2, "expert2": 2}
  assert dict(build(experiment(0, 4), 8).mesh.shape) == {"data": 2, "expert": 4}
  with pytest.raises(UserError, match="mesh.data .* got -1"):
    config.Mesh(data=-1)
  with pytest.raises(UserError, match="mesh.exchange .* got 'ring'"):
    config.Mesh(exchange="ring")


@pytest.fixture(scope="module")
def state():
  return step.abstract_state(System(experiment()))


def leaves(layout, tree):
  """[(name, leaf, sharding)] of a part of a network's state."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  stored = jax.tree.leaves(layout.shardings(tree, label))
  return [(jax.tree_util.keystr(path), leaf, sharding) for (path, leaf), sharding in zip(flat, stored, strict=True)]


@pytest.mark.slow
def test_each_expert_lives_along_its_run_with_its_optimizer_state_and_average(state):
  layout = build(experiment(16, 16, fsdp=True, batch=256), 256)
  runs = {4: ("expert0",), 8: ("expert0", "expert1"), 16: ("expert0", "expert1", "expert2")}
  found = 0
  generator = state.networks["generator"]
  for part in (generator.params, generator.ema, generator.opt_state):
    for name, leaf, sharding in leaves(layout, part):
      if "feed_forward" in name and "router" not in name:
        found += 1
        assert sharding.spec == PartitionSpec(runs[leaf.shape[0]] if leaf.shape[0] > 4 else "expert0"), name
        assert sharding.shard_shape(leaf.shape) == (1, *leaf.shape[1:]), name
  assert found == 3 * 4 * 18  # four arrays in each of 18 layers


@pytest.mark.slow
def test_fsdp_cuts_what_is_large_over_as_many_devices_as_divide_it(state):
  whole = build(experiment(16, 16, batch=256), 256)
  cut = build(experiment(16, 16, fsdp=True, batch=256), 256)
  pieces_seen = set()
  generator, discriminator = state.networks["generator"], state.networks["discriminator"]
  for name, leaf, sharding in [
    entry for part in (generator.params, discriminator.params, discriminator.opt_state) for entry in leaves(cut, part)
  ]:
    expert = "feed_forward" in name and "router" not in name
    pieces = max((n for n in (1, 16, 64, 128, 256) if any(size % n == 0 for size in leaf.shape)), default=1)
    if not expert and leaf.size >= mesh.SMALL and pieces > 1:
      pieces_seen.add(pieces)
      assert math.prod(sharding.shard_shape(leaf.shape)) * pieces == leaf.size, name
      axis = [i for i, entry in enumerate(sharding.spec) if entry]
      assert leaf.shape[axis[0]] == max(size for size in leaf.shape if size % pieces == 0)
    elif not expert:
      assert sharding.is_fully_replicated, name
  assert 256 in pieces_seen and len(pieces_seen) > 1
  assert all(sharding.is_fully_replicated for _, _, sharding in leaves(whole, discriminator.params))


@pytest.mark.slow
@pytest.mark.parametrize("data, expert", [(1, 16), (4, 16), (16, 16)])
def test_a_device_keeps_its_share_of_the_state_on_a_pod_of_any_size(state, data, expert):
  layout = build(experiment(data, expert, fsdp=True, batch=256), data * expert)
  params = state.networks["discriminator"].params
  share = sum(math.prod(sharding.shard_shape(leaf.shape)) for _, leaf, sharding in leaves(layout, params))
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert 0 < share - total / (data * expert) < 0.0005 * total  # what is small is whole everywhere


@pytest.mark.slow
def test_cut_over_the_expert_axis_a_device_keeps_the_same_pieces_on_a_pod_of_any_size(state):
  pods = [build(experiment(data, 16, fsdp=True, batch=256, over="expert"), 16 * data) for data in (1, 4, 16)]
  everywhere = build(experiment(1, 16, fsdp=True, batch=256), 16)  # of 16 devices along `expert` these are all
  for layout, network in itertools.product(pods, state.networks.values()):
    for (name, leaf, sharding), (_, _, other) in zip(leaves(layout, network), leaves(everywhere, network)):
      assert sharding.shard_shape(leaf.shape) == other.shard_shape(leaf.shape), name
      assert mesh.DATA not in jax.tree.leaves(tuple(sharding.spec)), name


@pytest.mark.slow
def test_all_that_is_kept_of_a_parameter_lies_where_it_does(state):
  wanted = experiment(16, 16, fsdp=True, batch=256)
  layout = build(wanted, 256)
  stored = step.state_shardings(System(wanted, layout), state)
  assert stored.step == layout.replicated and jax.tree.structure(stored) == jax.tree.structure(state)
  for network in stored.networks.values():
    assert network.opt_state[0].count == layout.replicated and network.opt_state[0].nu == network.params
    assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(network.params))
  assert stored.networks["generator"].ema == stored.networks["generator"].params
  assert stored.networks["discriminator"].ema is None


@pytest.mark.slow
def test_exchange_is_chosen_by_bytes_and_explained():
  few, many = (build(experiment(16, 16, batch=256 * images), 256) for images in (1, 64))
  # One image: 256 tokens of 512 numbers, in fours of 2 x 64 slots from 3 others, there and back, both passes, float32.
  plan = experts.Exchange(few).plan(256, 512, 2048, 8, 4)
  assert plan.group == 8 and plan.capacity == 64 and plan.mode == "tokens"
  assert plan.token_bytes == 2 * 2 * 7 * 64 * 512 * 4
  assert plan.weight_bytes == 2 * 7 * (512 * 4096 + 4096 + 2048 * 512 + 512) * 4
  assert experts.Exchange(many).plan(256 * 64, 512, 2048, 8, 4).mode == "weights"
  assert experts.Exchange(few, "weights").plan(256, 512, 2048, 8, 4).mode == "weights"
  assert experts.Exchange(few, rematerialized=True).plan(256, 512, 2048, 8, 4).token_bytes == plan.token_bytes * 3 // 2
  lines = exchange_report.explain(experts.Exchange(few), experiment().generator, 256)
  assert len(lines) == 4
  assert lines[1].startswith("experts at 16 px: 6 layers of 8, 1 per device along expert0 x expert1 = 8")
  assert "3.7 MB as tokens" in lines[1] and "176.4 MB as weights: tokens (chosen by bytes)" in lines[1]


@pytest.mark.slow
def test_inspect_prints_the_layout_of_every_parameter(capsys):
  command = ["inspect", "--config", f"{CONFIGS / 'aurora_64.py'}:test", "--sharding", "--config.train.batch_size=8"]
  assert main.main(command + ["--devices", "8", "--config.mesh.expert=4", "--config.mesh.fsdp=True"]) == 0
  said = capsys.readouterr().out
  assert "data 2, expert 4 = 8 devices" in said and "1 per device along expert = 4" in said
  assert "feed_forward/in_weight  [4, 16, 128] -> [1, 16, 128] per device, axis 0 along expert" in said
  assert "axis 3 along data" in said and ", whole" in said
  assert main.main(command + ["--config.mesh.data=3", "--config.mesh.expert=2"]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "train.batch_size=8 is no multiple of the 6 devices" in error
  assert main.main(["inspect", "nowhere", "--sharding"]) == 2
  assert "are for a config" in capsys.readouterr().err
