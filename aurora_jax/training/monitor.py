"""Looks at the metrics of every step: guard, averages, health, log and display."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from aurora_jax.parallel import hosts
from aurora_jax.runs import metrics as metrics_lib
from aurora_jax.runs import progress
from aurora_jax.systems import base
from aurora_jax.training import guard, health
from aurora_jax.training.batch_feed import BatchFeed
from aurora_jax.training.prepared import Prepared, SampleSet
from aurora_jax.training.stopping import StopRule

_SHOWN_METRICS = 4


class Monitor:
  """Looks at each step after the next one is dispatched, so that the devices never wait for the host.

  Attributes:
    resolution: of the present stage of progressive growing, in pixels; None without stages.
  """

  def __init__(
    self,
    prepared: Prepared,
    log: metrics_lib.NoLog,
    display: progress.Silent,
    feed: BatchFeed,
    stop: StopRule,
    stored: Mapping[str, Any],
  ):
    """Starts, or continues from a checkpoint.

    Args:
      prepared: what is trained.
      log: the run's log.
      display: shows the progress.
      feed: its skipped records are counted and shared at every log line.
      stop: estimates the time left; its timer measures the steps.
      stored: the checkpoint's progress, which holds `to_json`; {} for a new run.
    """
    self.resolution: int | None = None
    self._settings, self._batches_per_step = prepared.experiment.train, prepared.batches_per_step
    self._images_per_step = self._settings.batch_size * self._batches_per_step
    self._headline = prepared.headline
    self._log, self._display, self._feed, self._stop, self._timer = log, display, feed, stop, stop.timer
    self._window = metrics_lib.Window(stored.get("window"))
    self._skips = guard.Skips(self._settings.max_skipped_in_a_row, prepared.log_names, stored.get("skips"))
    # "watch": the name in checkpoints of earlier versions.
    stored_health = stored.get("health", stored.get("watch"))
    self._health = health.Health(prepared.experiment.health, stored_health, prepared.remedies)
    self._pending: tuple[int, Mapping[str, base.Metrics]] | None = None  # dispatched, not yet looked at

  def add(self, done: int, metrics: Mapping[str, base.Metrics]) -> None:
    """Takes the metrics of a dispatched step and looks at those of the previous one.

    Args:
      done: steps dispatched, this one included.
      metrics: {phase: metrics}, on the devices.

    Raises:
      NonFinite: too many steps in a row were skipped, or an unguarded metric is not finite.
    """
    with self._timer.phase("step"):
      self._observe(self._pending)  # waits for the previous step
    self._pending = done, metrics

  def flush(self) -> None:
    """Looks at the newest step too, hence waits for it. Raises NonFinite as `add` does."""
    with self._timer.phase("step"):
      pending, self._pending = self._pending, None
      self._observe(pending)

  @property
  def skips_in_a_row(self) -> int:
    """Number of steps in a row that were skipped, up to the newest step looked at."""
    return self._skips.in_a_row

  def write_window(self, done: int) -> None:
    """Logs the averages since the last log line, after `done` steps."""
    values = self._window.take()
    values |= self._timer.take_window(self._images_per_step)
    values["images"] = done * self._images_per_step
    if self.resolution:
      values["resolution"] = self.resolution
    values["data/skipped"] = self._feed.skipped.count(done * self._batches_per_step)
    figures, alerts = self._health.window(values)
    self._log.train(done, self._timer.seconds, values | figures)
    self._warn(done, alerts)

  def look_at_samples(self, step: int, samples: SampleSet) -> None:
    """Logs the diversity of the sample images."""
    figures, alerts = self._health.samples(step, samples.images)
    self._log.measured("samples", step, self._timer.seconds, figures)
    self._warn(step, alerts)

  def to_json(self) -> dict[str, Any]:
    """Entries of a checkpoint's progress."""
    return {"window": self._window.to_json(), "skips": self._skips.to_json(), "health": self._health.to_json()}

  def _observe(self, pending):
    if pending is None:
      return
    done, phases = pending
    at_log_line = done % self._settings.log_every == 0
    metrics, skip = self._skips.look(done - 1, phases, detail=at_log_line)
    self._timer.step_done()
    self._window.add(metrics)
    if skip is not None:
      self._report_skip(skip)
    if at_log_line:
      self._feed.skipped.share()
      self.write_window(done)
    self._show(done, metrics)

  def _show(self, done, metrics):
    names = [name for name in self._headline if name in metrics] or [
      name for name in metrics if name.startswith("loss/") and not np.ndim(metrics[name])
    ][:_SHOWN_METRICS]
    shown = {"pixels": self.resolution} if self.resolution else {}
    shown |= {name: float(metrics[name]) for name in names}
    seconds = self._timer.step_seconds
    images_per_second = self._images_per_step / seconds if seconds else None
    detail = progress.step_detail(shown, images_per_second, self._stop.seconds_left(done))
    self._display.update(done, self._settings.total_steps, detail)

  def _report_skip(self, skip):
    """Says why a step was skipped. Raises `NonFinite` if it was one too many."""
    self._log.note("skipped", skip.step + 1, self._timer.seconds, {"message": skip.message, **skip.to_json()})
    in_a_row = f" ({self._skips.in_a_row} in a row)" if self._skips.in_a_row > 1 else ""
    _tell(f"step {skip.step} was skipped{in_a_row}: {skip.message}")
    self._skips.refuse(skip)

  def _warn(self, step: int, alerts: Iterable[health.Alert]):
    for alert in alerts:
      self._log.note("warning", step, self._timer.seconds, alert.to_json())
      _tell(f"warning at step {step:,}: {alert.message}")


def _tell(message):
  if hosts.is_primary():
    print(f"aurora_jax train: {message}", file=sys.stderr, flush=True)
