"""Reads the weights of pytorch-fid and torch-fidelity, `pt_inception-2015-12-05-6726825d.pth`.

The file holds TensorFlow's graph of 2015-12-05 under torchvision's names: per convolution `NAME.conv.weight` [out, in,
rows, columns] and `NAME.bn.*`, and the classifier `fc.*`. Its 1,008 classes distinguish it from torchvision's own
Inception.
"""

import os
from typing import Any

import numpy as np

from aurora_jax.interop import name_map, tensor_files
from aurora_jax.models import inception

_EPSILON = 1e-3  # of the batch normalization
_NORM = ("weight", "bias", "running_mean", "running_var")
_CLASSIFIER = {"fc.weight": (1008, inception.WIDTH), "fc.bias": (1008,)}


def load(path: str | os.PathLike) -> dict[str, Any]:
  """Reads the file and folds the batch normalization into the convolutions.

  Args:
    path: .pth, or .safetensors with the same names.

  Returns:
    Variables of `inception.Inception`, float32 numpy arrays on the host.

  Raises:
    UserError: no such file, a corrupt file, or another model. The error lists what is missing, left over or misshapen.
  """
  expected = {name: tuple(leaves["kernel"].shape) for name, leaves in inception.abstract_variables()["params"].items()}
  weights = tensor_files.read(path)
  _check(path, weights, _released_shapes(expected))

  def folded(name):
    kernel, scale, offset, mean, variance = (
      np.asarray(weights[f"{name}.{part}"], np.float64) for part in ("conv.weight", *(f"bn.{part}" for part in _NORM))
    )
    scale /= np.sqrt(variance + _EPSILON)
    kernel = kernel.transpose(2, 3, 1, 0) * scale
    return {"kernel": kernel.astype(np.float32), "bias": (offset - mean * scale).astype(np.float32)}

  return {"params": {name: folded(name) for name in expected}}


def _released_shapes(kernels):
  """{name in the file: shape} from our kernels' shapes."""
  shapes = dict(_CLASSIFIER)
  for name, (rows, columns, given, width) in kernels.items():
    shapes[f"{name}.conv.weight"] = width, given, rows, columns
    shapes |= {f"{name}.bn.{part}": (width,) for part in _NORM}
  return shapes


def _check(path, weights, shapes):
  """Raises UserError for the weights of another model; reads none of them."""
  # PyTorch counts the batches of training; some writers leave the count out.
  named = {name: value for name, value in weights.items() if not name.endswith(".num_batches_tracked")}
  arrays = {name: value for name, value in named.items() if tensor_files.is_array(value)}
  left_over = dict.fromkeys(named.keys() - shapes.keys(), ())
  name_map.check(f"{path} holds no Inception of 2015-12-05", left_over | name_map.shapes(arrays), shapes)
