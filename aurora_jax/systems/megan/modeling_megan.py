"""MEGAN's generators and gate in PyTorch, for inference (arXiv 1805.02481).

Several DCGAN generators make feature maps of one latent vector. A gate sees them and chooses the generator whose image
it is.

  model = MeganGenerator.from_pretrained("folder")     # config.json and model.safetensors
  out = model(z, uniform)                              # out.image: [B, 3, S, S] in [-1, 1]

It needs torch, and safetensors for `from_pretrained` and `save_pretrained`. All generators run up to 8x8 pixels, which
is what the gate sees; the rest runs for the chosen ones alone. `model.to(torch.bfloat16)` leaves norms and gate in
float32.

  n generators, B batch, C channels, S side of the images, Z width of the latents
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
FEATURE_RESOLUTION = 8  # where the gate looks
NOISE_EPSILON = 1e-20


@dataclasses.dataclass(frozen=True)
class MeganConfig:
  """The architecture; the defaults are the released code's for CIFAR-10."""

  resolution: int = 32  # side of the images
  z_dim: int = 128
  channels: int = 64  # of the last feature map; they double with every halving of the resolution
  generators: int = 10
  bn_at_eval: str = (
    "batch"  # batch norms take the statistics of the "batch", as in the released code, or the "running" ones
  )
  gate_at_eval: str = "sample"  # the gate draws a generator, "sample", or takes the likeliest, "argmax"

  @classmethod
  def from_dict(cls, values: Mapping) -> "MeganConfig":
    """Reads the object of a config.json. Raises ValueError for a field that does not exist."""
    values = {name: value for name, value in values.items() if name not in ("architectures", "model_type")}
    unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(f"unknown fields in the configuration: {', '.join(sorted(unknown))}")
    return cls(**values)

  def to_dict(self) -> dict:
    """The object of a config.json."""
    return {"architectures": ["MeganGenerator"], "model_type": "megan", **dataclasses.asdict(self)}

  @property
  def resolutions(self) -> list[int]:
    """Resolutions of a generator's layers: 4, 8, ..."""
    return [2**k for k in range(2, self.resolution.bit_length())]

  def width(self, resolution: int) -> int:
    """Channels of the layer at a resolution; the last layer's are the colors."""
    return 3 if resolution == self.resolution else self.channels * self.resolution // (2 * resolution)


class MeganOutput(NamedTuple):
  """What the model returns."""

  image: Tensor  # [B, 3, S, S], float32 in [-1, 1]
  generator: Tensor  # int64 [B], the chosen generator
  logits: Tensor  # [B, n], the gate's, before noise


class Float32Module(nn.Module):
  """A module whose weights stay float32 when the whole model is moved to bfloat16 or float16."""

  def _apply(self, fn, recurse=True):
    def keep_precision(tensor):
      moved = fn(tensor)
      return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

    return super()._apply(keep_precision, recurse)


class BatchNorm(Float32Module):
  """Batch norms, one for each of `stack`, in float32, on the statistics of the batch or on the running ones."""

  def __init__(self, *stack: int, on_batch: bool):
    super().__init__()
    self.on_batch = on_batch
    self.weight, self.bias = nn.Parameter(torch.ones(stack)), nn.Parameter(torch.zeros(stack))
    self.register_buffer("running_mean", torch.zeros(stack))
    self.register_buffer("running_var", torch.ones(stack))
    self.register_buffer("num_batches_tracked", torch.zeros(stack[:-1], dtype=torch.int32))

  def forward(self, x: Tensor, index: int | None = None) -> Tensor:
    """x [B, C, ...]; `index` says which norm of a stack."""
    take = lambda t: t if index is None else t[index]
    scale, shift = take(self.weight), take(self.bias)
    if self.on_batch:
      if x.numel() == x.shape[1]:
        raise ValueError("batch norm on the batch's statistics needs 2 samples or more (bn_at_eval is 'batch')")
      if torch.onnx.is_in_onnx_export():  # ONNX has no batch norm on the batch's statistics
        axes, of_channel = (0, *range(2, x.ndim)), (-1, *(1,) * (x.ndim - 2))
        variance, mean = torch.var_mean(x.float(), axes, correction=0, keepdim=True)
        normalized = (x.float() - mean) * torch.rsqrt(variance + 1e-5)
        return normalized * scale.view(of_channel) + shift.view(of_channel)
      return F.batch_norm(x.float(), None, None, scale, shift, training=True)
    return F.batch_norm(x.float(), take(self.running_mean), take(self.running_var), scale, shift)


class Layer(nn.Module):
  """A transposed convolution of every generator, [n, inputs, outputs, 4, 4]; then batch norm and ReLU, or tanh at the
  end.
  """

  def __init__(self, cfg: MeganConfig, resolution: int, inputs: int):
    super().__init__()
    outputs = cfg.width(resolution)
    bound = inputs**-0.5 / 4
    uniform = lambda *shape: nn.Parameter(torch.rand(shape) * (2 * bound) - bound)
    self.weight, self.bias = uniform(cfg.generators, inputs, outputs, 4, 4), uniform(cfg.generators, outputs)
    last = resolution == cfg.resolution
    self.norm = None if last else BatchNorm(cfg.generators, outputs, on_batch=cfg.bn_at_eval == "batch")

  def forward(self, x: Tensor, index: int) -> Tensor:
    """One generator's. x [B, inputs, 1, 1] -> [B, outputs, 4, 4], or [B, inputs, H, W] -> [B, outputs, 2H, 2W]."""
    first = x.shape[2] == 1
    weight, bias = self.weight[index], self.bias[index]
    y = F.conv_transpose2d(x.to(weight.dtype), weight, bias, stride=1 if first else 2, padding=0 if first else 1)
    return torch.tanh(y.float()) if self.norm is None else torch.relu(self.norm(y, index)).to(y.dtype)


