"""Sections of report.html about the run itself: facts and config, warnings, samples over training, curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aurora_jax.reporting import curves as curves_lib
from aurora_jax.reporting.page_elements import data_uri, duration, escape, number, section

# Config fields in the summary at the top of the page, and their labels.
_SUMMARY = (
  ("system", "System"),
  ("generator.resolution", "Resolution"),
  ("generator.generators", "Generators"),
  ("generator.experts", "Experts"),
  ("generator.z_dim", "Latent width"),
  ("generator.w_dim", "Style width"),
  ("generator.moe_backend", "Expert dispatch"),
  ("data.path", "Data"),
  ("data.split", "Split"),
  ("text.clip", "Text encoder"),
  ("train.batch_size", "Batch"),
  ("train.total_steps", "Planned steps"),
  ("train.seed", "Seed"),
  ("optimizer.generator.learning_rate", "Learning rate of G"),
  ("optimizer.discriminator.learning_rate", "Learning rate of D"),
  ("loss.r1_gamma", "R1 gamma"),
  ("loss.clip_weight", "CLIP weight"),
  ("loss.matching_weight", "Matching weight"),
)
_EVENTS_SHOWN = 30


def _lookup(config, path):
  for part in path.split("."):
    if not isinstance(config, dict) or part not in config:
      return None
    config = config[part]
  return config


def _format(value):
  """A config value in one line."""
  if isinstance(value, dict):
    items = sorted(((str(k), v) for k, v in value.items()), key=lambda item: curves_lib.natural_key(item[0]))
    return ", ".join(f"{v} at {k}" for k, v in items)
  if isinstance(value, (list, tuple)):
    return ", ".join(map(str, value))
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return number(value)
  return str(value)


def _facts(log):
  """[(label, value)] of what the run has done so far."""
  facts = []
  if "step" in log.last:
    facts.append(("Step", number(log.last["step"])))
  if "images" in log.last:
    facts.append(("Images seen", number(log.last["images"])))
  if "seconds" in log.last:
    facts.append(("Wall time", duration(log.last["seconds"])))
  speed = log.series.get("images_per_second")
  if speed is not None:
    facts.append(("Images per second", number(float(np.median(speed[1])))))
  if "resolution" in log.last:
    facts.append(("Stage", f"{number(log.last['resolution'])} px"))
  if "features" in log.last:
    facts.append(("Frechet distance of", log.last["features"]))
  for label, events in (("Resumes", log.resumes), ("Warnings", log.warnings), ("Skipped steps", log.skipped_steps)):
    if events:
      facts.append((label, number(len(events))))
  return facts


def _definitions(items):
  return "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in items)


def header(name: str, config: Mapping[str, Any], log: curves_lib.RunLog) -> str:
  """The top of the page: name, facts, a summary of the config and all of it.

  Args:
    name: the run's name.
    config: config.json; {} if it cannot be read.
    log: the run's numbers.
  """
  if config:
    items = [(label, _lookup(config, path)) for path, label in _SUMMARY]
    summary = _definitions((label, _format(value)) for label, value in items if value not in (None, "", {}, [], ()))
    whole = escape(json.dumps(config, indent=2, ensure_ascii=False))
    about = (
      f'<div class="config"><dl>{summary}</dl><details><summary>Whole configuration</summary><pre>{whole}</pre>'
      "</details></div>"
    )
  else:
    about = '<p class="missing config">No readable config.json in the run folder.</p>'
  if log.last:
    progress = f'<dl class="facts">{_definitions(_facts(log))}</dl>'
  else:
    progress = '<p class="missing">No metrics.jsonl in the run folder.</p>'
  return f'<header><p class="eyebrow">GAN training run</p><h1>{escape(name)}</h1>{progress}{about}</header>'


def warnings(log: curves_lib.RunLog) -> str:
  """Warnings and skipped steps in order of their steps; "" for a run without."""
  events = sorted(
    [(step, "warning", message) for step, message in log.warnings]
    + [(step, "skipped", message) for step, message in log.skipped_steps]
  )
  if not events:
    return ""
  prefix = {"warning": "", "skipped": "skipped: "}
  rows = "".join(
    f'<li class="{kind}"><b>step {number(step)}</b> {prefix[kind]}{escape(message)}</li>'
    for step, kind, message in events[-_EVENTS_SHOWN:]
  )
  more = f" The newest {_EVENTS_SHOWN} of {number(len(events))} are shown." if len(events) > _EVENTS_SHOWN else ""
  return section(
    "Warnings",
    "Signs of unhealthy training, and steps that were skipped because a loss or a gradient was not finite. Vertical "
    f"lines mark the warnings in the curves.{more}",
    f'<ul class="events">{rows}</ul>',
  )


def embed_samples(sheets: Sequence[tuple[int, Path]], log: curves_lib.RunLog) -> list[dict[str, str]]:
  """Sample sheets for the page.

  Args:
    sheets: (step, path) of each.
    log: the run's numbers, for the images seen at each step.

  Returns:
    {"label": text, "src": data URI} of each. A file that cannot be read is left out.
  """
  embedded = []
  last_step, last_images = log.last.get("step", 0), log.last.get("images", 0)
  for step, path in sheets:
    try:
      with Image.open(path) as image:
        source = data_uri(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a damaged file
      continue
    label = f"step {step:,}"
    if last_step and last_images:  # every step reads the same number of images
      label += f" \u00b7 {round(step * last_images / last_step):,} images"
    embedded.append({"label": label, "src": source})
  return embedded


def samples(embedded: Sequence[Mapping[str, str]], count: int) -> str:
  """The sample sheets with a slider. Without JavaScript the page shows the newest one.

  Args:
    embedded: as of `embed_samples`.
    count: number of sheets in the run's folder.
  """
  if not embedded:
    return section("Samples over training", "", "", "No samples yet.")
  last = embedded[-1]
  about = "The same prompts and latents at every step. Move the slider, or use the arrow keys."
  if len(embedded) < count:
    about += f" {len(embedded)} of {count} sample sheets are shown."
  body = (
    '<div class="shot"><div class="controls">'
    '<button type="button" id="sample-play" aria-pressed="false">Play</button>'
    f'<input type="range" id="sample-slider" min="0" max="{len(embedded) - 1}" value="{len(embedded) - 1}" step="1" '
    f'aria-label="Training step"><output id="sample-label" for="sample-slider">{escape(last["label"])}</output></div>'
    f'<div class="scroll" tabindex="0" role="group" aria-label="Samples"><img id="sample-image" '
    f'src="{last["src"]}" alt="Samples at {escape(last["label"])}"></div></div>'
  )
  return section("Samples over training", about, body)


def curves(charts: Sequence[Mapping[str, Any]]) -> str:
  """Empty charts that the page's script draws. `charts` is as of `curves.curve_groups`."""
  body = "".join(f'<article class="card chart" data-chart="{n}"></article>' for n in range(len(charts)))
  if body:
    body = f'<noscript><p class="missing">The curves need JavaScript.</p></noscript><div class="charts">{body}</div>'
  return section(
    "Curves",
    "Faint: as logged. Bold: smoothed. Point at a chart, or focus it and use the arrow keys, to read values. Dotted "
    "lines mark resumes, red lines mark warnings.",
    body,
    "No curves yet: metrics.jsonl has fewer than two points.",
  )


def footer(log: curves_lib.RunLog) -> str:
  """How the page was made, and how many lines of metrics.jsonl could not be read."""
  note = "Made by aurora_jax from the files in the run's folder. The page needs no network."
  if log.skipped:
    note += f" {log.skipped} line{'s' if log.skipped > 1 else ''} of metrics.jsonl could not be read."
  return f"<footer>{escape(note)}</footer>"
