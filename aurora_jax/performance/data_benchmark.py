"""Measures the loader beside other input pipelines, side by side in one run.

All of them give shuffled batches of square uint8 images from the same encoded images, in as many threads of one
process. Rounds take turns. Processor time counts all threads of the process, so it is less disturbed by other work on
the machine than wall time.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from aurora_jax.data import dataset as dataset_lib
from aurora_jax.data import decode, loader, orders, schema, tfrecords
from aurora_jax.data.index_sampler import IndexSampler
from aurora_jax.errors import UserError

_DISTINCT = 400  # synthetic images; more are copies
_SHARDS = 4
_WARM_UP = 2  # batches of each round that do not count
_SHUFFLE_BUFFER = 1000  # records, of the pipelines that shuffle in a buffer
_BLOCK_READS = 32  # reads at a time of our loader with injected latency, for blocks
_READS = 512  # and for single records


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is measured.

  Attributes:
    images: number of images.
    side: side of the synthetic images, in pixels.
    resolution: side of the images in the batches.
    batch_size: images per batch.
    workers: threads of each pipeline.
    repeats: rounds of all pipelines.
    latency: seconds added to every read of our loader; the rows with latency are added to the others.
  """

  images: int = 4000
  side: int = 256
  resolution: int = 64
  batch_size: int = 64
  workers: int = 2
  repeats: int = 5
  latency: float = 0.0


class Speed(NamedTuple):
  """The speed of one pipeline.

  Attributes:
    name: of the pipeline.
    images_per_second: median of the rounds.
    images_per_processor_second: the same per second of processor time, of all threads.
    relative: speed of our loader (full shuffle) relative to this one: the median of the rounds' ratios.
    relative_work: the same by processor time.
  """

  name: str
  images_per_second: float
  images_per_processor_second: float
  relative: float
  relative_work: float


class SlowDataset(dataset_lib.Dataset):
  """A data set on storage with latency: every read waits first. `latency` is in seconds."""

  latency = 0.0

  def read(self, number: int) -> bytes:
    """Waits and reads a record."""
    time.sleep(self.latency)
    return super().read(number)

  def read_run(self, first: int, count: int) -> list[bytes | tfrecords.RecordError]:
    """Waits once and reads neighboring records."""
    time.sleep(self.latency)
    return super().read_run(first, count)


