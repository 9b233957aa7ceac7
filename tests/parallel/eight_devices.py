"""Tests on eight devices; `test_eight_devices.py` runs them in a process that has eight CPU devices.

The most important one: a whole training step, R1 included, gives on a mesh what it gives on one device.

    python -m pytest tests/parallel/eight_devices.py        (in an environment with eight devices, see there)
    ALL_MESHES=1 python -m pytest ...                       every mesh with and without fsdp and with both exchanges
"""

import collections
import dataclasses
import functools
import math
import os
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from parallel import states

from aurora_jax import config, config_files
from aurora_jax.models import clip as clip_lib
from aurora_jax.models.clip import ClipConfig, ImageConfig, TextConfig
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.runs import checkpoint_manager
from aurora_jax.systems import base
from aurora_jax.systems.aurora import objective as objective_lib
from aurora_jax.systems.aurora.labels import label
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import optimizers
from aurora_jax.training import step as step_lib

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "aurora_64.py"
BATCH, PROMPTS = 8, 3
# Seeds of the state and of its routers' weights in a whole step. Found by trying: with others an expert may get most
# tokens of an image, or a value may lie so close to a kink that rounding decides its side.
STATE_SEED, ROUTER_SEEDS = 6, {"r4_block0": 554, "r8_block0": 4000}
CAPACITY = 3.5  # capacity factor of the exchange

_expert_loads = objective_lib._expert_loads


def _loads_and_experts(routing):
  """The metrics of a step, and the expert of every token. They show how full the buffers of the exchange are, and that
  tokens take the same experts on every mesh."""
  return _expert_loads(routing) | {f"moe/expert/{layer}": item.expert for layer, item in routing.items()}


objective_lib._expert_loads = _loads_and_experts


def experiment(data=0, expert=1, fsdp="", exchange="auto"):
  """Eight pixels, layers of 4 and of 8 experts, and everything that looks across the batch.

  Learning rates and Adam's epsilon are high, so that an update shows the size of its gradient. With the usual epsilon
  the first update is only the sign of the gradient, which is random where the true gradient is zero. The discriminator
  has no attention: its tied queries and keys have a distance of zero to themselves, and the gradient of that root
  in float32 is rounding noise on any number of devices. It has no text layers either: the generator has some, of the
  same module.

  Args:
    data: devices along `data`.
    expert: devices along `expert`.
    fsdp: the devices that dense parameters are sharded over ("all" or "expert"); "" for none.
    exchange: as `config.Mesh` has it.
  """
  whole, replace = config_files.load([f"--config={CONFIG}:test"]), dataclasses.replace
  sizes = {name: getattr(whole, name) for name in ("generator", "discriminator", "loss", "train")}
  rates = {
    name: replace(getattr(whole.optimizer, name), learning_rate=0.02, eps=1e-2)
    for name in ("generator", "discriminator")
  }
  return replace(
    whole,
    generator=replace(
      sizes["generator"],
      resolution=8,
      blocks={4: 1, 8: 1},
      adaptive_kernels={4: 1, 8: 2},
      output_resolutions=(4, 8),
      attention_depth={4: 1, 8: 1},
      experts={4: 4, 8: 8},
      text_attention="uniform",
      mapping_layers=1,
      deformable_max_resolution=4,
    ),
    discriminator=replace(
      sizes["discriminator"],
      resolution=8,
      blocks={8: 1, 4: 1},
      attention_depth={},
      input_resolutions=(8, 4),
      exit_resolutions=(4, 1),
      text_layers=0,
      minibatch_std=4,
      compare_pairs=True,
    ),
    loss=replace(sizes["loss"], clip_augment=True, clip_bank=3, clip_min_resolution=4, generator_matching_weight=0.5),
    optimizer=replace(whole.optimizer, **rates),
    mesh=config.Mesh(data, expert, bool(fsdp), fsdp or "all", exchange, CAPACITY),
    train=replace(sizes["train"], batch_size=BATCH),
  )


@functools.cache
def clip_module():
  tower = dict(width=32, layers=1, heads=2, mlp_width=64)
  return clip_lib.Clip(
    ClipConfig(
      text=TextConfig(vocabulary_size=50, context_length=8, eot_id=49, **tower),
      image=ImageConfig(size=8, patch=4, **tower),
      embedding_width=16,
    )
  )


def to_host(tree):
  return jax.tree.map(np.asarray, tree)


