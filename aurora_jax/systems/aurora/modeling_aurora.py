"""Aurora's text-to-image generator in PyTorch, for inference (arXiv 2309.03904).

A text head and a mapping network turn CLIP features and a latent vector into a style vector w. The synthesis network
starts at 4x4 pixels and alternates modulated convolutions with transformer blocks whose feed-forward is a sparse
mixture of experts. Every resolution adds its RGB image to the upsampled image of the resolution below.

  model = AuroraGenerator.from_pretrained("folder")     # config.json and model.safetensors
  out = model(z, text, eot, psi=0.7)                    # out.image: [B, 3, R, R], about [-1, 1]

It needs torch, and safetensors for `from_pretrained` and `save_pretrained`. `model.to(torch.bfloat16)` halves the
memory: the large weights change, while what needs precision (text head, mapping, styles, norms, routers) stays float32.
Rounded products would send tokens to other experts: leave `torch.set_float32_matmul_precision` at its default.
`torch.compile(model)` works. The experts run between the compiled graphs, since the tokens of each depend on the data.

Weights are stored as trained, with an equalized learning rate (arXiv 1710.10196): a stored weight is multiplied by
lr_multiplier / sqrt(fan_in) when it is used, a stored bias by lr_multiplier.

  B batch, N tokens, C channels, D width, E experts, K kernels, R resolution, W width of w
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
EPSILON = 1e-8


# ----------------------------------------------------------------------------------------------------------------------
# Configuration and output


@dataclasses.dataclass(frozen=True)
class AuroraConfig:
  """The generator's architecture; the defaults are the released model's, 1,166 M parameters. Mappings are {resolution:
  value}.
  """

  resolution: int = 64
  z_dim: int = 128
  w_dim: int = 1024
  mapping_layers: int = 4
  mapping_width: int = 1024
  mapping_lr_multiplier: float = 0.01
  text_feature_dim: int = 768  # width of CLIP's features
  text_dim: int = 1024  # width of the text head
  text_layers: int = 4
  text_heads: int = 8
  text_lr_multiplier: float = 0.01
  text_residual_gain: float = 1.0
  # "scaled": over the tokens. "uniform": an average over the samples of the batch, as in the released code.
  # "independent": the same for a batch of one, which keeps the samples apart.
  text_attention: str = "independent"
  channels_base: int = 16384  # channels at resolution r: min(base / r, max)
  channels_max: int = 1600
  blocks: Mapping[int, int] = dataclasses.field(default_factory=lambda: {4: 3, 8: 3, 16: 3, 32: 2, 64: 2})
  adaptive_kernels: Mapping[int, int] = dataclasses.field(default_factory=lambda: {4: 1, 8: 1, 16: 2, 32: 4, 64: 8})
  attention_depth: Mapping[int, int] = dataclasses.field(default_factory=lambda: {8: 2, 16: 2, 32: 2, 64: 1})
  experts: Mapping[int, int] = dataclasses.field(default_factory=lambda: {8: 4, 16: 8, 32: 16, 64: 16})
  heads: int = 8
  head_dim: int = 64
  feed_forward_ratio: int = 4
  conv_residual_gain: float = 0.4
  attention_residual_gain: float = 0.3
  fourier_input: bool = True  # False: a trained constant
  tied_attention: bool = False  # queries and keys of self-attention are one projection
  w_token: bool = False  # cross-attention sees w, projected, as one more token
  deformable_max_resolution: int = 16  # deformable convolutions up to here; 0: none
  output_resolutions: tuple[int, ...] = (4, 8, 16, 32, 64)

  @classmethod
  def from_dict(cls, values: Mapping) -> "AuroraConfig":
    """Reads the object of a config.json. Raises ValueError for a field that does not exist."""
    values = {name: value for name, value in values.items() if name not in ("architectures", "model_type")}
    unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(f"unknown fields in the configuration: {', '.join(sorted(unknown))}")
    for name in ("blocks", "adaptive_kernels", "attention_depth", "experts"):
      if name in values:  # JSON has strings for keys
        values[name] = {int(r): count for r, count in values[name].items()}
    if "output_resolutions" in values:
      values["output_resolutions"] = tuple(values["output_resolutions"])
    return cls(**values)

  def to_dict(self) -> dict:
    """The object of a config.json."""
    return {"architectures": ["AuroraGenerator"], "model_type": "aurora", **dataclasses.asdict(self)}

  @property
  def resolutions(self) -> list[int]:
    """All resolutions of the synthesis network: 4, 8, ..."""
    return [2**k for k in range(2, self.resolution.bit_length())]

  def channels(self, resolution: int) -> int:
    """Feature channels at a resolution."""
    return min(self.channels_base // resolution, self.channels_max)


class Routing(NamedTuple):
  """Where one mixture-of-experts layer sent its tokens."""

  expert: Tensor  # [B, N], int64
  logits: Tensor  # [B, N, E], float32


class AuroraOutput(NamedTuple):
  """What the generator returns."""

  image: Tensor  # [B, 3, R, R], float32, about [-1, 1], not clipped
  pyramid: dict[int, Tensor]  # {r: [B, 3, r, r]}
  w: Tensor  # [B, W], before truncation
  routing: dict[str, Routing]  # by layer: "r8_block0_layer1"


# ----------------------------------------------------------------------------------------------------------------------
# Layers


class Float32Module(nn.Module):
  """A module whose weights stay float32 when the whole model is moved to bfloat16 or float16."""

  def _apply(self, fn, recurse=True):
    def keep_precision(tensor):
      moved = fn(tensor)
      return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

    return super()._apply(keep_precision, recurse)


def leaky_relu(x: Tensor) -> Tensor:
  return F.leaky_relu(x, 0.2) * math.sqrt(2)


def pixel_norm(x: Tensor) -> Tensor:
  return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON)


def scaled_linear(x: Tensor, weight: Tensor, factor: float, bias: Tensor | None = None) -> Tensor:
  """factor * (x @ weight.T) + bias in one product. x [B, ..., inputs], weight [outputs, inputs]."""
  rows, start = x.reshape(-1, x.shape[-1]), x.new_zeros(1) if bias is None else bias
  y = torch.addmm(start, rows, weight.T, beta=0 if bias is None else 1, alpha=factor)
  return y.view(-1, *map(int, x.shape[1:-1]), y.shape[-1])


class Linear(nn.Module):
  """A linear map with an equalized learning rate. [..., inputs] -> [..., outputs]."""

  def __init__(self, inputs: int, outputs: int, bias: bool = True, lr_multiplier: float = 1.0, bias_init: float = 0.0):
    super().__init__()
    self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
    self.bias = nn.Parameter(torch.full((outputs,), bias_init / lr_multiplier)) if bias else None
    self.weight_factor, self.bias_factor = lr_multiplier / math.sqrt(inputs), lr_multiplier

  def forward(self, x: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias * self.bias_factor
    return scaled_linear(x, self.weight, self.weight_factor, bias)


class Float32Linear(Linear, Float32Module):
  """A `Linear` whose weights stay float32."""


class PointwiseConv(Linear):
  """A `Linear` over the channels of feature maps. [B, inputs, H, W] -> [B, outputs, H, W]."""

  def forward(self, x: Tensor) -> Tensor:
    return F.conv2d(x * self.weight_factor, self.weight[:, :, None, None])


class LayerNorm(Float32Module):
  """Layer norm over the last axis, in float32."""

  def __init__(self, width: int):
    super().__init__()
    self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

  def forward(self, x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, 1e-5).to(x.dtype)


class GroupNorm(LayerNorm):
  """Group norm of feature maps [B, C, H, W] with 32 groups, in float32."""

  def forward(self, x: Tensor) -> Tensor:
    return F.group_norm(x.float(), 32, self.weight, self.bias, 1e-5).to(x.dtype)


def upsample(x: Tensor) -> Tensor:
  """Doubles height and width with the filter [1, 3, 3, 1]; zeros beyond the border."""
  for axis in (2, 3):
    size = x.shape[axis]
    padded = F.pad(x, (0, 0, 1, 1) if axis == 2 else (1, 1))
    even = 0.25 * padded.narrow(axis, 0, size) + 0.75 * x
    odd = 0.75 * x + 0.25 * padded.narrow(axis, 2, size)
    x = torch.stack([even, odd], axis + 1).flatten(axis, axis + 1)
  return x


def smooth(x: Tensor) -> Tensor:
  """The filter [1, 3, 3, 1] / 4 along both axes, after a transposed convolution. [B, C, 2H + 1, 2W + 1] -> [B, C, 2H,
  2W].
  """
  for axis in (2, 3):
    size = x.shape[axis] - 1
    padded = F.pad(x, (0, 0, 1, 1) if axis == 2 else (1, 1))
    taps = [padded.narrow(axis, k, size) for k in range(4)]
    x = 0.25 * (taps[0] + taps[3]) + 0.75 * (taps[1] + taps[2])
  return x


class ModulatedLinear(nn.Module):
  """A linear map over tokens whose inputs w scales, demodulated. x [B, N, inputs], w [B, W] -> [B, N, outputs]."""

  def __init__(self, inputs: int, outputs: int, w_dim: int):
    super().__init__()
    self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
    self.style = Float32Linear(w_dim, inputs, bias_init=1.0)

  def forward(self, x: Tensor, w: Tensor) -> Tensor:
    style = self.style(w) / math.sqrt(self.weight.shape[1])
    demodulation = torch.rsqrt(style.square() @ self.weight.float().square().T + EPSILON)
    y = F.linear(x * style[:, None].to(x.dtype), self.weight)
    return y * demodulation[:, None].to(x.dtype) + self.bias


class ModulatedConv(nn.Module):
  """A convolution whose input channels w scales and whose output channels are demodulated (StyleGAN2, arXiv
  1912.04958).

  With K > 1 kernels every sample has a filter of its own, a mix of K that w chooses (GigaGAN, arXiv 2303.05511).

  x [B, inputs, H, W], w [B, W] -> [B, outputs, H, W], or twice the size with `upsample`. The weight is
  [K, outputs, inputs, size, size]; with `upsample` it is [K, inputs, outputs, 3, 3], as `nn.ConvTranspose2d` has it.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    w_dim: int,
    size: int = 3,
    kernels: int = 1,
    upsample: bool = False,
    demodulate: bool = True,
    activate: bool = True,
    bias: bool = True,
  ):
    super().__init__()
    self.size, self.upsample, self.demodulate, self.activate = size, upsample, demodulate, activate
    self.gain = 1 / math.sqrt(size * size * inputs)
    channels = (inputs, outputs) if upsample else (outputs, inputs)
    self.weight = nn.Parameter(torch.randn(kernels, *channels, size, size))
    self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
    self.style = Float32Linear(w_dim, inputs, bias_init=1.0)
    self.mix = Float32Linear(w_dim, kernels, bias_init=1.0) if kernels > 1 else None

  def forward(self, x: Tensor, w: Tensor, *positions: Tensor) -> Tensor:
    style, filters = self.style(w) * self.gain, self._filters(w)
    y = self._convolve(x * style[:, :, None, None].to(x.dtype), filters, *positions)
    if self.demodulate:
      # The norm of every modulated filter, without building it.
      squares = torch.linalg.vector_norm(filters, dim=(-2, -1), dtype=torch.float32).square()
      squares = squares.transpose(1, 2) if self.upsample else squares  # [1 or B, outputs, inputs]
      demodulation = torch.rsqrt(squares @ style.square()[:, :, None] + EPSILON)
      y = y * demodulation[..., None].to(y.dtype)
    if self.bias is not None:
      y = y + self.bias[:, None, None]
    return leaky_relu(y) if self.activate else y

  def _filters(self, w: Tensor) -> Tensor:
    """One filter for all samples [1, ...], or one for each [B, ...]."""
    if self.mix is None:
      return self.weight
    mix = self.mix(w).softmax(-1).to(self.weight.dtype)
    return (mix @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])

  def _convolve(self, x: Tensor, filters: Tensor) -> Tensor:
    height, width, size = *map(int, x.shape[2:]), self.size
    if self.upsample:
      columns = filters.flatten(2).transpose(1, 2) @ x.flatten(2)  # all taps of every pixel
      return smooth(F.fold(columns, (2 * height + 1, 2 * width + 1), 3, stride=2))
    small = x.device.type == "cpu" and height * width <= 64
    if size == 1 or small or (self.mix is not None and torch.onnx.is_in_onnx_export()):
      # On a CPU a matrix product reads the filters of a small map faster than a convolution does. In ONNX the number of
      # groups of a convolution is a constant, so it cannot be the batch.
      columns = x.flatten(2) if size == 1 else F.unfold(x, size, padding=size // 2)
      return (filters.flatten(2) @ columns).unflatten(2, (height, width))
    groups = len(filters)
    y = F.conv2d(
      x.reshape(-1, x.shape[1] * groups, height, width), filters.flatten(0, 1), padding=size // 2, groups=groups
    )
    return y.view(x.shape[0], -1, height, width)


class ScaleShift(Float32Module):
  """A factor and a shift per channel of feature maps, in float32."""

  def __init__(self, channels: int):
    super().__init__()
    self.scale, self.bias = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

  def forward(self, x: Tensor) -> Tensor:
    return x.float() * self.scale[:, None, None] + self.bias[:, None, None]


class DeformableConv(ModulatedConv):
  """A 3x3 `ModulatedConv` that reads its taps at predicted positions (modulated transformation, arXiv 2308.15472)."""

  def __init__(self, inputs: int, outputs: int, w_dim: int, kernels: int = 1):
    super().__init__(inputs, outputs, w_dim, kernels=kernels)
    self.mtm = ModulatedConv(inputs, 27, w_dim, activate=False, bias=False)  # per tap: dy, dx; then a factor per tap
    self.mtm_output = ScaleShift(27)

  def forward(self, x: Tensor, w: Tensor) -> Tensor:
    prediction = self.mtm_output(self.mtm(x, w))
    return super().forward(x, w, prediction[:, :18], 2 * prediction[:, 18:].sigmoid())

  def _convolve(self, x: Tensor, filters: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
    """offsets [B, 18, H, W] in pixels, mask [B, 9, H, W]."""
    height, width = map(int, x.shape[2:])
    line = lambda size: torch.arange(size, device=x.device, dtype=torch.float32)
    tap = line(3) - 1
    offsets = offsets.unflatten(1, (9, 2))  # [B, 9, 2, H, W]
    rows = offsets[:, :, 0] + tap.repeat_interleave(3)[:, None, None] + line(height)[:, None]
    columns = offsets[:, :, 1] + tap.repeat(3)[:, None, None] + line(width)
    grid = torch.stack([columns * (2 / (width - 1)) - 1, rows * (2 / (height - 1)) - 1], -1)  # [B, 9, H, W, (x, y)]
    taps = F.grid_sample(x.float(), grid.flatten(1, 2), align_corners=True)  # zeros beyond the border
    taps = taps.unflatten(2, (9, height)) * mask[:, None]
    return (filters.flatten(2) @ taps.to(x.dtype).flatten(3).flatten(1, 2)).unflatten(2, (height, width))


# ----------------------------------------------------------------------------------------------------------------------
# Text head and inputs


class TextBlock(nn.Module):
  """A pre-norm transformer block of the text head. [B, N, D] -> same."""

  def __init__(self, cfg: AuroraConfig):
    super().__init__()
    width, options = cfg.text_dim, {"lr_multiplier": cfg.text_lr_multiplier}
    self.heads, self.attention, self.gain = cfg.text_heads, cfg.text_attention, cfg.text_residual_gain
    self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
    self.qkv, self.out = Linear(width, 3 * width, **options), Linear(width, width, **options)
    self.mlp_in, self.mlp_out = Linear(width, 4 * width, **options), Linear(4 * width, width, **options)

  def forward(self, x: Tensor) -> Tensor:
    x = (x + self.out(self._attend(*self.qkv(self.norm1(x)).chunk(3, -1)))) * self.gain
    h = self.mlp_in(self.norm2(x))
    return (x + self.mlp_out(h * torch.sigmoid(1.702 * h))) * self.gain

  def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    if self.attention == "independent":
      return values
    if self.attention == "uniform":
      return values.mean(0, keepdim=True).expand_as(values)
    heads = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (queries, keys, values))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class TextHead(Float32Module):
  """Trained layers on top of CLIP's features.

  text [B, N, F], eot [B], the position of the end-of-text token -> (global [B, D], the feature at that position, local
  [B, N - 1, D], all others).
  """

  def __init__(self, cfg: AuroraConfig):
    super().__init__()
    aligned = cfg.text_feature_dim == cfg.text_dim
    self.align = None if aligned else Linear(cfg.text_feature_dim, cfg.text_dim, True, cfg.text_lr_multiplier, 1.0)
    self.blocks = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.text_layers))

  def forward(self, text: Tensor, eot: Tensor) -> tuple[Tensor, Tensor]:
    text = text if self.align is None else self.align(text)
    for block in self.blocks:
      text = block(text)
    eot = eot.long()[:, None]
    rest = torch.arange(text.shape[1] - 1, device=text.device)
    rest = rest + (rest >= eot)  # every position but that of the end
    take = lambda index: text.gather(1, index[:, :, None].expand(-1, -1, text.shape[2]))
    return take(eot)[:, 0], take(rest)


