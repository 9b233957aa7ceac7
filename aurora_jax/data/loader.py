"""Training batches: random access, a keyed permutation per epoch, decoding ahead in threads or processes.

The batch of step s is a pure function of (data set, seed, s): `BatchMaker.__call__`. grain runs that function ahead of
the training loop; its position is the step and nothing else, so a run resumes at any step at once, and any number of
hosts sees the same global batches.

Where a record cannot be read (a wrong checksum, a shard that is cut off or gone, no Example, no caption, no picture or
one of another size than the record says) it alone is skipped, and another takes its slot: the first readable one of a
keyed permutation of that step and slot (`order.stand_in`). Nothing is remembered for that, so what stands in is a pure
function of (data set, seed, step, slot) too. What was skipped travels with the batch, out of grain's threads or
processes, into `Batches.skipped`.
"""

import dataclasses
import signal
import weakref
from collections.abc import Callable

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
# Stand-ins that are tried for one slot. So many in a row fail only where nearly nothing can be read, and then a batch
# must not go through millions of records: with every second record lost it happens once in 2**1000 slots.
_MOST_ATTEMPTS = 1000


class NothingReadable(UserError):
  """A batch cannot be made: what was tried for one of its slots, all records or very many, cannot be read."""


def to_float(pixels):
  """uint8 [..., 3] to float32 in [-1, 1]."""
  return pixels.astype(np.float32) / 127.5 - 1


def load_pixels(dataset, number, side):
  """Reads and decodes one picture.

  Args:
    dataset: a `Dataset`.
    number: of the example.
    side: of the result. A larger picture is reduced by area averaging (Pillow's BOX): no ringing around flat shapes,
      and for a factor of two exactly what an augmented picture goes through. A smaller one is enlarged (bicubic).

  Returns:
    (uint8 [side, side, 3], captions).

  Raises:
    tfrecords.RecordError: the record or its picture cannot be read.
  """
  image, example = dataset.picture(number)
  if image.size != (side, side):
    image = images.square(image, side, Image.Resampling.BOX if min(image.size) >= side else Image.Resampling.BICUBIC)
  return np.asarray(image), example.captions


def load_images(dataset, resolution, numbers=None):
  """Reads whole pictures for evaluation, in order and without augmentation.

  Args:
    dataset: a `Dataset`.
    resolution: side of the result.
    numbers: of the examples; None takes all.

  Returns:
    uint8 [n, resolution, resolution, 3]; see `to_float`.

  Raises:
    UserError: `resolution` is larger than the stored one, or a picture cannot be read.
  """
  check_resolution(dataset, resolution)
  numbers = range(len(dataset)) if numbers is None else numbers
  try:
    pictures = [load_pixels(dataset, number, resolution)[0] for number in numbers]
  except tfrecords.RecordError as error:
    raise UserError(str(error)) from None
  return np.stack(pictures) if pictures else np.zeros((0, resolution, resolution, 3), np.uint8)


def check_resolution(dataset, resolution):
  """Raises `UserError` where the asked resolution is more than the data set holds."""
  if not 1 <= resolution <= dataset.resolution:
    raise UserError(
      f"resolution {resolution} cannot be had from data set {dataset.path}, which was built at {dataset.resolution}"
    )


