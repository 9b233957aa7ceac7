"""Batches on their way to the devices."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.data import loader
from aurora_jax.parallel import hosts
from aurora_jax.runs import skipped_records
from aurora_jax.runs.timer import Timer
from aurora_jax.training.prepared import Prepared

DeviceBatch = dict[str, jax.Array]
# 1 / 127.5 as the sum of a number of 16 significant bits and a remainder.
_INVERSE_HIGH = np.float32(round(2**22 / 127.5) / 2**22)
_INVERSE_LOW = np.float32(1 / 127.5 - float(_INVERSE_HIGH))


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
    return put(batch, self._prepared.batch_sharding)


def put(batch: Mapping[str, Any], sharding: jax.sharding.NamedSharding | None) -> DeviceBatch:
  """Starts the transfer of a batch.

  Only arrays of numbers travel; captions stay on the host. A uint8 image travels as it is. The device then makes it
  float32 in [-1, 1], bitwise as `loader.to_float`.

  Args:
    batch: of the loader.
    sharding: of every entry; None: the default device.
  """
  arrays = {
    name: value for name, value in batch.items() if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
  }
  if sharding is None:
    placed = jax.device_put(arrays)
  else:
    placed = {name: jax.make_array_from_process_local_data(sharding, value) for name, value in arrays.items()}
  image = placed.get("image")
  if image is not None and image.dtype == np.uint8:
    placed["image"] = _conversion(sharding, _computes_exactly())(image)
  return placed


@functools.cache
def _conversion(sharding, computes_exactly):
  """uint8 -> float32 in [-1, 1], compiled once per shape."""
  return jax.jit(_by_products if computes_exactly else _by_table, out_shardings=sharding)


@functools.cache
def _computes_exactly():
  """Whether the device's arithmetic gives the host's values."""
  values = np.arange(256, dtype=np.uint8)
  return np.array_equal(np.asarray(jax.jit(_by_products)(values)), loader.to_float(values))


def _by_products(pixels):
  # XLA divides by a scalar as it multiplies by its rounded inverse, which is wrong in the last bit for half of the
  # values. The inverse is therefore split: a pixel times its 16 leading bits is exact, and the sum of both products is
  # rounded once, also where a product and a sum are fused.
  pixels = pixels.astype(jnp.float32)
  return (pixels * _INVERSE_HIGH + pixels * _INVERSE_LOW) - 1


def _by_table(pixels):
  return jnp.asarray(loader.to_float(np.arange(256, dtype=np.uint8)))[pixels.astype(jnp.int32)]
