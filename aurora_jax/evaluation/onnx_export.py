"""Runs to folders for onnxruntime, checked after writing: its images against ours of the same latents."""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from aurora_jax import files
from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib
from aurora_jax.evaluation import trained_generator
from aurora_jax.interop.hub import folder as hub_folder
from aurora_jax.interop.hub import layout, onnx_files
from aurora_jax.systems import hub

TOLERANCE = 1e-3  # of the images, whose values are about [-1, 1]; relative to the largest value above 1
_LATENTS, _MEANS, _PSI = 2, 3, 0.7
# What stays of the folder in the Hub's layout; a config.json would make it one of those.
_COMPANIONS = (layout.CARD, layout.ORIGIN, layout.TOKENIZER)


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was written.

  Attributes:
    path: the folder.
    step: of the checkpoint.
    parameters: numbers in the weights, buffers included.
    weights: "moving averages" or "parameters".
    deviation: the largest difference from our images, relative to their largest value if that is above 1.
  """

  path: pathlib.Path
  step: int
  parameters: int
  weights: str
  deviation: float


def export(
  workdir: str | os.PathLike,
  out: str | os.PathLike,
  prompts: list[str],
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
  check = lambda: hub_folder.check_target(out, overwrite=overwrite)
  check()
  with files.atomic_folder(out, check) as work:
    source = work / ".source"
    card = {**(card or {}), "runtime": "onnxruntime"}
    done = hub.export_run(workdir, source, step=step, weights=weights, clip=clip, card=card, extra=extra)
    onnx_files.write(source, work)
    model = trained_generator.load(workdir, done.step, clip=clip, dtype="float32", weights=weights)
    session = onnx_files.Session(work)
    deviation = _deviation(model, session, prompts)
    if not deviation <= TOLERANCE:
      raise UserError(
        f"nothing is written: onnxruntime's images differ from ours by {deviation:.2g}, more than {TOLERANCE:g}"
      )
    for name in (*_COMPANIONS, *(extra or ())):
      if (source / name).exists():
        os.rename(source / name, work / name)
    shutil.rmtree(source)
    with open(work / layout.CARD, "a", encoding="utf-8") as stream:
      stream.write("\n" + "\n".join(_use(model, session, card.get("prompt", "a red heart"), deviation)) + "\n")
  return Exported(pathlib.Path(out), done.step, done.parameters, done.weights, deviation)


def _deviation(model, session, prompts):
  """The largest difference of images of the same latents, all in one batch."""
  system = model.system
  psi = _PSI if system.truncates else 1.0
  given = latents_lib.draw(system.draw_latents, 0, np.arange(len(prompts)), _LATENTS, _MEANS)
  count = len(prompts) * _LATENTS
  sampler = dataclasses.replace(model, sampler=type(model.sampler)(system, count, len(prompts)))
  ours = sampler.sample(prompts, latents=given, psi=psi).images
  ours = np.asarray(ours, np.float32).reshape(count, *ours.shape[-3:])
  of_images = lambda array: np.repeat(array, _LATENTS, 0)
  encoded = session.encode(np.asarray(system.inputs(prompts))) if system.experiment.conditional else {}
  inputs = {name: of_images(array) for name, array in encoded.items()}
  inputs |= {name: array.reshape(count, -1) for name, array in given.values.items()}
  inputs |= {f"mean_{name}": of_images(array) for name, array in given.means.items()}
  theirs = session.sample({**inputs, "psi": np.float32(psi)})
  return float(np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max()))


def _use(model, session, prompt, deviation):
  """The lines of the card on how to sample."""
  system = model.system
  text = [name for name in session.inputs if name in ("text", "eot")]
  given, setup, words = [], [], []
  for name, shape in session.latents.items():
    draw = "random" if name == "uniform" else "standard_normal"
    given.append(f'"{name}": rng.{draw}(({", ".join(map(str, (4, *shape)))}), np.float32)')
  if "psi" in session.inputs:
    given.append('"psi": np.float32(0.7)')
  if "mean_z" in session.inputs:
    setup.append(f"means = rng.standard_normal((1, 16, {session.latents['z'][0]}), np.float32)")
    given.append('"mean_z": np.repeat(means, 4, 0)')
  if text:
    length = session.context_length
    words = [
      'tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")',
      f"tokenizer.enable_truncation({length})",
      f"tokens = tokenizer.encode({_quoted(prompt)}).ids",
      f"ids = np.zeros((1, {length}), np.int64)",
      "ids[0, : len(tokens)] = tokens",
      'encoder = onnxruntime.InferenceSession(f"{folder}/text_encoder.onnx")',
      f'{", ".join(text)}{"," * (len(text) == 1)} = encoder.run(None, {{"ids": ids}})',
    ]
    given += [f'"{name}": np.repeat({name}, 4, 0)' for name in text]
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
    *words,
    "rng = np.random.default_rng(0)",
    *setup,
    "inputs = {",
    *(f"  {line}," for line in given),
    "}",
    'generator = onnxruntime.InferenceSession(f"{folder}/generator.onnx")',
    "for i, image in enumerate(generator.run(None, inputs)[0].transpose(0, 2, 3, 1)):",
    "  pixels = np.clip(image * 127.5 + 128, 0, 255).astype(np.uint8)",
    '  PIL.Image.fromarray(pixels).save(f"{i}.png")',
    "```",
    "",
    f"ONNX opset {onnx_files.OPSET}, float32. The batch is free, the length of the token ids is not. Checked after "
    f"writing by onnxruntime: images within {deviation:.1g} of the original's for the same latents.",
  ]
  if "mean_z" in session.inputs:
    lines.append("`mean_z` are latents whose mean style is the prompt's own mean, toward which `psi` below 1 moves.")
  if system.experiment.conditional is False and "uniform" in session.inputs:
    lines.append("`uniform` are the numbers by which the gate draws a generator.")
  lines.append(
    "A graph has one course for all data: every expert runs on everything, which costs more than in PyTorch."
  )
  return lines


def _quoted(prompt):
  return json.dumps(prompt)
