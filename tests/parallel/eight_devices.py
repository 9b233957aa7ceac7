"""What holds on eight devices; `test_eight_devices.py` runs it in a process that has them. The last test is the point:
one whole training step, R1 included, is the same on a mesh as on one device.

    python -m pytest tests/parallel/eight_devices.py        (in an environment with eight devices, see there)
    ALL_MESHES=1 python -m pytest ...                       every mesh with and without fsdp and with both exchanges
"""

import dataclasses
import functools
import math
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax import config, config_files
from aurora_jax.models import clip as clip_lib
from aurora_jax.models.clip import ClipConfig, ImageConfig, TextConfig
from aurora_jax.ops import moe, random_keys
from aurora_jax.parallel import experts as experts_lib
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.runs import checkpoint_manager
from aurora_jax.systems import base
from aurora_jax.systems.aurora import generator as generator_lib
from aurora_jax.systems.aurora.labels import label
from aurora_jax.systems.aurora.objective import Objective
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import optimizers
from aurora_jax.training import step as step_lib

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "aurora_64.py"
BATCH, PROMPTS = 8, 3
TOKENS, WIDTH, HIDDEN = 256, 8, 12  # of the exchange by itself
# Of the routers' weights in a whole step; found by trying, so that no expert takes too much of any image.
ROUTER_SEEDS = {"r4_block0": 17, "r8_block0": 2552}
CAPACITY = 3.5


def experiment(data=0, expert=1, fsdp="", exchange="auto"):
  """Eight pixels; layers of 4 and of 8 experts, and whatever looks across the batch switched on.

  `fsdp` names the devices that the rest is cut over, "" for none.

  Rates are high and Adam's epsilon is too, so that an update shows the gradient it was made from: with the usual tiny
  epsilon the first update is only the gradient's sign, a coin toss where the true gradient is zero. The discriminator's
  attention is left out: its tied queries and keys have a distance of zero to themselves, whose root's gradient in
  float32 is rounding noise, on any number of devices.
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
  """Frozen CLIP with a bank, and a batch; some captions occur twice."""
  keys = jax.random.split(jax.random.key(1), 3)
  tokens = np.array([[48, 3 + i // 2, 5 + i, 49, 0, 0, 0, 0] for i in range(BATCH)], np.int32)
  image = jax.random.uniform(keys[0], (BATCH, 8, 8, 3), minval=-1)
  bank = jax.random.normal(keys[2], (3, 16))
  frozen = {
    "clip": clip_module().init(keys[1], tokens, image),
    "bank": bank / jnp.linalg.norm(bank, axis=1, keepdims=True),
    "bank_id": jnp.array([0, 4, 20]),
  }
  return to_host(frozen), {
    "image": np.asarray(image),
    "tokens": tokens,
    "caption_id": np.arange(BATCH, dtype=np.int32) // 2,
  }


class Placed(NamedTuple):
  """A system on a mesh, its abstract state and its compiled step: (number, state, frozen, batch) -> (state, metrics)."""

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
  """A state in which nothing is zero. Routing "spread": every image's tokens go to many experts, which `overflowing`
  makes sure of; "all to one": every token's favourite is the same expert."""
  state = to_host(jax.jit(optimizers.init_state(system_on(experiment(), jax.devices()[:1])))(jax.random.key(0)))

  def stir(path, leaf):
    key = jax.random.fold_in(jax.random.key(2), hash_of(path))
    leaf = np.asarray(leaf + 0.1 * jax.random.normal(key, leaf.shape))
    name = jax.tree_util.keystr(path)
    if "['router']['bias']" in name:
      leaf = leaf * 0 + (100 * (np.arange(leaf.size) == 2) if routing == "all to one" else 0)
    if "['router']['weight']" in name:
      seed = ROUTER_SEEDS["r4_block0" if "r4_block0" in name else "r8_block0"]
      leaf = np.asarray(jax.random.normal(jax.random.key(seed), leaf.shape))
    return leaf.astype(np.float32)

  stirred = {
    name: network.replace(params=jax.tree_util.tree_map_with_path(stir, network.params))
    for name, network in state.networks.items()
  }
  generator = stirred["generator"]
  return state.replace(networks={**stirred, "generator": generator.replace(ema=generator.params)})


def hash_of(path):
  return sum(ord(letter) * (i + 1) for i, letter in enumerate(jax.tree_util.keystr(path))) % 2**31


def one_step(placed, routing):
  """A step with R1. Returns (state, metrics) on the host."""
  state, metrics = placed.run(0, placed.put(first_state(routing)))
  assert list(metrics) == ["networks", "r1"]
  return state, to_host(metrics)


