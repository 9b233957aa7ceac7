"""Configuration: schedules and what is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from aurora_jax.errors import UserError
from aurora_jax.systems.megan import annealing, config


def test_temperature_decays_in_steps_to_its_floor():
  cfg = config.Loss(anneal_every=1)
  steps = np.array([0, 5_000, 10_000, 23_026, 46_053, 300_000])
  values = jax.vmap(lambda step: annealing.temperature(cfg, step))(steps)
  np.testing.assert_allclose(values, [1, 0.6065307, 0.3678794, 0.1, 0.01, 0.01], rtol=1e-4)
  every = lambda step: float(annealing.temperature(config.Loss(), step))
  assert every(780) == 1 and every(781) == every(1561) == pytest.approx(math.exp(-0.0781), rel=1e-6)
  assert every(58 * 781) > 0.01 == pytest.approx(every(59 * 781))


def test_balance_weight_decays_likewise_to_a_floor_of_its_own():
  cfg = config.Loss(balance_weight=5.0, anneal_every=100)
  of = jax.jit(lambda step: annealing.balance_weight(cfg, step))
  assert of(99) == 5
  assert of(10_050) == pytest.approx(5 * math.exp(-1), rel=1e-6)
  assert of(60_000) == pytest.approx(5 * math.exp(-6), rel=1e-5)  # the temperature is at its floor since 46052
  assert of(300_000) == pytest.approx(0.001)
  small = config.Loss(balance_weight=0.0)
  assert annealing.balance_weight(small, 0) == 0


def test_annealing_may_start_later():
  cfg = config.Loss(temperature=2.0, anneal_every=10, anneal_start=25)
  values = [float(annealing.temperature(cfg, step)) for step in (0, 29, 30, 39, 40)]
  later = [2 * math.exp(-5e-4), 2 * math.exp(-15e-4)]
  assert values == pytest.approx([2, 2, later[0], later[0], later[1]], rel=1e-6)


@pytest.mark.parametrize(
  ("cls", "changes", "message"),
  [
    (config.Generator, {"resolution": 8}, "generator.resolution must be a power of two, 16 or more, got 8"),
    (config.Generator, {"generators": 0}, "generator.generators must be at least 1, got 0"),
    (config.Generator, {"init": "he"}, "generator.init must be 'torch031' or 'modern', got 'he'"),
    (config.Generator, {"bn_at_eval": "none"}, "generator.bn_at_eval must be 'batch' or 'running'"),
    (config.Generator, {"gate_at_eval": "none"}, "generator.gate_at_eval must be 'sample' or 'argmax'"),
    (config.Generator, {"compute_dtype": "int8"}, "generator.compute_dtype"),
    (config.Discriminator, {"channels": -1}, "discriminator.channels must be at least 1, got -1"),
    (config.Discriminator, {"resolution": 100}, "discriminator.resolution must be a power of two"),
    (config.Loss, {"d_steps": 0}, "loss.d_steps must be at least 1, got 0"),
    (config.Loss, {"temperature_min": 0.0}, "loss.temperature_min must be positive, got 0.0"),
    (config.Loss, {"temperature": 0.001}, "loss.temperature_min 0.01 is above loss.temperature 0.001"),
  ],
)
def test_bad_values_are_named(cls, changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(cls(), **changes)
