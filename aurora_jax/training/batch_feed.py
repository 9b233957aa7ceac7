"""Batches on their way to the devices."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from aurora_jax.data import loader
from aurora_jax.parallel import hosts
from aurora_jax.runs import skipped_records
from aurora_jax.runs.timer import Timer
from aurora_jax.training.prepared import Prepared

DeviceBatch = dict[str, jax.Array]


class BatchFeed:
  """Reads the batches of each step and starts their transfer.

  Attributes:
    problem: why there is no next batch, or None.
    skipped: the unreadable records of the run.
  """

  def __init__(self, prepared: Prepared, skipped: skipped_records.NothingSkipped, timer: Timer):
    """Reads nothing yet. `timer` counts the time in `next` as input."""
    self.problem: str | None = None
    self.skipped = skipped
    self._prepared, self._timer = prepared, timer
    self._batches: Iterator[Mapping[str, Any]] = iter(())

  def start(self, step: int) -> None:
    """Starts with the batches of step `step`."""
    self._batches = iter(self._prepared.batches(step))

  def next(self) -> list[DeviceBatch]:
    """The batches of the next step; [] if nothing can be read, which `no_data` tells. The transfer may still run."""
    with self._timer.phase("input"):
      try:
        batches = [next(self._batches) for _ in range(self._prepared.batches_per_step)]
      except loader.NothingReadable as error:
        if not hosts.is_alone():  # The others have a batch and will wait in it for this process.
          raise
        self.problem, batches = str(error), []
      self.skipped.add(getattr(self._batches, "skipped", {}))
      return [self._put(batch) for batch in batches]

  def no_data(self) -> bool:
    """Whether there is no next batch, or more records were skipped than allowed."""
    return self.problem is not None or self.skipped.too_many

  def describe_problem(self) -> str:
    """A sentence on why there is no data."""
    return self.skipped.message() if self.skipped.too_many else self.problem or ""

  def close(self) -> None:
    """Stops the reading threads."""
    close = getattr(self._batches, "close", None)
    if close is not None:
      close()

  def _put(self, batch):
    """Starts the transfer of a batch. Only arrays of numbers travel; captions stay on the host."""
    arrays = {
      name: value for name, value in batch.items() if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    }
    sharding = self._prepared.batch_sharding
    if sharding is None:
      return jax.device_put(arrays)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in arrays.items()}