@functools.cache
def reference(routing):
  state, metrics = one_step(on_one_device(), routing)
  return to_host(state), metrics


def routings(devices):
  """Experts of TOKENS tokens: spread, all to one, and such that devices differ in how uneven their own tokens are."""
  token = np.arange(TOKENS)
  return {
    "balanced": token % 8,
    "all to one": np.full(TOKENS, 2),
    "one device uneven": np.where(token < TOKENS // devices, 2, token % 8),
    "to one half": 4 + token % 4,
  }


MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]


# Mesh and experts per layer, which decide how its expert axis is cut; the layer at hand has 8.
CUTS = [
  ((8, 1), (8,)),
  ((4, 2), (8,)),
  ((2, 4), (8,)),
  ((2, 4), (2, 8)),
  ((1, 8), (8,)),
  ((1, 8), (4, 8)),
  ((1, 8), (2, 4, 8)),
]
BACKENDS = [(*cut, "bucket") for cut in CUTS] + [(*cut, "grouped") for cut in CUTS[3::3]]


@pytest.mark.parametrize("mode", ["tokens", "weights"])
@pytest.mark.parametrize("mesh,counts,backend", BACKENDS, ids=str)
def test_exchange_equals_dense_forward_and_backward(mesh, counts, mode, backend):
  sizes = mesh_lib.sub_axes(mesh[1], counts)
  names = ("data", *(f"expert{i}" for i in range(len(sizes))))
  types = (jax.sharding.AxisType.Auto,) * len(names)
  layout = mesh_lib.Layout(
    jax.make_mesh((mesh[0], *sizes), names, axis_types=types), mesh_lib.Rules(batch=names, experts=names[1:])
  )
  exchange = experts_lib.Exchange(layout, mode)
  keys = jax.random.split(jax.random.key(0), 6)
  shapes = (8, WIDTH, 2 * HIDDEN), (8, 2 * HIDDEN), (8, HIDDEN, WIDTH), (8, WIDTH)
  params = moe.ExpertParams(*(jax.random.normal(key, shape) for key, shape in zip(keys, shapes)))
  x, target = (jax.random.normal(key, (TOKENS, WIDTH)) for key in keys[4:])

  def run(expert_ffn, how):
    def loss(x, params, expert):
      out = expert_ffn(x, expert, params, how)
      return jnp.sum(out * target), out

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

  ours, oracle = run(exchange, backend), run(moe.expert_ffn, "dense")
  for name, expert in routings(8).items():
    expert = jnp.asarray(expert, jnp.int32)
    (_, expected), expected_gradients = oracle(x, params, expert)
    (_, out), gradients = ours(x, params, expert)
    for theirs, mine in zip(jax.tree.leaves((expected, expected_gradients)), jax.tree.leaves((out, gradients))):
      assert relative(theirs, mine) < 1e-5, name


def relative(expected, got):
  """Largest difference relative to the largest entry."""
  expected, got = np.asarray(expected), np.asarray(got)
  return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))


def differences(expected, got):
  """(difference relative to the array's largest entry, name) of every leaf of (state, metrics), largest first.

  Second moments are compared by their roots, the gradients they were made of. To a gradient 1e-7 of the network's
  largest is allowed besides: it is the rounding error of sums that all but cancel.
  """
  leaves = [
    (jax.tree_util.keystr(path), a, b)
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(got), strict=True)
  ]
  second = lambda name: ".nu" in name
  network = lambda name: name.split(".opt_state")[0]
  largest = {}
  for name, a, _ in leaves:
    if second(name):
      largest[network(name)] = max(largest.get(network(name), 0.0), np.sqrt(np.abs(a).max()))

  def one(name, a, b):
    if not second(name):
      return relative(a, b)
    error = np.abs(np.sqrt(a) - np.sqrt(b)).max() - 1e-7 * largest[network(name)]
    return float(max(error, 0.0) / max(np.sqrt(a.max()), 1e-30))

  return sorted(((one(*leaf), leaf[0]) for leaf in leaves), reverse=True)


