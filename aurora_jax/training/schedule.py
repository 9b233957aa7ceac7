"""Progressive growing by reference FID (arXiv 2309.03904): decides when a run enters the next resolution.

The reference of a stage is the Frechet distance between two disjoint sets of real images of its resolution, measured
before the stage. Every `every_images` images the distance of the generated images is measured in the same way, with
equally many images. A distance less than `factor` times the reference ends the stage, and so does its cap in images.
The last stage is measured too, although nothing ends it. There is no fade-in: the paper's generator has none.

The state is a `Progress`, plain values in the checkpoint. What is due at a step depends on it alone, so a resumed run
decides as an uninterrupted one. evaluation/frechet.py measures the distances.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from aurora_jax.config import Experiment, Schedule
from aurora_jax.evaluation import frechet
from aurora_jax.systems import base
from aurora_jax.systems.stages import BEATEN, CAP, START, Measurement, Progress, Stage, description
from aurora_jax.training import initialize
from aurora_jax.training.prepared import Prepared


class Event(NamedTuple):
  """A measurement, for log and user.

  Attributes:
    kind: "stage" or "evaluation", the kind of its line in metrics.jsonl.
    values: the values of this line.
    message: one line for the user.
  """

  kind: str
  values: dict[str, Any]
  message: str


def first_resolution(experiment: Experiment) -> int:
  """The resolution of a new run: that of the first stage, or with `train.init_from` the stage of its checkpoint."""
  cfg = experiment.schedule
  if not experiment.train.init_from:
    return cfg.resolutions[0]
  reached = initialize.stage_of(experiment.train.init_from) or cfg.resolutions[-1]
  return cfg.resolutions[cfg.stage(min(reached, cfg.resolutions[-1]))]


def next_stage(cfg: Schedule, progress: Progress, step: int, batch_size: int) -> tuple[int, str] | None:
  """The stage to enter now.

  Args:
    cfg: a schedule with stages.
    progress: at least one stage.
    step: steps done.
    batch_size: images per step.

  Returns:
    (resolution, reason), or None.
  """
  stage, newest = progress.stages[-1], progress.measurements[-1:]
  following = [r for r in cfg.resolutions if r > stage.resolution]
  if not following:
    return None
  if newest and newest[0].resolution == stage.resolution and newest[0].distance < cfg.factor * stage.reference:
    return following[0], BEATEN
  # The cap ends the stage after its last measurement.
  if _at_cap(cfg, stage, step, batch_size) and not measurement_due(cfg, progress, step, batch_size):
    return following[0], CAP
  return None


def measurement_due(cfg: Schedule, progress: Progress, step: int, batch_size: int) -> bool:
  """Whether to measure the generator at this step: after every `every_images` images of a stage, and at its cap."""
  stage, newest = progress.stages[-1], progress.measurements[-1:]
  if step <= stage.step or (newest and newest[0].step >= step):
    return False
  every = max(1, cfg.every_images // batch_size)
  return (step - stage.step) % every == 0 or _at_cap(cfg, stage, step, batch_size)


def _at_cap(cfg, stage, step, batch_size):
  cap = cfg.max_images.get(stage.resolution)
  return stage.resolution < cfg.resolutions[-1] and cap is not None and (step - stage.step) * batch_size >= cap


class NotGrowing:
  """The schedule of a run without stages. `Growing` has the same methods."""

  @property
  def resolution(self) -> int | None:
    """Resolution of the present stage, in pixels; None without stages."""
    return None

  def is_due(self, step: int) -> bool:
    """Whether a distance must be measured after `step` steps, before the next one."""
    del step
    return False

  def advance(self, step: int, state: base.TrainState, keep_on: Callable[[], bool]) -> Event | None:
    """Measures the distance that is due, the reference of a new stage or that of the generator, and records it.

    Args:
      step: steps done.
      state: the training state.
      keep_on: () -> bool, called between batches; False stops the measurement.

    Returns:
      The event, or None if the measurement was stopped: then it stays due.
    """
    del step, state, keep_on

  def to_json(self) -> dict[str, Any] | None:
    """Plain values for a checkpoint; None without stages."""
    return None


class Growing(NotGrowing):
  """The schedule of a run with stages.

  Attributes:
    progress: the stages and distances so far.
  """

  def __init__(self, experiment: Experiment, distances: frechet.Distances, stored: Mapping[str, Any] | None = None):
    """Starts, or continues.

    Args:
      experiment: the whole experiment, with stages.
      distances: measures the distances.
      stored: what `to_json` returned; None for a new run.
    """
    self._cfg, self._batch_size, self._distances = experiment.schedule, experiment.train.batch_size, distances
    self.progress = Progress.from_json(stored) if stored else Progress()
    self._first = self.progress.stages[0].resolution if self.progress.stages else first_resolution(experiment)

  @property
  def resolution(self) -> int:
    return self.progress.stages[-1].resolution if self.progress.stages else self._first

  def is_due(self, step: int) -> bool:
    return self._measurement_due(step) or self._next_stage(step) is not None

  def advance(self, step: int, state: base.TrainState, keep_on: Callable[[], bool]) -> Event | None:
    if self._measurement_due(step):
      return self._measure(step, state, keep_on)
    following = self._next_stage(step)
    return following and self._begin(step, keep_on, *following)

  def _measurement_due(self, step):
    return bool(self.progress.stages) and measurement_due(self._cfg, self.progress, step, self._batch_size)

  def _next_stage(self, step):
    """(resolution, reason) of the stage to enter now, or None."""
    if not self.progress.stages:
      return self._first, START
    return next_stage(self._cfg, self.progress, step, self._batch_size)

  def _measure(self, step, state, keep_on):
    side, reference = self.resolution, self.progress.stages[-1].reference
    found = self._distances.generated(side, state, keep_on)
    if found is None:
      return None
    self.progress = dataclasses.replace(
      self.progress, measurements=self.progress.measurements + (Measurement(step, side, found),)
    )
    name, factor = self._distances.name, self._cfg.factor
    values = {f"{name}/{side}": found, f"{name}/reference_{side}": reference, "factor": factor} | self._about(side)
    message = (
      f"step {step:,}, {side}x{side} pixels: Frechet distance {found:.4g}, of real images {reference:.4g} "
      f"(goal: less than {factor:g} times that; {self._distances.description})"
    )
    return Event("evaluation", values, message)

  def _begin(self, step, keep_on, side, reason):
    found = self._distances.reference(side, keep_on)
    if found is None:
      return None
    self.progress = dataclasses.replace(
      self.progress, stages=self.progress.stages + (Stage(side, step, reason, found),)
    )
    values = {"reason": reason, f"{self._distances.name}/reference_{side}": found} | self._about(side)
    message = (
      f"step {step:,}: on to {description(self._cfg, side)} ({reason}); Frechet distance of real images {found:.4g} "
      f"({self._distances.description})"
    )
    return Event("stage", values, message)

  def _about(self, side):
    return {"resolution": side, "features": self._distances.features, "images_compared": self._distances.count}

  def to_json(self) -> dict[str, Any]:
    return self.progress.to_json()


def of_run(prepared: Prepared, stored: Mapping[str, Any] | None) -> NotGrowing:
  """`Growing` for a run with stages, else `NotGrowing`.

  Args:
    prepared: what is trained.
    stored: what `to_json` returned, from a checkpoint, or None.
  """
  if not prepared.experiment.schedule.resolutions or prepared.distances is None:
    return NotGrowing()
  return Growing(prepared.experiment, prepared.distances, stored)
