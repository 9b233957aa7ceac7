"""Names of machines, good and bad, and what is said where a compiler is missing."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from aurora_jax.errors import UserError
from aurora_jax.performance import chips, topology


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
    ("h100-8x8", "cuda", "h100", (8, 8), 64),
    ("h100-80g-8", "cuda", "h100", (1, 8), 8),
    ("h100-94g-2", "cuda", "h100-94g", (1, 2), 2),
    ("h200-8", "cuda", "h200", (1, 8), 8),
    ("b200-16", "cuda", "b200", (2, 8), 16),
    ("tpu7x:2x2x1", "tpu", "tpu7x", (2, 2, 1), 8),  # two devices per chip
    ("tpu7x-16", "tpu", "tpu7x", (2, 2, 2), 16),
    ("cpu-8", "cpu", "cpu", (8,), 8),
  ],
)
def test_names(text, platform, chip, shape, devices):
  name = topology.parse(text)
  assert name == (text, platform, chip, shape) and name.devices == devices


@pytest.mark.parametrize(
  "text, said",
  [
    ("h300-8", "no topology 'h300-8'; there are v4-N"),
    ("h200-80g-8", "no topology 'h200-80g-8'"),
    ("b200-12", "a node has 1 to 8 GPUs"),
    ("tpu7x:2x2", "tpu7x is a 3-dimensional torus, 2x2 has 2 dimensions"),
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
    assert chip.memory > 2**33 and 1e14 < chip.float32 <= chip.bfloat16 < 3e15 and chip.link_rate > 1e11, name
    assert chip.peak("bfloat16") == chip.bfloat16 and chip.peak("float32") == chip.float32
    assert chip.peak("float32, highest") == chip.highest and 1e13 < chip.highest < chip.float32 / 4
    # A product of two matrices of this size needs far more arithmetic than memory traffic.
    assert chip.bfloat16 / chip.memory_rate > 100
    assert (chip.network_rate is not None) == (name in chips.GPUS)


@pytest.mark.parametrize(
  "kind, memory, name",
  [
    ("NVIDIA A100-SXM4-80GB", 80e9, "a100"),
    ("NVIDIA A100-SXM4-40GB", 40e9, "a100-40g"),
    ("NVIDIA H100 80GB HBM3", None, "h100"),
    ("NVIDIA H100 NVL", None, "h100-94g"),
    ("NVIDIA H200", None, "h200"),
    ("NVIDIA B200", None, "b200"),
    ("TPU v5 lite", None, "v5e"),
    ("TPU7x", None, "tpu7x"),
    ("NVIDIA GH200 480GB", None, None),
    ("NVIDIA GB200", None, None),
    ("NVIDIA H100 PCIe", None, None),
    ("NVIDIA H200 NVL", None, None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ("cpu", None, None),
  ],
)
def test_a_device_is_known_by_the_name_that_jax_gives_it(kind, memory, name):
  assert chips.of_device_kind(kind, memory) == (chips.CHIPS[name] if name else None)


_PRODUCT = """
import sys
from aurora_jax.performance import topology
name = topology.parse(sys.argv[1])
topology.prepare_environment(name)
import jax, jax.numpy as jnp
device = topology.load(name).devices[0]
sharding = jax.sharding.SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharding)
compiled = jax.jit(lambda x: jnp.tanh(x @ x), in_shardings=sharding).trace(x).lower().compile()
print(device.device_kind, "gemm" in compiled.as_text() or "matmul" in compiled.as_text())
"""


@pytest.mark.slow
def test_the_compiler_takes_the_description_of_an_h100():
  compilers = pathlib.Path(sys.prefix) / "compilers"
  path = os.pathsep.join(filter(None, [str(compilers), os.environ.get("PYTHONPATH")]))
  root = pathlib.Path(__file__).parents[2]
  if not (compilers / "jax_cuda12_plugin").is_dir() and importlib.util.find_spec("jax_cuda12_plugin") is None:
    pytest.skip("no compiler for CUDA")
  done = subprocess.run(
    [sys.executable, "-c", _PRODUCT, "h100-8"],
    cwd=root,
    env=os.environ | {"PYTHONPATH": path},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split() == ["NVIDIA", "H100", "80GB", "HBM3", "True"]
