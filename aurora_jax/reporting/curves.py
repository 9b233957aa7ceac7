"""What a run's folder tells over time: metrics.jsonl as curves and expert loads, sample pictures by step."""

import collections
import dataclasses
import math
import pathlib
import re

import numpy as np

from aurora_jax.runs import metrics

# Fields of a metrics line that say when and what, and are no curve.
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
# Lines that tell of something; their numbers are no curve.
_EVENTS = ("warning", "skipped")


@dataclasses.dataclass(frozen=True)
class RunLog:
  """The numbers of a run.

  Attributes:
    series: {name: (steps int [n], values float [n])}, steps strictly ascending; what an interrupted run repeated
      after its resumption replaces what it had written before.
    last: the newest value of each counter, where there are any: "step", "seconds", "images", and of a run that grows
      "resolution" (pixels) and "features" (what Frechet distances are of, a string).
    resumes: steps at which the run was taken up again.
    skipped: number of lines that could not be read.
    warnings: (step, words) of each warning; what an interrupted run repeated is there once.
    skipped_steps: (step, words) of each step that the guard left out.
  """

  series: dict
  last: dict
  resumes: tuple
  skipped: int
  warnings: tuple = ()
  skipped_steps: tuple = ()

  def latest(self, prefix):
    """{name: newest value} of the series whose name starts with `prefix`."""
    return {name: float(values[-1]) for name, (_, values) in self.series.items() if name.startswith(prefix)}


def read_metrics(path):
  """Reads metrics.jsonl, however it ends: a line that is cut or no JSON object is counted and left out.

  Args:
    path: the file; it may be missing.

  Returns:
    RunLog.
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


def thin(steps, values, most):
  """At most `most` points: means of equal runs of points, at each run's last step."""
  if len(steps) <= most:
    return steps, values
  edges = np.linspace(0, len(steps), most + 1).astype(int)
  sums = np.add.reduceat(values, edges[:-1], axis=0)
  counts = np.diff(edges).reshape((-1,) + (1,) * (np.ndim(values) - 1))
  return steps[edges[1:] - 1], sums / counts


def natural_key(name):
  """Sorts "r8_block10" behind "r8_block9" and before "r16"."""
  return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


# Which chart a curve belongs to: the first rule whose pattern is found in the name.
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
  ("Adversarial", r"adversarial|logit|^[dg]/"),
  ("Learning", r"grad|norm|learning_rate|(^|/)lr|ema|per_second|weight"),
  ("Other", r""),
)
# What the first part of a name is called in a chart's title.
_PREFIXES = {
  "d": "discriminator",
  "g": "generator",
  "grad_norm": "gradient norm",
  "update_norm": "update norm",
  "grad_norm/g": "gradient of the generator",
  "grad_norm/d": "gradient of the discriminator",
  "update_norm/g": "update of the generator",
  "update_norm/d": "update of the discriminator",
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


def curve_groups(log, most_points=400):
  """The curves of a run, in charts.

  Names are grouped by what they measure and then by their first part, so that a chart has one unit.

  Args:
    log: RunLog.
    most_points: int, longer curves are thinned.

  Returns:
    list of {"title": str, "log": bool, "series": [{"name": str, "steps": [int], "values": [float]}]}: `log` suggests
    a logarithmic axis. Expert loads are left out.
  """
  charts = collections.defaultdict(list)
  for name in sorted(log.series, key=natural_key):
    steps, values = log.series[name]
    if name.startswith(_LOAD) or len(steps) < 2:
      continue
    group = next(title for title, pattern in _GROUPS if re.search(pattern, name))
    if group == "Judge":
      # Shares of 1 on one chart, everything else (degrees, distances, counts) on a chart of its own.
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
  """Whether all values are positive and the bulk of them spans more than a factor of thirty."""
  values = np.concatenate([s["values"] for s in series])
  if values.min() <= 0:
    return False
  low, high = np.quantile(values, (0.02, 0.98))
  return bool(high > 30 * low)


@dataclasses.dataclass(frozen=True)
class LayerLoad:
  """The share of tokens that each expert of a layer got.

  Attributes:
    layer: str.
    steps: int [n].
    shares: float [n, E], rows sum to 1.
  """

  layer: str
  steps: np.ndarray
  shares: np.ndarray


def expert_loads(log, most_points=80):
  """Loads over time of every MoE layer, in natural order; steps at which an expert's entry is missing are left out.

  Args:
    log: RunLog.
    most_points: int.

  Returns:
    list of LayerLoad.
  """
  layers = collections.defaultdict(dict)
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
    kept = table.sum(-1) > 0 if len(steps) else np.zeros(0, bool)
    if kept.any():
      steps, shares = np.asarray(steps)[kept], table[kept]
      steps, shares = thin(steps, shares / shares.sum(-1, keepdims=True), most_points)
      loads.append(LayerLoad(layer, steps, shares))
  return loads


def sample_pictures(folder, most=60):
  """The sample grids of a run in order of their steps.

  Args:
    folder: `samples/` of the run; it may be missing.
    most: int; of more pictures an even choice is taken, the first and the last among them.

  Returns:
    (list of (step, path), number of pictures there are).
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
