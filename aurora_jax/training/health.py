"""Alerts: warnings of a run that goes wrong, before hours are lost.

There are three signs, each with a limit in `config.Health`: the discriminator wins (logit gap), images become alike
(diversity of the sample images), one expert gets all tokens (entropy of the loads). An alert is raised when its sign
appears, and again only after it was gone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from aurora_jax import config
from aurora_jax.evaluation import diversity
from aurora_jax.systems.metric_names import EXPERT_LOAD, LOGIT_FAKE, LOGIT_REAL


@dataclasses.dataclass(frozen=True)
class Alert:
  """One alert.

  Attributes:
    name: name of the figure: "health/logit_gap", "samples/diversity_within", "moe/entropy/LAYER".
    message: a sentence with the figure, its limit, and what to look at.
    value: the figure.
    limit: the limit that it passed.
  """

  name: str
  message: str
  value: float
  limit: float

  def to_json(self) -> dict[str, Any]:
    """Values of its line in metrics.jsonl."""
    return {"warning": self.name, "message": self.message, "value": self.value, "limit": self.limit}


def expert_entropy(values: Mapping[str, Any]) -> dict[str, float]:
  """Entropy of each layer's load, from 0 (one expert gets all tokens) to 1 (even).

  Args:
    values: a window's averages, with {"moe/load/LAYER/EXPERT": share}.

  Returns:
    {"moe/entropy/LAYER": entropy}, of the layers with several experts.
  """
  layers: dict[str, list[float]] = {}
  for name, share in values.items():
    if name.startswith(EXPERT_LOAD):
      layers.setdefault(name.removeprefix(EXPERT_LOAD).rpartition("/")[0], []).append(share)
  found = {}
  for layer, shares in layers.items():
    total = sum(shares)
    if len(shares) > 1 and total > 0:
      nats = -sum(share / total * math.log(share / total) for share in shares if share > 0)
      found[f"moe/entropy/{layer}"] = max(0.0, nats) / math.log(len(shares))
  return found


class Health:
  """Looks at the averages of windows and at sample images. Its state is part of a checkpoint's progress."""

  def __init__(
    self, limits: config.Health, stored: Mapping[str, Any] | None = None, remedies: Mapping[str, str] | None = None
  ):
    """Starts, or continues.

    Args:
      limits: the configuration.
      stored: what `to_json` returned before a restart, or None.
      remedies: {field of `limits`: config fields to look at}, for the messages; see `systems.base.System`.
    """
    self._limits = limits
    self._see = {name: f"; see {fields}" for name, fields in (remedies or {}).items()}
    self._standing = set((stored or {}).get("standing", ()))  # signs that were reported and are not gone
    self._largest = dict((stored or {}).get("largest", {}))  # of each diversity

  def window(self, values: Mapping[str, Any]) -> tuple[dict[str, float], list[Alert]]:
    """Checks a window of steps.

    Args:
      values: its averages, {name: float}.

    Returns:
      (further figures to log, alerts).
    """
    figures, alerts = expert_entropy(values), []
    for name, entropy in figures.items():
      layer = name.removeprefix("moe/entropy/")
      loads = {
        key.rpartition("/")[2]: value for key, value in values.items() if key.startswith(f"{EXPERT_LOAD}{layer}/")
      }
      expert = max(loads, key=lambda name: loads[name])
      alerts += self._below(
        name,
        entropy,
        self._limits.expert_entropy,
        f"the experts of {layer} starve: expert {expert} of {len(loads)} gets {100 * loads[expert]:.0f} % of the "
        f"tokens (entropy {entropy:.2f}, limit {self._limits.expert_entropy:g}){self._see.get('expert_entropy', '')}",
      )
    if LOGIT_REAL in values and LOGIT_FAKE in values:
      gap, limit = values[LOGIT_REAL] - values[LOGIT_FAKE], self._limits.logit_gap
      alerts += self._sign(
        "health/logit_gap",
        gap,
        limit,
        bool(limit) and gap > limit,
        f"the discriminator has won: mean logit of real images {values[LOGIT_REAL]:.1f}, of generated ones "
        f"{values[LOGIT_FAKE]:.1f} (gap {gap:.1f}, limit {limit:g}){self._see.get('logit_gap', '')}",
      )
    return figures, alerts

  def samples(self, step: int, images: np.ndarray) -> tuple[dict[str, float], list[Alert]]:
    """Checks the sample images.

    Args:
      step: steps done. The images of step 0, from random weights, do not count as the largest diversity.
      images: [prompts, latents, R, R, 3] in [-1, 1].

    Returns:
      (figures to log, alerts).
    """
    found = diversity.diversity(images)
    figures, alerts = {}, []
    for name, value, what in (
      ("samples/diversity_within", found.within, "latents of one prompt give the same image"),
      ("samples/diversity_between", found.between, "all prompts give the same image"),
    ):
      if math.isfinite(value):
        figures[name] = value
        if step > 0:
          largest = self._largest[name] = max(self._largest.get(name, 0.0), value)
          alerts += self._below(
            name,
            value,
            self._limits.diversity * largest,
            f"collapse: {what} (mean distance {value:.2g}, it was {largest:.2g}); see the images of this step",
          )
    return figures, alerts

  def _below(self, name, value, limit, message):
    return self._sign(name, value, limit, value < limit, message)

  def _sign(self, name, value, limit, seen, message):
    """[Alert] if the sign is new, else []."""
    if not seen:
      self._standing.discard(name)
      return []
    if name in self._standing:
      return []
    self._standing.add(name)
    return [Alert(name, message, value, limit)]

  def to_json(self) -> dict[str, Any]:
    """Plain values for a checkpoint."""
    return {"standing": sorted(self._standing), "largest": dict(self._largest)}
