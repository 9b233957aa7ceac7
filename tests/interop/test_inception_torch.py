"""Inception's features against torch-fidelity's with random weights, and what happens to files that do not fit."""

import functools
import importlib
import importlib.util
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from aurora_jax.data import loader
from aurora_jax.errors import UserError
from aurora_jax.interop import inception_torch
from aurora_jax.models import inception

pytestmark = pytest.mark.slow


class Oracle:
  """torch-fidelity's Inception with random weights, and its enlargement."""

  def __init__(self, patch):
    found = importlib.util.find_spec("torch_fidelity")
    assert found, (
      "torch-fidelity is not installed: bash launch/setup.sh --dev, or pip install --no-deps "
      "-r requirements-oracles.txt"
    )
    # The package imports all of itself and with it torchvision, which is not there (requirements-oracles.txt).
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(found.submodule_search_locations)
    patch.setitem(sys.modules, "torch_fidelity", package)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    self.enlarge = module.interpolate_bilinear_2d_like_tensorflow1x
    with pytest.MonkeyPatch.context() as inner:  # it takes no weights but from a file
      inner.setattr(module.torch, "load", lambda *args, **kwargs: None)
      inner.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state_dict: None)
      self.model = module.FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(0)
    for name, value in self.model.state_dict().items():
      if name.endswith("conv.weight"):
        value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)  # images reach the other end
      elif name.endswith(("bn.weight", "running_var")):
        value.uniform_(0.5, 1.5, generator=generator)
      elif value.is_floating_point():
        value.normal_(0, 0.2, generator=generator)

  def state_dict(self):
    """A copy that a test may change."""
    return {name: value.clone() for name, value in self.model.state_dict().items()}

  def features(self, pixels):
    """uint8 [B, R, R, 3] -> [B, 2048]."""
    return self.model(torch.tensor(pixels.transpose(0, 3, 1, 2)))[0].numpy()


@pytest.fixture(scope="module")
def oracle():
  with pytest.MonkeyPatch.context() as patch:
    yield Oracle(patch)


@pytest.fixture(scope="module")
def path(oracle, tmp_path_factory):
  """The weights as torch-fidelity's own file has them."""
  path = tmp_path_factory.mktemp("weights") / "inception.pth"
  torch.save(oracle.state_dict(), path)
  return path


@pytest.fixture(scope="module")
def variables(path):
  return inception_torch.load(path)


def pictures(side):
  """Noise, a gradient, black and white squares."""
  noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
  gradient = np.linspace(0, 255, side * side * 3).reshape(side, side, 3).astype(np.uint8)
  squares = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((side // 4, side // 4)))[..., None] * [255, 255, 255]
  return np.stack([noise, gradient, squares.astype(np.uint8)])


@pytest.mark.parametrize("side", [32, 64])
def test_features_are_torch_fidelitys(oracle, variables, side):
  pixels = pictures(side)
  theirs = oracle.features(pixels)
  ours = np.asarray(jax.jit(inception.Inception().apply)(variables, loader.to_float(pixels)))
  assert ours.shape == (len(pixels), inception.WIDTH) and ours.dtype == np.float32
  assert np.abs(ours - theirs).max() < 1e-5 * theirs.max()
  # What tells images apart is far larger than that.
  assert min(np.abs(theirs[a] - theirs[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-2 * theirs.max()


@pytest.mark.parametrize("side", [4, 32, 64, 299, 512])
def test_pictures_are_enlarged_as_by_tensorflow_1(oracle, side):
  images = np.random.default_rng(side).uniform(0, 255, (2, side, side, 3)).astype(np.float32)
  theirs = oracle.enlarge(torch.tensor(images.transpose(0, 3, 1, 2)), size=(299, 299), align_corners=False)
  np.testing.assert_allclose(inception.resize(images), theirs.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def test_pictures_count_as_their_bytes(monkeypatch):
  """What lies between two bytes goes to the nearer one, and what lies outside to the last, as in a saved image."""
  seen = []
  monkeypatch.setattr(inception, "resize", lambda pixels: seen.append(pixels) or pixels)
  monkeypatch.setattr(inception, "_LAYERS", ())
  pixels = np.arange(256, dtype=np.float32)
  for change in (0, 0.4, -0.4):
    images = np.broadcast_to(((pixels + change) / 127.5 - 1)[None, :, None, None], (1, 256, 1, 3))
    inception.Inception().apply({}, np.float32(images))
    np.testing.assert_array_equal(seen[-1][0, :, 0, 0], pixels)
  inception.Inception().apply({}, np.float32([-1.7, 1.7]).reshape(1, 2, 1, 1))
  np.testing.assert_array_equal(np.ravel(seen[-1]), [0, 255])


@pytest.mark.parametrize(
  "name,write",
  [
    ("x.safetensors", safetensors.torch.save_file),
    ("x.pth", functools.partial(torch.save, _use_new_zipfile_serialization=False)),
  ],
)
def test_other_ways_to_write_the_file(oracle, variables, tmp_path, monkeypatch, name, write):
  """And without the counts of batches, which older files do not have; read without PyTorch."""
  state = {key: value for key, value in oracle.state_dict().items() if not key.endswith("num_batches_tracked")}
  write(state, tmp_path / name)
  monkeypatch.setitem(sys.modules, "torch", None)
  jax.tree.map(np.testing.assert_array_equal, inception_torch.load(tmp_path / name), variables)


def _without(*names):
  return lambda state: [state.pop(name) for name in names]


@pytest.mark.parametrize(
  "change,words",
  [
    (_without("Mixed_7c.branch_pool.bn.running_var"), "missing: Mixed_7c.branch_pool.bn.running_var"),
    (lambda state: state.update({"AuxLogits.fc.bias": torch.zeros(1000)}), "left over: AuxLogits.fc.bias"),
    (lambda state: state.update(epoch=3), "left over: epoch"),
    (lambda state: state.update({"fc.bias": torch.zeros(1000)}), "1 misshapen: fc.bias is (1000,), expected (1008,)"),
    (lambda state: state.update({"fc.bias": "none"}), "missing: fc.bias"),
    (lambda state: _without(*[name for name in state if name.startswith("Mixed_6e")])(state), "50 missing: "),
    (
      lambda state: state.update(
        {name: state.pop(name)[..., 0] for name in ("fc.weight", "Conv2d_2a_3x3.conv.weight")}
      ),
      "2 misshapen: fc.weight is (1008,), expected (1008, 2048), "
      "Conv2d_2a_3x3.conv.weight is (32, 32, 3), expected (32, 32, 3, 3)",
    ),
  ],
)
def test_weights_of_another_model_are_named_in_one_line(oracle, tmp_path, change, words):
  state, path = oracle.state_dict(), tmp_path / "x.pth"
  change(state)
  torch.save(state, path)
  with pytest.raises(UserError) as raised:
    inception_torch.load(path)
  message = str(raised.value)
  assert message.startswith(f"{path} holds no Inception of 2015-12-05; ") and words in message and "\n" not in message


def test_damaged_files(path, tmp_path):
  cut = tmp_path / "cut.pth"
  cut.write_bytes(path.read_bytes()[:-1000])
  for bad, words in ((cut, "cut off"), (tmp_path / "nowhere.pth", "cannot be read"), (tmp_path, "read from .pth")):
    with pytest.raises(UserError) as raised:
      inception_torch.load(bad)
    assert str(bad) in str(raised.value) and words in str(raised.value) and "\n" not in str(raised.value)
