"""A folder in the Hub's layout as ONNX files for onnxruntime, made by torch.onnx.export from the PyTorch twin.

  text_encoder.onnx   ids int64 [P, N] -> text, and eot where the generator takes features of all tokens
  generator.onnx      latents, text, psi -> image float32 [B, 3, R, R], about [-1, 1]

  B images, P prompts, N tokens, M latents of a prompt's own mean, R resolution

A graph has one course for all data. All experts (and all generators of a mixture) run on everything, and the result of
the chosen one is taken.
"""

import contextlib
import importlib.util
import inspect
import logging
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from aurora_jax.errors import UserError

GENERATOR, TEXT_ENCODER = "generator.onnx", "text_encoder.onnx"
OPSET = 20  # the first with grid sampling of any rank; onnxruntime 1.17 and later have it
_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")
_TOKENS = ("text", "eot")
_MEANS = "mean_z"


def check_packages() -> None:
  """Raises a UserError if a package that `write` needs is not installed."""
  missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install 'aurora_jax[onnx]'")


def write(source: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes GENERATOR and, for a generator that takes text, TEXT_ENCODER; weights of 2 GB or more in files of their own.

  Args:
    source: a folder in the Hub's layout that this package has just written. Its code runs.
    folder: an existing folder.
  """
  import torch

  from aurora_jax.interop.hub.pipeline import Pipeline

  class TextEncoder(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.model, self.text_encoder = pipe.model, pipe.text_encoder

    def forward(self, *tensors):
      return pipe.encode_ids(*tensors)

  class Generator(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.model = pipe.model

    def forward(self, *tensors):
      given = dict(zip(names, tensors))
      text = tuple(given[name] for name in _TOKENS if name in given)
      sample = inspect.unwrap(type(self.model).sample)  # without inference mode, which cannot be exported
      return sample(
        self.model,
        {name: given[name] for name in latents},
        text if len(text) > 1 else next(iter(text), None),
        given.get("psi", 1.0),
        {"z": given[_MEANS]} if _MEANS in given else None,
      )

  pipe = Pipeline.from_pretrained(source)
  model = pipe.model.requires_grad_(False)
  least = getattr(model, "least_batch", 1)
  # Sizes that differ, and none is 1, so that no two of them are taken for the same.
  count, means = 3, 5
  latents = model.draw_latents(count)
  batch, many = torch.export.Dim("batch", min=least), torch.export.Dim("mean_latents", min=1)
  inputs = {name: (values, {0: batch}) for name, values in latents.items()}
  if model.text_input is not None:
    ids = torch.ones(count, pipe.context_length, dtype=torch.long)
    prompts = torch.export.Dim("prompts", min=1)
    text = TextEncoder()
    with torch.no_grad():
      found = text(ids)
    found = found if isinstance(found, tuple) else (found,)
    _export(folder / TEXT_ENCODER, text, {"ids": (ids, {0: prompts})}, _TOKENS[: len(found)])
    inputs |= {name: (values, {0: batch}) for name, values in zip(_TOKENS, found)}
  if getattr(model, "truncates", True):
    inputs["psi"] = (torch.tensor(0.5), {})
  if getattr(model, "prompt_means", False):
    drawn = model.draw_latents(count * means)["z"].unflatten(0, (count, means))
    inputs[_MEANS] = (drawn, {0: batch, 1: many})
  names = list(inputs)
  _export(folder / GENERATOR, Generator(), inputs, ("image",))


def _export(path, module, inputs, outputs):
  """Writes one file. inputs: {name: (example, {axis: name of a size that is free})}."""
  import torch

  sizes = tuple(axes for _, axes in inputs.values())
  with _quiet(), torch.no_grad():
    program = torch.onnx.export(
      module.eval(),
      tuple(example for example, _ in inputs.values()),
      dynamo=True,
      input_names=list(inputs),
      output_names=list(outputs),
      dynamic_shapes=(sizes,),
      opset_version=OPSET,
      verbose=False,
    )
    program.save(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without the exporter's warnings, which are of packages that are not used and of its own insides."""
  logger = logging.getLogger("torch.onnx")
  before = logger.level
  logger.setLevel(logging.ERROR)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logger.setLevel(before)


class Session:
  """The files of a folder in onnxruntime, on the CPU."""

  def __init__(self, folder: pathlib.Path):
    import onnxruntime

    start = lambda name: onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    self._generator = start(GENERATOR)
    self._text_encoder = start(TEXT_ENCODER) if (folder / TEXT_ENCODER).is_file() else None
    shapes = {value.name: tuple(value.shape) for value in self._generator.get_inputs()}
    self.inputs: Sequence[str] = list(shapes)
    # Shapes without the batch.
    self.latents = {name: shapes[name][1:] for name in shapes if name not in (*_TOKENS, "psi", _MEANS)}
    self.context_length = 0 if self._text_encoder is None else self._text_encoder.get_inputs()[0].shape[1]

  def encode(self, ids: np.ndarray | None) -> dict[str, np.ndarray]:
    """Token ids [P, N] to what the generator takes of them, by name; {} without text."""
    if self._text_encoder is None or ids is None:
      return {}
    names = [value.name for value in self._text_encoder.get_outputs()]
    return dict(zip(names, self._text_encoder.run(None, {"ids": ids.astype(np.int64)})))

  def sample(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Images [B, R, R, 3] of the generator's inputs by name; others are ignored."""
    return self._generator.run(None, {name: inputs[name] for name in self.inputs})[0].transpose(0, 2, 3, 1)
