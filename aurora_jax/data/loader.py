"""Training batches: random access, a keyed order, reading and decoding ahead in threads.

The batch of step s is a pure function of (data set, settings, seed, s): `BatchMaker.__call__`. Threads run that
function ahead of the training loop; reading, decoding and resizing release Python's lock. The only iterator state is
the step, so a run resumes at any step at once, and any number of hosts and threads sees the same global batches.

A record is corrupt if its checksum is wrong, its shard is truncated or missing, it is no Example, it has no caption, or
its image is unreadable or has another size than the record says. A corrupt record is skipped. Its slot gets the first
readable record of a keyed permutation of that step and slot (`shuffle.replacement_index`), which is a pure function of
(data set, seed, step, slot) as well. Each batch carries its skipped records out of the threads, to `Batches.skipped`.
"""

import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from aurora_jax.data import augment as augmentation
from aurora_jax.data import corrupt_records, decode, schema, shuffle, tfrecords
from aurora_jax.data.augment import Augment
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import IndexSampler
from aurora_jax.data.joined import Joined
from aurora_jax.data.prefetch import Prefetch
from aurora_jax.data.read_ahead import ReadAhead
from aurora_jax.errors import UserError

CACHE_BYTES = 512 * 2**20
# Replacements that are tried for one slot, so that a batch never reads millions of records. If every second record is
# corrupt, all of them fail once in 2**1000 slots.
_MOST_ATTEMPTS = 1000
_BLOCK_READS = 8  # reads of blocks at a time


class NothingReadable(UserError):
  """A batch cannot be made: none of the records tried for one of its slots can be read."""


def to_float(pixels: np.ndarray) -> np.ndarray:
  """uint8 [..., 3] to float32 in [-1, 1]."""
  return pixels.astype(np.float32) / 127.5 - 1


