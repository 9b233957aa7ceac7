"""The model card of an exported folder: `README.md` with front matter as the Hub reads it."""

import dataclasses
import json
from collections.abc import Sequence

# JSON values are YAML values too.
_quoted = json.dumps


@dataclasses.dataclass(frozen=True)
class Metric:
  """A measured number.

  Attributes:
    kind: as the Hub calls it, such as "fid".
    name: as a reader should see it, such as "FID-30k".
    value: the number.
    protocol: how it was measured: images, resolution, features, truncation.
  """

  kind: str
  name: str
  value: float
  protocol: str = ""


@dataclasses.dataclass(frozen=True)
class Card:
  """What a model card says.

  Attributes:
    name: of the model.
    pipeline: class in `pipeline.py`.
    resolution: side of the images.
    parameters: numbers in the weights.
    weights: which weights these are, such as "moving average, step 20,000".
    conditional: whether it takes text.
    prompt: of the example.
    psi: of the example; None for a generator without truncation.
    summary: what kind of model it is, a sentence or two.
    license: of the weights, an identifier that the Hub knows, such as "cc-by-sa-4.0" or "other".
    tags: further tags.
    dataset: name of the training data.
    dataset_images: number of its images, or 0.
    dataset_notes: lines on it, such as its source and license.
    metrics: measured numbers.
    cost: lines on what training took: steps, images, time, machine.
    image: file name of a sheet of samples in the folder, or "".
    image_note: how these were drawn.
  """

  name: str
  pipeline: str
  resolution: int
  parameters: int
  weights: str
  conditional: bool = True
  prompt: str = "a red heart"
  psi: float | None = 0.7
  summary: str = ""
  license: str = "other"
  tags: tuple[str, ...] = ()
  dataset: str = ""
  dataset_images: int = 0
  dataset_notes: tuple[str, ...] = ()
  metrics: tuple[Metric, ...] = ()
  cost: tuple[str, ...] = ()
  image: str = ""
  image_note: str = ""


def render(card: Card) -> str:
  """The text of `README.md`."""
  return "\n".join(["---", *_front_matter(card), "---", "", *_body(card)]) + "\n"


def _task(card):
  return "text-to-image" if card.conditional else "unconditional-image-generation"


def _front_matter(card) -> Sequence[str]:
  lines = [f"license: {_quoted(card.license)}", "library_name: pytorch", f"pipeline_tag: {_task(card)}", "tags:"]
  lines += [f"- {_quoted(tag)}" for tag in dict.fromkeys(("gan", "aurora_jax", *card.tags))]
  if card.dataset:
    lines += ["datasets:", f"- {_quoted(card.dataset)}"]
  if card.metrics:
    lines += ["model-index:", f"- name: {_quoted(card.name)}", "  results:"]
    lines += ["  - task:", f"      type: {_task(card)}", "    dataset:"]
    dataset = _quoted(card.dataset or "unknown")
    lines += [f"      name: {dataset}", f"      type: {dataset}", "    metrics:"]
    for metric in card.metrics:
      label = f"{metric.name} ({metric.protocol})" if metric.protocol else metric.name
      value = _quoted(float(metric.value))
      lines += [f"    - type: {_quoted(metric.kind)}", f"      name: {_quoted(label)}", f"      value: {value}"]
  return lines


def _body(card) -> Sequence[str]:
  lines = [f"# {card.name}", ""]
  if card.summary:
    lines += [card.summary, ""]
  lines += [
    f"{card.resolution}x{card.resolution} pixels, {card.parameters:,} parameters in float32; weights: {card.weights}. "
    "Trained with aurora_jax (JAX). Sampling needs PyTorch, not JAX.",
    "",
  ]
  if card.image:
    lines += [f"![samples]({card.image})", ""] + ([card.image_note, ""] if card.image_note else [])
  lines += _example(card)
  if card.dataset:
    lines += [
      "## Training data",
      "",
      f"- {card.dataset}" + f": {card.dataset_images:,} images" * bool(card.dataset_images),
    ]
    lines += [f"- {note}" for note in card.dataset_notes]
    lines += [""]
  if card.metrics:
    lines += ["## Results", "", "| metric | value | protocol |", "| --- | --- | --- |"]
    lines += [f"| {metric.name} | {metric.value:.4g} | {metric.protocol or '-'} |" for metric in card.metrics]
    lines += [""]
  if card.cost:
    lines += ["## Training cost", "", *(f"- {line}" for line in card.cost), ""]
  return lines[:-1]


def _example(card):
  arguments = [_quoted(card.prompt)] if card.conditional else []
  arguments += ["num_images=4", "seed=0"] + ([f"psi={card.psi}"] if card.psi is not None else [])
  packages = "torch safetensors pillow" + (" transformers" if card.conditional else "")
  return [
    "## Use",
    "",
    f"`pip install {packages}`, then:",
    "",
    "```python",
    "import sys",
    "",
    'folder = "."  # this folder',
    "sys.path.insert(0, folder)",
    f"from pipeline import {card.pipeline}",
    "",
    f"pipe = {card.pipeline}.from_pretrained(folder)",
    f"images = pipe({', '.join(arguments)})",
    "for i, image in enumerate(images):",
    '  image.save(f"{i}.png")',
    "```",
    "",
    "`latents=` takes the random numbers behind the images in place of `seed`. From a shell: "
    f"`python pipeline.py{' ' + _quoted(card.prompt) if card.conditional else ''} --num-images 4`.",
    "",
  ]
