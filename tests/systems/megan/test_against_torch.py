"""Other sizes than the golden's: outputs, statistics, gradients and initialization against plain torch modules."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from aurora_jax.systems.megan import config, discriminator, generator, released

pytestmark = pytest.mark.slow

SCALES = [(64, 3, 5), (16, 1, 4)]  # resolution, generators, batch
TEMPERATURE = 0.5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
  """Torch's threads wait for each other longer than these sizes take."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


def halves(cfg):
  """Torch's layers of one generator: to the features, and from there to the image."""
  layers, inputs = [], cfg.z_dim
  for resolution in cfg.resolutions:
    outputs = cfg.width(resolution)
    stride = (1, 0) if resolution == 4 else (2, 1)
    layers.append(nn.ConvTranspose2d(inputs, outputs, 4, *stride))
    layers += [nn.Tanh()] if resolution == cfg.resolution else [nn.BatchNorm2d(outputs), nn.ReLU()]
    inputs = outputs
  return nn.Sequential(*layers[:6]), nn.Sequential(*layers[6:])


class TorchGenerator(nn.Module):
  def __init__(self, cfg):
    super().__init__()
    pairs = [halves(cfg) for _ in range(cfg.generators)]
    self.all_layers = nn.ModuleList(first for first, _ in pairs)
    self.all_layers2 = nn.ModuleList(second for _, second in pairs)
    self.main1, self.main2 = pairs[-1]
    self.sum_linear = nn.Linear(64 * cfg.width(8), cfg.z_dim)

  def forward(self, z):
    features = [layers(z[:, :, None, None]) for layers in self.all_layers]
    images = [layers(feature) for layers, feature in zip(self.all_layers2, features)]
    projected = [torch.relu(self.sum_linear(feature.flatten(1))) for feature in features]
    return torch.stack(images, 1), torch.cat(projected, 1)


class TorchGate(nn.Module):
  def __init__(self, cfg):
    super().__init__()
    width = int((cfg.z_dim + cfg.generators * cfg.z_dim) / 2)
    self.mlp = nn.Sequential(
      nn.Linear(cfg.z_dim * (cfg.generators + 1), width),
      nn.BatchNorm1d(width),
      nn.ReLU(),
      nn.Linear(width, cfg.z_dim),
      nn.BatchNorm1d(cfg.z_dim),
      nn.ReLU(),
      nn.Linear(cfg.z_dim, cfg.generators),
    )

  def forward(self, z, projected):
    return self.mlp(torch.cat([z, projected], 1))


class TorchDiscriminator(nn.Module):
  def __init__(self, cfg):
    super().__init__()
    layers, inputs = [], 3
    for width in cfg.widths:
      layers += [nn.Conv2d(inputs, width, 4, 2, 1), nn.LeakyReLU(0.2)]
      inputs = width
    self.main, self.last = nn.Sequential(*layers), nn.Conv2d(inputs, 1, 4)

  def forward(self, image):
    return self.last(self.main(image)).reshape(-1)


def loaded(module, state_dict):
  module.load_state_dict({name: torch.from_numpy(array) for name, array in state_dict.items()}, strict=True)
  return module


def relative(ours, theirs):
  theirs = np.asarray(theirs)
  return np.abs(np.asarray(ours) - theirs).max() / max(np.abs(theirs).max(), 1e-30)


@dataclasses.dataclass(frozen=True)
class Pair:
  """The same random networks here and in torch, one draw of the inputs, and our results."""

  cfg: config.Generator
  gradient: dict[str, np.ndarray]  # released names -> of `loss`
  statistics: dict[str, np.ndarray]  # after the pass in training mode
  loss: jax.Array
  running: generator.GeneratorOutput  # by running statistics
  trained: generator.GeneratorOutput
  generators: TorchGenerator
  gate: TorchGate
  inputs: tuple[np.ndarray, ...]  # z, uniform, cotangent of the image


