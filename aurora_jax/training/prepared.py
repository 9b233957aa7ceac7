"""What the training loop runs: an experiment with its data, its compiled step and its sampler."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from aurora_jax.config import Experiment
from aurora_jax.data.dataset import Dataset
from aurora_jax.evaluation import frechet
from aurora_jax.systems import base


class SampleSet(NamedTuple):
  """Images for fixed prompts and latents.

  Attributes:
    images: [prompts, latents, R, R, 3] float32.
    prompts: strings.
    stage: describes the stage of progressive growing; "" without stages.
    makers: int [prompts, latents], which of several generators made each image; None for one generator.
    maker_count: number of these generators.
  """

  images: np.ndarray
  prompts: tuple[str, ...]
  stage: str = ""
  makers: np.ndarray | None = None
  maker_count: int = 0


Step = Callable[
  [int, base.TrainState, Sequence[Mapping[str, jax.Array]]], tuple[base.TrainState, Mapping[str, base.Metrics]]
]


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An experiment, ready to run. training/setup.py makes it.

  Attributes:
    experiment: the configuration.
    system: its system, at the present stage.
    dataset: the training split.
    notes: lines for the user who starts the run: corrupt shards, the mesh, the plan of the expert exchange.
    init: () -> TrainState, fresh or with the networks of `train.init_from`.
    abstract_state: its shapes, dtypes and shardings.
    batch_sharding: sharding of every entry of a batch; None in one process: the default device.
    batches_per_step: batches that a step reads.
    batches: start step -> iterator over batches, dicts of numpy arrays, `batches_per_step` of them per step. Images may
      be uint8 (`batch_feed.put`). Its
      `skipped`, if it has one, are the unreadable records so far (`data.loader.Batches`).
    begin: starts to compile the step's programs in the background; without it, the first step compiles them.
    step: (number of the step, state, device batches) -> (state, {phase: metrics}).
    sample: state -> SampleSet, or None: no images are drawn.
    distances: Frechet distances of an experiment with stages; else None.
    at_stage: resolution -> the same with that stage's `step` and `sample`.
  """

  experiment: Experiment
  system: base.System
  dataset: Dataset
  notes: tuple[str, ...]
  init: Callable[[], base.TrainState]
  abstract_state: base.TrainState
  batch_sharding: jax.sharding.NamedSharding | None
  batches_per_step: int
  batches: Callable[[int], Iterator[Mapping[str, Any]]]
  begin: Callable[[], Any]
  step: Step
  sample: Callable[[base.TrainState], SampleSet] | None
  distances: frechet.Distances | None
  at_stage: Callable[[int], "Prepared"]

  @property
  def headline(self) -> tuple[str, ...]:
    """Names of the metrics to show while training."""
    return self.system.headline

  @property
  def log_names(self) -> Mapping[str, str]:
    """{short name of an update in metrics: name for messages}."""
    return self.system.log_names

  @property
  def remedies(self) -> Mapping[str, str]:
    """{field of `config.Health`: config fields that act on what it alerts to}."""
    return self.system.remedies