def load_pixels(
  dataset: Dataset | Joined, number: int, side: int, decoding: str = decode.FULL, record: bytes | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Reads and decodes one image.

  Args:
    dataset: the split.
    number: number of the example.
    side: side of the result, in pixels. A larger image is reduced by area averaging (Pillow's BOX), which does not ring
      around flat shapes. For a factor of two it is exactly the reduction of an augmented image. A smaller image is
      enlarged (bicubic).
    decoding: how a JPEG is reduced; see `Dataset.pixels`.
    record: the bytes of the record, if they have been read.

  Returns:
    (uint8 [side, side, 3], captions).

  Raises:
    tfrecords.RecordError: the record or its image cannot be read.
  """
  pixels, example = dataset.pixels(number, side, decoding, record)
  return pixels, example.captions


def load_images(dataset: Dataset, resolution: int, numbers: Iterable[int] | np.ndarray | None = None) -> np.ndarray:
  """Reads whole images for evaluation, in order and without augmentation.

  Args:
    dataset: the split.
    resolution: side of the result, in pixels.
    numbers: numbers of the examples; None takes all.

  Returns:
    uint8 [n, resolution, resolution, 3]; see `to_float`.

  Raises:
    UserError: `resolution` exceeds that of the data set, or an image cannot be read.
  """
  check_resolution(dataset, resolution)
  numbers = range(len(dataset)) if numbers is None else numbers
  try:
    loaded = [load_pixels(dataset, number, resolution)[0] for number in numbers]
  except tfrecords.RecordError as error:
    raise UserError(str(error)) from None
  return np.stack(loaded) if loaded else np.zeros((0, resolution, resolution, 3), np.uint8)


def check_resolution(dataset: Dataset | Joined, resolution: int) -> None:
  """Raises `UserError` unless the resolution lies between 1 and that of the data set."""
  if not 1 <= resolution <= dataset.resolution:
    raise UserError(
      f"resolution {resolution} cannot be had from data set {dataset.path}, which was built at {dataset.resolution}"
    )


@dataclasses.dataclass(frozen=True)
class _Loaded:
  """An image that was read, its captions, and their weights as of `_cumulative_weights`."""

  pixels: np.ndarray
  captions: tuple[str, ...]
  weights: np.ndarray | None


def _cumulative_weights(example):
  """float64 [captions], the running sum of an example's caption weights, which ends at 1. None if it has no weights."""
  weights = example.features.get(schema.CAPTION_WEIGHT)
  if weights is None or weights.shape != (len(example.captions),):
    return None
  weights = np.asarray(weights, np.float64)
  if not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
    return None
  return np.cumsum(weights) / weights.sum()


@dataclasses.dataclass
class BatchMaker:
  """Makes one host's part of the batch of any step.

  Attributes: see `train_batches`.
    cached: whether decoded images are held in memory.
    reader: gives the records of the steps, each once; None reads them when they are needed.
  """

  dataset: Dataset | Joined
  resolution: int
  batch_size: int
  seed: int
  augment: Augment = Augment()
  tokenizer: Callable[[list[str]], np.ndarray] | None = None
  primary_caption_probability: float = 1.0
  index_sampler: IndexSampler | None = None
  slots: np.ndarray | None = None
  cached: bool = False
  decoding: str = decode.FULL
  normalize: bool = True
  reader: ReadAhead | None = None

  def __post_init__(self):
    self._cache = {}
    if self.slots is None:
      self.slots = np.arange(self.batch_size)
    self.slots = np.asarray(self.slots, np.int64)
    if self.index_sampler is None:
      self.index_sampler = IndexSampler(self.dataset)

  @property
  def side(self) -> int:
    """Side of the images that are read from the data set, in pixels."""
    if not self.augment.active:
      return self.resolution
    return augmentation.working_side(self.dataset.resolution, self.resolution)

  def __call__(self, step: int) -> dict[str, Any]:
    """Makes the batch of a step.

    Args:
      step: the global step.

    Returns:
      A dict as of `train_batches`, with a list of `corrupt_records.Skip` under `skipped`. If no record can be read, it
      has only `skipped` and `unreadable`, a message.
    """
    slots = self.slots
    skipped = {}
    numbers, examples = [], []
    ahead = None if self.reader is None else self.reader.take(step)
    drawn = self.index_sampler(self.seed, self.batch_size, step, slots) if ahead is None else ahead.numbers
    for at, (slot, number) in enumerate(zip(slots.tolist(), drawn.tolist())):
      number, example = self._readable(step, slot, number, skipped, ahead and functools.partial(ahead.record, at))
      if example is None:
        last = list(skipped.values())[-1]
        return {
          "unreadable": f"no record of data set {self.dataset.path} can be read for slot {slot} of step {step}, "
          f"the last one: {last}",
          "skipped": list(skipped.values()),
        }
      numbers.append(number)
      examples.append(example)
    if self.augment.active:
      draws = shuffle.uniform(self.seed, "augment", step, slots, augmentation.DRAWS)
      inverses = augmentation.inverse_affine(self.augment, draws)
      pixels = [
        augmentation.warp(example.pixels, self.resolution, inverse)
        for example, inverse in zip(examples, inverses.tolist())
      ]
    else:
      pixels = [example.pixels for example in examples]
    draws = shuffle.uniform(self.seed, "caption", step, slots, 2)
    captions = [self._choose(example.captions, example.weights, *row) for example, row in zip(examples, draws)]
    batch = {
      "image": to_float(np.stack(pixels)) if self.normalize else np.stack(pixels),
      "caption": captions,
      "index": np.array(numbers, np.int64),
      "caption_id": np.array([schema.caption_id(example.captions[0]) for example in examples], np.int32),
      "skipped": list(skipped.values()),
    }
    if self.tokenizer is not None:
      batch["tokens"] = np.asarray(self.tokenizer(captions), np.int32)
    return batch

  def is_cached(self, number: int) -> bool:
    """Whether an image is held in memory."""
    return number in self._cache

  def _readable(self, step, slot, number, skipped, record):
    """Reads the example of a slot, or its first readable replacement.

    Records that cannot be read are added to `skipped`, {number: `corrupt_records.Skip`}. `record` waits for the bytes
    of the slot's record, or is None.

    Returns:
      (number, `_Loaded`), or (_, None) if none can be read.
    """
    size = len(self.dataset)
    for attempt in range(min(size, _MOST_ATTEMPTS) + 1):
      if attempt:
        number = shuffle.replacement_index(self.seed, size, step, slot, attempt - 1)
      try:
        return number, self._load(number, record if not attempt else None)
      except tfrecords.RecordError as error:
        if number not in skipped:
          skipped[number] = corrupt_records.skip_of(self.dataset, number, error, int(step))
    return number, None

  def _load(self, number, record):
    """`_Loaded` of an example; with augmentation the pixels are those of `augmentation.prepare`."""
    if number in self._cache:
      return self._cache[number]
    pixels, example = self.dataset.pixels(number, self.side, self.decoding, record and record())
    if self.augment.active:
      pixels = augmentation.prepare(pixels, self.resolution)
    loaded = _Loaded(pixels, example.captions, _cumulative_weights(example))
    if self.cached:  # if two threads load the same image, their results are equal
      self._cache[number] = loaded
    return loaded

  def _choose(self, captions, weights, primary_draw, other_draw):
    if weights is not None:
      return captions[min(int(np.searchsorted(weights, primary_draw, side="right")), len(captions) - 1)]
    if len(captions) == 1 or primary_draw < self.primary_caption_probability:
      return captions[0]
    return captions[1 + int(other_draw * (len(captions) - 1))]


class Batches:
  """Iterator over batches, made by `train_batches`. As a context manager it ends its threads on exit.

  Attributes:
    step: global step of the next batch.
    skipped: {number of the example: `corrupt_records.Skip`} of all batches so far, in order of occurrence.
  """

  def __init__(self, iterator: Prefetch[dict[str, Any]], step: int, reader: ReadAhead | None = None):
    # Threads must end before the interpreter unloads modules. Reads are dropped first: batches may wait for them.
    self._running: list[Any] = [iterator, *([] if reader is None else [reader])]
    self._end = weakref.finalize(self, _close_all, self._running)
    self.step = step
    self.skipped = {}

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> dict[str, Any]:
    if not self._running:
      raise ValueError("these batches have been closed")
    batch = next(self._running[0])
    for skip in batch.pop("skipped"):
      self.skipped.setdefault(skip.number, skip)
    if "unreadable" in batch:
      raise NothingReadable(batch["unreadable"])
    self.step += 1
    return batch

  def close(self) -> None:
    """Ends the threads. A second call does nothing."""
    self._end()

  def __enter__(self) -> "Batches":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, traceback: types.TracebackType | None
  ) -> None:
    self.close()


def _close_all(running):
  while running:
    running.pop().close()


def train_batches(
  dataset: Dataset | Joined,
  *,
  resolution: int,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  augment: Augment = Augment(),
  tokenizer: Callable[[list[str]], np.ndarray] | None = None,
  primary_caption_probability: float = 1.0,
  index_sampler: IndexSampler | None = None,
  slots: Sequence[int] | np.ndarray | None = None,
  workers: int = 2,
  prefetch: int = 4,
  cache_bytes: int = CACHE_BYTES,
  decoding: str = decode.FULL,
  normalize: bool = True,
  reads: int = 0,
) -> Batches:
  """Endless training batches, in another order every epoch.

  Args:
    dataset: the split.
    resolution: side of the images, in pixels, at most that of the data set.
    batch_size: global batch size.
    seed: seed of the order and of all draws.
    start_step: global step of the first batch.
    augment: random warp of the images, drawn for each step and slot.
    tokenizer: captions -> int32 [b, N], or None. It is called in several threads.
    primary_caption_probability: probability of an example's first caption; otherwise one of the others, uniformly. An
      example with caption weights (`schema.CAPTION_WEIGHT`) has its captions drawn by these instead.
    index_sampler: `IndexSampler` of the data set; None visits every image once an epoch.
    slots: int [b], the slots of the global batch that this host makes; None makes all.
    workers: number of threads that make batches; 0 is one.
    prefetch: batches made ahead.
    cache_bytes: largest size of the cache of decoded images; 0 disables it. It is used if all images fit, for then
      every image is decoded only once.
    decoding: how a JPEG is reduced; see `Dataset.pixels`.
    normalize: whether images are float32 in [-1, 1] as of `to_float`; otherwise uint8, a quarter of the bytes.
    reads: reads at a time, begun ahead of the batches that need them. It hides the latency of storage if it is at least
      the product of records per second and seconds per read. 0: the threads that make batches read, which is best for
      local files. Orders of blocks read ahead in any case.

  Returns:
    `Batches`, an iterator over dicts of b slots:
      `image`: float32 [b, resolution, resolution, 3] in [-1, 1], or uint8 (`normalize`);
      `caption`: b strings;
      `index`: int64 [b], numbers of the examples;
      `caption_id`: int32 [b], ids of the primary captions (see `schema.caption_id`), whichever captions were chosen;
      `tokens`, with a tokenizer: int32 [b, N].

  Raises:
    UserError: `resolution` exceeds that of the data set, or a slot is outside the batch.
    NothingReadable: no record can be read; raised while iterating.
  """
  check_resolution(dataset, resolution)
  if batch_size < 1:
    raise UserError(f"batch size must be positive, got {batch_size}")
  outside = [] if slots is None else [slot for slot in slots if not 0 <= slot < batch_size]
  if outside:
    raise UserError(f"slot {outside[0]} is none of a batch of {batch_size}")
  if not 0 <= primary_caption_probability <= 1:
    raise UserError(f"primary caption probability must be between 0 and 1, not {primary_caption_probability}")
  maker = BatchMaker(
    dataset, resolution, batch_size, seed, augment, tokenizer, primary_caption_probability, index_sampler, slots
  )
  maker.cached = len(dataset) * maker.side**2 * 3 <= cache_bytes
  maker.decoding, maker.normalize = decoding, normalize
  threads = max(1, workers)
  ahead = max(prefetch, threads)
  sampler = maker.index_sampler
  held = sampler.held_runs(batch_size)
  if reads or held:
    reads = reads or _BLOCK_READS
    steps = max(ahead, -(-2 * reads // len(maker.slots))) if not held else ahead
    plan = functools.partial(sampler.plan, seed, batch_size, slots=maker.slots)
    skip = maker.is_cached
    maker.reader = ReadAhead(dataset, plan, start_step, threads=reads, steps=steps, held=held, skip=skip)
  return Batches(Prefetch(maker, start_step, threads, ahead), start_step, maker.reader)
