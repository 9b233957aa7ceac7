"""Data sheets of accelerators, and the descriptions of GPUs that XLA compiles for without one."""

import dataclasses
from typing import NamedTuple

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


# TPU up to v6e: operations, memory and one-way rate per link of "How to Scale Your Model", chapter 2
# (jax-ml.github.io/scaling-book), whose numbers are those of Google's pages (cloud.google.com/tpu/docs/v5e and so on),
# and the number of links: 6 to the neighbours of a three-dimensional torus, 4 of a two-dimensional one. A product of
# float32 takes one pass in bfloat16 by default on TPU, so its peak is the same; at the highest precision it takes six.
#
# TPU7x (Ironwood): cloud.google.com/tpu/docs/tpu7x gives 2,307 TFLOP/s in bfloat16, 192 GiB, 7.38 TB/s and 1,200 GB/s
# of links, both ways together, per chip. JAX shows a chip as two devices; a device has half of everything.
#
# GPUs: NVIDIA's data sheets, without sparsity (they print the rates with it, twice as many). "float32" is TF32 on the
# tensor cores, XLA's default for float32; "highest" is float32 proper. NVLink is given both ways together there, so a
# device receives half of it. Between nodes: the DGX systems' data sheets, one port per card. Memory: what the driver
# reports, as XLA's descriptions of the cards have it (xla/backends/gpu/target_config/specs).
#   A100 SXM4 ("NVIDIA A100 Tensor Core GPU" data sheet): 312, 156 and 19.5 TFLOP/s; 2,039 GB/s, 1,555 GB/s at 40 GB;
#     NVLink 600 GB/s. DGX A100: 200 Gbit/s per card.
#   H100 SXM5 ("NVIDIA H100 Tensor Core GPU Architecture" white paper): 989.4, 494.7 and 66.9 TFLOP/s; 3.35 TB/s; NVLink
#     900 GB/s. DGX H100: 400 Gbit/s per card.
#   H200 SXM ("NVIDIA H200 Tensor Core GPU" data sheet): operations and NVLink as H100 SXM5; 4.8 TB/s.
#   B200 SXM ("NVIDIA Blackwell" data sheet, the column HGX B200): 2,250, 1,100 and 75 TFLOP/s; 7.7 TB/s; NVLink
#     1.8 TB/s. Other pages of NVIDIA round to 80 TFLOP/s and 8 TB/s. DGX B200: 400 Gbit/s per card.
#   H100 NVL (94 GB): 835.5, 417.5 and 60 TFLOP/s, 3.9 TB/s, of the H100 data sheet from memory: no copy of it was at
#     hand. Estimates: the memory (95,830 MiB, less what the driver keeps on the card of 80 GB), the network (as H100)
#     and the link rate. An NVLink bridge (600 GB/s) joins two or, in some servers, four cards; all others are reached
#     over PCIe 5 (64 GB/s each way). The link rate is the sum, so the bound of a larger group is loose.
CHIPS = {
  "v4": Chip("TPU v4", 32 * GIB, 275e12, 275e12, 275e12 / 6, 1.2e12, 6 * 45e9),
  "v5e": Chip("TPU v5e", 16 * GIB, 197e12, 197e12, 197e12 / 6, 0.81e12, 4 * 45e9),
  "v5p": Chip("TPU v5p", 95 * GIB, 459e12, 459e12, 459e12 / 6, 2.765e12, 6 * 90e9),
  "v6e": Chip("TPU v6e", 32 * GIB, 918e12, 918e12, 918e12 / 6, 1.64e12, 4 * 90e9),
  "tpu7x": Chip("TPU7x core", 96 * GIB, 1153.5e12, 1153.5e12, 1153.5e12 / 6, 3.69e12, 300e9),
  "a100": Chip("A100 SXM4 80 GB", 84986691584, 312e12, 156e12, 19.5e12, 2.039e12, 300e9, 25e9),
  "a100-40g": Chip("A100 SXM4 40 GB", 42331013120, 312e12, 156e12, 19.5e12, 1.555e12, 300e9, 25e9),
  "h100": Chip("H100 SXM5 80 GB", 84942979072, 989.4e12, 494.7e12, 66.9e12, 3.35e12, 450e9, 50e9),
  "h100-94g": Chip("H100 NVL 94 GB", 99907207168, 835.5e12, 417.5e12, 60e12, 3.9e12, 300e9 + 64e9, 50e9),
  "h200": Chip("H200 SXM5 141 GB", 151397597184, 989.4e12, 494.7e12, 66.9e12, 4.8e12, 450e9, 50e9),
  "b200": Chip("B200 SXM 180 GB", 191514411008, 2250e12, 1100e12, 75e12, 7.7e12, 900e9, 50e9),
}

