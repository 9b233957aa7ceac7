"""Progressive growing by reference FID (arXiv 2309.03904; facts: section 4.1): when a run goes on to the next resolution.

Before a stage the Frechet distance between two disjoint sets of real pictures of its resolution is taken: the reference.
Every `every_images` images the generator's is taken in the same way, with as many pictures; less than `factor` times the
reference ends the stage, and so does its cap in images. In the last stage there is nothing to end, it is measured all the
same. There is no fade-in: the paper's generator has none.

`Progress` is all that this remembers, plain values that travel in the checkpoint's progress. What is due at a step follows
from it alone, so a resumed run decides as an uninterrupted one. How a distance is taken is training/frechet.py's matter.
"""

import dataclasses
from typing import Any

# Why a stage began.
START, BEATEN, CAP = "start", "reference beaten", "cap"


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The distance of the generator's pictures at a step."""

  step: int
  resolution: int
  distance: float


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage that has begun.

  Attributes:
    resolution: pixels.
    step: steps done when it began.
    reason: why the one before ended: one of the words above.
    reference: the distance between the two sets of real pictures.
  """

  resolution: int
  step: int
  reason: str
  reference: float


@dataclasses.dataclass(frozen=True)
class Progress:
  """What has happened so far: stages begun and distances taken, in order. It is never empty once a run has begun."""

  stages: tuple[Stage, ...] = ()
  measurements: tuple[Measurement, ...] = ()

  def to_json(self):
    """Plain values; floats survive JSON exactly."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values):
    """The inverse of `to_json`."""
    return cls(tuple(Stage(**entry) for entry in values["stages"]),
               tuple(Measurement(**entry) for entry in values["measurements"]))


def resolution(cfg, progress):
  """The resolution at which to train, in pixels: that of the stage at hand, or of the first one."""
  return progress.stages[-1].resolution if progress.stages else cfg.resolutions[0]


def next_stage(cfg, progress, step, batch_size):
  """The stage that is to begin now, (resolution, reason), or None. Its reference is to be taken.

  Args:
    cfg: `config.Schedule` with stages.
    progress: `Progress`.
    step: steps done.
    batch_size: images per step.
  """
  if not progress.stages:
    return cfg.resolutions[0], START
  stage, newest = progress.stages[-1], progress.measurements[-1:]
  following = [r for r in cfg.resolutions if r > stage.resolution]
  if not following:
    return None
  if newest and newest[0].resolution == stage.resolution and newest[0].distance < cfg.factor * stage.reference:
    return following[0], BEATEN
  # The cap counts when the stage's last measurement is there.
  if _at_cap(cfg, stage, step, batch_size) and not measurement_due(cfg, progress, step, batch_size):
    return following[0], CAP
  return None


def measurement_due(cfg, progress, step, batch_size):
  """Whether the generator's distance is to be taken at this step: every so many images of a stage, and at its cap."""
  if not progress.stages:
    return False
  stage, newest = progress.stages[-1], progress.measurements[-1:]
  if step <= stage.step or (newest and newest[0].step >= step):
    return False
  every = max(1, cfg.every_images // batch_size)
  return (step - stage.step) % every == 0 or _at_cap(cfg, stage, step, batch_size)


def _at_cap(cfg, stage, step, batch_size):
  cap = cfg.max_images.get(stage.resolution)
  return stage.resolution < cfg.resolutions[-1] and cap is not None and (step - stage.step) * batch_size >= cap


class Growing:
  """The schedule of a run as the loop drives it.

  Attributes:
    progress: `Progress`.
  """

  def __init__(self, cfg, batch_size, distances, stored=None):
    """Begins, or goes on.

    Args:
      cfg: `config.Schedule` with stages.
      batch_size: images per step.
      distances: `frechet.Distances`.
      stored: `to_json`'s values, None for a new run.
    """
    self._cfg, self._batch_size, self._distances = cfg, batch_size, distances
    self.progress = Progress.from_json(stored) if stored else Progress()

  @property
  def resolution(self):
    """At which to train now, in pixels."""
    return resolution(self._cfg, self.progress)

  def is_due(self, step):
    """Whether something is to be measured before the step after `step`."""
    arguments = self._cfg, self.progress, step, self._batch_size
    return measurement_due(*arguments) or next_stage(*arguments) is not None

  def advance(self, step, state, keep_on):
    """Takes one distance, the reference of a stage that begins or the generator's, and remembers it.

    Args:
      step: steps done.
      state: the training state.
      keep_on: () -> bool, asked between batches; False gives the measurement up.

    Returns:
      ("stage" or "evaluation", values for metrics.jsonl, words), or None where it was given up: it is due again then.
    """
    arguments = self._cfg, self.progress, step, self._batch_size
    if measurement_due(*arguments):
      return self._measure(step, state, keep_on)
    return self._begin(step, *next_stage(*arguments), keep_on)

  def _measure(self, step, state, keep_on):
    side, reference = self.resolution, self.progress.stages[-1].reference
    found = self._distances.generated(side, state, keep_on)
    if found is None:
      return None
    self.progress = dataclasses.replace(
        self.progress, measurements=self.progress.measurements + (Measurement(step, side, found),))
    name, factor = self._distances.name, self._cfg.factor
    values = {f"{name}/{side}": found, f"{name}/reference_{side}": reference, "factor": factor} | self._about(side)
    return "evaluation", values, (f"step {step:,}, {side}x{side} pixels: Frechet distance {found:.4g}, of real pictures "
                                  f"{reference:.4g} (goal: less than {factor:g} times that; {self._distances.words})")

  def _begin(self, step, side, reason, keep_on):
    found = self._distances.reference(side, keep_on)
    if found is None:
      return None
    self.progress = dataclasses.replace(self.progress, stages=self.progress.stages + (Stage(side, step, reason, found),))
    values = {"reason": reason, f"{self._distances.name}/reference_{side}": found} | self._about(side)
    number = len(self.progress.stages)
    return "stage", values, (f"step {step:,}: stage {number} of {len(self._cfg.resolutions)} begins ({reason}): {side}x{side} "
                             f"pixels; Frechet distance of real pictures {found:.4g} ({self._distances.words})")

  def _about(self, side):
    return {"resolution": side, "features": self._distances.features, "pictures": self._distances.count}

  def to_json(self):
    """What a checkpoint keeps."""
    return self.progress.to_json()


class NotGrowing:
  """The twin of `Growing` for a run without stages."""

  resolution = None

  def is_due(self, step):
    del step
    return False

  def to_json(self):
    return None


def of_run(prepared, stored):
  """`Growing` for a run with stages, else `NotGrowing`.

  Args:
    prepared: as of `loop.run`; one with stages has `distances`.
    stored: `to_json`'s values from a checkpoint, or None.
  """
  experiment: Any = prepared.experiment
  if not experiment.schedule.resolutions:
    return NotGrowing()
  return Growing(experiment.schedule, experiment.train.batch_size, prepared.distances, stored)
