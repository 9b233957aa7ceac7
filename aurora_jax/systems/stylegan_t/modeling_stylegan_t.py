"""StyleGAN-T's text-to-image generator in PyTorch, for inference (arXiv 2301.09515).

A mapping network turns a latent vector into one half of the style vector w; the other half is a text feature of CLIP.
The synthesis network starts from Fourier features at 8x8 pixels and adds the RGB images of all resolutions.

  model = StyleganTGenerator.from_pretrained("folder")     # config.json and model.safetensors
  image = model(z, text, psi=0.7)                          # [B, 3, R, R], about [-1, 1]

It needs torch, and safetensors for `from_pretrained` and `save_pretrained`. `torch.compile(model)` works. With
`model.to(torch.bfloat16)` the convolutions of the highest resolutions (`low_precision_blocks`) and their feature maps
are bfloat16; everything else stays float32.

Weights are stored as trained, with an equalized learning rate (arXiv 1710.10196): a stored weight is multiplied by
lr_multiplier / sqrt(fan_in) when it is used, a stored bias by lr_multiplier.

  B batch, N tokens, C channels, D width of the text feature, R resolution, W width of w, Z width of the latents
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
FIRST_RESOLUTION = 8
BANDWIDTH = 2.0  # of the Fourier input, cycles per image
CLAMP = 256.0
RESIDUAL_GAIN = math.sqrt(0.5)

Noise = str | Mapping[str, Tensor]


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True)
class TextTower:
  """A CLIP text encoder inside the generator; with 0 layers there is none."""

  layers: int = 0
  width: int = 768
  heads: int = 12
  mlp_width: int = 3072
  vocabulary_size: int = 49408
  context_length: int = 77
  activation: str = "quick_gelu"


@dataclasses.dataclass(frozen=True)
class StyleganTConfig:
  """The architecture; the defaults are the full model's at 64 pixels."""

  resolution: int = 64
  z_dim: int = 64
  text_dim: int = 768  # width of the text feature; 0: unconditional
  channels_base: int = 65536  # channels at resolution r: min(base / r, max)
  channels_max: int = 2048
  residual_blocks: int = 3  # per resolution
  norm_groups: int = 32
  text_tower: TextTower = TextTower()
  noise_at_eval: str = "const"  # "const", "none" or "random"
  low_precision_blocks: int = 4

  @classmethod
  def from_dict(cls, values: Mapping) -> "StyleganTConfig":
    """Reads the object of a config.json. Raises ValueError for a field that does not exist."""
    values = {name: value for name, value in values.items() if name not in ("architectures", "model_type")}
    tower = dict(values.pop("text_tower", {}))
    unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
    unknown |= {f"text_tower.{name}" for name in tower.keys() - {field.name for field in dataclasses.fields(TextTower)}}
    if unknown:
      raise ValueError(f"unknown fields in the configuration: {', '.join(sorted(unknown))}")
    return cls(**values, text_tower=TextTower(**tower))

  def to_dict(self) -> dict:
    """The object of a config.json."""
    return {"architectures": ["StyleganTGenerator"], "model_type": "stylegan_t", **dataclasses.asdict(self)}

  @property
  def resolutions(self) -> list[int]:
    """Resolutions of the blocks: 8, 16, ..."""
    return [2**k for k in range(3, self.resolution.bit_length())]

  @property
  def w_dim(self) -> int:
    """W."""
    return self.z_dim + self.text_dim

  def channels(self, resolution: int) -> int:
    """Feature channels at a resolution."""
    return min(self.channels_base // resolution, self.channels_max)


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


class Linear(Float32Module):
  """A linear map with an equalized learning rate. [..., inputs] -> [..., outputs]."""

  def __init__(self, inputs: int, outputs: int, lr_multiplier: float = 1.0, bias_init: float = 0.0):
    super().__init__()
    self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
    self.bias = nn.Parameter(torch.full((outputs,), bias_init / lr_multiplier))
    self.weight_factor, self.bias_factor = lr_multiplier / math.sqrt(inputs), lr_multiplier

  def forward(self, x: Tensor) -> Tensor:
    return F.linear(x * self.weight_factor, self.weight, self.bias * self.bias_factor)


class Style(Linear):
  """The scale of a layer's input channels, of second order in w. [B, W] -> [B, inputs]."""

  def __init__(self, w_dim: int, inputs: int):
    super().__init__(w_dim, 3 * inputs, bias_init=1.0)

  def forward(self, w: Tensor) -> Tensor:
    first, second, third = super().forward(w).chunk(3, -1)
    return first * second + third


class GroupNorm(Float32Module):
  """Group norm of feature maps [B, C, H, W], in float32."""

  def __init__(self, groups: int, channels: int):
    super().__init__()
    self.groups = groups
    self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

  def forward(self, x: Tensor) -> Tensor:
    return F.group_norm(x, self.groups, self.weight, self.bias, 1e-5)


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


class Output(Float32Module):
  """What follows a convolution, in float32: noise, bias, leaky ReLU, clamp. [B, C, R, R] -> same."""

  def __init__(self, channels: int, resolution: int, gain: float):
    super().__init__()
    self.gain = gain
    self.bias, self.noise_strength = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(()))
    self.register_buffer("noise_const", torch.randn(resolution, resolution))

  def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
    if noise is not None:
      x = x + self.noise_strength * noise
    x = leaky_relu(x + self.bias[:, None, None]) * self.gain
    return x.clamp(-CLAMP * self.gain, CLAMP * self.gain)


