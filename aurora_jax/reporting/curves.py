"""A run over time: metrics.jsonl as curves and expert loads, sample sheets by step."""

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from aurora_jax.runs import metrics

# Fields of a metrics line that are no curve. "pictures" is in lines of earlier versions.
_COUNTERS = (
  "step",
  "seconds",
  "images",
  "kind",
  "time",
  "resolution",
  "features",
  "pictures",
  "images_compared",
  "factor",
)
_LOAD = "moe/load/"
# Kinds of lines that are events; their numbers are no curve.
_EVENTS = ("warning", "skipped")


@dataclasses.dataclass(frozen=True)
class RunLog:
  """The numbers of a run.

  Attributes:
    series: {name: (steps int [n], values float [n])}, steps strictly ascending. What a resumed run repeats replaces
      what it wrote before the interruption.
    last: newest value of each counter that the run has: "step", "seconds", "images", and with progressive growing
      "resolution" (pixels) and "features" (those of the Frechet distance, a string).
    resumes: steps at which the run was resumed.
    skipped: number of lines that could not be read.
    warnings: (step, message) of each warning, without those that a resumed run undid.
    skipped_steps: (step, message) of each step that the guard skipped.
  """

  series: dict[str, tuple[np.ndarray, np.ndarray]]
  last: dict[str, Any]
  resumes: tuple[int, ...]
  skipped: int
  warnings: tuple[tuple[int, str], ...] = ()
  skipped_steps: tuple[tuple[int, str], ...] = ()

  def latest(self, prefix: str) -> dict[str, float]:
    """{name: newest value} of the series whose name starts with `prefix`."""
    return {name: float(values[-1]) for name, (_, values) in self.series.items() if name.startswith(prefix)}


def read_metrics(path: str | os.PathLike) -> RunLog:
  """Reads metrics.jsonl. Lines that are cut off or not JSON objects are counted and left out.

  Args:
    path: the file; it may be missing.
  """
  points = collections.defaultdict(lambda: ([], []))
  last, resumes = {}, []
  events = {kind: [] for kind in _EVENTS}
  rows, unreadable = metrics.read_lines(path)
  for row in rows:
    step = row["step"]
    for name in ("step", "seconds", "images", "resolution"):
      if _is_number(row.get(name)):
        last[name] = row[name]
    if isinstance(row.get("features"), str):
      last["features"] = row["features"]
    if row.get("kind") == "resume":
      resumes.append(step)
      events = {kind: [entry for entry in entries if entry[0] <= step] for kind, entries in events.items()}
    if row.get("kind") in _EVENTS:
      events[row["kind"]].append((step, str(row.get("message", ""))))
      continue
    for name, value in row.items():
      if name in _COUNTERS or not _is_number(value):
        continue
      steps, values = points[name]
      while steps and steps[-1] >= step:
        steps.pop()
        values.pop()
      steps.append(step)
      values.append(float(value))
  series = {name: (np.asarray(steps), np.asarray(values)) for name, (steps, values) in points.items()}
  return RunLog(series, last, tuple(resumes), unreadable, tuple(events["warning"]), tuple(events["skipped"]))


