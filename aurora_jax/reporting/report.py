"""report.html: one self-contained page that tells a run's story to a person.

It is built from what lies in the run's folder (config.json, metrics.jsonl, samples/) and from panels that need the
model or the data (`Panels`). Whatever is missing is named in a line; the page needs no network.
"""

import dataclasses
import importlib.resources
import json
import pathlib
import string
from collections.abc import Mapping
from typing import Any

import numpy as np

from aurora_jax import config_migration, files
from aurora_jax.errors import UserError
from aurora_jax.evaluation import judge
from aurora_jax.reporting import curves, report_sections


@dataclasses.dataclass(frozen=True)
class ExpertExample:
  """One generated picture and which expert each of its pixels went to.

  Attributes:
    caption: str.
    image: [R, R, 3] in [-1, 1].
    layers: {layer: int [r, r] or [r * r]}.
    experts: {layer: number of experts}.
  """

  caption: str
  image: np.ndarray
  layers: Mapping[str, np.ndarray]
  experts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class HeldOutExample:
  """A prompt that training never saw: the real picture and generated ones [L, R, R, 3]."""

  caption: str
  real: np.ndarray
  generated: np.ndarray


@dataclasses.dataclass(frozen=True)
class ColourExample:
  """A colour prompt: the judge's check, the real picture and generated ones [L, R, R, 3]."""

  check: judge.ColourCheck
  real: np.ndarray
  generated: np.ndarray


@dataclasses.dataclass(frozen=True)
class Panels:
  """What the report shows besides the files of the run; each part may be missing.

  Attributes:
    name: the run's name; None takes the config's, else the folder's.
    figures: the judge's figures by their names in metrics.jsonl ("judge/top1_of_32"); None takes the newest ones there.
    expert_examples, heldout, colours: pictures.
    notes: sentences shown under the figures: which weights, how many pictures, which truncation.
  """

  name: str | None = None
  figures: Mapping[str, float] | None = None
  expert_examples: tuple[ExpertExample, ...] = ()
  heldout: tuple[HeldOutExample, ...] = ()
  colours: tuple[ColourExample, ...] = ()
  notes: tuple[str, ...] = ()


def write_report(run_dir, panels=Panels()):
  """Writes RUN/report.html, whole or not at all.

  Args:
    run_dir: the run's folder.
    panels: Panels.

  Returns:
    pathlib.Path of the page.

  Raises:
    UserError: no such folder, or the page cannot be written.
  """
  run_dir = pathlib.Path(run_dir)
  if not run_dir.is_dir():
    raise UserError(f"run folder not found: {run_dir}")
  page = render(run_dir, panels)
  files.write_text(run_dir / "report.html", page)
  return run_dir / "report.html"


def render(run_dir, panels):
  """The page as a string; see `write_report`."""
  config = _read_config(run_dir / "config.json")
  log = curves.read_metrics(run_dir / "metrics.jsonl")
  figures = log.latest("judge/") if panels.figures is None else dict(panels.figures)
  charts = curves.curve_groups(log)
  shots, shot_count = curves.sample_pictures(run_dir / "samples")
  samples = report_sections.embed_samples(shots, log)
  name = panels.name or config.get("name") or run_dir.resolve().name
  sections = (
    report_sections.header(name, config, log),
    report_sections.warnings(log),
    report_sections.figures(figures, panels.notes),
    report_sections.samples(samples, shot_count),
    report_sections.heldout(panels.heldout),
    report_sections.colours(panels.colours),
    report_sections.expert_examples(panels.expert_examples),
    report_sections.expert_loads(curves.expert_loads(log)),
    report_sections.curves(charts),
    report_sections.footer(log),
  )
  data = {
    "samples": samples,
    "charts": charts,
    "resumes": list(log.resumes),
    "warnings": sorted({step for step, _ in log.warnings}),
  }
  page = importlib.resources.files(__package__) / "page"
  return string.Template((page / "report.html").read_text(encoding="utf-8")).substitute(
    title=report_sections.text(name),
    style=(page / "report.css").read_text(encoding="utf-8"),
    script=(page / "report.js").read_text(encoding="utf-8"),
    sections="\n".join(sections),
    # "<" must not end the script element that holds it.
    data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
  )


def _read_config(path) -> dict[str, Any]:
  """config.json as a dict in today's names; empty if it is missing or no JSON object."""
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return config_migration.migrate(config) if isinstance(config, dict) else {}
