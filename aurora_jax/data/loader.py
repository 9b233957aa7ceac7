"""Training batches: random access, a keyed permutation per epoch, decoding ahead in threads or processes.

The batch of step s is a pure function of (data set, seed, s): `BatchMaker.__call__`. grain runs that function ahead of
the training loop. The only iterator state is the step, so a run resumes at any step at once, and any number of hosts
sees the same global batches.

A record is corrupt if its checksum is wrong, its shard is truncated or missing, it is no Example, it has no caption, or
its image is unreadable or has another size than the record says. A corrupt record is skipped. Its slot gets the first
readable record of a keyed permutation of that step and slot (`shuffle.replacement_index`), which is a pure function of
(data set, seed, step, slot) as well. Each batch carries its skipped records out of grain's threads or processes, to
`Batches.skipped`.
"""

import dataclasses
import signal
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from aurora_jax.data import augment as augmentation
from aurora_jax.data import corrupt_records, images, schema, shuffle, tfrecords
from aurora_jax.data.augment import Augment
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import IndexSampler
from aurora_jax.errors import UserError

CACHE_BYTES = 512 * 2**20
# Replacements that are tried for one slot, so that a batch never reads millions of records. If every second record is
# corrupt, all of them fail once in 2**1000 slots.
_MOST_ATTEMPTS = 1000


class NothingReadable(UserError):
  """A batch cannot be made: none of the records tried for one of its slots can be read."""


def to_float(pixels: np.ndarray) -> np.ndarray:
  """uint8 [..., 3] to float32 in [-1, 1]."""
  return pixels.astype(np.float32) / 127.5 - 1


def load_pixels(dataset: Dataset, number: int, side: int) -> tuple[np.ndarray, tuple[str, ...]]:
  """Reads and decodes one image.

  Args:
    dataset: the split.
    number: number of the example.
    side: side of the result, in pixels. A larger image is reduced by area averaging (Pillow's BOX), which does not ring
      around flat shapes. For a factor of two it is exactly the reduction of an augmented image. A smaller image is
      enlarged (bicubic).

  Returns:
    (uint8 [side, side, 3], captions).

  Raises:
    tfrecords.RecordError: the record or its image cannot be read.
  """
  image, example = dataset.image(number)
  if image.size != (side, side):
    image = images.square(image, side, Image.Resampling.BOX if min(image.size) >= side else Image.Resampling.BICUBIC)
  return np.asarray(image), example.captions


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


def check_resolution(dataset: Dataset, resolution: int) -> None:
  """Raises `UserError` unless the resolution lies between 1 and that of the data set."""
  if not 1 <= resolution <= dataset.resolution:
    raise UserError(
      f"resolution {resolution} cannot be had from data set {dataset.path}, which was built at {dataset.resolution}"
    )