@functools.cache
def inputs():
  """Frozen CLIP with a bank, and a batch. Some captions occur twice."""
  rng = np.random.default_rng(1)
  tokens = np.array([[48, 3 + i // 2, 5 + i, 49, 0, 0, 0, 0] for i in range(BATCH)], np.int32)
  bank = rng.standard_normal((3, 16)).astype(np.float32)
  variables = clip_lib.abstract_variables(clip_module().config)
  frozen = {
    "clip": jax.tree_util.tree_map_with_path(functools.partial(states.drawn, std=0.15), variables),
    "bank": bank / np.linalg.norm(bank, axis=1, keepdims=True),
    "bank_id": np.array([0, 4, 20], np.int32),
  }
  return frozen, {
    "image": rng.uniform(-1, 1, (BATCH, 8, 8, 3)).astype(np.float32),
    "tokens": tokens,
    "caption_id": np.arange(BATCH, dtype=np.int32) // 2,
  }


class Placed(NamedTuple):
  """A system on a mesh, its abstract state and its compiled step: (number, state, frozen, batch) -> (state,
  metrics).
  """

  system: System
  abstract_state: base.TrainState
  step: step_lib.CompiledStep

  def put(self, state):
    """A state on the host where it is stored."""
    return jax.tree.map(lambda leaf, abstract: jax.device_put(leaf, abstract.sharding), state, self.abstract_state)

  def run(self, number, state):
    """A step with the batch of `inputs`."""
    return self.step(number, state, [jax.device_put(inputs()[1], self.system.layout.batch)])


def system_on(wanted, devices=None):
  system = System(wanted, mesh_lib.build(wanted.mesh, wanted.train.batch_size, wanted.expert_counts, devices))
  system.clip = clip_module()
  return system


def place(wanted, devices=None):
  system = system_on(wanted, devices)
  step = step_lib.build(system)
  return Placed(system, step.state, step.compile(jax.device_put(inputs()[0], system.layout.replicated))())


@functools.cache
def on_one_device():
  return place(experiment(), jax.devices()[:1])


@functools.cache
def first_state(routing):
  """A state at step 0, on the host, in which no parameter is zero.

  Routing "spread": the tokens of every image go to many experts, which `overflowing` verifies. "all to one": all tokens
  go to the same expert.
  """
  state = step_lib.abstract_state(system_on(experiment(), jax.devices()[:1]))
  draw = functools.partial(states.drawn, seed=f"{STATE_SEED}/")

  def parameter(path, leaf):
    names = mesh_lib.names_of(path)
    if names[-2:] == ("router", "bias"):
      return np.float32(100 * (np.arange(leaf.size) == 2) if routing == "all to one" else np.zeros(leaf.shape))
    if names[-2:] == ("router", "weight"):
      [seed] = [seed for layer, seed in ROUTER_SEEDS.items() if any(name.startswith(layer) for name in names)]
      return np.random.default_rng(seed).standard_normal(leaf.shape).astype(np.float32)
    # With weak styles all images spread their tokens in a similar way.
    styles = names[-2] in ("style", "mix") and "synthesis" in names
    return draw(path, leaf, std=(0.1 if "router" in names else 0.3) if styles else 1.0)

  def network(shapes):
    params = jax.tree_util.tree_map_with_path(parameter, shapes.params)
    return base.NetworkState(
      params,
      jax.tree_util.tree_map_with_path(draw, shapes.variables),
      jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes.opt_state),
      None if shapes.ema is None else params,
    )

  return base.TrainState(np.int32(0), {name: network(shapes) for name, shapes in state.networks.items()})


def one_step(placed, routing):
  """A step with R1. Returns (state, metrics) on the host."""
  state, metrics = placed.run(0, placed.put(first_state(routing)))
  assert list(metrics) == ["networks", "r1"]
  return state, to_host(metrics)


@functools.cache
def reference(routing):
  state, metrics = one_step(on_one_device(), routing)
  return to_host(state), metrics


MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


@functools.cache
def overflowing(peers):
  """{(routing, layer): whether a device has more tokens for one of `peers` devices than the bounded exchange takes}."""
  found, counts = {}, experiment().generator.experts
  for routing in ("spread", "all to one"):
    metrics = reference(routing)[1]["networks"]
    layers = [name.removeprefix("moe/expert/") for name in metrics if name.startswith("moe/expert/")]
    assert len(layers) == 2
    for layer in layers:
      expert, count = metrics[f"moe/expert/{layer}"], counts[int(layer[1:].split("_")[0])]  # [images, tokens]
      group = min(peers, count)
      fullest = max(np.bincount(row, minlength=group).max() for row in expert // (count // group))
      found[routing, layer] = fullest > CAPACITY * expert.shape[1] / group
  return found


# (data, expert, axes of fsdp, exchange). Each takes half a minute to compile, so the default is two: both axes with
# fsdp over `expert` (as on the pods) and the exchange of tokens, and `data` alone. The move between meshes needs both.
# A whole step with the exchange of weights, without fsdp or with fsdp over both axes runs with ALL_MESHES only; that
# exchange by itself is tested in exchange_eight_devices.py.
CHOSEN = [(2, 4, "expert", "tokens"), (8, 1, "all", "auto")]
EVERY = [
  (*mesh, fsdp, mode)
  for mesh in MESHES
  for fsdp in ("", "all", "expert")
  if mesh[1] > 1 or fsdp != "expert"
  for mode in ("tokens", "weights")
]


@functools.cache
def on_mesh(*case):
  return place(experiment(*case))


@pytest.mark.parametrize("case", EVERY if os.environ.get("ALL_MESHES") else CHOSEN, ids=str)
def test_a_training_step_equals_the_single_device_step(case):
  placed = on_mesh(*case)
  for (routing, _), overflows in overflowing(case[1]).items() if 1 < case[1] else ():
    assert overflows == (routing == "all to one" and case[1] > 3)  # so both branches of the bounded exchange run
  for routing in ("spread", "all to one"):
    state, metrics = one_step(placed, routing)
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(placed.abstract_state), strict=True):
      assert leaf.sharding == abstract.sharding
    found = states.differences(reference(routing), (to_host(state), metrics))
    print(case, routing, *found[:6], sep="\n  ")
    assert found[0][0] < 1e-5, f"{routing}: {found[:10]}"


def two_of_a_kind(params, abstract):
  """Parameters without those of which two others have the same label, shape and sharding: there is less to compile."""
  seen, chosen = collections.Counter(), {}
  for (path, leaf), shape in zip(
    jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(abstract), strict=True
  ):
    kind = label(path)._replace(module="", group=""), leaf.shape, shape.sharding
    seen[kind] += 1
    if seen[kind] <= 2:
      inner = chosen
      for key in path[:-1]:
        inner = inner.setdefault(key.key, {})
      inner[path[-1].key] = leaf, shape.sharding
  pair = lambda entry: isinstance(entry, tuple)
  return tuple(jax.tree.map(lambda entry: entry[i], chosen, is_leaf=pair) for i in (0, 1))


def test_muon_gives_sharded_weights_the_same_updates():
  state = step_lib.abstract_state(system_on(experiment(*CHOSEN[0])))
  optimizer = optimizers.make(config.Optimizer(method="muon"), label)

  @jax.jit
  def updates(gradients):
    return optimizer.update(gradients, optimizer.init(gradients), gradients, keep=lambda new, old: new)[0]

  for network in ("generator", "discriminator"):
    gradients, shardings = two_of_a_kind(*(whole.networks[network].params for whole in (first_state("spread"), state)))
    sharded = jax.device_put(gradients, shardings)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    expected, got = to_host(updates(gradients)), to_host(updates(sharded))
    # Five iterations multiply the rounding errors in a matrix's smallest directions by up to 3.4**5.
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(got), strict=True):
      assert states.relative(a, b) < 1e-4, jax.tree_util.keystr(path)


def test_unsharded_parameters_are_not_kept_for_the_backward_pass():
  """With and without fsdp the generator's forward pass keeps the same: no parameters, and little of rematerialized
  blocks.
  """
  kept, (frozen, batch) = {}, inputs()
  text = jax.eval_shape(lambda: clip_module().apply(frozen["clip"], batch["tokens"], method="encode_text"))
  for fsdp, remat in (("", True), ("all", True), ("all", False)):
    wanted = experiment(2, 4, fsdp, "tokens")
    wanted = dataclasses.replace(
      wanted,
      generator=dataclasses.replace(
        wanted.generator, remat=remat, loop_layers=remat, attention_depth={8: 1}, deformable_max_resolution=0
      ),
    )
    system = system_on(wanted)
    objective = objective_lib.Objective(system, optimizers.Updates(system, 1))

    def forward(state, text):
      return objective._generate(state, text, jax.random.key(0)).pull_back

    state = step_lib.abstract_state(system)
    kept[fsdp, remat] = sorted(leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(forward, state, text)))
  large = {leaf.shape for leaf in jax.tree.leaves(state.networks["generator"].params) if leaf.size >= mesh_lib.SMALL}
  assert kept["all", True] == kept["", True] and not large & set(kept["all", True])
  size = lambda shapes: sum(math.prod(shape) for shape in shapes)
  assert size(kept["all", True]) < 0.5 * size(kept["all", False])


