"""The metrics of a run as a table for the terminal: first value, newest value and curve of each."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from aurora_jax.training import health

_BARS = "▁▂▃▄▅▆▇█"
_BAR_COLUMNS = 8
# Metrics that are shown if the run has them, in this order, and their labels.
_NUMBERS = {
  "loss/d_adversarial": "D adversarial",
  "loss/g_adversarial": "G adversarial",
  "loss/d_matching": "D matching",
  "loss/g_matching": "G matching",
  "loss/g_clip": "G CLIP",
  "loss/r1": "R1",
  "loss/moe": "MoE losses",
  "d/logit_real": "logit real",
  "d/logit_fake": "logit fake",
  "d/logit_mismatched": "logit mismatched",
  "clip/accuracy": "CLIP accuracy",
  "grad_norm/d": "gradient of D",
  "grad_norm/g": "gradient of G",
  "g/w_std": "w std",
  "samples/diversity_within": "diversity, prompt",
  "samples/diversity_between": "diversity, all",
}
_ENTROPY = "entropy of experts"


def cells(rows: Iterable[Mapping[str, Any]]) -> list[str]:
  """A cell of up to 42 characters per metric: its label, first value, newest value and curve.

  Args:
    rows: lines of metrics.jsonl, as of `metrics.history`.
  """
  series: dict[str, list[float]] = {}
  for row in rows:
    if row["kind"] not in ("train", "samples") or (row["kind"] == "samples" and not row["step"]):
      continue  # samples of step 0 are those of random weights
    entropies = health.expert_entropy(row)
    if entropies:  # the most uneven of all layers
      row = {**row, _ENTROPY: min(entropies.values())}
    for name, value in row.items():
      if isinstance(value, (int, float)) and math.isfinite(value):
        series.setdefault(name, []).append(value)
  names = [name for name in (*_NUMBERS, _ENTROPY) if name in series]
  names += [name for name in series if name.startswith("loss/") and name not in names]
  table = []
  for name in names:
    values = series[name]
    short = _NUMBERS.get(name, name.removeprefix("loss/"))
    table.append(f"{short:18s}{_number(values[0]):>6s} → {_number(values[-1]):6s} {_bars(values)}")
  return table


def _bars(values):
  """A curve as a few block characters."""
  edges = [round(i * len(values) / _BAR_COLUMNS) for i in range(_BAR_COLUMNS + 1)]
  means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:]) if b > a]
  low, high = min(means), max(means)
  return "".join(_BARS[round((len(_BARS) - 1) * (mean - low) / (high - low)) if high > low else 0] for mean in means)


def _number(value):
  """Three digits, in at most six characters if possible."""
  short = f"{value:.3g}"
  return short if len(short) <= 6 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