class FourierInput(Float32Module):
  """Fixed Fourier features, rotated and shifted by w (StyleGAN3, arXiv 2106.12423), and a trained mix. -> [B, C, 4,
  4].
  """

  def __init__(self, channels: int, w_dim: int):
    super().__init__()
    frequencies = torch.randn(channels, 2)
    radii = frequencies.norm(dim=1, keepdim=True)
    self.register_buffer("freqs", frequencies / (radii * torch.exp(radii.square()) ** 0.25))
    self.register_buffer("phases", torch.rand(channels) - 0.5)
    self.register_buffer("transform", torch.eye(3))
    self.affine, self.mix = Linear(w_dim, 4), Linear(channels, channels, bias=False)

  def forward(self, w: Tensor) -> Tensor:
    t = self.affine(w)
    t = t / t[:, :2].norm(dim=1, keepdim=True)
    cos, sin, shift_x, shift_y = t.unbind(1)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    matrix = lambda *entries: torch.stack(entries, 1).view(-1, 3, 3)
    rotate = matrix(cos, -sin, zero, sin, cos, zero, zero, zero, one)
    translate = matrix(one, zero, -shift_x, zero, one, -shift_y, zero, zero, one)
    transform = rotate @ translate @ self.transform
    phases = self.phases + transform[:, :2, 2] @ self.freqs.T  # [B, C]
    freqs = self.freqs @ transform[:, :2, :2]  # [B, C, 2]
    line = (torch.arange(4, device=w.device, dtype=torch.float32) + 0.5) / 4 - 0.5  # pixel centers
    x = freqs[:, None, None, :, 0] * line[:, None] + freqs[:, None, None, :, 1] * line[:, None, None]
    x = torch.sin(2 * math.pi * (x + phases[:, None, None]))  # [B, 4, 4, C]
    return self.mix(x).permute(0, 3, 1, 2)


