"""report.html: one self-contained page about a run.

The page is built from the files in the run's folder (config.json, metrics.jsonl, samples/) and from examples that need
the model or the data (`Panels`). A section without data says so. The page needs no network.
"""

import importlib.resources
import json
import os
import pathlib
import string
from typing import Any

from aurora_jax import config_migration, files
from aurora_jax.errors import UserError
from aurora_jax.reporting import curves, expert_sections, judge_sections, page_elements, run_sections
from aurora_jax.reporting.panels import Panels


def write_report(run_dir: str | os.PathLike, panels: Panels = Panels()) -> pathlib.Path:
  """Writes RUN/report.html atomically.

  Args:
    run_dir: the run's folder.
    panels: additional content.

  Returns:
    The path of the page.

  Raises:
    UserError: the folder does not exist, or the page cannot be written.
  """
  run_dir = pathlib.Path(run_dir)
  if not run_dir.is_dir():
    raise UserError(f"run folder not found: {run_dir}")
  page = render(run_dir, panels)
  files.write_text(run_dir / "report.html", page)
  return run_dir / "report.html"


def render(run_dir: pathlib.Path, panels: Panels) -> str:
  """The page as HTML; see `write_report`."""
  config = _read_config(run_dir / "config.json")
  log = curves.read_metrics(run_dir / "metrics.jsonl")
  figures = log.latest("judge/") if panels.figures is None else dict(panels.figures)
  charts = curves.curve_groups(log)
  sheets, sheet_count = curves.sample_sheets(run_dir / "samples")
  samples = run_sections.embed_samples(sheets, log)
  name = panels.name or config.get("name") or run_dir.resolve().name
  sections = (
    run_sections.header(name, config, log),
    run_sections.warnings(log),
    judge_sections.figures(figures, panels.notes),
    run_sections.samples(samples, sheet_count),
    judge_sections.heldout(panels.heldout),
    judge_sections.colors(panels.colors),
    expert_sections.expert_examples(panels.expert_examples),
    expert_sections.expert_loads(curves.expert_loads(log)),
    run_sections.curves(charts),
    run_sections.footer(log),
  )
  data = {
    "samples": samples,
    "charts": charts,
    "resumes": list(log.resumes),
    "warnings": sorted({step for step, _ in log.warnings}),
  }
  page = importlib.resources.files("aurora_jax.reporting") / "page"
  return string.Template((page / "report.html").read_text(encoding="utf-8")).substitute(
    title=page_elements.escape(name),
    style=(page / "report.css").read_text(encoding="utf-8"),
    script=(page / "report.js").read_text(encoding="utf-8"),
    sections="\n".join(sections),
    # A "<" in the data must not end the script element that holds it.
    data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
  )


def _read_config(path) -> dict[str, Any]:
  """config.json in today's names; {} if it is missing or not a JSON object."""
  try:
    config = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return config_migration.migrate(config) if isinstance(config, dict) else {}