class ModulatedConv(nn.Module):
  """A 3x3 convolution whose input channels w scales and whose output channels are demodulated.

  x [B, inputs, R, R], w [B, W] -> [B, outputs, R, R] in the weight's type, or twice the size with `upsample`. The
  weight is [outputs, inputs, 3, 3]; with `upsample` it is [inputs, outputs, 3, 3], as `nn.ConvTranspose2d` has it.
  """

  def __init__(
    self,
    inputs: int,
    outputs: int,
    w_dim: int,
    resolution: int,
    gain: float = 1.0,
    upsample: bool = False,
    groups: int = 0,
  ):
    super().__init__()
    self.upsample = upsample
    self.weight = nn.Parameter(torch.randn(*((inputs, outputs) if upsample else (outputs, inputs)), 3, 3))
    self.affine = Style(w_dim, inputs)
    self.output = Output(outputs, resolution, gain)
    # A residual convolution: the normalized input is added to its output.
    self.norm = GroupNorm(groups, inputs) if groups else None
    self.residual = Residual(outputs) if groups else None

  def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
    """`noise`: [B or 1, 1, R, R] of the output, or None."""
    dtype, style = self.weight.dtype, self.affine(w)
    x = x.float() if self.norm is None else self.norm(x.float())
    y = (x * style[:, :, None, None]).to(dtype)
    if self.upsample:
      height, width = map(int, y.shape[2:])
      columns = self.weight.flatten(1).T @ y.flatten(2)  # all taps of every pixel
      y = smooth(F.fold(columns.float(), (2 * height + 1, 2 * width + 1), 3, stride=2))
    else:
      y = F.conv2d(y, self.weight, padding=1).float()
    squares = torch.linalg.vector_norm(self.weight, dim=(-2, -1), dtype=torch.float32).square()
    demodulation = torch.rsqrt(style.square() @ (squares if self.upsample else squares.T) + 1e-8)
    y = self.output(y * demodulation[:, :, None, None], noise)
    return (y if self.residual is None else self.residual(y, x)).to(dtype)


class Residual(Float32Module):
  """Adds the input of a convolution to its output, which a trained factor per channel scales."""

  def __init__(self, channels: int):
    super().__init__()
    self.gamma = nn.Parameter(torch.full((channels,), 1e-5))

  def forward(self, y: Tensor, x: Tensor) -> Tensor:
    return (self.gamma[:, None, None] * y + x) * math.sqrt(2)


class Bias(Float32Module):
  """A bias per channel and a clamp, in float32. [B, C, R, R] -> same."""

  def __init__(self, channels: int):
    super().__init__()
    self.bias = nn.Parameter(torch.zeros(channels))

  def forward(self, x: Tensor) -> Tensor:
    return (x.float() + self.bias[:, None, None]).clamp(-CLAMP, CLAMP)


