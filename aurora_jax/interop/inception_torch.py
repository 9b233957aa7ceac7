"""The weights file of pytorch-fid and torch-fidelity, `pt_inception-2015-12-05-6726825d.pth`, for `models/inception.py`.

It is TensorFlow's graph of 2015-12-05 under torchvision's names: per convolution `NAME.conv.weight` [out, in, rows, columns]
and `NAME.bn.*`, and the classifier `fc.*`, whose 1,008 classes tell it from torchvision's own Inception.
"""

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop import tensor_files
from aurora_jax.models import inception

_EPSILON = 1e-3  # of the batch normalisation
_NORM = ("weight", "bias", "running_mean", "running_var")
_CLASSIFIER = {"fc.weight": (1008, inception.WIDTH), "fc.bias": (1008,)}
_NAMES_IN_AN_ERROR = 4


def load(path):
  """Reads the file, .pth or .safetensors with the same names, and folds the batch normalisation into the convolutions.

  Returns:
    Variables of `inception.Inception`, float32 numpy arrays on the host.

  Raises:
    UserError: no such file, damaged, or of another model: what is missing, left over or misshapen.
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
  # What training counted, which some writers leave out.
  named = {name: value for name, value in weights.items() if not name.endswith(".num_batches_tracked")}
  arrays = {name: tuple(value.shape) for name, value in named.items() if tensor_files.is_array(value)}
  problems = {
    "missing": [name for name in shapes if name not in arrays],
    "left over": sorted(named.keys() - shapes.keys()),
    "misshapen": [
      f"{name} {list(arrays[name])} instead of {list(shape)}"
      for name, shape in shapes.items()
      if arrays.get(name, shape) != shape
    ],
  }
  words = [
    f"{what}: {', '.join(names[:_NAMES_IN_AN_ERROR])}"
    + (f" and {len(names) - _NAMES_IN_AN_ERROR} more" if len(names) > _NAMES_IN_AN_ERROR else "")
    for what, names in problems.items()
    if names
  ]
  if words:
    raise UserError(f"{path} holds no Inception of 2015-12-05; {'; '.join(words)}")
