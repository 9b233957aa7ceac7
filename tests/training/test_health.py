"""What raises a warning, and what does not."""

import json

import numpy as np
import pytest

from aurora_jax import config
from aurora_jax.training import health

LIMITS = config.Health(logit_gap=20.0, diversity=0.1, expert_entropy=0.25)


def loads(*shares):
  return {f"moe/load/r8/{e}": share for e, share in enumerate(shares)}


def test_entropy_of_loads():
  assert health.expert_entropy(loads(0.25, 0.25, 0.25, 0.25))["moe/entropy/r8"] == pytest.approx(1)
  assert health.expert_entropy(loads(0.5, 0.5, 0, 0))["moe/entropy/r8"] == pytest.approx(0.5)
  assert health.expert_entropy(loads(0, 1, 0, 0))["moe/entropy/r8"] == 0
  assert health.expert_entropy(loads(1.0)) == {}  # one expert has no choice


def test_a_starving_layer_is_named_once_until_it_recovers():
  checks = health.Health(LIMITS)
  assert checks.window(loads(0.3, 0.3, 0.2, 0.2))[1] == []
  figures, (warning,) = checks.window(loads(0.01, 0.98, 0.01, 0))
  assert warning.name == "moe/entropy/r8" and warning.value == figures["moe/entropy/r8"] < warning.limit == 0.25
  assert "experts of r8 starve: expert 1 of 4 gets 98 % of the tokens" in warning.message
  assert checks.window(loads(0, 1, 0, 0))[1] == []
  assert checks.window(loads(0.3, 0.3, 0.2, 0.2))[1] == []
  assert len(checks.window(loads(0, 1, 0, 0))[1]) == 1


def test_the_logit_gap():
  checks = health.Health(LIMITS)
  gap = lambda real, fake: checks.window({"d/logit_real": real, "d/logit_fake": fake})[1]
  assert gap(9.0, -10.9) == [] and gap(-3.0, 30.0) == []
  (warning,) = gap(9.5, -11.0)
  assert (warning.name, warning.value) == ("health/logit_gap", 20.5) and "gap 20.5, limit 20" in warning.message


def grid(within, between, seed=0):
  """[6 prompts, 2 latents, 4, 4, 3]: noise of those sizes."""
  rng = np.random.default_rng(seed)
  return between * rng.standard_normal((6, 1, 4, 4, 3)) + within * rng.standard_normal((6, 2, 4, 4, 3))


def test_collapse_is_measured_against_the_run_itself():
  checks = health.Health(LIMITS)
  assert checks.samples(0, grid(9.0, 0))[1] == []  # noise of random weights is no yardstick
  figures, warnings = checks.samples(100, grid(0.3, 0.6))
  assert warnings == [] and figures["samples/diversity_within"] == pytest.approx(0.3 * 2**0.5, rel=0.2)
  assert checks.samples(200, grid(0.05, 0.6))[1] == []
  (warning,) = checks.samples(300, grid(0.01, 0.6))[1]
  assert warning.name == "samples/diversity_within" and "latents of one prompt give the same image" in warning.message
  (warning,) = checks.samples(400, grid(0.01, 0.01))[1]
  assert warning.name == "samples/diversity_between" and "all prompts give the same image" in warning.message


def test_what_is_known_survives_a_restart():
  checks = health.Health(LIMITS)
  checks.samples(100, grid(0.3, 0.6))
  checks.window(loads(0, 1))
  again = health.Health(LIMITS, json.loads(json.dumps(checks.to_json())))
  assert again.window(loads(0, 1))[1] == []
  assert [warning.name for warning in again.samples(200, grid(0.01, 0.6))[1]] == ["samples/diversity_within"]


def test_one_prompt_one_latent_or_no_limit_is_no_collapse():
  checks = health.Health(LIMITS)
  assert checks.samples(1, np.zeros((1, 1, 2, 2, 3))) == ({}, [])
  same = checks.samples(1, np.zeros((2, 1, 2, 2, 3)))
  assert same == ({"samples/diversity_between": 0.0}, [])
  off = health.Health(config.Health(logit_gap=0, diversity=0, expert_entropy=0))
  assert off.window({"d/logit_real": 99.0, "d/logit_fake": -99.0} | loads(0, 1))[1] == []
  assert off.samples(1, grid(1, 1))[1] == [] and off.samples(2, grid(0, 0))[1] == []