class Gate(Float32Module):
  """z [B, Z] and the projected features [B, n, Z] to one logit for each generator [B, n]."""

  def __init__(self, cfg: MeganConfig):
    super().__init__()
    inputs, on_batch = cfg.z_dim * (1 + cfg.generators), cfg.bn_at_eval == "batch"
    self.dense_0, self.norm_0 = nn.Linear(inputs, inputs // 2), BatchNorm(inputs // 2, on_batch=on_batch)
    self.dense_1, self.norm_1 = nn.Linear(inputs // 2, cfg.z_dim), BatchNorm(cfg.z_dim, on_batch=on_batch)
    self.logits = nn.Linear(cfg.z_dim, cfg.generators)

  def forward(self, z: Tensor, projected: Tensor) -> Tensor:
    x = torch.cat([z, projected.flatten(1)], 1)
    x = torch.relu(self.norm_0(self.dense_0(x)))
    return self.logits(torch.relu(self.norm_1(self.dense_1(x))))


class Projection(Float32Module, nn.Linear):
  """One linear map for the features of all generators, flattened with channels first; stays float32."""


class MeganGenerator(nn.Module):
  """Generators, projection and gate. See the top of this file."""

  text_input = None  # unconditional
  truncates = False

  def __init__(self, cfg: MeganConfig):
    super().__init__()
    self.cfg = cfg
    widths = [cfg.z_dim, *map(cfg.width, cfg.resolutions)]
    self.generators = nn.ModuleDict({f"r{r}": Layer(cfg, r, inputs) for r, inputs in zip(cfg.resolutions, widths)})
    self.projection = Projection(cfg.width(FEATURE_RESOLUTION) * FEATURE_RESOLUTION**2, cfg.z_dim)
    self.gate = Gate(cfg)

  @property
  def least_batch(self) -> int:
    """The smallest batch that it takes."""
    return 2 if self.cfg.bn_at_eval == "batch" else 1

  def forward(self, z: Tensor, uniform: Tensor | None = None) -> MeganOutput:
    """Latents to images.

    Args:
      z: [B, Z], standard normal. With `bn_at_eval` "batch" every image depends on the whole batch, of 2 samples or
        more.
      uniform: [B, n], draws from U[0, 1) for the gate; not needed if `gate_at_eval` is "argmax".

    Returns:
      `MeganOutput`.
    """
    cfg = self.cfg
    if z.ndim != 2 or z.shape[1] != cfg.z_dim:
      raise ValueError(f"z must be [batch, {cfg.z_dim}], got {list(z.shape)}")
    z = z.float()
    features = [self._run(z[:, :, None, None], i, 4, FEATURE_RESOLUTION) for i in range(cfg.generators)]
    projected = [torch.relu(self.projection(maps.float().flatten(1))) for maps in features]
    logits = self.gate(z, torch.stack(projected, 1))
    scores = logits
    if cfg.gate_at_eval == "sample":
      if uniform is None or uniform.shape != logits.shape:
        raise ValueError(
          f"uniform must be {list(logits.shape)}, got {None if uniform is None else list(uniform.shape)}"
        )
      scores = logits - torch.log(-torch.log(uniform.float() + NOISE_EPSILON) + NOISE_EPSILON)
    chosen = scores.argmax(-1)
    return MeganOutput(self._images(features, chosen), chosen, logits)

  @torch.compiler.disable
  def _images(self, features: list[Tensor], chosen: Tensor) -> Tensor:
    """The second half of the generators that were chosen."""
    image = features[0].new_empty((chosen.shape[0], 3, self.cfg.resolution, self.cfg.resolution), dtype=torch.float32)
    # Which generators are chosen depends on the data: an ONNX graph has all of them.
    present = range(self.cfg.generators) if torch.onnx.is_in_onnx_export() else chosen.unique().tolist()
    for index in present:
      own = (chosen == index).nonzero()[:, 0]
      if self.cfg.bn_at_eval == "batch":  # the statistics are those of all samples
        made = self._run(features[index], index, 2 * FEATURE_RESOLUTION, self.cfg.resolution)[own]
      else:
        made = self._run(features[index][own], index, 2 * FEATURE_RESOLUTION, self.cfg.resolution)
      image = image.index_copy(0, own, made)
    return image

  def _run(self, x: Tensor, index: int, first: int, last: int) -> Tensor:
    """Some layers of one generator."""
    for resolution in self.cfg.resolutions:
      if first <= resolution <= last:
        x = self.generators[f"r{resolution}"](x, index)
    return x

  # ---- for pipeline.py -----------------------------------------------------------------------------------------------

  def draw_latents(self, count: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Random latents of `count` images: {"z": [count, Z], "uniform": [count, n]}."""
    z = torch.randn(count, self.cfg.z_dim, generator=generator)
    return {"z": z, "uniform": torch.rand(count, self.cfg.generators, generator=generator)}

  @torch.inference_mode()
  def sample(self, latents: Mapping[str, Tensor], text: None = None, psi: float = 1.0, means: None = None) -> Tensor:
    """Images [B, 3, S, S] of latents as of `draw_latents`; there is neither text nor truncation."""
    return self(latents["z"], latents["uniform"]).image

  # ---- files ---------------------------------------------------------------------------------------------------------

  @classmethod
  def from_pretrained(
    cls, folder: str | pathlib.Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
  ) -> "MeganGenerator":
    """Reads a folder with `config.json` and `model.safetensors`, whole or in shards with an index.

    Args:
      folder: its path.
      dtype: of the convolutions, float32 by default.
      device: where to.
    """
    from safetensors.torch import load_file

    folder = pathlib.Path(folder)
    cfg = MeganConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
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