class ConstantInput(Float32Module):
  """A trained feature map, the same for every sample. -> [B, C, 4, 4]."""

  def __init__(self, channels: int, w_dim: int):
    super().__init__()
    self.constant = nn.Parameter(torch.randn(1, channels, 4, 4))

  def forward(self, w: Tensor) -> Tensor:
    return self.constant.expand(w.shape[0], -1, -1, -1)


# ----------------------------------------------------------------------------------------------------------------------
# Transformer


# The largest part of the attention logits in memory at once, in numbers: what fits a CPU's cache, or 1 GB of a GPU.
_LOGITS_AT_ONCE = {"cpu": 1 << 18}
_LOGITS_ON_A_GPU = 1 << 28


def l2_attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
  """Softmax attention with logits -|q - k| / sqrt(D), the Euclidean distance (arXiv 2006.04710), in float32.

  queries [B, N, heads * D], keys and values [B, M, heads * D] -> [B, N, heads * D].
  """
  batch, count, width = queries.shape
  scale = int(width // heads) ** -0.5
  heads_first = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)  # [B * heads, tokens, D]
  queries, keys = heads_first(queries.float() * scale), heads_first(keys.float() * scale)
  values = heads_first(values)
  squares = lambda t: t.square().sum(-1, keepdim=True)
  if torch.onnx.is_in_onnx_export():  # at once: a number of chunks that depends on the batch has no place in a graph
    squared = squares(queries) + squares(keys).transpose(1, 2) - 2 * queries @ keys.transpose(1, 2)
    mixed = _softmax_of_distances(squared, values)
    return mixed.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
  # |q - k|^2 = |q|^2 + |k|^2 - 2 q k as one product: (-2 q, |q|^2, 1) (k, 1, |k|^2).
  queries = torch.cat([-2 * queries, squares(queries), torch.ones_like(queries[..., :1])], -1)
  keys = torch.cat([keys, torch.ones_like(keys[..., :1]), squares(keys)], -1).transpose(1, 2)
  most = _LOGITS_AT_ONCE.get(queries.device.type, _LOGITS_ON_A_GPU)
  rows = min(count, max(1, most // values.shape[1]))
  groups = max(1, most // (rows * values.shape[1]))
  parts = []
  for q, k, v in zip(queries.split(groups), keys.split(groups), values.split(groups)):
    parts.append(torch.cat([_softmax_of_distances(part @ k, v) for part in q.split(rows, 1)], 1))
  return torch.cat(parts).unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)


def _softmax_of_distances(squared: Tensor, values: Tensor) -> Tensor:
  least = 1e-12  # not zero, where the square root has no gradient
  if squared.requires_grad:
    logits = -squared.clamp_min(least).sqrt()
  else:
    logits = squared.clamp_min_(least).sqrt_().neg_()
  return logits.softmax(-1).to(values.dtype) @ values


class SelfAttention(nn.Module):
  """L2 self-attention whose output projection is modulated by w. x [B, N, D], w [B, W] -> [B, N, D]."""

  def __init__(self, cfg: AuroraConfig):
    super().__init__()
    width = cfg.heads * cfg.head_dim
    self.heads, self.projections = cfg.heads, 1 if cfg.tied_attention else 2
    self.qk = Linear(width, self.projections * width, bias=False)  # per head: queries, then keys
    self.v = Linear(width, width, bias=False)
    self.out = ModulatedLinear(width, width, cfg.w_dim)

  def forward(self, x: Tensor, w: Tensor) -> Tensor:
    qk = self.qk(x).unflatten(-1, (self.heads, self.projections, -1))
    return self.out(l2_attention(qk[..., 0, :].flatten(2), qk[..., -1, :].flatten(2), self.v(x), self.heads), w)


class CrossAttention(nn.Module):
  """L2 attention from image tokens to text tokens. x [B, N, D], text [B, M, T] -> [B, N, D]."""

  def __init__(self, cfg: AuroraConfig):
    super().__init__()
    width, self.heads = cfg.heads * cfg.head_dim, cfg.heads
    self.q, self.kv = Linear(width, width, bias=False), Linear(cfg.text_dim, 2 * width, bias=False)
    self.out = Linear(width, width)

  def forward(self, x: Tensor, text: Tensor) -> Tensor:
    keys, values = self.kv(text.to(x.dtype)).chunk(2, -1)
    return self.out(l2_attention(self.q(x), keys, values, self.heads))


class Router(ModulatedLinear, Float32Module):
  """Logits of the experts, in float32: a rounded logit sends a token to another expert."""

  def forward(self, x: Tensor, w: Tensor) -> Tensor:
    return leaky_relu(super().forward(x.float(), w))


class FeedForward(nn.Module):
  """A GEGLU feed-forward (arXiv 2002.05202), or a sparse mixture of E of them.

  Each token goes to its most probable expert, whose output is multiplied by that probability. x [B, N, D], w [B, W] ->
  ([B, N, D], `Routing` or None).
  """

  def __init__(self, cfg: AuroraConfig, experts: int):
    super().__init__()
    width, hidden = cfg.heads * cfg.head_dim, cfg.feed_forward_ratio * cfg.heads * cfg.head_dim
    self.in_weight = nn.Parameter(torch.randn(experts, 2 * hidden, width))  # value and gate
    self.in_bias = nn.Parameter(torch.zeros(experts, 2 * hidden))
    self.out_weight = nn.Parameter(torch.randn(experts, width, hidden))
    self.out_bias = nn.Parameter(torch.zeros(experts, width))
    self.in_factor, self.out_factor = width**-0.5, hidden**-0.5
    self.router = Router(width, experts, cfg.w_dim) if experts > 1 else None

  def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, Routing | None]:
    if self.router is None:
      return self._expert(x, 0), None
    logits = self.router(x, w)
    expert = logits.argmax(-1)
    out = self._chosen_experts(x.flatten(0, 1), expert.flatten()).view_as(x)
    return out * logits.softmax(-1).amax(-1, keepdim=True).to(x.dtype), Routing(expert, logits)

  def _expert(self, x: Tensor, e: int) -> Tensor:
    value, gate = scaled_linear(x, self.in_weight[e], self.in_factor, self.in_bias[e]).chunk(2, -1)
    return scaled_linear(value * F.gelu(gate), self.out_weight[e], self.out_factor, self.out_bias[e])

  @torch.compiler.disable
  def _chosen_experts(self, x: Tensor, expert: Tensor) -> Tensor:
    """Every token by its own expert: tokens sorted by expert, one product for each expert that has any. x [T, D],
    expert [T].
    """
    if torch.onnx.is_in_onnx_export():  # the experts that have any tokens depend on the data: the graph has all of them
      for e in range(len(self.in_weight)):
        rows = (expert == e).nonzero()[:, 0]
        x = x.index_copy(0, rows, self._expert(x[rows], e))  # of rows that no other expert reads
      return x
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=len(self.in_weight)).tolist()
    parts = [self._expert(rows, e) for e, rows in enumerate(x[order].split(counts)) if len(rows)]
    return torch.empty_like(x).index_copy(0, order, torch.cat(parts))