class ToRgb(nn.Module):
  """A 1x1 convolution modulated by w. x [B, inputs, R, R], w [B, W] -> float32 [B, 3, R, R]."""

  def __init__(self, inputs: int, w_dim: int):
    super().__init__()
    self.weight = nn.Parameter(torch.randn(3, inputs) * 0.1)
    self.affine, self.output = Style(w_dim, inputs), Bias(3)

  def forward(self, x: Tensor, w: Tensor) -> Tensor:
    style = self.affine(w) / math.sqrt(self.weight.shape[1])
    x = (x.float() * style[:, :, None, None]).to(self.weight.dtype)
    return self.output(F.conv2d(x, self.weight[:, :, None, None]))


class FourierInput(Float32Module):
  """Fourier features, rotated and shifted by w (StyleGAN3, arXiv 2106.12423), and a trained mix. w [B, W] -> [B, C, 8,
  8].
  """

  def __init__(self, channels: int, w_dim: int):
    super().__init__()
    normal = torch.randn(channels, 2)
    length = normal.norm(dim=1, keepdim=True)
    self.register_buffer("freqs", normal / length * BANDWIDTH * torch.exp(-length.square() / 4))
    self.register_buffer("phases", torch.rand(channels) - 0.5)
    self.register_buffer("transform", torch.eye(3))
    self.weight = nn.Parameter(torch.randn(channels, channels))
    self.affine = Linear(w_dim, 4)

  def forward(self, w: Tensor) -> Tensor:
    size = FIRST_RESOLUTION
    t = self.affine(w)
    cos, sin, shift_x, shift_y = (t / t[:, :2].norm(dim=1, keepdim=True)).unbind(1)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    matrix = lambda *entries: torch.stack(entries, 1).view(-1, 3, 3)
    rotate = matrix(cos, -sin, zero, sin, cos, zero, zero, zero, one)
    translate = matrix(one, zero, -shift_x, zero, one, -shift_y, zero, zero, one)
    transform = rotate @ translate @ self.transform
    phases = self.phases + transform[:, :2, 2] @ self.freqs.T  # [B, C]
    freqs = self.freqs @ transform[:, :2, :2]  # [B, C, 2]
    # Frequencies that a transform raises above the bandwidth fade out until the sampling limit.
    excess = (freqs.norm(dim=2) - BANDWIDTH) / (size / 2 - BANDWIDTH)
    amplitude = (1 - excess).clamp(0, 1)
    line = (torch.arange(size, device=w.device, dtype=torch.float32) + 0.5) / size - 0.5  # pixel centers
    x, y = freqs[:, None, None, :, 0], freqs[:, None, None, :, 1]
    angle = line[:, None] * x + line[:, None, None] * y + phases[:, None, None]
    features = torch.sin(2 * math.pi * angle) * amplitude[:, None, None]  # [B, 8, 8, C]
    return F.linear(features / math.sqrt(len(self.weight)), self.weight).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Text tower


ACTIVATIONS = {
  "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
  "gelu": F.gelu,
  "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
  "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class TextBlock(nn.Module):
  """A pre-norm transformer block with causal attention. [B, N, width] -> same."""

  def __init__(self, cfg: TextTower):
    super().__init__()
    self.heads, self.activation = cfg.heads, ACTIVATIONS[cfg.activation]
    self.attention_norm, self.mlp_norm = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
    self.qkv, self.out = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)
    self.up, self.down = nn.Linear(cfg.width, cfg.mlp_width), nn.Linear(cfg.mlp_width, cfg.width)

  def forward(self, x: Tensor) -> Tensor:
    heads = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.attention_norm(x)).chunk(3, -1))
    mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
    x = x + self.out(mixed.transpose(1, 2).flatten(2))
    return x + self.down(self.activation(self.up(self.mlp_norm(x))))


