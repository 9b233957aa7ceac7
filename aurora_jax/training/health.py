"""Warnings: what a person who watches a run would want to be told before hours are lost.

Three signs, each with a limit in `config.Health`: the discriminator has won (logit gap), the pictures have become one
(diversity of the sample grid), one expert does everything (entropy of the loads). A warning is raised when its sign
appears, and again only after it has gone.
"""

import dataclasses
import math

from aurora_jax.evaluation import diversity

_LOAD = "moe/load/"


@dataclasses.dataclass(frozen=True)
class Alert:
  """One warning.

  Attributes:
    name: of the figure, "health/logit_gap", "samples/diversity_within", "moe/entropy/LAYER".
    message: a sentence with the figure, its limit, and what to look at.
    value, limit: what it was, and where the warning begins.
  """

  name: str
  message: str
  value: float
  limit: float

  def to_json(self):
    """For metrics.jsonl."""
    return {"warning": self.name, "message": self.message, "value": self.value, "limit": self.limit}


def expert_entropy(values):
  """Entropy of each layer's load, {"moe/entropy/LAYER": from 0 (one expert has it all) to 1 (even)}.

  Args:
    values: a window's averages, with {"moe/load/LAYER/EXPERT": share}.
  """
  layers = {}
  for name, share in values.items():
    if name.startswith(_LOAD):
      layers.setdefault(name.removeprefix(_LOAD).rpartition("/")[0], []).append(share)
  found = {}
  for layer, shares in layers.items():
    total = sum(shares)
    if len(shares) > 1 and total > 0:
      nats = -sum(share / total * math.log(share / total) for share in shares if share > 0)
      found[f"moe/entropy/{layer}"] = max(0.0, nats) / math.log(len(shares))
  return found


class Health:
  """Looks at windows and sample grids. What it remembers is part of a checkpoint's progress."""

  def __init__(self, limits, stored=None):
    """Args: limits: `config.Health`; stored: what `to_json` gave before a restart, or None."""
    self._limits = limits
    self._standing = set((stored or {}).get("standing", ()))  # signs that were warned of and have not gone
    self._largest = dict((stored or {}).get("largest", {}))  # of each diversity

  def window(self, values):
    """Judges a window.

    Args:
      values: its averages, {name: float}.

    Returns:
      (figures to log besides, list of `Alert`).
    """
    figures, alerts = expert_entropy(values), []
    for name, entropy in figures.items():
      layer = name.removeprefix("moe/entropy/")
      loads = {key.rpartition("/")[2]: value for key, value in values.items() if key.startswith(f"{_LOAD}{layer}/")}
      expert = max(loads, key=loads.get)
      alerts += self._below(
        name,
        entropy,
        self._limits.expert_entropy,
        f"the experts of {layer} starve: expert {expert} of {len(loads)} gets {100 * loads[expert]:.0f} % of the "
        f"tokens (entropy {entropy:.2f}, limit {self._limits.expert_entropy:g}); see generator.router_balance_weight",
      )
    if "d/logit_real" in values and "d/logit_fake" in values:
      gap, limit = values["d/logit_real"] - values["d/logit_fake"], self._limits.logit_gap
      alerts += self._sign(
        "health/logit_gap",
        gap,
        limit,
        limit and gap > limit,
        f"the discriminator has won: mean logit of real pictures {values['d/logit_real']:.1f}, of generated ones "
        f"{values['d/logit_fake']:.1f} (gap {gap:.1f}, limit {limit:g}); see loss.r1_gamma and the learning rates",
      )
    return figures, alerts

  def samples(self, step, images):
    """Judges the sample grid.

    Args:
      step: steps done; what random weights draw at step 0 is no measure of diversity.
      images: [prompts, latents, R, R, 3] in [-1, 1].

    Returns:
      (figures to log, list of `Alert`).
    """
    found = diversity.diversity(images)
    figures, alerts = {}, []
    for name, value, what in (
      ("samples/diversity_within", found.within, "latents of one prompt give the same picture"),
      ("samples/diversity_between", found.between, "all prompts give the same picture"),
    ):
      if math.isfinite(value):
        figures[name] = value
        if step > 0:
          largest = self._largest[name] = max(self._largest.get(name, 0.0), value)
          alerts += self._below(
            name,
            value,
            self._limits.diversity * largest,
            f"collapse: {what} (mean distance {value:.2g}, it was {largest:.2g}); see the pictures of this step",
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

  def to_json(self):
    """What a checkpoint keeps."""
    return {"standing": sorted(self._standing), "largest": dict(self._largest)}