@functools.cache
def overflowing(peers):
  """For both routings, by layer: has any device more tokens for one of its `peers` than the bounded exchange takes?"""
  cfg = experiment().generator
  frozen, batch = inputs()
  key = random_keys.fold(jax.random.key(0), "phase/networks", 0, 0)
  z = jax.random.normal(random_keys.fold(key, "latents"), (BATCH, cfg.z_dim))  # of step 0

  @jax.jit
  def route(state):
    text = clip_module().apply(frozen["clip"], batch["tokens"], method="encode_text")
    out = generator_lib.Generator(cfg).apply(state.variables("generator"), z, text.features, text.eot)
    return {name: item.expert for name, item in out.routing.items()}

  found = {}
  for routing in ("spread", "all to one"):
    for layer, expert in to_host(route(first_state(routing))).items():
      group = min(peers, cfg.experts[int(layer[1:].split("_")[0])])
      peer = expert // (cfg.experts[int(layer[1:].split("_")[0])] // group)
      fullest = max(np.bincount(row, minlength=group).max() for row in peer)
      found[routing, layer] = fullest > CAPACITY * expert.shape[1] / group
  return found


# (data, expert, fsdp over what, exchange). Each is half a minute of compiling, so the default is two: both axes with fsdp
# over `expert` (as on the pods) and the exchange of tokens, and `data` alone, whose programs the move between meshes needs
# too. A whole step by the exchange of weights, without fsdp or with it over both axes, runs with ALL_MESHES only; that
# exchange by itself is tested above.
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
    assert overflows == (routing == "all to one" and case[1] > 3)  # both ways through the bounded exchange are gone
  for routing in ("spread", "all to one"):
    state, metrics = one_step(placed, routing)
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(placed.abstract_state), strict=True):
      assert leaf.sharding == abstract.sharding
    found = differences(reference(routing), (to_host(state), metrics))
    print(case, routing, *found[:6], sep="\n  ")
    assert found[0][0] < 1e-5, f"{routing}: {found[:10]}"


def test_muon_gives_weights_that_are_cut_over_devices_the_same_updates():
  placed = on_mesh(*CHOSEN[0])
  optimizer = optimizers.make(config.Optimizer(method="muon"), label)

  @jax.jit
  def updates(gradients):
    return optimizer.update(gradients, optimizer.init(gradients), gradients, keep=lambda new, old: new)[0]

  for network in ("generator", "discriminator"):
    gradients, abstract = (state.networks[network].params for state in (first_state("spread"), placed.abstract_state))
    cut = jax.tree.map(lambda leaf, a: jax.device_put(leaf, a.sharding), gradients, abstract)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(cut))
    expected, got = to_host(updates(gradients)), to_host(updates(cut))
    # Five iterations multiply the rounding errors in a matrix's smallest directions by up to 3.4**5.
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(got), strict=True):
      assert relative(a, b) < 1e-4, jax.tree_util.keystr(path)


def test_gathered_parameters_are_not_kept_for_the_backward_pass():
  """Cut over the devices or not, the generator's forward pass leaves the same: of parameters nothing, and of rematerialised
  blocks little."""
  kept = {}
  for fsdp, remat in (("", True), ("all", True), ("all", False)):
    wanted = experiment(2, 4, fsdp, "tokens")
    wanted = dataclasses.replace(
      wanted, generator=dataclasses.replace(wanted.generator, remat=remat, loop_layers=remat)
    )
    system = system_on(wanted)
    objective, (frozen, batch) = Objective(system, optimizers.Updates(system, 1)), inputs()

    def forward(state):
      text = clip_module().apply(frozen["clip"], batch["tokens"], method="encode_text")
      return objective._generate(state, text, jax.random.key(0)).pull_back

    state = step_lib.abstract_state(system)
    kept[fsdp, remat] = sorted(leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(forward, state)))
  large = {leaf.shape for leaf in jax.tree.leaves(state.networks["generator"].params) if leaf.size >= mesh_lib.SMALL}
  assert kept["all", True] == kept["", True] and not large & set(kept["all", True])
  size = lambda shapes: sum(math.prod(shape) for shape in shapes)
  assert size(kept["all", True]) < 0.5 * size(kept["all", False])


def test_a_run_moves_between_meshes(tmp_path):
  """Saved on 8 x 1, restored on 2 x 4 (cut otherwise) and on one device: the same bits, and the next step's losses."""

  def next_step(placed, state):
    return {
      name: to_host(value) for name, value in placed.run(1, state)[1]["networks"].items() if name.startswith("loss/")
    }

  wanted, whole = experiment(*CHOSEN[1]), on_mesh(*CHOSEN[1])
  state = whole.put(first_state("spread"))
  pieces = state.networks["discriminator"].params["r8_block0"]["conv1"]["weight"].addressable_shards
  assert len({str(piece.index) for piece in pieces}) == 8  # it is cut indeed
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