@dataclasses.dataclass
class BatchMaker:
  """Makes one host's part of the batch of any step.

  Attributes: see `train_batches`.
    cached: keep decoded pictures in memory.
  """

  dataset: Dataset
  resolution: int
  batch_size: int
  seed: int
  augment: Augment = Augment()
  tokenizer: Callable | None = None
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
  def side(self):
    """Side at which pictures are had from the data set, in pixels."""
    if not self.augment.active:
      return self.resolution
    return augmentation.working_side(self.dataset.resolution, self.resolution)

  def __call__(self, step):
    """The batch of a step: a dict as in `train_batches`, and under `skipped` a list of `corrupt_records.Skip`.

    Where there is nothing to be read, the batch has `unreadable` (words) instead of all else.
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
    """(number, (pixels, captions)) of the example meant for a slot, or of its first readable stand-in; else (_, None).

    What cannot be read is added to `skipped`, {number: `corrupt_records.Skip`}.
    """
    size = len(self.dataset)
    for attempt in range(min(size, _MOST_ATTEMPTS) + 1):
      if attempt:
        number = shuffle.stand_in(self.seed, size, step, slot, attempt - 1)
      try:
        return number, self._load(number)
      except tfrecords.RecordError as error:
        if number not in skipped:
          skipped[number] = corrupt_records.skip_of(self.dataset, number, error, int(step))
    return number, None

  def _load(self, number):
    """(pixels, captions), the pixels ready for `augmentation.warp` if there is any."""
    if number in self._cache:
      return self._cache[number]
    pixels, captions = load_pixels(self.dataset, number, self.side)
    if self.augment.active:
      pixels = augmentation.prepare(pixels, self.resolution)
    if self.cached:  # Two threads may both load a picture that is not there yet; they come to the same.
      self._cache[number] = pixels, captions
    return pixels, captions

  def _choose(self, captions, primary_draw, other_draw):
    if len(captions) == 1 or primary_draw < self.primary_caption_probability:
      return captions[0]
    return captions[1 + int(other_draw * (len(captions) - 1))]


def _ignore_interrupts(worker, workers):
  """Ctrl-C goes to every process of a terminal; the main one decides what it means, and ends the workers."""
  del worker, workers
  signal.signal(signal.SIGINT, signal.SIG_IGN)


class Batches:
  """Iterator over batches; made by `train_batches`. A context manager, which ends its threads or processes.

  Attributes:
    step: of the batch that comes next.
    skipped: {number of the example: `corrupt_records.Skip`} of all batches so far, in the order in which they were met.
  """

  def __init__(self, iterator, step):
    # Threads and processes must end, and grain's iterator must be gone, before the interpreter tears its modules down.
    self._running = [iterator]
    self._end = weakref.finalize(self, lambda running: running.pop().close(), self._running)
    self.step = step
    self.skipped = {}

  def __iter__(self):
    return self

  def __next__(self):
    if not self._running:
      raise ValueError("these batches have been closed")
    batch = next(self._running[0])
    for skip in batch.pop("skipped"):
      self.skipped.setdefault(skip.number, skip)
    if "unreadable" in batch:
      raise NothingReadable(batch["unreadable"])
    self.step += 1
    return batch

  def close(self):
    """Ends the threads or processes; a second call does nothing."""
    self._end()

  def __enter__(self):
    return self

  def __exit__(self, kind, value, traceback):
    self.close()


def train_batches(
  dataset,
  *,
  resolution,
  batch_size,
  seed,
  start_step=0,
  augment=Augment(),
  tokenizer=None,
  primary_caption_probability=1.0,
  index_sampler=None,
  slots=None,
  workers=2,
  prefetch=4,
  cache_bytes=CACHE_BYTES,
):
  """Endless training batches, shuffled anew each epoch.

  Args:
    dataset: a `Dataset`.
    resolution: side of the pictures, at most the data set's.
    batch_size: global.
    seed: int.
    start_step: global step of the first batch.
    augment: an `Augment`; differs at each step.
    tokenizer: list of str -> int32 [b, N], or None. With processes it is sent to them.
    primary_caption_probability: of an example's first caption; else one of its others, evenly.
    index_sampler: `IndexSampler` of the data set; None: every picture once an epoch.
    slots: of the global batch, those that this host makes, [b]; None: all.
    workers: threads where the decoded split fits into `cache_bytes` (then every picture is decoded once and kept), else
      processes (0: one thread).
    prefetch: batches made ahead (by each worker process).
    cache_bytes: see `workers`; 0 for no cache.

  Returns:
    `Batches`, an iterator over dicts, b slots: `image` float32 [b, resolution, resolution, 3] in
    [-1, 1], `caption` list of b str, `index` int64 [b] (numbers of the examples), `caption_id` int32 [b] (of their
    primary captions, whichever was chosen; see `schema.caption_id`), and with a tokenizer `tokens` int32 [b, N].

  Raises:
    UserError: `resolution` is more than the data set's, or a slot not one of the batch.
    NothingReadable: while iterating, no record can be read.
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
    if not flags.FLAGS.is_parsed():  # grain reads absl flags of its own here; this program has no absl main.
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch),
      worker_init_fn=_ignore_interrupts,
    )
  return Batches(iter(batches), start_step)