class TransformerLayer(nn.Module):
  """Self-attention, cross-attention and feed-forward, each after a layer norm and around a residual."""

  def __init__(self, cfg: AuroraConfig, experts: int):
    super().__init__()
    width = cfg.heads * cfg.head_dim
    self.norm1, self.norm2, self.norm3 = LayerNorm(width), LayerNorm(width), LayerNorm(width)
    self.self_attention, self.cross_attention = SelfAttention(cfg), CrossAttention(cfg)
    self.w_token = Float32Linear(cfg.w_dim, cfg.text_dim, bias_init=1.0) if cfg.w_token else None
    self.feed_forward = FeedForward(cfg, experts)

  def forward(self, x: Tensor, w: Tensor, text: Tensor) -> tuple[Tensor, Routing | None]:
    x = x + self.self_attention(self.norm1(x), w)
    if self.w_token is not None:
      text = torch.cat([text, self.w_token(w)[:, None]], 1)
    x = x + self.cross_attention(self.norm2(x), text)
    out, routing = self.feed_forward(self.norm3(x), w)
    return x + out, routing


class AttentionBlock(nn.Module):
  """Transformer layers between two linear maps, around a residual. x [B, C, H, W], w [B, W], text [B, M, T] -> like
  x.
  """

  def __init__(self, cfg: AuroraConfig, resolution: int):
    super().__init__()
    channels, width, self.gain = cfg.channels(resolution), cfg.heads * cfg.head_dim, cfg.attention_residual_gain
    self.norm = GroupNorm(channels)
    self.proj_in, self.proj_out = Linear(channels, width, bias=False), Linear(width, channels, bias=False)
    depth, experts = cfg.attention_depth[resolution], cfg.experts[resolution]
    self.layers = nn.ModuleList(TransformerLayer(cfg, experts) for _ in range(depth))

  def forward(self, x: Tensor, w: Tensor, text: Tensor) -> tuple[Tensor, list[Routing | None]]:
    tokens, routings = self.proj_in(self.norm(x).flatten(2).transpose(1, 2)), []
    for layer in self.layers:
      tokens, routing = layer(tokens, w, text)
      routings.append(routing)
    h = self.proj_out(tokens).transpose(1, 2).reshape(x.shape)
    return (x + h) * self.gain, routings


