"""MEGAN on eight devices; `test_eight_devices.py` runs it in a process that has them.

Every phase of a step, from one state, gives on a mesh what it gives on one device, and a device does its share of the
work.

    python -m pytest tests/parallel/megan_eight_devices.py        (in an environment with eight devices, see there)
"""

import functools
import zlib

import jax
import numpy as np
import pytest

from aurora_jax.config import Mesh, Optimizer, Train
from aurora_jax.evaluation import sampling
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.systems.megan import config
from aurora_jax.systems.megan.system import System
from aurora_jax.training import step as step_lib

BATCH, GENERATORS, SIDE = 8, 4, 16
# (data, expert, fsdp): the generators along the expert axis, one per device, and the batch alone along eight devices.
MESHES = [(2, 4, False), (8, 1, True)]


def experiment(data=1, expert=1, fsdp=False):
  """A high rate and a high epsilon, so that an update shows the size of its gradient: with Adam's usual epsilon the
  first one is only the gradient's sign, a coin toss where it is zero but for rounding (biases in front of a batch
  norm).
  """
  adam = lambda l2: Optimizer(learning_rate=0.02, beta2=0.9, eps=1e-2, l2=l2)
  return config.Experiment(
    generator=config.Generator(resolution=SIDE, z_dim=16, channels=4, generators=GENERATORS, bn_at_eval="running"),
    discriminator=config.Discriminator(resolution=SIDE, channels=8),
    loss=config.Loss(d_steps=1, load_balance=True),
    optimizer=config.Optimizers(generator=adam(0.0), gate=adam(0.1), discriminator=adam(0.0)),
    mesh=Mesh(data, expert, fsdp),
    train=Train(batch_size=BATCH, total_steps=10),
  )


@functools.cache
def placed(*case):
  """(system, its step, the compiled programs) on a mesh; without a case on one device."""
  wanted = experiment(*case)
  devices = None if case else jax.devices()[:1]
  system = System(wanted, mesh_lib.build(wanted.mesh, BATCH, wanted.expert_counts, devices))
  step = step_lib.build(system)
  return system, step, [step.trace(index, {}).lower().compile() for index in range(len(step.programs))]


@functools.cache
def first_state():
  """A state on the host in which no parameter, statistic or moment is zero."""

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    if np.issubdtype(leaf.dtype, np.integer):
      return np.zeros(leaf.shape, leaf.dtype)
    noise = 0.2 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
    if ".opt_state" in name:
      noise = abs(noise)
    elif "['scale']" in name or "['var']" in name:
      noise = 1 + abs(noise)
    return np.asarray(noise, np.float32)

  return jax.tree_util.tree_map_with_path(draw, placed()[1].state)


def run_phases(case=()):
  """{phase: (state, metrics)}, every phase from the first state; states on the devices."""
  system, step, programs = placed(*case)
  layout, shardings = system.layout, jax.tree.map(lambda leaf: leaf.sharding, step.state)
  image = np.random.default_rng(1).uniform(-1, 1, (BATCH, SIDE, SIDE, 3)).astype(np.float32)
  batch = jax.device_put({"image": image}, layout.batch)
  repeat, constants = jax.device_put(np.int32(0), layout.replicated), step_lib.constants(system)
  found = {}
  for program, run in zip(step.programs, programs, strict=True):
    state = jax.device_put(first_state(), shardings)
    found[program.name] = run(state, {}, batch, constants, repeat)
  return found


@functools.cache
def on_one_device():
  return jax.tree.map(np.asarray, run_phases())


def differences(expected, got):
  """[(difference relative to the array's largest entry, name)] of every leaf of two states, largest first.

  Second moments are compared by their roots, as the gradients are. To these 1e-7 of the network's largest is allowed
  besides: the rounding error of sums that all but cancel.
  """
  leaves = [
    (jax.tree_util.keystr(path), a, np.asarray(b))
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(expected)[0], jax.tree.leaves(got), strict=True)
  ]
  network = lambda name: name.split(".opt_state")[0]
  largest = {}
  for name, a, _ in leaves:
    if ".nu" in name:
      largest[network(name)] = max(largest.get(network(name), 0.0), np.sqrt(a.max()))

  def one(name, a, b):
    allowed = 0.0
    if ".nu" in name:
      a, b, allowed = np.sqrt(a), np.sqrt(b), 1e-7 * largest[network(name)]
    return float(max(abs(a - b).max() - allowed, 0.0) / max(abs(a).max(), 1e-30))

  return sorted(((one(*leaf), leaf[0]) for leaf in leaves), reverse=True)


@pytest.mark.parametrize("case", MESHES, ids=str)
def test_every_phase_equals_that_of_one_device(case):
  step = placed(*case)[1]
  for phase, (state, metrics) in run_phases(case).items():
    expected_state, expected_metrics = on_one_device()[phase]
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(step.state), strict=True):
      assert leaf.sharding == abstract.sharding
    found = differences(expected_state, state)
    print(case, phase, *found[:4], sep="\n  ")
    assert found[0][0] < 1e-5, (phase, found[:10])
    assert differences(first_state(), state)[0][0] > 0.01, phase  # the phase has moved something by far more than that
    for name, value in expected_metrics.items():
      if name.startswith(("loss/", "moe/", "guard/", "d/", "gate/")):
        np.testing.assert_allclose(np.asarray(metrics[name]), value, rtol=1e-5, atol=1e-6, err_msg=f"{phase} {name}")


@pytest.mark.parametrize("case", MESHES, ids=str)
def test_a_device_does_its_share_of_every_phase(case):
  for program, whole, part in zip(placed()[1].programs, placed()[2], placed(*case)[2], strict=True):
    share = part.cost_analysis()["flops"] / whole.cost_analysis()["flops"]
    # Beside an eighth of the batch there are the optimizers of the dense parameters, a few hundredths at this size.
    assert share < 0.2, (program.name, share)


def test_generators_lie_one_to_a_device_with_their_moments_and_statistics():
  state = run_phases(MESHES[0])["generator"][0]
  network, count = state.networks["generator"], 0
  for path, leaf in jax.tree_util.tree_flatten_with_path(network)[0]:
    name = jax.tree_util.keystr(path)
    if "['generators']" in name:
      count += 1
      pieces = {shard.device.id: shard.data for shard in leaf.addressable_shards}
      assert len(pieces) == 8 and {piece.shape for piece in pieces.values()} == {(1, *leaf.shape[1:])}, name
      assert len({str(shard.index) for shard in leaf.addressable_shards}) == GENERATORS, name
    else:
      assert leaf.sharding.is_fully_replicated, name
  # Three layers: kernel and bias, and scale and bias of two norms, all with a second moment; three statistics per norm.
  assert count == 2 * (3 * 2 + 2 * 2) + 2 * 3
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.networks["gate"]))


def test_with_fsdp_the_large_dense_kernels_are_cut():
  state = run_phases(MESHES[1])["discriminator"][0]
  cut = {
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.networks["generator"].params)[0]
    if not leaf.sharding.is_fully_replicated
  }
  assert "['projection']['kernel']" in cut


def test_images_are_those_of_one_device():
  def sample(*case):
    system = placed(*case)[0]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed(*case)[1].state)
    weights = sampling.weights_of(system, jax.device_put(first_state(), shardings), {})
    return sampling.Sampler(system, BATCH)(weights, [""], latents_per_prompt=11, choices=True)

  one, many = sample(), sample(*MESHES[0])
  np.testing.assert_allclose(many.images, one.images, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(many.choices["generator"], one.choices["generator"])
  assert len(np.unique(one.choices["generator"])) > 1