class TextEncoder(Float32Module):
  """The generator's own CLIP text tower with its projection. Token ids [B, N] -> unit features [B, D]."""

  def __init__(self, cfg: StyleganTConfig):
    super().__init__()
    tower = cfg.text_tower
    self.token_embedding = nn.Parameter(torch.randn(tower.vocabulary_size, tower.width) * 0.02)
    self.position_embedding = nn.Parameter(torch.randn(tower.context_length, tower.width) * 0.01)
    self.blocks = nn.ModuleList(TextBlock(tower) for _ in range(tower.layers))
    self.final_norm = nn.LayerNorm(tower.width)
    self.projection = nn.Linear(tower.width, cfg.text_dim, bias=False)
    self.register_buffer("log_scale", torch.zeros(()))  # CLIP's temperature, not used here

  def forward(self, ids: Tensor) -> Tensor:
    x = self.token_embedding[ids] + self.position_embedding[: ids.shape[1]]
    for block in self.blocks:
      x = block(x)
    end = ids.argmax(-1)  # the end of the text has the largest id
    x = self.final_norm(x)[torch.arange(ids.shape[0], device=ids.device), end]
    return F.normalize(self.projection(x), dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# The whole generator


class Block(nn.Module):
  """One resolution: the input or an up-sampling convolution, then pairs of a plain and a residual one, then ToRGB."""

  def __init__(self, cfg: StyleganTConfig, resolution: int):
    super().__init__()
    channels, first = cfg.channels(resolution), resolution == FIRST_RESOLUTION
    self.input = FourierInput(channels, cfg.w_dim) if first else None
    before = cfg.channels(resolution // 2)
    self.conv0 = None if first else ModulatedConv(before, channels, cfg.w_dim, resolution, upsample=True)
    self.convs1 = nn.ModuleList(
      ModulatedConv(channels, channels, cfg.w_dim, resolution, RESIDUAL_GAIN, groups=cfg.norm_groups if i % 2 else 0)
      for i in range(2 * cfg.residual_blocks)
    )
    self.torgb = ToRgb(channels, cfg.w_dim)

  def forward(
    self, x: Tensor | None, image: Tensor | None, w: Tensor, noise: dict[str, Tensor]
  ) -> tuple[Tensor, Tensor]:
    """x [B, C, R / 2, R / 2] and image [B, 3, R / 2, R / 2], None in the first block -> the same at R."""
    x = self.input(w) if self.conv0 is None else self.conv0(x, w, noise.get("conv0"))
    for i, conv in enumerate(self.convs1):
      x = conv(x, w, noise.get(f"convs1.{i}"))
    rgb = self.torgb(x, w)
    return x, rgb if image is None else upsample(image) + rgb


class Float32Block(Block, Float32Module):
  """A `Block` that stays float32."""


class StyleganTGenerator(nn.Module):
  """The whole generator. See the top of this file."""

  def __init__(self, cfg: StyleganTConfig):
    super().__init__()
    self.cfg = cfg
    self.mapping = LatentMapping(cfg)
    self.text_tower = TextEncoder(cfg) if cfg.text_tower.layers else None
    exact = len(cfg.resolutions) - cfg.low_precision_blocks
    self.blocks = nn.ModuleDict(
      {f"b{r}": (Float32Block if i < exact else Block)(cfg, r) for i, r in enumerate(cfg.resolutions)}
    )

  @property
  def text_input(self) -> str | None:
    """What it takes of a prompt: "embedding", CLIP's unit feature; "ids" for its own text tower; or None."""
    if not self.cfg.text_dim:
      return None
    return "ids" if self.cfg.text_tower.layers else "embedding"

  def forward(self, z: Tensor, text: Tensor | None = None, psi: float | Tensor = 1.0, noise: Noise = "const") -> Tensor:
    """Latents and text to images.

    Args:
      z: [B, Z], standard normal.
      text: [B, D], CLIP's text features of unit length (`encode_text` with a text tower); None if unconditional.
      psi: truncation, a number or [B, 1]: 1 is none, 0 the average of the mapped latents.
      noise: "const": each layer's constant; "none"; "random"; or {layer: [B, 1, r, r]} for all of `noise_sizes`.

    Returns:
      float32 [B, 3, R, R], about [-1, 1], not clipped.
    """
    return self.synthesize(self.map_latents(z, text, psi), noise)

  def encode_text(self, ids: Tensor) -> Tensor:
    """Token ids [B, N] to features [B, D] by the generator's own text tower."""
    if self.text_tower is None:
      raise ValueError("this generator has no text tower; it takes text features")
    return self.text_tower(ids)

  def map_latents(self, z: Tensor, text: Tensor | None, psi: float | Tensor = 1.0) -> Tensor:
    """Latents [B, Z] and text [B, D] to w [B, W]."""
    if z.ndim != 2 or z.shape[1] != self.cfg.z_dim:
      raise ValueError(f"z must be [batch, {self.cfg.z_dim}], got {list(z.shape)}")
    wanted = [z.shape[0], self.cfg.text_dim] if self.cfg.text_dim else None
    if (None if text is None else list(text.shape)) != wanted:
      raise ValueError(f"text must be {wanted}, got {None if text is None else list(text.shape)}")
    x = self.mapping(z.float(), psi)
    return x if text is None else torch.cat([x, text.float()], -1)

  def synthesize(self, w: Tensor, noise: Noise = "const") -> Tensor:
    """w [B, W] to images [B, 3, R, R]."""
    noise = self._noise(noise, w)
    x = image = None
    for name, block in self.blocks.items():
      x, image = block(
        x, image, w, {key.partition(".")[2]: n for key, n in noise.items() if key.startswith(f"{name}.")}
      )
    return image

  def noise_sizes(self) -> dict[str, int]:
    """The layers that have noise, with their resolution: {"b8.convs1.0": 8, ..., "b16.conv0": 16, ...}."""
    sizes = {}
    for r in self.cfg.resolutions:
      names = ["conv0"] if r > FIRST_RESOLUTION else []
      sizes |= {f"b{r}.{name}": r for name in names + [f"convs1.{i}" for i in range(2 * self.cfg.residual_blocks)]}
    return sizes

  def _noise(self, noise, w):
    """{layer: [B or 1, 1, r, r]}; {} for none."""
    if isinstance(noise, str):
      if noise == "const":
        return {
          name: self.get_submodule(f"blocks.{name}.output").noise_const[None, None] for name in self.noise_sizes()
        }
      if noise == "random":
        draw = lambda size: torch.randn(w.shape[0], 1, size, size, device=w.device)
        return {name: draw(size) for name, size in self.noise_sizes().items()}
      if noise == "none":
        return {}
      raise ValueError(f"noise must be 'const', 'none', 'random' or tensors by layer, got {noise!r}")
    if noise.keys() != self.noise_sizes().keys():
      raise ValueError(f"noise must have one tensor for each of {', '.join(self.noise_sizes())}")
    return noise

  # ---- for pipeline.py -----------------------------------------------------------------------------------------------

  def draw_latents(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Random latents of `count` images: {"z": [count, Z]}, with random noise also "noise", that of all layers in a
    row.
    """
    latents = {"z": torch.randn(count, self.cfg.z_dim, generator=generator)}
    if self.cfg.noise_at_eval == "random":
      total = sum(size**2 for size in self.noise_sizes().values())
      latents["noise"] = torch.randn(count, total, generator=generator)
    return latents

  @torch.inference_mode()
  def sample(
    self,
    latents: Mapping[str, Tensor],
    text: Tensor | None = None,
    psi: float = 1.0,
    means: Mapping[str, Tensor] | None = None,
  ) -> Tensor:
    """Images [B, 3, R, R] of latents as of `draw_latents`, text [B, D] and truncation; `means` are not used."""
    noise = self.cfg.noise_at_eval
    if noise == "random":
      sizes = self.noise_sizes()
      parts = latents["noise"].split([size**2 for size in sizes.values()], 1)
      noise = {name: part.view(-1, 1, size, size) for (name, size), part in zip(sizes.items(), parts)}
    return self(latents["z"], text, psi, noise)

  # ---- files ---------------------------------------------------------------------------------------------------------

  @classmethod
  def from_pretrained(
    cls, folder: str | pathlib.Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
  ) -> "StyleganTGenerator":
    """Reads a folder with `config.json` and `model.safetensors`, whole or in shards with an index.

    Args:
      folder: its path.
      dtype: of the convolutions of the highest resolutions, float32 by default.
      device: where to.
    """
    from safetensors.torch import load_file

    folder = pathlib.Path(folder)
    cfg = StyleganTConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
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


class LatentMapping(Float32Module):
  """Two linear maps on the normalized latents, truncated toward their running average. [B, Z] -> same."""

  def __init__(self, cfg: StyleganTConfig):
    super().__init__()
    self.fc0, self.fc1 = (Linear(cfg.z_dim, cfg.z_dim, lr_multiplier=0.01) for _ in range(2))
    self.register_buffer("x_avg", torch.zeros(cfg.z_dim))

  def forward(self, z: Tensor, psi: float | Tensor) -> Tensor:
    x = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-8)
    x = self.fc1(leaky_relu(self.fc0(x)))
    psi = torch.as_tensor(psi, dtype=torch.float32, device=z.device).expand(z.shape[0], 1)
    return torch.where(psi == 1, x, self.x_avg + psi * (x - self.x_avg))
