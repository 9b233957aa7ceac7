"""Runs to folders for onnxruntime, checked after writing: its images against ours of the same latents."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from aurora_jax import files
from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.evaluation import trained_generator
from aurora_jax.interop.clip_hf import check_writable
from aurora_jax.interop.hub import folder as hub_folder
from aurora_jax.interop.hub import layout, onnx_files
from aurora_jax.systems import hub

TOLERANCE = 1e-3  # of the images, relative to their largest value
_LATENTS, _MEANS, _PSI = 2, 3, (0.7, 1.0)
# What stays of the folder in the Hub's layout; a config.json would make it one of those.
_COMPANIONS = (layout.ORIGIN, layout.TOKENIZER)


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was written.

  Attributes:
    path: the folder.
    step: of the checkpoint.
    parameters: numbers in the weights, buffers included.
    weights: "moving averages" or "parameters".
    difference: the largest one of onnxruntime's images and ours, relative to the largest value of ours.
  """

  path: pathlib.Path
  step: int
  parameters: int
  weights: str
  difference: float


def check_target(folder: str | os.PathLike, *, overwrite: bool = False) -> None:
  """Raises a UserError if `export` would refuse the folder: it is in use, and not by an earlier export."""
  folder = pathlib.Path(folder)
  if (folder / onnx_files.GENERATOR).is_file() and (folder / layout.ORIGIN).is_file():
    check_writable(folder, overwrite=overwrite)
  else:
    hub_folder.check_target(folder, overwrite=overwrite)


def export(
  workdir: str | os.PathLike,
  out: str | os.PathLike,
  prompts: Sequence[str],
  *,
  step: int | None = None,
  weights: str = "ema",
  clip: str | None = None,
  card: Mapping[str, Any] | None = None,
  extra: Mapping[str, bytes] | None = None,
  overwrite: bool = False,
) -> Exported:
  """Writes a run's generator as ONNX files. All of the folder appears, or nothing.

  Args:
    workdir, out, step, weights, clip, card, extra, overwrite: as of `systems.hub.export_run`.
    prompts: whose images are compared; [""] for a generator without text.

  Raises:
    UserError: as `export_run`; a package is missing; or the images differ by more than TOLERANCE.
  """
  onnx_files.check_packages()
  check = lambda: check_target(out, overwrite=overwrite)
  check()
  with files.atomic_folder(out, check) as work:
    source = work / ".source"
    done = hub.export_run(workdir, source, step=step, weights=weights, clip=clip, card=card, extra=extra)
    least = onnx_files.write(source, done.pipeline, work)
    model = trained_generator.load(workdir, done.step, clip=clip, dtype="float32", weights=weights)
    session = onnx_files.Session(work)
    difference = _difference(model, session, list(prompts), least)
    if not difference <= TOLERANCE:
      raise UserError(
        f"nothing is written: onnxruntime's images differ from ours by {difference:.2g}, more than {TOLERANCE:g}"
      )
    for name in (*_COMPANIONS, *(extra or ())):
      if (source / name).exists():
        os.rename(source / name, work / name)
    text = (source / layout.CARD).read_text(encoding="utf-8")
    use = _use(model, session, (card or {}).get("prompt", "a red heart"), difference, least)
    (work / layout.CARD).write_text(_card(text, use), encoding="utf-8")
    shutil.rmtree(source)
  return Exported(pathlib.Path(out), done.step, done.parameters, done.weights, difference)


def _difference(model, session, prompts, least):
  """The largest difference of images of the same latents, in one batch and, where the generator takes it, alone."""
  system = model.system
  sweep = _PSI if system.truncates else (1.0,)
  drawn = latents_lib.draw(system.draw_latents, 0, np.arange(len(prompts)), _LATENTS, _MEANS)
  count = len(prompts) * _LATENTS
  # All in one batch: an image may depend on the others of its batch.
  sampler = dataclasses.replace(model, sampler=type(model.sampler)(system, count * len(sweep), len(prompts)))
  ours = np.asarray(sampler.sample(prompts, latents=drawn, psi=sweep).images, np.float32)
  ours = ours.reshape(count, len(sweep), *ours.shape[-3:])
  of_images = lambda array: np.repeat(array, _LATENTS, 0)
  encoded = session.encode(np.asarray(system.inputs(prompts))) if system.experiment.conditional else {}
  inputs = {name: of_images(array) for name, array in encoded.items()}
  inputs |= {name: array.reshape(count, -1) for name, array in drawn.values.items()}
  inputs |= {f"mean_{name}": of_images(array) for name, array in drawn.means.items()}
  found = []
  for k, psi in enumerate(sweep):
    of_psi = {"psi": np.array(psi, np.float32)}
    found.append(np.abs(ours[:, k] - session.sample(inputs | of_psi)).max())
    if least == 1:
      alone = session.sample({name: array[:1] for name, array in inputs.items()} | of_psi)
      found.append(np.abs(ours[:1, k] - alone).max())
  # NaN in onnxruntime's images is NaN here too, which is not within any tolerance.
  return float(np.max(found) / np.abs(ours).max())


