"""The released networks' numbers (tests/goldens/megan), read once per process, and the training phases on their
weights.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from aurora_jax.config import Train
from aurora_jax.systems.megan import config, generator, released, system
from aurora_jax.training import optimizers

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens" / "megan"


@dataclasses.dataclass(frozen=True)
class Golden:
  cfg: config.Generator
  d_cfg: config.Discriminator
  state_dicts: dict[str, dict[str, np.ndarray]]  # "G", "Gum", "D"
  variables: dict[str, Any]
  d_variables: dict[str, Any]
  io: dict[str, np.ndarray]
  temperature: float

  @staticmethod
  def nhwc(array):
    return np.moveaxis(array, -3, -1)

  @staticmethod
  def relative(ours, theirs):
    """Largest difference over the largest entry."""
    ours = np.asarray(ours)
    assert ours.shape == np.shape(theirs), (ours.shape, np.shape(theirs))
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))

  def images(self, name):
    """A stored array of images, channels last."""
    return self.nhwc(self.io[name])

  def experiment(self, **loss):
    """The experiment of the stored iteration; `loss`: fields that differ."""
    fields = dict(d_steps=2, load_balance=True, temperature=self.temperature) | loss
    return config.Experiment(
      generator=self.cfg,
      discriminator=self.d_cfg,
      loss=config.Loss(**fields),
      train=Train(batch_size=len(self.io["in.z"]), total_steps=10),
    )

  def draws(self, z="in.z", uniform="in.gumbel_u", alpha="in.alpha"):
    """Copies of stored random numbers, by their names."""
    return system.Draws(*(np.array(self.io[name]) for name in (z, uniform)), self.io[alpha].flatten())

  def check_gradients(self, ours, prefix):
    """Compares every stored gradient below `prefix` with {file: {name: array}}; returns how many there are."""
    count = 0
    for name, theirs in self.io.items():
      if not name.startswith(prefix):
        continue
      file, tensor = name.removeprefix(prefix).split(".", 1)
      count += 1
      if is_shift_before_norm(file, tensor, self.cfg):
        np.testing.assert_allclose(ours[file][tensor], theirs, rtol=0, atol=1e-5, err_msg=name)
      elif not theirs.any():
        np.testing.assert_array_equal(ours[file][tensor], theirs, err_msg=name)
      else:
        assert self.relative(ours[file][tensor], theirs) < 1e-4, name
    return count


def is_shift_before_norm(file, tensor, cfg):
  """Whether a released tensor is a bias that a batch norm takes away again: its gradient is zero but for rounding."""
  if not tensor.endswith(".bias"):
    return False
  if file == "Gum":
    return tensor in ("mlp.0.bias", "mlp.3.bias")
  if not tensor.startswith("all_layers"):
    return False
  half, _, position, _ = tensor.split(".")
  last = 3 * (len(cfg.resolutions) - 3)
  return int(position) % 3 == 0 and not (half == "all_layers2" and int(position) == last)


@pytest.fixture(scope="session")
def golden():
  kwargs = json.loads((GOLDENS / "tiny32.config.json").read_text())
  cfg, d_cfg = released.config_from_released(kwargs), released.discriminator_config_from_released(kwargs)
  state_dicts = {file: load_file(GOLDENS / f"tiny32.{file}.state_dict.safetensors") for file in ("G", "Gum", "D")}
  return Golden(
    cfg=cfg,
    d_cfg=d_cfg,
    state_dicts=state_dicts,
    variables=released.import_generator({file: state_dicts[file] for file in ("G", "Gum")}, cfg),
    d_variables=released.import_discriminator(state_dicts["D"], d_cfg),
    io=load_file(GOLDENS / "tiny32.networks.safetensors") | load_file(GOLDENS / "tiny32.training.safetensors"),
    temperature=kwargs["training"]["tau"],
  )


class Phases(system.System):
  """The system with the stored weights, whose phases take `Draws` in the place of a key, each compiled once."""

  def __init__(self, golden, **loss):
    super().__init__(golden.experiment(**loss))
    rest, gate = generator.split_gate(golden.variables)
    self._first = {"generator": rest, "gate": gate, "discriminator": golden.d_variables}
    self.update = optimizers.Updates(self, self.experiment.train.total_steps)
    self.compiled = {phase.name: jax.jit(phase.run) for phase in self.phases(self.update)}

  def init(self, key):
    return self._first

  def _draws(self, key):
    return key

  def first_state(self):
    """The stored weights and fresh optimizers."""
    return optimizers.init_state(self)(jax.random.key(0))

  def run(self, name, state, draws, image):
    """One phase, once: (state, metrics)."""
    return self.compiled[name](state, {}, {"image": image}, draws)


@pytest.fixture(scope="session")
def make_phases(golden):
  """Makes `Phases` with some fields of the loss changed."""
  return lambda **loss: Phases(golden, **loss)


@pytest.fixture(scope="session")
def phases(make_phases):
  """The released recipe with load balancing; its programs are compiled once for all tests."""
  return make_phases()
