"""The stages of progressive growing that a checkpoint records, and the experiment at a checkpoint's stage."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from aurora_jax.config import ExperimentT, Schedule
from aurora_jax.runs import checkpoint_reader

# Why a stage began.
START, BEATEN, CAP = "start", "reference beaten", "cap"


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The Frechet distance of generated images at a step.

  Attributes:
    step: steps done.
    resolution: of the images, in pixels.
    distance: their Frechet distance from real images.
  """

  step: int
  resolution: int
  distance: float


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage that has begun.

  Attributes:
    resolution: pixels.
    step: steps done when it began.
    reason: why the previous stage ended: START, BEATEN or CAP.
    reference: the Frechet distance between two sets of real images.
  """

  resolution: int
  step: int
  reason: str
  reference: float


@dataclasses.dataclass(frozen=True)
class Progress:
  """The stages begun and the distances measured so far, in order."""

  stages: tuple[Stage, ...] = ()
  measurements: tuple[Measurement, ...] = ()

  def to_json(self) -> dict[str, Any]:
    """Plain values. JSON keeps the floats exactly."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> "Progress":
    """The inverse of `to_json`."""
    return cls(
      tuple(Stage(**entry) for entry in values["stages"]),
      tuple(Measurement(**entry) for entry in values["measurements"]),
    )


def description(cfg: Schedule, side: int) -> str:
  """Describes the stage of a resolution: "stage 2 of 5: 8x8 pixels"."""
  return f"stage {cfg.resolutions.index(side) + 1} of {len(cfg.resolutions)}: {side}x{side} pixels"


def at_checkpoint(experiment: ExperimentT, folder: str | os.PathLike, step: int | None = None) -> ExperimentT:
  """The experiment at the stage of progressive growing in which a checkpoint was saved.

  Args:
    experiment: the whole experiment.
    folder: path of `checkpoints/`.
    step: of the checkpoint; None takes the newest.

  Returns:
    `Experiment.at_stage`; the experiment itself without stages, or where the checkpoint records none (a converted one).
  """
  stored = checkpoint_reader.stored_progress(folder, step).get("schedule") if experiment.schedule.resolutions else None
  stages = Progress.from_json(stored).stages if stored else ()
  return experiment.at_stage(stages[-1].resolution) if stages else experiment