# ----------------------------------------------------------------------------------------------------------------------
# Synthesis and the whole generator


class ConvBlock(nn.Module):
  """Two modulated convolutions around a residual. x [B, inputs, H, W] -> [B, outputs, H, W], or twice the size."""

  def __init__(self, cfg: AuroraConfig, resolution: int, inputs: int, upsample: bool):
    super().__init__()
    outputs, kernels = cfg.channels(resolution), cfg.adaptive_kernels[resolution]
    self.upsample, self.gain = upsample, cfg.conv_residual_gain
    self.conv1 = ModulatedConv(inputs, outputs, cfg.w_dim, kernels=kernels, upsample=upsample)
    self.conv2 = same_size_conv(cfg, resolution, outputs)
    self.skip = PointwiseConv(inputs, outputs, bias=False) if upsample else None

  def forward(self, x: Tensor, w: Tensor) -> Tensor:
    h = self.conv2(self.conv1(x, w), w)
    return (h + (x if self.skip is None else upsample(self.skip(x)))) * self.gain


def same_size_conv(cfg: AuroraConfig, resolution: int, inputs: int) -> ModulatedConv:
  """The 3x3 convolution of a resolution, deformable where the configuration has it so."""
  kind = DeformableConv if resolution <= cfg.deformable_max_resolution else ModulatedConv
  return kind(inputs, cfg.channels(resolution), cfg.w_dim, kernels=cfg.adaptive_kernels[resolution])