def synthetic_images(count: int, side: int, seed: int = 0) -> list[bytes]:
  """JPEGs (quality 90) of smooth colors, shapes and noise, 20 kB each at 256 pixels, `_DISTINCT` different ones."""
  rng = np.random.default_rng(seed)
  found = []
  for _ in range(min(count, _DISTINCT)):
    colors = np.clip(rng.normal(128, 50, (9, 9, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(colors).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
      x, y, radius = rng.integers(0, side, 2).tolist() + [int(rng.integers(side // 50 + 1, side // 4 + 2))]
      box = (x - radius, y - radius, x + radius, y + radius)
      draw.ellipse(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    pixels = np.asarray(image) + rng.normal(0, 6, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    found.append(buffer.getvalue())
  return [found[number % len(found)] for number in range(count)]


def write_dataset(folder: pathlib.Path, examples: Sequence[schema.Example], resolution: int, shards: int) -> None:
  """Writes examples as a data set folder with one split, "train"."""
  folder.mkdir(parents=True)
  entries = []
  for shard in range(shards):
    path = folder / tfrecords.shard_name("benchmark", "train", shard, shards)
    part = examples[shard * len(examples) // shards : (shard + 1) * len(examples) // shards]
    with tfrecords.ShardWriter(path) as writer:
      for example in part:
        writer.write(schema.encode(example))
    entries.append({"file": path.name, "examples": len(part), "bytes": writer.size, "sha256": writer.sha256})
  manifest = {
    "schema_version": schema.SCHEMA_VERSION,
    "name": "benchmark",
    "resolution": resolution,
    "splits": {"train": {"examples": len(examples), "shards": entries}},
  }
  (folder / dataset_lib.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def measure(
  settings: Settings = Settings(),
  data: str = "",
  on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Speed]:
  """Measures all pipelines that are installed.

  Args:
    settings: sizes.
    data: a data set whose first images are taken; "": synthetic JPEGs.
    on_progress: called with (rounds done, all rounds), counted per pipeline.

  Returns:
    `Speed` of each pipeline, our loader first.

  Raises:
    UserError: a setting that is not possible, or no such data set.
  """
  for name in ("images", "side", "resolution", "batch_size", "workers", "repeats"):
    if getattr(settings, name) < 1:
      raise UserError(f"{name.replace('_', ' ')} must be at least 1, got {getattr(settings, name)}")
  if not 0 <= settings.latency <= 60:
    raise UserError(f"the latency must be from 0 to 60,000 ms, got {1000 * settings.latency:g}")
  with tempfile.TemporaryDirectory() as home:
    folder, encoded = _inputs(pathlib.Path(home), settings, data)
    arms = _arms(pathlib.Path(home), folder, encoded, settings)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    total = settings.repeats * len(arms)
    for _ in range(settings.repeats):
      for name, arm in arms.items():
        seconds[name].append(_round(arm, settings))
        on_progress(sum(map(len, seconds.values())), total)
  ours = seconds[next(iter(arms))]
  median = statistics.median
  return [
    Speed(
      name,
      median(settings.images / wall for wall, _ in rounds),
      median(settings.images / work for _, work in rounds),
      median(wall / own for (wall, _), (own, _) in zip(rounds, ours)),
      median(work / own for (_, work), (_, own) in zip(rounds, ours)),
    )
    for name, rounds in seconds.items()
  ]


def _inputs(home, settings, data):
  """(folder of a data set, its encoded images)."""
  if data:
    opened = dataset_lib.Dataset.open(data)
    examples = [opened[number] for number in range(min(len(opened), settings.images))]
    examples = [examples[number % len(examples)] for number in range(settings.images)]
    side = opened.resolution
  else:
    encoded = synthetic_images(settings.images, settings.side)
    side = settings.side
    examples = [
      schema.Example(image, (f"image {number}",), side, side, str(number)) for number, image in enumerate(encoded)
    ]
  write_dataset(home / "data", examples, side, _SHARDS)
  return home / "data", [example.image for example in examples]


def _round(arm, settings):
  """(seconds, processor seconds) for `settings.images` images after warm-up."""
  with contextlib.closing(arm()) as batches:
    for _ in range(_WARM_UP):
      next(batches)
    begin, work, done = time.perf_counter(), time.process_time(), 0
    while done < settings.images:
      done += len(next(batches))
    scale = settings.images / done
    return (time.perf_counter() - begin) * scale, (time.process_time() - work) * scale


def _arms(home, folder, encoded, settings) -> dict[str, Callable[[], Any]]:
  """{name: () -> generator of uint8 [batch, resolution, resolution, 3]}, ours first."""
  batch, side, workers = settings.batch_size, settings.resolution, settings.workers
  opened = dataset_lib.Dataset.open(folder)
  slow = SlowDataset.open(folder)
  slow.latency = settings.latency  # pyrefly: ignore

  def ours(dataset, kind="full", reads=0, decoding=decode.SHRINK):
    sampler = IndexSampler(dataset, order=orders.build(kind, [len(dataset)], [1.0]))
    options = {"workers": workers, "cache_bytes": 0, "decoding": decoding, "normalize": False, "reads": reads}
    with loader.train_batches(
      dataset, resolution=side, batch_size=batch, seed=0, index_sampler=sampler, **options
    ) as batches:
      yield from (made["image"] for made in batches)

  arms = {
    "aurora_jax": lambda: ours(opened),
    "aurora_jax, shuffle of blocks": lambda: ours(opened, "blocks"),
    "aurora_jax, every pixel decoded": lambda: ours(opened, decoding=decode.FULL),
    "decoding alone": lambda: _floor(encoded, settings),
  }
  if settings.latency:
    suffix = f", {1000 * settings.latency:g} ms per read"
    arms[f"aurora_jax{suffix}"] = lambda: ours(slow, reads=_READS)
    arms[f"aurora_jax, shuffle of blocks{suffix}"] = lambda: ours(slow, "blocks", _BLOCK_READS)
  files = [str(path) for path in sorted(folder.glob("*.tfrecord"))]
  if _installed("tensorflow"):
    arms["tf.data, decode_jpeg(ratio)"] = lambda: _tf_data(files, settings, _ratio(encoded[0], side))
    arms["tf.data, decode_jpeg and resize"] = lambda: _tf_data(files, settings, 1)
  if _installed("grain") and _installed("array_record"):
    path = _write_array_record(home, encoded)
    arms["grain over ArrayRecord, simplejpeg"] = lambda: _grain(path, settings)
  if _installed("webdataset"):
    tar = _write_tar(home, encoded)
    arms["webdataset, simplejpeg, one thread"] = lambda: _webdataset(tar, settings)
  return arms


def _installed(name):
  return importlib.util.find_spec(name) is not None


def _floor(encoded, settings) -> Iterator[np.ndarray]:
  """Decodes images that are in memory and does nothing else, in threads of its own for each batch's parts."""
  position = 0
  while True:
    some = [encoded[(position + i) % len(encoded)] for i in range(settings.batch_size * settings.workers)]
    made: list[Any] = [None] * settings.workers

    def work(number, some=some, made=made):
      part = some[number :: settings.workers]
      made[number] = [decode.square_pixels(image, settings.resolution, None, True) for image in part]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(settings.workers)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    yield np.stack([pixels for part in made for pixels in part])
    position += len(some)


def _ratio(image, side):
  """The divisor of DCT scaling for an encoded image."""
  smallest = min(Image.open(io.BytesIO(image)).size)
  return next((ratio for ratio in (8, 4, 2) if smallest // side >= ratio), 1)


def _tf_data(files, settings, ratio) -> Iterator[np.ndarray]:
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its notes on this machine's processor
  import tensorflow as tf

  def pixels(record):
    image = tf.io.parse_single_example(record, {"image": tf.io.FixedLenFeature([], tf.string)})["image"]
    decoded = tf.io.decode_jpeg(image, channels=3, ratio=ratio)
    if ratio > 1:
      return tf.image.resize_with_crop_or_pad(decoded, settings.resolution, settings.resolution)
    resized = tf.image.resize(decoded, [settings.resolution] * 2, method="area")
    return tf.cast(tf.round(resized), tf.uint8)

  records = tf.data.TFRecordDataset(files).repeat().shuffle(_SHUFFLE_BUFFER, seed=0)
  batches = records.map(pixels, num_parallel_calls=settings.workers).batch(settings.batch_size).prefetch(4)
  options = tf.data.Options()
  options.threading.private_threadpool_size = settings.workers
  yield from batches.with_options(options).as_numpy_iterator()


def _write_array_record(home, encoded):
  from array_record.python import array_record_module

  path = str(home / "images.array_record")
  writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
  for image in encoded:
    writer.write(image)
  writer.close()
  return path


def _grain(path, settings) -> Iterator[np.ndarray]:
  import grain

  source = grain.sources.ArrayRecordDataSource([path])
  pixels = lambda image: decode.square_pixels(image, settings.resolution, None, True)
  images = grain.MapDataset.source(source).seed(0).shuffle().repeat().map(pixels).batch(settings.batch_size)
  options = grain.ReadOptions(num_threads=settings.workers, prefetch_buffer_size=4)
  yield from iter(images.to_iter_dataset(options))


def _write_tar(home, encoded):
  path = home / "images.tar"
  with tarfile.open(path, "w") as tar:
    for number, image in enumerate(encoded):
      entry = tarfile.TarInfo(f"{number:06d}.jpg")
      entry.size = len(image)
      tar.addfile(entry, io.BytesIO(image))
  return str(path)


def _webdataset(path, settings) -> Iterator[np.ndarray]:
  import webdataset

  pixels = lambda image: decode.square_pixels(image, settings.resolution, None, True)
  images = webdataset.WebDataset(path, shardshuffle=False, empty_check=False).repeat().shuffle(_SHUFFLE_BUFFER)
  batches = images.to_tuple("jpg").map_tuple(pixels).batched(settings.batch_size)
  for (batch,) in batches:
    yield np.asarray(batch)
