"""Which checkpoints of a run stay on disk: the newest few, one every so many steps for ever, the best by a metric."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from aurora_jax.config import Train
from aurora_jax.runs import metrics

LOWER, HIGHER = "lower", "higher"


@dataclasses.dataclass(frozen=True)
class Policy:
  """A retention policy. See `config.Train`.

  Attributes:
    newest: how many of the newest checkpoints to retain; 0 retains all.
    every: retain checkpoints whose step is a multiple of this; 0: none for this reason.
    best: retain the best checkpoint by a metric of metrics.jsonl, "lower:NAME" or "higher:NAME"; "": none for this
      reason.
    window: a checkpoint's metric is the last one measured in this many steps up to it.
    history: path of metrics.jsonl.
  """

  newest: int = 3
  every: int = 0
  best: str = ""
  window: int = 1
  history: str = ""

  def reasons(self, steps: Sequence[int]) -> dict[int, list[str]]:
    """Why checkpoints are retained.

    Args:
      steps: of the existing checkpoints, ascending.

    Returns:
      {step: reasons such as "newest", "every 1,000", "best by fid = 12.3"}. A checkpoint without a reason is removed at
      the next save.
    """
    retained: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps if not self.newest else steps[-self.newest :]:
      retained[step].append(
        "all are retained" if not self.newest else "newest" if self.newest == 1 else f"newest {self.newest}"
      )
    if self.every:
      for step in steps:
        if step and step % self.every == 0:
          retained[step].append(f"every {self.every:,}")
    values = {step: value for step, value in self.values().items() if step in retained}
    if values:
      choose = min if self.best.startswith(LOWER) else max
      # The earliest of equals.
      step = choose(values, key=lambda step: (values[step], -step if choose is max else step))
      retained[step].append(f"best by {self.metric} = {values[step]:.4g}")
    return retained

  @property
  def metric(self) -> str:
    """The name of the metric in `best`."""
    return self.best.partition(":")[2]

  def values(self) -> dict[int, float]:
    """The metric by step: {multiple of `window`: its last finite value since the previous multiple}.

    Averages over training windows and evaluations count alike, including those that `evaluate` adds later.
    """
    found: dict[int, float] = {}
    for row in metrics.history(self.history) if self.best else ():
      value = row.get(self.metric)
      if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        found[-(-row["step"] // self.window) * self.window] = value
        found[row["step"]] = value  # a checkpoint written at a stop may be between two multiples
    return found

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Implements Orbax's `PreservationPolicy`. Each checkpoint has a `step`."""
    del context
    reasons = self.reasons([info.step for info in checkpoints])
    return [bool(reasons[info.step]) for info in checkpoints]


def of_run(train: Train, history: str | os.PathLike) -> Policy:
  """The policy of a run.

  Args:
    train: the run's training configuration.
    history: path of the run's metrics.jsonl.
  """
  return Policy(train.keep_checkpoints, train.keep_every, train.keep_best, train.checkpoint_every, str(history))