class Synthesis(nn.Module):
  """w [B, W] and local text [B, M, T] to the image pyramid. Layers above the largest of `output_resolutions` are not
  run.
  """

  def __init__(self, cfg: AuroraConfig):
    super().__init__()
    self.cfg = cfg
    self.input = (FourierInput if cfg.fourier_input else ConstantInput)(cfg.channels(2), cfg.w_dim)
    self.convs, self.attentions, self.rgb = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
    channels = cfg.channels(2)
    for r in cfg.resolutions:
      for i in range(cfg.blocks[r]):
        first = r == 4 and i == 0
        block = same_size_conv(cfg, r, channels) if first else ConvBlock(cfg, r, channels, upsample=i == 0)
        self.convs[f"r{r}_block{i}"] = block
        channels = cfg.channels(r)
        if r in cfg.attention_depth:
          self.attentions[f"r{r}_block{i}"] = AttentionBlock(cfg, r)
      options = {"size": 1, "kernels": cfg.adaptive_kernels[r], "demodulate": False, "activate": False}
      self.rgb[f"r{r}"] = ModulatedConv(channels, 3, cfg.w_dim, **options)

  def forward(self, w: Tensor, text: Tensor) -> tuple[dict[int, Tensor], dict[str, Routing]]:
    x, image, pyramid, routing = self.input(w).to(self.rgb["r4"].weight.dtype), None, {}, {}
    for r in self.cfg.resolutions:
      if r > max(self.cfg.output_resolutions):
        break
      for name in (f"r{r}_block{i}" for i in range(self.cfg.blocks[r])):
        x = self.convs[name](x, w)
        if name in self.attentions:
          x, routings = self.attentions[name](x, w, text)
          routing.update({f"{name}_layer{k}": item for k, item in enumerate(routings) if item is not None})
      rgb = self.rgb[f"r{r}"](x, w).float()
      image = rgb if image is None else rgb + upsample(image)
      pyramid[r] = image
    return {r: pyramid[r] for r in self.cfg.output_resolutions}, routing


