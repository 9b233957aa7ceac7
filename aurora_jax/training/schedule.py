"""Progressive growing by reference FID (arXiv 2309.03904; facts: section 4.1): when a run goes on to the next resolution.

Before a stage the Frechet distance between two disjoint sets of real pictures of its resolution is taken: the reference.
Every `every_images` images the generator's is taken in the same way, with as many pictures; less than `factor` times the
reference ends the stage, and so does its cap in images. In the last stage there is nothing to end, it is measured all the
same. There is no fade-in: the paper's generator has none.

`Progress` is all that this remembers, plain values that travel in the checkpoint's progress. What is due at a step follows
from it alone, so a resumed run decides as an uninterrupted one. How a distance is taken is evaluation/frechet.py's matter.
"""

import dataclasses

from aurora_jax.runs import checkpoint_reader
from aurora_jax.systems.stages import BEATEN, CAP, START, Measurement, Progress, Stage, description
from aurora_jax.training import initialize


def first_resolution(experiment):
  """At which a new run begins: the first stage's, or where the networks come from another checkpoint, that one's stage."""
  cfg = experiment.schedule
  if not experiment.train.init_from:
    return cfg.resolutions[0]
  folder, step = initialize.source(experiment.train.init_from)
  stored = checkpoint_reader.stored_progress(folder, step).get("schedule")
  reached = Progress.from_json(stored).stages[-1].resolution if stored else cfg.resolutions[-1]
  return cfg.resolutions[cfg.stage(min(reached, cfg.resolutions[-1]))]


def next_stage(cfg, progress, step, batch_size):
  """The stage that is to begin now, (resolution, reason), or None. Its reference is to be taken.

  Args:
    cfg: `config.Schedule` with stages.
    progress: `Progress` with at least one stage.
    step: steps done.
    batch_size: images per step.
  """
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

  def __init__(self, experiment, distances, stored=None):
    """Begins, or goes on.

    Args:
      experiment: the whole `config.Experiment`, with stages.
      distances: `frechet.Distances`.
      stored: `to_json`'s values, None for a new run.
    """
    self._cfg, self._batch_size, self._distances = experiment.schedule, experiment.train.batch_size, distances
    self.progress = Progress.from_json(stored) if stored else Progress()
    self._first = None if self.progress.stages else first_resolution(experiment)

  @property
  def resolution(self):
    """At which to train now, in pixels."""
    return self.progress.stages[-1].resolution if self.progress.stages else self._first

  def is_due(self, step):
    """Whether something is to be measured before the step after `step`."""
    return self._due(step) is not None

  def _due(self, step):
    """What is to be done at this step, (method, its further arguments ...), or None."""
    if not self.progress.stages:
      return self._begin, self._first, START
    arguments = self._cfg, self.progress, step, self._batch_size
    if measurement_due(*arguments):
      return (self._measure,)
    following = next_stage(*arguments)
    return following and (self._begin, *following)

  def advance(self, step, state, keep_on):
    """Takes one distance, the reference of a stage that begins or the generator's, and remembers it.

    Args:
      step: steps done.
      state: the training state.
      keep_on: () -> bool, asked between batches; False gives the measurement up.

    Returns:
      ("stage" or "evaluation", values for metrics.jsonl, words), or None where it was given up: it is due again then.
    """
    what, *arguments = self._due(step)
    return what(step, state, keep_on, *arguments)

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
    return (
      "evaluation",
      values,
      (
        f"step {step:,}, {side}x{side} pixels: Frechet distance {found:.4g}, of real pictures "
        f"{reference:.4g} (goal: less than {factor:g} times that; {self._distances.description})"
      ),
    )

  def _begin(self, step, state, keep_on, side, reason):
    del state
    found = self._distances.reference(side, keep_on)
    if found is None:
      return None
    self.progress = dataclasses.replace(
      self.progress, stages=self.progress.stages + (Stage(side, step, reason, found),)
    )
    values = {"reason": reason, f"{self._distances.name}/reference_{side}": found} | self._about(side)
    return (
      "stage",
      values,
      (
        f"step {step:,}: on to {description(self._cfg, side)} ({reason}); Frechet distance of real pictures "
        f"{found:.4g} ({self._distances.description})"
      ),
    )

  def _about(self, side):
    return {"resolution": side, "features": self._distances.features, "images_compared": self._distances.count}

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
  if not prepared.experiment.schedule.resolutions:
    return NotGrowing()
  return Growing(prepared.experiment, prepared.distances, stored)
