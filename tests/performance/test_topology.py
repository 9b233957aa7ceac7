"""Names of machines, good and bad, and what is said where a compiler is missing."""

import importlib.util
import os

import pytest

from aurora_jax.errors import UserError
from aurora_jax.performance import topology


@pytest.mark.parametrize(
  "text, platform, chip, shape, devices",
  [
    ("v5e:16x16", "tpu", "v5e", (16, 16), 256),
    ("v5e-256", "tpu", "v5e", (16, 16), 256),
    ("v5e-1", "tpu", "v5e", (1, 1), 1),
    ("v4-32", "tpu", "v4", (2, 2, 4), 16),  # cores: two per chip
    ("v5p:4x4x4", "tpu", "v5p", (4, 4, 4), 64),
    ("v6e-8", "tpu", "v6e", (2, 4), 8),
    ("a100-8", "cuda", "a100", (1, 8), 8),
    ("a100-80g-8", "cuda", "a100", (1, 8), 8),
    ("a100-2", "cuda", "a100", (1, 2), 2),
    ("a100-32", "cuda", "a100", (4, 8), 32),
    ("a100-2x4", "cuda", "a100", (2, 4), 8),
    ("a100-40g-16", "cuda", "a100-40g", (2, 8), 16),
    ("cpu-8", "cpu", "cpu", (8,), 8),
  ],
)
def test_names(text, platform, chip, shape, devices):
  name = topology.parse(text)
  assert name == (text, platform, chip, shape) and name.devices == devices


@pytest.mark.parametrize(
  "text, said",
  [
    ("h100-8", "no topology 'h100-8'; there are v4-N"),
    ("v5e", "no topology 'v5e'"),
    ("v5e-12", "v5e slices have 1, 4, 8, 16, 32, 64, 128, 256 chips, not 12"),
    ("v4-4", "v4 slices have 8, 16, .* cores, not 4"),
    ("v5e:3x5", "hosts have 2x2 chips, 3x5 is not made of them"),
    ("v5e:2x2x2", "v5e is a 2-dimensional torus, 2x2x2 has 3 dimensions"),
    ("v5e:0x4", "0x4 is not made of them"),
    ("v5e:16x32", "512 chips, the largest v5e slice has 256"),
    ("a100-12", "a node has 1 to 8 GPUs"),
    ("a100-0", "a node has 1 to 8 GPUs"),
    ("cpu-0", "1 to 64 CPU devices, not 0"),
    ("", "no topology ''"),
  ],
)
def test_bad_names(text, said):
  with pytest.raises(UserError, match=said):
    topology.parse(text)


@pytest.mark.parametrize("text, install", [("v5e-4", r'pip install "jax\[tpu\]"'), ("a100-8", "jax-cuda12-plugin")])
def test_a_missing_compiler_is_named(monkeypatch, text, install):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  environment = dict(os.environ)
  with pytest.raises(UserError, match=f"compiling for {text} needs a package that is not installed: .*{install}"):
    topology.prepare_environment(topology.parse(text))
  assert dict(os.environ) == environment


def test_the_environment_of_a_cpu_stand_in(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8")
  monkeypatch.setenv("JAX_PLATFORMS", "tpu")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "")
  topology.prepare_environment(topology.parse("cpu-3"))
  assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_force_host_platform_device_count=3"
  assert os.environ["JAX_PLATFORMS"] == "cpu"


def test_every_chip_has_all_its_numbers():
  for name, chip in topology.CHIPS.items():
    assert chip.memory > 2**33 and 1e14 < chip.float32 <= chip.bfloat16 < 1e15 and chip.link_rate > 1e11, name
    assert chip.peak("bfloat16") == chip.bfloat16 and chip.peak("float32") == chip.float32
    assert chip.peak("float32, highest") == chip.highest and 1e13 < chip.highest < chip.float32
    # A product of two matrices of this size needs far more arithmetic than memory traffic.
    assert chip.bfloat16 / chip.memory_rate > 100
    assert (chip.network_rate is not None) == name.startswith("a100")