class AuroraGenerator(nn.Module):
  """The whole generator. See the top of this file."""

  # What the text encoder has to give: "tokens", its features of all tokens and the position of the end.
  text_input = "tokens"
  prompt_means = True  # `sample` takes the latents of a prompt's own mean

  def __init__(self, cfg: AuroraConfig):
    super().__init__()
    self.cfg = cfg
    self.text_head = TextHead(cfg)
    widths = [cfg.z_dim + cfg.text_dim] + [cfg.mapping_width] * (cfg.mapping_layers - 1) + [cfg.w_dim]
    layers = (Float32Linear(i, o, lr_multiplier=cfg.mapping_lr_multiplier) for i, o in zip(widths, widths[1:]))
    self.mapping = nn.ModuleList(layers)
    self.synthesis = Synthesis(cfg)
    self.average = Average(cfg.w_dim)

  def forward(
    self, z: Tensor, text: Tensor, eot: Tensor, psi: float | Tensor = 1.0, prompt_mean: Tensor | None = None
  ) -> AuroraOutput:
    """Latents and text to images.

    Args:
      z: [B, Z], standard normal.
      text: [B, N, F], CLIP's features of all tokens after its final layer norm.
      eot: int [B], the position of the end-of-text token.
      psi: truncation, a number or [B, 1]: 1 is none, 0 the mean image.
      prompt_mean: [B, W], the mean w of each prompt (`mean_w`). Truncation then ends there rather than at the mean of
        all w.

    Returns:
      `AuroraOutput`.
    """
    global_text, local_text = self.encode_text(text, eot)
    w = self.map_latents(z, global_text)
    pyramid, routing = self.synthesis(self.truncate(w, psi, prompt_mean), local_text)
    return AuroraOutput(pyramid[max(pyramid)], pyramid, w, routing)

  def encode_text(self, text: Tensor, eot: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's features [B, N, F] to (global text [B, D], local text [B, N - 1, D])."""
    return self.text_head(text.float(), eot)

  def map_latents(self, z: Tensor, global_text: Tensor) -> Tensor:
    """Latents [B, Z] and global text [B, D] to w [B, W]."""
    if z.ndim != 2 or z.shape[1] != self.cfg.z_dim:
      raise ValueError(f"z must be [batch, {self.cfg.z_dim}], got {list(z.shape)}")
    w = torch.cat([pixel_norm(z.float()), pixel_norm(global_text)], -1)
    for layer in self.mapping:
      w = leaky_relu(layer(w))
    return w

  def truncate(self, w: Tensor, psi: float | Tensor, prompt_mean: Tensor | None = None) -> Tensor:
    """Moves w [B, W] toward the mean of all w and then toward the prompt's own mean."""
    psi = torch.as_tensor(psi, dtype=torch.float32, device=w.device).expand(w.shape[0], 1)
    w = torch.lerp(self.average.w, w, psi)
    return w if prompt_mean is None else torch.lerp(prompt_mean, w, psi)

  def mean_w(self, z: Tensor, global_text: Tensor) -> Tensor:
    """The mean w of prompts over latents: z [P, M, Z], global text [P, D] -> [P, W]."""
    each = global_text[:, None].expand(-1, z.shape[1], -1)
    return self.map_latents(z.flatten(0, 1), each.flatten(0, 1)).unflatten(0, (-1, z.shape[1])).mean(1)

  # ---- for pipeline.py -----------------------------------------------------------------------------------------------

  def draw_latents(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Random latents of `count` images: {"z": [count, Z]}."""
    return {"z": torch.randn(count, self.cfg.z_dim, generator=generator)}

  @torch.inference_mode()
  def sample(
    self,
    latents: Mapping[str, Tensor],
    text: tuple[Tensor, Tensor],
    psi: float = 1.0,
    means: Mapping[str, Tensor] | None = None,
  ) -> Tensor:
    """Images of prompts, [B, 3, R, R].

    Args:
      latents: as of `draw_latents`.
      text: (features [B, N, F], position of the end [B]).
      psi: truncation.
      means: {"z": [B, M, Z]}, latents whose mean w is the prompt's own mean; None: see `forward`.
    """
    global_text, local_text = self.encode_text(*text)
    mean = None if means is None else self.mean_w(means["z"], global_text)
    w = self.truncate(self.map_latents(latents["z"], global_text), psi, mean)
    pyramid, _ = self.synthesis(w, local_text)
    return pyramid[max(pyramid)]

  # ---- files ---------------------------------------------------------------------------------------------------------

  @classmethod
  def from_pretrained(
    cls, folder: str | pathlib.Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
  ) -> "AuroraGenerator":
    """Reads a folder with `config.json` and `model.safetensors`, whole or in shards with an index.

    Args:
      folder: its path.
      dtype: of the large weights, float32 by default.
      device: where to.
    """
    from safetensors.torch import load_file

    folder = pathlib.Path(folder)
    cfg = AuroraConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):  # no memory for weights that are replaced
      model = cls(cfg)
    index, files = folder / f"{WEIGHTS}.index.json", [WEIGHTS]
    if index.exists():
      files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    state = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    model.load_state_dict(state, assign=True)
    return model.float().to(device=device, dtype=dtype).eval()

  def save_pretrained(self, folder: str | pathlib.Path) -> None:
    """Writes `config.json` and `model.safetensors` into a folder that `from_pretrained` reads."""
    from safetensors.torch import save_file

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(self.cfg.to_dict(), indent=2) + "\n", encoding="utf-8")
    state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


class Average(Float32Module):
  """The running average of w, toward which truncation moves."""

  def __init__(self, w_dim: int):
    super().__init__()
    self.register_buffer("w", torch.zeros(w_dim))