def _is_number(value):
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Reduces a curve to at most `most` points: means of groups of neighbors, each at its group's last step.

  Args:
    steps: [n].
    values: [n, ...].
    most: number of points.
  """
  if len(steps) <= most:
    return steps, values
  edges = np.linspace(0, len(steps), most + 1).astype(int)
  sums = np.add.reduceat(values, edges[:-1], axis=0)
  counts = np.diff(edges).reshape((-1,) + (1,) * (np.ndim(values) - 1))
  return steps[edges[1:] - 1], sums / counts


def natural_key(name: str) -> list[tuple[int, int, str]]:
  """A sort key that puts "r8_block10" after "r8_block9" and before "r16"."""
  return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


# (chart, pattern): a curve belongs to the first chart whose pattern is found in its name.
_GROUPS = (
  ("Judge", r"^judge/"),
  ("Skipped", r"skipped"),
  ("Norms per module", r"^(grad|update)_norm/\w+/"),
  ("Diversity", r"^samples/|w_std"),
  ("Frechet distance", r"^frechet_"),
  ("Matching", r"matching"),
  ("R1", r"(^|[/_])r1($|[/_])"),
  ("CLIP", r"clip"),
  ("Mixture of experts", r"moe|router|balance"),
  ("Adversarial", r"adversarial|critic|logit|^[dg]/"),
  ("Learning", r"grad|norm|learning_rate|(^|/)lr|ema|per_second|weight"),
  ("Other", r""),
)
# First part of a curve's name -> its name in a chart's title.
_PREFIXES = {
  "c": "feature critic",
  "d": "discriminator",
  "g": "generator",
  "grad_norm": "gradient norm",
  "update_norm": "update norm",
  "grad_norm/g": "gradient of the generator",
  "grad_norm/d": "gradient of the discriminator",
  "grad_norm/c": "gradient of the feature critic",
  "update_norm/g": "update of the generator",
  "update_norm/d": "update of the discriminator",
  "update_norm/c": "update of the feature critic",
  "samples": "mean distance of samples",
}
_ORDER = (
  "Frechet distance",
  "Adversarial",
  "Matching",
  "CLIP",
  "Mixture of experts",
  "R1",
  "Diversity",
  "Learning",
  "Norms per module",
  "Skipped",
  "Judge",
  "Other",
)


def curve_groups(log: RunLog, most_points: int = 400) -> list[dict[str, Any]]:
  """The curves of a run in charts, without expert loads.

  Curves are grouped by what they measure and then by the first part of their name, so that a chart has one unit.

  Args:
    log: the run's numbers.
    most_points: longer curves are thinned.

  Returns:
    {"title": str, "log": bool, "series": [{"name": str, "steps": [int], "values": [float]}]} of each chart. "log" says
    whether a logarithmic axis suits the values.
  """
  charts = collections.defaultdict(list)
  for name in sorted(log.series, key=natural_key):
    steps, values = log.series[name]
    if name.startswith(_LOAD) or len(steps) < 2:
      continue
    group = next(title for title, pattern in _GROUPS if re.search(pattern, name))
    if group == "Judge":
      # Only shares fit one chart; the other figures (degrees, distances, counts) have other units.
      if not re.search(r"top1|accuracy", name):
        continue
    first, _, rest = name.rpartition("/") if group == "Norms per module" else name.partition("/")
    steps, values = thin(steps, values, most_points)
    charts[group, first if rest else ""].append(
      {"name": rest or name, "steps": [int(s) for s in steps], "values": [float(f"{v:.5g}") for v in values]}
    )
  per_group = collections.Counter(group for group, _ in charts)
  found = []
  for group, first in sorted(charts, key=lambda key: (_ORDER.index(key[0]), key[1] != "loss", key[1])):
    series = charts[group, first]
    detail = _PREFIXES.get(first, first.replace("_", " "))
    if not detail or detail == group.lower():
      detail = ", ".join(s["name"].replace("_", " ") for s in series[:2])
    title = group if per_group[group] == 1 else f"{group}: {detail}"
    found.append({"title": title, "log": _looks_logarithmic(series), "series": series})
  return found


def _looks_logarithmic(series):
  """Whether all values are positive and 96 % of them span more than a factor of thirty."""
  values = np.concatenate([s["values"] for s in series])
  if values.min() <= 0:
    return False
  low, high = np.quantile(values, (0.02, 0.98))
  return bool(high > 30 * low)


@dataclasses.dataclass(frozen=True)
class LayerLoad:
  """The share of tokens that each expert of a layer received.

  Attributes:
    layer: its name.
    steps: int [n].
    shares: float [n, E]; rows sum to 1.
  """

  layer: str
  steps: np.ndarray
  shares: np.ndarray


def expert_loads(log: RunLog, most_points: int = 80) -> list[LayerLoad]:
  """Loads of every MoE layer over time, in natural order. Steps without an entry for every expert are left out.

  Args:
    log: the run's numbers.
    most_points: longer curves are thinned.
  """
  layers: Mapping[str, dict[int, dict[int, float]]] = collections.defaultdict(dict)
  for name, (steps, values) in log.series.items():
    match = re.fullmatch(re.escape(_LOAD) + r"(.+)/(\d+)", name)
    if match:
      layers[match[1]][int(match[2])] = dict(zip(steps.tolist(), values.tolist()))
  loads = []
  for layer in sorted(layers, key=natural_key):
    experts = layers[layer]
    steps = sorted(set.intersection(*(set(points) for points in experts.values())))
    table = np.array(
      [[experts[e].get(step, 0.0) if e in experts else 0.0 for e in range(max(experts) + 1)] for step in steps]
    ).reshape(len(steps), -1)
    table = np.maximum(table, 0)
    valid = table.sum(-1) > 0 if len(steps) else np.zeros(0, bool)
    if valid.any():
      steps, shares = np.asarray(steps)[valid], table[valid]
      steps, shares = thin(steps, shares / shares.sum(-1, keepdims=True), most_points)
      loads.append(LayerLoad(layer, steps, shares))
  return loads


def sample_sheets(folder: str | os.PathLike, most: int = 60) -> tuple[list[tuple[int, pathlib.Path]], int]:
  """The sample sheets of a run in order of their steps.

  Args:
    folder: `samples/` of the run; it may be missing.
    most: of more sheets an even selection is taken that includes the first and the last.

  Returns:
    ((step, path) of each, number of sheets in the folder).
  """
  found = []
  for path in pathlib.Path(folder).glob("*.png"):
    match = re.search(r"(\d+)$", path.stem)
    if match and not path.name.startswith("."):
      found.append((int(match[1]), path))
  found.sort()
  if len(found) <= most:
    return found, len(found)
  chosen = np.unique(np.linspace(0, len(found) - 1, most).round().astype(int))
  return [found[i] for i in chosen], len(found)
