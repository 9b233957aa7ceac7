"""Topologies by name, for compiling ahead of time: `v5e:4x4`, `v5e-16`, `v5p-32`, `a100-8`, `a100-40g-4x8`, `cpu-8`.

TPU slices come from libtpu's own descriptions. A100 nodes come from a target description that the CUDA plugin compiles
for. Neither needs the hardware or a driver. `cpu-N` is the CPU of this machine as N devices.

The compilers read the environment when they are loaded, so call `prepare_environment` before JAX is imported.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from aurora_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """The data sheet of one device. Rates are peaks per second; None: unknown.

  Attributes:
    name: for messages.
    memory: bytes.
    bfloat16: floating-point operations in bfloat16.
    float32: floating-point operations in float32, at JAX's default precision.
    highest: floating-point operations in float32, at `jax.lax.Precision.HIGHEST`.
    memory_rate: bytes to and from its memory.
    link_rate: bytes that it can receive from the other devices of its TPU slice or GPU node.
    network_rate: bytes that it can receive from other nodes.
  """

  name: str
  memory: int
  bfloat16: float | None = None
  float32: float | None = None
  highest: float | None = None
  memory_rate: float | None = None
  link_rate: float | None = None
  network_rate: float | None = None

  def peak(self, precision: str) -> float | None:
    """Operations per second in "bfloat16", "float32" or "float32, highest"."""
    return {"bfloat16": self.bfloat16, "float32": self.float32}.get(precision, self.highest)


# TPU: operations, memory and one-way rate per link of "How to Scale Your Model", chapter 2
# (jax-ml.github.io/scaling-book), whose numbers are those of Google's pages (cloud.google.com/tpu/docs/v5e and so on),
# and the number of links: 6 to the neighbours of a three-dimensional torus, 4 of a two-dimensional one. A product of
# float32 takes one pass in bfloat16 by default on TPU, so its peak is the same; at the highest precision it takes six.
# A100: NVIDIA's data sheet (A100 SXM4: 312 TFLOP/s bfloat16, 156 in TF32, XLA's default for float32; 600 GB/s of NVLink
# both ways together; 19.5 TFLOP/s in float32 proper); between nodes one 200 Gbit/s port per card, as in a DGX A100 (DGX
# A100 system data sheet). Memory as XLA's own description of the cards gives it.
CHIPS = {
  "v4": Chip("TPU v4", 32 * GIB, 275e12, 275e12, 275e12 / 6, 1.2e12, 6 * 45e9),
  "v5e": Chip("TPU v5e", 16 * GIB, 197e12, 197e12, 197e12 / 6, 0.81e12, 4 * 45e9),
  "v5p": Chip("TPU v5p", 95 * GIB, 459e12, 459e12, 459e12 / 6, 2.765e12, 6 * 90e9),
  "v6e": Chip("TPU v6e", 32 * GIB, 918e12, 918e12, 918e12 / 6, 1.64e12, 4 * 90e9),
  "a100": Chip("A100 SXM4 80 GB", 84986691584, 312e12, 156e12, 19.5e12, 2.039e12, 300e9, 25e9),
  "a100-40g": Chip("A100 SXM4 40 GB", 42331013120, 312e12, 156e12, 19.5e12, 1.555e12, 300e9, 25e9),
}

# Slices by their usual name, GENERATION-NUMBER: the number counts chips on v5e and v6e, cores (two per chip) on v4,
# v5p.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBIC = {
  8: "2x2x1",
  16: "2x2x2",
  32: "2x2x4",
  64: "2x4x4",
  128: "4x4x4",
  256: "4x4x8",
  512: "4x8x8",
  1024: "8x8x8",
  2048: "8x8x16",
  4096: "8x16x16",
}
_SLICES = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256}

_GPUS_PER_NODE = 8
_MOST_CPUS = 64

_A100_TARGET = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 167936
  threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: %(bandwidth)d l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: %(memory)d
  shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "%(description)s"
"""

_INSTALL = {
  "tpu": ("libtpu", 'pip install "jax[tpu]"'),
  "cuda": (
    "jax_plugins.xla_cuda12",
    "pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 (the first two of the version that jax has)",
  ),
}


class Name(NamedTuple):
  """The parsed name of a topology.

  Attributes:
    text: the name.
    platform: "tpu", "cuda" or "cpu".
    chip: key of `CHIPS`, or "cpu".
    shape: of a TPU slice in chips; (nodes, GPUs per node); (CPU devices,).
  """

  text: str
  platform: str
  chip: str
  shape: tuple[int, ...]

  @property
  def devices(self) -> int:
    """Number of devices."""
    return math.prod(self.shape)


class Topology(NamedTuple):
  """A machine to compile for.

  Attributes:
    name: its parsed name.
    chip: the data sheet of its devices.
    devices: JAX devices.
    per_node: devices that share the links of a node; all devices of a TPU slice.
  """

  name: Name
  chip: Chip
  devices: list[Any]
  per_node: int


