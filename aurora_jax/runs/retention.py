"""Which checkpoints of a run stay on the disk: the newest few, one every so many steps for ever, the best by a metric."""

import dataclasses
import math

from aurora_jax.runs import metrics

LOWER, HIGHER = "lower", "higher"


@dataclasses.dataclass(frozen=True)
class Policy:
  """What is kept; see `config.Train`.

  Attributes:
    newest: how many of the newest; 0 keeps all.
    every: checkpoints whose step is a multiple of this; 0: none for that reason.
    best: "lower:NAME" or "higher:NAME", a metric of metrics.jsonl; "": none for that reason.
    window: a checkpoint is judged by what was measured at most so many steps before it.
    history: path of metrics.jsonl.
  """

  newest: int = 3
  every: int = 0
  best: str = ""
  window: int = 1
  history: str = ""

  def reasons(self, steps):
    """Why checkpoints are kept.

    Args:
      steps: of the checkpoints that are there, ascending.

    Returns:
      {step: list of words such as "newest", "every 1,000", "best by fid = 12.3"}; an empty list where the next save
      will remove it.
    """
    kept = {step: [] for step in steps}
    for step in steps if not self.newest else steps[-self.newest :]:
      kept[step].append(
        "all are kept" if not self.newest else "newest" if self.newest == 1 else f"newest {self.newest}"
      )
    if self.every:
      for step in steps:
        if step and step % self.every == 0:
          kept[step].append(f"every {self.every:,}")
    values = {step: value for step, value in self.values().items() if step in kept}
    if values:
      order = min if self.best.startswith(LOWER) else max
      step = order(values, key=lambda step: (values[step], -step if order is max else step))  # the earliest of equals
      kept[step].append(f"best by {self.metric} = {values[step]:.4g}")
    return kept

  @property
  def metric(self):
    """The name of the metric that `best` goes by."""
    return self.best.partition(":")[2]

  def values(self):
    """{multiple of `window`: the last finite value of the metric up to that step, after the multiple before it}.

    An average over a window of training and an evaluation count alike; so does one that `evaluate` adds later on, as
    long as the checkpoint is still there.
    """
    found = {}
    for row in metrics.history(self.history) if self.best else ():
      value = row.get(self.metric)
      if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        found[-(-row["step"] // self.window) * self.window] = value
        found[row["step"]] = value  # a checkpoint of a stop may stand between two multiples
    return found

  def should_preserve(self, checkpoints, *, context):
    """Orbax's `PreservationPolicy`."""
    del context
    kept = self.reasons([info.step for info in checkpoints])
    return [bool(kept[info.step]) for info in checkpoints]


def of_run(train, history):
  """The policy of a run.

  Args:
    train: `config.Train`.
    history: path of the run's metrics.jsonl.
  """
  return Policy(train.keep_checkpoints, train.keep_every, train.keep_best, train.checkpoint_every, str(history))