@pytest.fixture(scope="module", params=SCALES, ids=lambda s: f"{s[0]}px_n{s[1]}")
def pair(request):
  resolution, n, batch = request.param
  cfg = config.Generator(resolution=resolution, z_dim=6, channels=3, generators=n)
  rng = np.random.default_rng(resolution)
  variables = draw_variables(rng, generator.abstract_variables(cfg))
  z = rng.normal(size=(batch, cfg.z_dim)).astype(np.float32)
  uniform = rng.uniform(size=(batch, n)).astype(np.float32)
  cotangent = (rng.normal(size=(batch, resolution, resolution, 3)) / resolution**2).astype(np.float32)

  def loss(params):
    model, everything = generator.Generator(cfg), {**variables, "params": params}
    running = model.apply(everything, z, uniform, TEMPERATURE)
    out, moved = model.apply(everything, z, uniform, TEMPERATURE, train=True, mutable=["batch_stats"])
    return jnp.sum(out.image * cotangent) + jnp.mean(jnp.square(out.logits)), (running, out, moved)

  (value, (running, out, moved)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
  state_dicts = released.export_generator(variables, cfg)
  return Pair(
    cfg=cfg,
    gradient=released.export_generator({**variables, "params": gradient}, cfg),
    statistics=released.export_generator({**variables, **moved}, cfg),
    loss=value,
    running=running,
    trained=out,
    generators=loaded(TorchGenerator(cfg), state_dicts["G"]),
    gate=loaded(TorchGate(cfg), state_dicts["Gum"]),
    inputs=(z, uniform, cotangent),
  )


def draw_variables(rng, shapes):
  """Random values of a sensible size for every leaf; scales and variances are positive."""

  def draw(path, leaf):
    name = path[-1].key
    if name == "count":
      return np.full(leaf.shape, 3, np.int32)
    if name in ("scale", "var"):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return rng.normal(0, 0.2, leaf.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def torch_pass(pair):
  """(images, logits, hard straight-through gate, image)."""
  z, uniform = (torch.from_numpy(array) for array in pair.inputs[:2])
  images, projected = pair.generators(z)
  logits = pair.gate(z, projected)
  noise = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
  soft = torch.softmax((logits + noise) / TEMPERATURE, 1)
  hard = (soft == soft.max(1, keepdim=True).values).float()
  gate = (hard - soft).detach() + soft
  gate = torch.ones_like(gate) if gate.shape[1] == 1 else gate
  return images, logits, gate, (images * gate[:, :, None, None, None]).sum(1)


def check_outputs(ours, theirs):
  images, logits, gate, image = (tensor.detach().movedim(-3, -1) if tensor.ndim > 2 else tensor for tensor in theirs)
  assert relative(ours.images, images) < 1e-5
  assert relative(ours.image, image) < 1e-5
  assert relative(ours.logits, logits.detach()) < 1e-5
  np.testing.assert_allclose(ours.gate, gate.detach(), atol=1e-6)


def test_evaluation_mode(pair):
  pair.generators.eval()
  pair.gate.eval()
  with torch.no_grad():
    check_outputs(pair.running, torch_pass(pair))


def test_training_mode_statistics_and_every_gradient(pair):
  nets = {"G": pair.generators.train(), "Gum": pair.gate.train()}
  images, logits, gate, image = torch_pass(pair)
  loss = (image.movedim(1, -1) * torch.from_numpy(pair.inputs[2])).sum() + (logits**2).mean()
  loss.backward()
  check_outputs(pair.trained, (images, logits, gate, image))
  assert pair.loss == pytest.approx(loss.item(), rel=1e-5)
  for file, net in nets.items():
    modules = dict(net.named_modules())
    for name, parameter in net.named_parameters():
      path, _, last = name.rpartition(".")
      owner, _, position = path.rpartition(".")
      follower = modules.get(f"{owner}.{int(position) + 1}") if position.isdigit() else None
      gradient = pair.gradient[file][name]
      if last == "bias" and isinstance(follower, nn.BatchNorm1d | nn.BatchNorm2d):
        np.testing.assert_allclose(gradient, parameter.grad, rtol=0, atol=1e-5, err_msg=name)
      else:
        assert relative(gradient, parameter.grad) < 1e-4, name
    for name, buffer in net.named_buffers():
      assert relative(pair.statistics[file][name], buffer) < 1e-5, name
      assert not name.endswith("tracked") or buffer == 4


@pytest.mark.parametrize("resolution", [64, 16])
def test_the_discriminator(resolution):
  cfg, rng = config.Discriminator(resolution=resolution, channels=4), np.random.default_rng(0)
  variables = draw_variables(rng, discriminator.abstract_variables(cfg))
  net = loaded(TorchDiscriminator(cfg), released.export_discriminator(variables, cfg))
  image = rng.normal(size=(2, resolution, resolution, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = net(torch.from_numpy(image).movedim(-1, 1))
  assert relative(jax.jit(discriminator.Discriminator(cfg).apply)(variables, image), theirs) < 1e-5


@pytest.fixture(scope="module", params=["torch031", "modern"])
def initialized(request):
  """(configuration, variables) of each style."""
  cfg = config.Generator(resolution=32, z_dim=32, channels=16, generators=4, init=request.param)
  init = lambda key: generator.Generator(cfg).init(key, jnp.zeros((2, 32)), jnp.zeros((2, 4)), 1.0)
  return cfg, jax.jit(init)(jax.random.key(0))


def test_initialization_has_torchs_ranges(initialized):
  cfg, variables = initialized
  params, style = variables["params"], cfg.init
  inputs = {4: 32, 8: 64, 16: 32, 32: 16}
  fans = {}  # our path -> what bounds it
  for resolution, channels in inputs.items():
    fans["generators", f"r{resolution}"] = 16 * (channels if style == "torch031" else cfg.width(resolution))
  fans["projection",] = 64 * 32
  fans |= {("gate", "dense_0"): 160, ("gate", "dense_1"): 80, ("gate", "logits"): 32}
  for path, fan in fans.items():
    layer = params
    for key in path:
      layer = layer[key]
    for name in ("kernel", "bias"):
      check_uniform(layer[name], -1 / math.sqrt(fan), 1 / math.sqrt(fan))
  kernel = params["generators"]["r8"]["kernel"]
  assert len(np.unique(np.asarray(kernel[:, 0, 0, 0, 0]))) == 4  # every generator has weights of its own
  for norm in (params["generators"]["r4"]["norm"], params["gate"]["norm_0"]):
    assert not norm["bias"].any()
    if style == "torch031":
      check_uniform(norm["scale"], 0, 1)
    else:
      assert (norm["scale"] == 1).all()
  statistics = variables["batch_stats"]["gate"]["norm_0"]
  assert not statistics["mean"].any() and (statistics["var"] == 1).all() and statistics["count"] == 0


def check_uniform(array, low, high):
  """Within the range, filling it, and with the mean and the standard deviation of a uniform draw."""
  array, width = np.asarray(array).ravel(), high - low
  assert low <= array.min() and array.max() <= high
  noise = 5 * width / math.sqrt(12 * array.size)
  assert abs(array.mean() - (low + high) / 2) < noise
  assert abs(array.std() - width / math.sqrt(12)) < noise


def test_modern_initialization_is_that_of_torchs_own_layers(initialized):
  cfg, variables = initialized
  ours = released.export_generator(variables, cfg)
  torch.manual_seed(0)
  for file, net in (("G", TorchGenerator(cfg)), ("Gum", TorchGate(cfg))):
    for name, theirs in net.state_dict().items():
      # torch 0.3.1 took another fan for transposed convolutions, and today's torch is what is installed.
      if theirs.numel() > 1000 and (cfg.init == "modern" or theirs.ndim == 2):
        assert np.abs(ours[file][name]).max() == pytest.approx(theirs.abs().max().item(), rel=0.02), name
        assert ours[file][name].std() == pytest.approx(theirs.std().item(), rel=0.05), name


def test_the_discriminator_s_initialization_is_that_of_torchs_own_layers():
  cfg = config.Discriminator(resolution=32, channels=16)
  init = lambda key: discriminator.Discriminator(cfg).init(key, jnp.zeros((1, 32, 32, 3)))
  ours = released.export_discriminator(jax.jit(init)(jax.random.key(0)), cfg)
  torch.manual_seed(0)
  for name, theirs in TorchDiscriminator(cfg).state_dict().items():
    if theirs.numel() > 500:
      assert np.abs(ours[name]).max() == pytest.approx(theirs.abs().max().item(), rel=0.02), name
      assert ours[name].std() == pytest.approx(theirs.std().item(), rel=0.05), name
