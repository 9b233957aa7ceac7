"""StyleGAN-T on eight devices; `test_eight_devices.py` runs it in a process that has them.

Both phases, from one state, give on a mesh what they give on one device, and a device does its share of the work. Two
micro-batches of four images each follow one another on shares of the batch that are smaller than the devices are many:
the statistics of a batch norm come from several devices.

    python -m pytest tests/parallel/stylegan_t_eight_devices.py        (in an environment with eight devices, see there)
"""

import functools
import zlib

import jax
import numpy as np

from aurora_jax.config import Mesh, Optimizer, Train
from aurora_jax.evaluation import sampling
from aurora_jax.models.dino import DinoConfig
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.systems.stylegan_t import config
from aurora_jax.systems.stylegan_t.system import System
from aurora_jax.training import step as step_lib

BATCH, SIDE, WIDTH = 16, 8, 64


def experiment(fsdp=False):
  """A high learning rate and a high epsilon, so that an update shows the size of its gradient."""
  adam = Optimizer(learning_rate=0.5, eps=1e-2)
  return config.Experiment(
    generator=config.Generator(
      resolution=SIDE,
      z_dim=8,
      text_dim=32,
      channels_base=8 * WIDTH,
      channels_max=WIDTH,
      residual_blocks=1,
      norm_groups=4,
    ),
    discriminator=config.Discriminator(
      dino=DinoConfig(image_size=16, patch=4, width=WIDTH, depth=2, heads=2, mlp_width=32),
      image_size=16,
      taps=(1,),
      text_dim=32,
      text_map_dim=8,
      kernel_size=3,
      augment=("contrast", "translation"),
    ),
    loss=config.Loss(clip_weight=0.2, clip_crop=SIDE, clip_size=32, blur_fade_kimg=0.0),
    micro_batch=config.MicroBatch(size=4, count=2),
    optimizer=config.Optimizers(generator=adam, discriminator=adam),
    mesh=Mesh(data=8 if fsdp else 1, fsdp=fsdp),
    train=Train(batch_size=BATCH, total_steps=10),
  )


@functools.cache
def placed(fsdp=False):
  """(system, its step, the compiled programs), with FSDP on eight devices, without on one."""
  wanted = experiment(fsdp)
  system = System(wanted, mesh_lib.build(wanted.mesh, BATCH, {}, None if fsdp else jax.devices()[:1]))
  step, frozen = step_lib.build(system), system.abstract_frozen()
  return system, step, [step.trace(index, frozen).lower().compile() for index in range(len(step.programs))]


def draw(path, leaf):
  """A value for every leaf that is not zero."""
  name = jax.tree_util.keystr(path)
  if np.issubdtype(leaf.dtype, np.integer):
    return np.zeros(leaf.shape, leaf.dtype)
  noise = 0.2 * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
  if ".opt_state" in name:
    noise = abs(noise)
  elif "scale" in name:
    noise = 1 + abs(noise)
  return np.asarray(noise, np.float32)


@functools.cache
def first_state():
  return jax.tree_util.tree_map_with_path(draw, placed()[1].state)


@functools.cache
def frozen():
  return jax.tree_util.tree_map_with_path(draw, placed()[0].abstract_frozen())


@functools.cache
def run_phases(fsdp=False):
  """{phase: (state, metrics)}, every phase from the first state; states on the devices."""
  system, step, programs = placed(fsdp)
  layout, shardings = system.layout, jax.tree.map(lambda leaf: leaf.sharding, step.state)
  rng = np.random.default_rng(1)
  tokens = rng.integers(1, 100, (BATCH, system.clip.config.text.context_length)).astype(np.int32)
  image = rng.uniform(-1, 1, (BATCH, SIDE, SIDE, 3)).astype(np.float32)
  batch = jax.device_put({"image": image, "tokens": tokens}, layout.batch)
  repeat, constants = jax.device_put(np.int32(0), layout.replicated), step_lib.constants(system)
  weights, found = jax.device_put(frozen(), layout.replicated), {}
  for program, run in zip(step.programs, programs, strict=True):
    found[program.name] = run(jax.device_put(first_state(), shardings), weights, batch, constants, repeat)
  return found


def differences(expected, got):
  """[(difference relative to the array's largest entry, name)] of every leaf of two states, largest first.

  Second moments are compared by their roots, as the gradients are. To these 1e-7 of the network's largest is allowed
  besides: the rounding error of sums that all but cancel.
  """
  leaves = [
    (jax.tree_util.keystr(path), np.asarray(a), np.asarray(b))
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


def test_every_phase_equals_that_of_one_device():
  step = placed(True)[1]
  for phase, (state, metrics) in run_phases(True).items():
    expected_state, expected_metrics = run_phases()[phase]
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(step.state), strict=True):
      assert leaf.sharding == abstract.sharding
    found = differences(expected_state, state)
    print(phase, *found[:4], sep="\n  ")
    assert found[0][0] < 1e-5, (phase, found[:10])
    moved = {name for size, name in differences(first_state(), state) if size > 0.01}
    assert any(".params" in name for name in moved) and any("spectral" in name for name in moved), phase
    for name, value in expected_metrics.items():
      if name.startswith(("loss/", "guard/", "d/")):
        np.testing.assert_allclose(np.asarray(metrics[name]), value, rtol=1e-5, atol=1e-5, err_msg=f"{phase} {name}")


def test_a_device_does_its_share_of_every_phase():
  for program, whole, part in zip(placed()[1].programs, placed()[2], placed(True)[2], strict=True):
    share = part.cost_analysis()["flops"] / whole.cost_analysis()["flops"]
    # Beside an eighth of the batch there are spectral norms, a few hundredths at this size.
    assert share < 0.25, (program.name, share)


def test_large_parameters_are_sharded():
  state = run_phases(True)["generator"][0]
  sharded = {
    jax.tree_util.keystr(path)
    for name in state.networks
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.networks[name].params)[0]
    if not leaf.sharding.is_fully_replicated
  }
  assert "['synthesis']['b8']['convs1_0']['weight']" in sharded and "['heads']['conv_mix']['weight']" in sharded


def test_images_are_those_of_one_device():
  def sample(fsdp):
    system, step, _ = placed(fsdp)
    state = jax.device_put(first_state(), jax.tree.map(lambda leaf: leaf.sharding, step.state))
    weights = sampling.weights_of(system, state, frozen())
    latents = {"z": np.random.default_rng(2).standard_normal((8, 8)).astype(np.float32)}
    text = {"text": np.random.default_rng(3).standard_normal((8, 32)).astype(np.float32)}
    rows = jax.device_put((text, latents), system.layout.batch)
    variables = {"generator": {**weights.networks["generator"]}}
    variables["generator"]["params"] = system.unshard("generator", variables["generator"]["params"])
    return np.asarray(jax.jit(lambda v, rows: system.sample(v, {}, *rows, 0.7).image)(variables, rows))

  np.testing.assert_allclose(sample(True), sample(False), rtol=0, atol=1e-4)