def _card(text, use):
  """The model card of the folder in the Hub's layout with another example."""
  text = text.replace("library_name: pytorch", "library_name: onnx", 1)
  text = text.replace("Sampling needs PyTorch, not JAX.", "Sampling needs onnxruntime, not JAX.", 1)
  return re.sub(r"^## Use\n.*?(?=^## |\Z)", lambda _: "\n".join([*use, "", ""]), text, flags=re.MULTILINE | re.DOTALL)


def _use(model, session, prompt, difference, least):
  """The lines of the card on how to sample."""
  system = model.system
  text = [name for name in session.inputs if name in ("text", "eot")]
  arrays, setup, tokens = [], [], []
  for name, shape in session.latents.items():
    draw = "random" if name == "uniform" else "standard_normal"
    arrays.append(f'"{name}": rng.{draw}(({", ".join(map(str, (4, *shape)))}), np.float32)')
  if "psi" in session.inputs:
    arrays.append('"psi": np.array(0.7, np.float32)')
  if "mean_z" in session.inputs:
    setup.append(f"means = rng.standard_normal((1, 16, {session.latents['z'][0]}), np.float32)")
    arrays.append('"mean_z": np.repeat(means, 4, 0)')
  if text:
    length = session.context_length
    tokens = [
      'tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")',
      f"tokenizer.enable_truncation({length})",
      f"tokens = tokenizer.encode({json.dumps(prompt)}).ids",
      f"ids = np.zeros((1, {length}), np.int64)",
      "ids[0, : len(tokens)] = tokens",
      'encoder = onnxruntime.InferenceSession(f"{folder}/text_encoder.onnx")',
      f'{", ".join(text)}{"," * (len(text) == 1)} = encoder.run(None, {{"ids": ids}})',
    ]
    arrays += [f'"{name}": np.repeat({name}, 4, 0)' for name in text]
  packages = ["numpy", "onnxruntime", "pillow", *(["tokenizers"] if text else [])]
  modules = ["import numpy as np", "import onnxruntime", "import PIL.Image", *(["import tokenizers"] if text else [])]
  lines = [
    "## Use",
    "",
    f"`pip install {' '.join(packages)}`, then:",
    "",
    "```python",
    *modules,
    "",
    'folder = "."  # this folder',
    *tokens,
    "rng = np.random.default_rng(0)",
    *setup,
    "inputs = {",
    *(f"  {line}," for line in arrays),
    "}",
    'generator = onnxruntime.InferenceSession(f"{folder}/generator.onnx")',
    "for i, image in enumerate(generator.run(None, inputs)[0].transpose(0, 2, 3, 1)):",
    "  pixels = np.clip(image * 127.5 + 128, 0, 255).astype(np.uint8)",
    '  PIL.Image.fromarray(pixels).save(f"{i}.png")',
    "```",
    "",
    f"ONNX opset {onnx_files.OPSET}, float32. The batch size is free, resolution and number of token ids are not. "
    f"Checked after writing: onnxruntime's images are within {difference:.1g} of the original's for the same latents, "
    "relative to their largest value.",
  ]
  if least > 1:
    lines.append(f"Every image depends on its batch, of {least} or more.")
  if "mean_z" in session.inputs:
    lines.append("`mean_z` are latents whose mean style is the prompt's own mean, toward which `psi` below 1 moves.")
  if "uniform" in session.inputs and not system.experiment.conditional:
    lines.append("`uniform` are the numbers by which the gate draws a generator.")
  return lines
