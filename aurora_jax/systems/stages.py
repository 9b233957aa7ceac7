"""Stages of progressive growing as a checkpoint remembers them, and the experiment at a checkpoint's stage."""

import dataclasses
import os
from typing import Any

from aurora_jax.config import Experiment, Schedule
from aurora_jax.runs import checkpoint_reader

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
  """What has happened so far: stages begun and distances taken, in order."""

  stages: tuple[Stage, ...] = ()
  measurements: tuple[Measurement, ...] = ()

  def to_json(self) -> dict[str, Any]:
    """Plain values; floats survive JSON exactly."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> "Progress":
    """The inverse of `to_json`."""
    return cls(
      tuple(Stage(**entry) for entry in values["stages"]),
      tuple(Measurement(**entry) for entry in values["measurements"]),
    )


def description(cfg: Schedule, side: int) -> str:
  """The stage of a resolution in words: "stage 2 of 5: 8x8 pixels"."""
  return f"stage {cfg.resolutions.index(side) + 1} of {len(cfg.resolutions)}: {side}x{side} pixels"


def at_checkpoint(experiment: Experiment, folder: str | os.PathLike, step: int | None = None) -> Experiment:
  """What of an experiment a checkpoint has trained: the experiment at the stage it was saved in.

  Args:
    experiment: the whole one.
    folder: path of `checkpoints/`.
    step: of the checkpoint; None takes the newest.

  Returns:
    `Experiment.at_stage`; the experiment itself where there are no stages or the checkpoint knows of none (a converted one).
  """
  stored = checkpoint_reader.stored_progress(folder, step).get("schedule") if experiment.schedule.resolutions else None
  stages = Progress.from_json(stored).stages if stored else ()
  return experiment.at_stage(stages[-1].resolution) if stages else experiment