def parse(text: str) -> Name:
  """Parses the name of a topology. Loads no compiler.

  Raises:
    UserError: there is no such topology; the message lists those that exist.
  """
  if match := re.fullmatch(r"(v4|v5e|v5p|v6e)(?::(\d+(?:x\d+){1,2})|-(\d+))", text):
    return _tpu(text, *match.groups())
  if match := re.fullmatch(r"(a100(?:-40g)?)(?:-80g)?-(?:(\d+)x)?(\d+)", text):
    return _a100(text, *match.groups())
  if match := re.fullmatch(r"cpu-(\d+)", text):
    count = int(match[1])
    if not 1 <= count <= _MOST_CPUS:
      raise UserError(f"topology {text}: 1 to {_MOST_CPUS} CPU devices, not {count}")
    return Name(text, "cpu", "cpu", (count,))
  raise UserError(
    f"no topology {text!r}; there are v4-N, v5e-N, v5p-N, v6e-N (or by shape: v5e:4x4, v5p:2x2x4), a100-N, "
    "a100-40g-N (or by nodes: a100-4x8), cpu-N"
  )


def _tpu(text, generation, shape, number):
  slices = _SLICES[generation]
  if number:
    if int(number) not in slices:
      unit = "cores" if slices is _CUBIC else "chips"
      raise UserError(f"topology {text}: {generation} slices have {', '.join(map(str, slices))} {unit}, not {number}")
    shape = slices[int(number)]
  sizes = tuple(int(size) for size in shape.split("x"))
  rank = 3 if slices is _CUBIC else 2
  if len(sizes) != rank:
    raise UserError(f"topology {text}: {generation} is a {rank}-dimensional torus, {shape} has {len(sizes)} dimensions")
  single = sizes == (1, 1)
  if not single and (sizes[0] % 2 or sizes[1] % 2 or 0 in sizes):
    raise UserError(f"topology {text}: hosts have 2x2 chips, {shape} is not made of them")
  if math.prod(sizes) > _LARGEST[generation]:
    raise UserError(
      f"topology {text}: {math.prod(sizes)} chips, the largest {generation} slice has {_LARGEST[generation]}"
    )
  return Name(text, "tpu", generation, sizes)


def _a100(text, card, nodes, gpus):
  gpus = int(gpus)
  if nodes is None and gpus > _GPUS_PER_NODE and gpus % _GPUS_PER_NODE == 0:
    nodes, gpus = gpus // _GPUS_PER_NODE, _GPUS_PER_NODE
  nodes = 1 if nodes is None else int(nodes)
  if not 1 <= gpus <= _GPUS_PER_NODE or nodes < 1:
    raise UserError(
      f"topology {text}: a node has 1 to {_GPUS_PER_NODE} GPUs; more come in whole nodes of {_GPUS_PER_NODE}"
    )
  return Name(text, "cuda", card, (nodes, gpus))


def prepare_environment(name: Name) -> None:
  """Sets the environment variables that the compilers read. Call it before JAX is imported.

  Raises:
    UserError: the compiler is not installed; the message says what to install.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  if name.platform == "cpu":
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    flags.append(f"--xla_force_host_platform_device_count={name.devices}")
  else:
    _require_compiler(name)
  if name.platform == "cuda":
    # Autotuning needs a GPU, and Triton matrix products need autotuning.
    flags += ["--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"]
  os.environ["XLA_FLAGS"] = " ".join(flags)
  os.environ["JAX_PLATFORMS"] = "cpu"  # the backend that runs; the topology is only compiled for
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu must not look for the metadata server of a TPU VM


def _require_compiler(name):
  module, install = _INSTALL[name.platform]
  try:
    found = importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:
    found = False
  if not found:
    raise UserError(f"compiling for {name.text} needs a package that is not installed: {install}")


def load(name: Name) -> Topology:
  """Loads the devices of a topology. Imports JAX.

  Raises:
    UserError: the compiler refuses the description, or (TPU) another process has libtpu loaded.
  """
  import jax
  from jax.experimental import topologies

  if name.platform == "cpu":
    devices = jax.devices("cpu")
    if len(devices) != name.devices:
      raise UserError(f"topology {name.text}: JAX was started with {len(devices)} CPU devices")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Topology(name, Chip("CPU", total // name.devices), devices, name.devices)
  chip = CHIPS[name.chip]
  options, topology_name = {}, "a100"
  if name.platform == "cuda":
    nodes, gpus = name.shape
    options = {
      "topology": f"1x{nodes}x{gpus}",
      "target_config": _A100_TARGET
      % {
        "bandwidth": chip.memory_rate,
        "memory": chip.memory,
        "description": f"NVIDIA A100-SXM4-{chip.name.split()[-2]}GB",
      },
    }
  else:
    topology_name = f"{name.chip}:{'x'.join(map(str, name.shape))}"
    if name.chip == "v4":
      options["chip_config_name"] = "megacore"  # one device per chip, as a v4 slice presents itself
    if name.shape == (1, 1):
      options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    devices = topologies.get_topology_desc(topology_name, name.platform, **options).devices
  except Exception as error:  # the compilers' own types of errors
    raise UserError(f"topology {name.text}: {_reason(error)}") from error
  if len(devices) != name.devices:
    raise UserError(
      f"topology {name.text}: the compiler gives it {len(devices)} devices, it should have {name.devices}"
    )
  return Topology(name, chip, list(devices), name.shape[-1] if name.platform == "cuda" else name.devices)


def _reason(error):
  text = " ".join(str(error).split())
  if "lockfile" in text or "already in use" in text:
    return "another process has libtpu loaded, and only one at a time can (wait for it to end)"
  return text[:300]
