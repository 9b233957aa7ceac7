"""A folder in the Hub's layout as ONNX files for onnxruntime, made by torch.onnx.export from the PyTorch twin.

  text_encoder.onnx   ids int64 [P, N] -> text, and eot where the generator takes features of all tokens
  generator.onnx      latents, text, psi -> image float32 [B, 3, R, R], about [-1, 1]

  B images, P prompts, N tokens, M latents of a prompt's own mean, R resolution

The exporter is PyTorch's TorchScript-based one. The one on torch.export takes minutes of processor time for Aurora's
smallest generators, since it solves for the free batch size symbolically.
"""

import contextlib
import importlib.util
import inspect
import logging
import pathlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop.hub.layout import PIPELINE

GENERATOR, TEXT_ENCODER = "generator.onnx", "text_encoder.onnx"
OPSET = 18  # the first with Col2Im, the sum of overlapping blocks in an up-sampling convolution
LARGEST = 2 << 30  # bytes: what one ONNX file can hold
_PACKAGES = ("torch", "onnx", "onnxruntime")
_TOKENS = ("text", "eot")
_MEANS, _PSI = "mean_z", "psi"


def check_packages() -> None:
  """Raises a UserError if a package that `write` needs is not installed."""
  missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise UserError(f"--format onnx needs {' and '.join(missing)}: pip install 'aurora_jax[onnx]'")


def write(source: pathlib.Path, pipeline: str, folder: pathlib.Path) -> int:
  """Writes GENERATOR and, for a generator that takes text, TEXT_ENCODER.

  Args:
    source: a folder in the Hub's layout that this package has just written. Its code runs.
    pipeline: name of the class in its `pipeline.py`.
    folder: an existing folder.

  Returns:
    The smallest batch that the generator takes.

  Raises:
    UserError: the weights have LARGEST bytes or more, or PyTorch cannot export the model.
  """
  import torch

  with _quiet():
    pipe = getattr(_pipeline_module(source), pipeline).from_pretrained(source)
  model = pipe.model.requires_grad_(False)
  size = sum(tensor.nbytes for tensor in model.state_dict().values())
  if size >= LARGEST:
    raise UserError(f"--format onnx is for weights below {LARGEST / 1e9:.1f} GB, these are {size / 1e9:.1f} GB")
  # Sizes that differ, and none is 1, so that no two of them are taken for the same.
  count, means = 3, 5
  inputs = {name: (values, {0: "images"}) for name, values in model.draw_latents(count).items()}
  latents = list(inputs)
  if model.text_input is not None:
    inputs |= _write_text_encoder(folder / TEXT_ENCODER, pipe, count)
  if getattr(model, "truncates", True):
    inputs[_PSI] = (torch.tensor(0.5), {})
  if getattr(model, "prompt_means", False):
    drawn = model.draw_latents(count * means)["z"].unflatten(0, (count, means))
    inputs[_MEANS] = (drawn, {0: "images", 1: "mean_latents"})

  class Generator(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.model = model

    def forward(self, *tensors):
      given = dict(zip(inputs, tensors))
      text = tuple(given[name] for name in _TOKENS if name in given)
      sample = inspect.unwrap(type(model).sample)  # without inference mode, which cannot be traced
      return sample(
        model,
        {name: given[name] for name in latents},
        text if len(text) > 1 else next(iter(text), None),
        given.get(_PSI, 1.0),
        {"z": given[_MEANS]} if _MEANS in given else None,
      )

  _export(folder / GENERATOR, Generator(), inputs, {"image": "images"})
  return getattr(model, "least_batch", 1)


def _write_text_encoder(path, pipe, count):
  """Writes the encoder. Returns its outputs of `count` prompts as inputs of the generator."""
  import torch

  if pipe.text_encoder is None:  # the generator has one of its own
    length = pipe.tokenizer.model_max_length
  else:
    length = pipe.text_encoder.config.max_position_embeddings
  pipe.tokenize = lambda ids, length: ids  # ids in place of prompts

  class TextEncoder(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.model, self.text_encoder = pipe.model, pipe.text_encoder

    def forward(self, ids):
      return inspect.unwrap(type(pipe).encode)(pipe, ids)

  ids = torch.ones(count, length, dtype=torch.long)
  with torch.no_grad():
    found = TextEncoder()(ids)
  found = dict(zip(_TOKENS, found if isinstance(found, tuple) else (found,)))
  _export(path, TextEncoder(), {"ids": (ids, {0: "prompts"})}, dict.fromkeys(found, "prompts"))
  return {name: (values, {0: "images"}) for name, values in found.items()}


def _pipeline_module(source):
  spec = importlib.util.spec_from_file_location("exported_pipeline", source / PIPELINE)
  module = importlib.util.module_from_spec(spec)
  before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
  try:
    spec.loader.exec_module(module)
  finally:
    sys.dont_write_bytecode = before
  return module


def _export(path, module, inputs, outputs):
  """Writes one file. inputs: {name: (example, {axis: name of a size that is free})}; outputs: {name: of the first
  axis}.
  """
  import torch

  free = {name: axes for name, (_, axes) in inputs.items() if axes} | {
    name: {0: axis} for name, axis in outputs.items()
  }
  try:
    with _quiet(), torch.no_grad():
      torch.onnx.export(
        module.eval(),
        tuple(example for example, _ in inputs.values()),
        path,
        dynamo=False,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_axes=free,
        opset_version=OPSET,
      )
  except (RuntimeError, TypeError, ValueError, torch.onnx.OnnxExporterError) as error:
    reason = str(error).strip().partition("\n")[0]
    raise UserError(f"PyTorch {torch.__version__} cannot export {path.name}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Hides the exporter's warnings, which say that sizes become constants, as they should. Hides the progress bar of
  transformers, since the command shows its own.
  """
  from transformers.utils import logging as transformers_logging

  logger, bar = logging.getLogger("torch.onnx"), transformers_logging.is_progress_bar_enabled()
  before = logger.level
  logger.setLevel(logging.ERROR)
  transformers_logging.disable_progress_bar()
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logger.setLevel(before)
    if bar:
      transformers_logging.enable_progress_bar()


class Session:
  """The files of a folder in onnxruntime, on the CPU.

  Attributes:
    inputs: names of the generator's inputs.
    latents: {name: shape without the batch}, those of them that are random.
    context_length: N; 0 for a generator without text.
  """

  def __init__(self, folder: pathlib.Path):
    import onnxruntime

    start = lambda name: onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
    self._generator = start(GENERATOR)
    self._text_encoder = start(TEXT_ENCODER) if (folder / TEXT_ENCODER).is_file() else None
    shapes = {value.name: tuple(value.shape) for value in self._generator.get_inputs()}
    self.inputs: Sequence[str] = list(shapes)
    self.latents = {name: shapes[name][1:] for name in shapes if name not in (*_TOKENS, _PSI, _MEANS)}
    self.context_length = 0 if self._text_encoder is None else self._text_encoder.get_inputs()[0].shape[1]

  def encode(self, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Token ids [P, N] to what the generator takes of them, by name; {} without text."""
    if self._text_encoder is None:
      return {}
    names = [value.name for value in self._text_encoder.get_outputs()]
    return dict(zip(names, self._text_encoder.run(None, {"ids": ids.astype(np.int64)})))

  def sample(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Images [B, R, R, 3] of the generator's inputs by name; others are ignored."""
    return self._generator.run(None, {name: inputs[name] for name in self.inputs})[0].transpose(0, 2, 3, 1)
