"""Topologies by name, for compiling ahead of time: `v5e:4x4`, `v5e-16`, `tpu7x:2x2x1`, `a100-8`, `h100-8x8`, `cpu-8`.

TPU slices come from libtpu's own descriptions. GPU nodes come from a target description that the CUDA plugin compiles
for. Neither needs the hardware or a driver. `cpu-N` is the CPU of this machine as N devices.

The compilers read the environment when they are loaded, so call `prepare_environment` before JAX is imported.
"""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

from aurora_jax.errors import UserError
from aurora_jax.performance import chips
from aurora_jax.performance.chips import CHIPS, Chip  # noqa: F401

# Slices by their usual name, GENERATION-NUMBER: the number counts chips on v5e and v6e, cores (two per chip) on v4,
# v5p and tpu7x.
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
_SLICES = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT, "tpu7x": _CUBIC}
_LARGEST = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}

_GPUS_PER_NODE = 8
_MOST_CPUS = 64

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
    """Number of JAX devices: two per chip on TPU7x, else one."""
    return math.prod(self.shape) * chips.CORES_PER_CHIP.get(self.chip, 1)


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
  if match := re.fullmatch(r"(v4|v5e|v5p|v6e|tpu7x)(?::(\d+(?:x\d+){1,2})|-(\d+))", text):
    return _tpu(text, *match.groups())
  if match := re.fullmatch(r"(a100|a100-40g|h100|h100-94g|h200|b200)(?:(?<=[ah]100)-80g)?-(?:(\d+)x)?(\d+)", text):
    return _gpus(text, *match.groups())
  if match := re.fullmatch(r"cpu-(\d+)", text):
    count = int(match[1])
    if not 1 <= count <= _MOST_CPUS:
      raise UserError(f"topology {text}: 1 to {_MOST_CPUS} CPU devices, not {count}")
    return Name(text, "cpu", "cpu", (count,))
  raise UserError(
    f"no topology {text!r}; there are v4-N, v5e-N, v5p-N, v6e-N, tpu7x-N (or by shape: v5e:4x4, v5p:2x2x4), a100-N, "
    "a100-40g-N, h100-N, h100-94g-N, h200-N, b200-N (or by nodes: h100-4x8), cpu-N"
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


def _gpus(text, card, nodes, gpus):
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
  options, topology_name = {}, name.chip
  if name.platform == "cuda":
    nodes, gpus = name.shape
    options = {"topology": f"1x{nodes}x{gpus}", "target_config": chips.target_config(name.chip)}
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