@dataclasses.dataclass
class BatchMaker:
  """Makes one host's part of the batch of any step.

  Attributes: see `train_batches`.
    cached: whether decoded images are held in memory.
  """

  dataset: Dataset
  resolution: int
  batch_size: int
  seed: int
  augment: Augment = Augment()
  tokenizer: Callable[[list[str]], np.ndarray] | None = None
  primary_caption_probability: float = 1.0
  index_sampler: IndexSampler | None = None
  slots: np.ndarray | None = None
  cached: bool = False

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
    for slot, number in zip(slots, self.index_sampler(self.seed, self.batch_size, step, slots)):
      number, example = self._readable(step, slot, int(number), skipped)
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
        augmentation.warp(pixels, self.resolution, inverse) for (pixels, _), inverse in zip(examples, inverses.tolist())
      ]
    else:
      pixels = [pixels for pixels, _ in examples]
    draws = shuffle.uniform(self.seed, "caption", step, slots, 2)
    captions = [self._choose(captions, *row) for (_, captions), row in zip(examples, draws)]
    batch = {
      "image": to_float(np.stack(pixels)),
      "caption": captions,
      "index": np.array(numbers, np.int64),
      "caption_id": np.array([schema.caption_id(captions[0]) for _, captions in examples], np.int32),
      "skipped": list(skipped.values()),
    }
    if self.tokenizer is not None:
      batch["tokens"] = np.asarray(self.tokenizer(captions), np.int32)
    return batch

  def _readable(self, step, slot, number, skipped):
    """Reads the example of a slot, or its first readable replacement.

    Records that cannot be read are added to `skipped`, {number: `corrupt_records.Skip`}.

    Returns:
      (number, (pixels, captions)), or (_, None) if none can be read.
    """
    size = len(self.dataset)
    for attempt in range(min(size, _MOST_ATTEMPTS) + 1):
      if attempt:
        number = shuffle.replacement_index(self.seed, size, step, slot, attempt - 1)
      try:
        return number, self._load(number)
      except tfrecords.RecordError as error:
        if number not in skipped:
          skipped[number] = corrupt_records.skip_of(self.dataset, number, error, int(step))
    return number, None

  def _load(self, number):
    """(pixels, captions); with augmentation the pixels are those of `augmentation.prepare`."""
    if number in self._cache:
      return self._cache[number]
    pixels, captions = load_pixels(self.dataset, number, self.side)
    if self.augment.active:
      pixels = augmentation.prepare(pixels, self.resolution)
    if self.cached:  # if two threads load the same image, their results are equal
      self._cache[number] = pixels, captions
    return pixels, captions

  def _choose(self, captions, primary_draw, other_draw):
    if len(captions) == 1 or primary_draw < self.primary_caption_probability:
      return captions[0]
    return captions[1 + int(other_draw * (len(captions) - 1))]


def _ignore_interrupts(worker, workers):
  """Ignores Ctrl-C in a worker.

  It reaches every process of a terminal; the main process handles it and ends the workers.
  """
  del worker, workers
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if hasattr(signal, "SIGHUP"):  # the end of the terminal reaches every process too
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


class Batches:
  """Iterator over batches, made by `train_batches`. As a context manager it ends its threads or processes on exit.

  Attributes:
    step: global step of the next batch.
    skipped: {number of the example: `corrupt_records.Skip`} of all batches so far, in order of occurrence.
  """

  def __init__(self, iterator: Iterator[dict[str, Any]], step: int):
    # Threads and processes must end, and grain's iterator must be deleted, before the interpreter unloads modules.
    self._running = [iterator]
    self._end = weakref.finalize(self, lambda running: running.pop().close(), self._running)
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
    """Ends the threads or processes. A second call does nothing."""
    self._end()

  def __enter__(self) -> "Batches":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, traceback: types.TracebackType | None
  ) -> None:
    self.close()


def train_batches(
  dataset: Dataset,
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
) -> Batches:
  """Endless training batches, in another order every epoch.

  Args:
    dataset: the split.
    resolution: side of the images, in pixels, at most that of the data set.
    batch_size: global batch size.
    seed: seed of the order and of all draws.
    start_step: global step of the first batch.
    augment: random warp of the images, drawn for each step and slot.
    tokenizer: captions -> int32 [b, N], or None. It is pickled for worker processes.
    primary_caption_probability: probability of an example's first caption; otherwise one of the others, uniformly.
    index_sampler: `IndexSampler` of the data set; None visits every image once an epoch.
    slots: int [b], the slots of the global batch that this host makes; None makes all.
    workers: number of threads if the decoded split fits into `cache_bytes`, for then every image is decoded only once.
      Otherwise number of processes; 0 is one thread.
    prefetch: batches made ahead, per worker process.
    cache_bytes: largest size of the cache of decoded images; 0 disables it.

  Returns:
    `Batches`, an iterator over dicts of b slots:
      `image`: float32 [b, resolution, resolution, 3] in [-1, 1];
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
  threads = max(1, workers) if maker.cached else 1
  steps = grain.MapDataset.range(start_step, 2**62).map(maker)
  batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads)))
  if workers and not maker.cached:
    if not flags.FLAGS.is_parsed():  # grain reads its own absl flags, and this program has no absl main
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
      worker_init_fn=_ignore_interrupts,
    )
  return Batches(iter(batches), start_step)