def test_a_run_moves_between_meshes(tmp_path):
  """Saved on 8 x 1, restored on 2 x 4 (sharded differently) and on one device: the same bits, and the same next
  losses.
  """

  def next_step(placed, state):
    return {
      name: to_host(value) for name, value in placed.run(1, state)[1]["networks"].items() if name.startswith("loss/")
    }

  wanted, whole = experiment(*CHOSEN[1]), on_mesh(*CHOSEN[1])
  state = whole.put(first_state("spread"))
  pieces = state.networks["discriminator"].params["r8_block0"]["conv1"]["weight"].addressable_shards
  assert len({str(piece.index) for piece in pieces}) == 8  # it is sharded
  with checkpoint_manager.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, state, config_files.to_mapping(wanted))
    saved = to_host(state)
    expected = next_step(whole, state)  # the uninterrupted run goes on while the files are written
    checkpoints.wait()
    assert len(expected) > 4
    for placed in (on_one_device(), on_mesh(*CHOSEN[0])):
      restored, _ = checkpoints.restore(placed.abstract_state)
      trees = saved, restored, placed.abstract_state
      for before, after, a in zip(*map(jax.tree.leaves, trees), strict=True):
        assert after.sharding == a.sharding
        np.testing.assert_array_equal(before, after)
      for name, value in next_step(placed, restored).items():
        np.testing.assert_allclose(
          value, expected[name], rtol=1e-6, err_msg=f"{placed.system.layout.mesh.shape} {name}"
        )