# JAX devices that one chip shows itself as, where it is not one.
CORES_PER_CHIP = {"tpu7x": 2}


class _Gpu(NamedTuple):
  """What XLA's compiler asks about a GPU, besides its `Chip`. Numbers as the CUDA driver reports them."""

  description: str
  capability: str  # fields of XLA's CudaComputeCapabilityProto
  cores: int
  fpus: int
  gigahertz: float
  l2: int
  shared_per_core: int
  shared_per_block: int


_HOPPER = {"fpus": 128, "l2": 50 * 2**20, "shared_per_core": 233472, "shared_per_block": 232448}
_SM_80, _SM_90A = "major: 8", "major: 9 feature_extension: ACCELERATED_FEATURES"
_SM_100A = "major: 10 feature_extension: ACCELERATED_FEATURES"
_GPUS = {
  "a100": _Gpu("NVIDIA A100-SXM4-80GB", _SM_80, 108, 64, 1.41, 40 * 2**20, 167936, 166912),
  "a100-40g": _Gpu("NVIDIA A100-SXM4-40GB", _SM_80, 108, 64, 1.41, 40 * 2**20, 167936, 166912),
  "h100": _Gpu("NVIDIA H100 80GB HBM3", _SM_90A, 132, gigahertz=1.98, **_HOPPER),
  "h100-94g": _Gpu("NVIDIA H100 NVL", _SM_90A, 132, gigahertz=1.785, **_HOPPER),
  "h200": _Gpu("NVIDIA H200", _SM_90A, 132, gigahertz=1.98, **_HOPPER),
  "b200": _Gpu("NVIDIA B200", _SM_100A, 148, gigahertz=1.965, **(_HOPPER | {"l2": 132644864})),
}

_TARGET = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048
  shared_memory_per_core: %(shared_per_core)d core_count: %(cores)d fpus_per_core: %(fpus)d
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: %(bandwidth)d l2_cache_size: %(l2)d clock_rate_ghz: %(gigahertz)g device_memory_size: %(memory)d
  shared_memory_per_block_optin: %(shared_per_block)d cuda_compute_capability { %(capability)s }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "%(description)s"
"""

GPUS = tuple(_GPUS)


def target_config(name: str) -> str:
  """XLA's description of a GPU (a `GpuTargetConfigProto` as text), by its key in `CHIPS`."""
  chip = CHIPS[name]
  return _TARGET % (_GPUS[name]._asdict() | {"bandwidth": chip.memory_rate, "memory": chip.memory})


def of_device_kind(kind: str, memory: int | None = None) -> Chip | None:
  """The data sheet of a device by its `device_kind` in JAX; None if it is not known here.

  Args:
    kind: such as "NVIDIA H100 80GB HBM3", "TPU v5 lite".
    memory: bytes, which tell the sizes of an A100 apart.
  """
  text = kind.lower()
  tpu = {"tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5p": "v5p", "tpu v5": "v5p"}
  tpu |= {"tpu v6 lite": "v6e", "tpu v6e": "v6e", "tpu7x": "tpu7x"}
  if text in tpu:
    return CHIPS[tpu[text]]
  if "pcie" in text or "mig" in text:  # slower cards of the same name, and parts of a card
    return None
  if "a100" in text:
    return CHIPS["a100-40g" if "40gb" in text or (memory or 0) and memory < 60e9 else "a100"]
  if "h100 nvl" in text:
    return CHIPS["h100-94g"]
  if "nvl" in text:
    return None
  found = [name for name in ("h100", "h200", "b200") if name in text and "gb200" not in text and "gh200" not in text]
  return CHIPS[found[0]] if found else None
