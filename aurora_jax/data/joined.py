"""Several data sets, one after the other, with the interface of one."""

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from aurora_jax.data import decode, schema, tfrecords
from aurora_jax.data.dataset import Dataset


class Joined:
  """The records of several data sets or splits, numbered through.

  Attributes:
    path: folder of the first one.
    name: name of the first one.
    split: split of the first one.
    resolution: side of the images of the smallest, in pixels.
    problems: those of all.
  """

  def __init__(self, *datasets: Dataset):
    """Joins data sets. Their order counts."""
    self._datasets = datasets
    self._starts = np.cumsum([0, *map(len, datasets)])
    self.path, self.name, self.split = datasets[0].path, datasets[0].name, datasets[0].split
    self.resolution = min(dataset.resolution for dataset in datasets)
    self.problems = [problem for dataset in datasets for problem in dataset.problems]

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, number: int) -> schema.Example:
    dataset, number = self._locate(number)
    return dataset[number]

  def read(self, number: int) -> bytes:
    """As `Dataset.read`."""
    dataset, number = self._locate(number)
    return dataset.read(number)

  def read_run(self, first: int, count: int) -> list[bytes | tfrecords.RecordError]:
    """As `Dataset.read_run`, of records of one data set."""
    dataset, first = self._locate(first)
    return dataset.read_run(first, count)

  def image(self, number: int) -> tuple[Image.Image, schema.Example]:
    """As `Dataset.image`."""
    dataset, number = self._locate(number)
    return dataset.image(number)

  def pixels(
    self, number: int, side: int, decoding: str = decode.FULL, record: bytes | None = None
  ) -> tuple[np.ndarray, schema.Example]:
    """As `Dataset.pixels`."""
    dataset, number = self._locate(number)
    return dataset.pixels(number, side, decoding, record)

  def place(self, number: int) -> tuple[str, int, int]:
    """As `Dataset.place`."""
    dataset, number = self._locate(number)
    return dataset.place(number)

  def readable_captions(self) -> Iterator[tuple[int, tuple[str, ...]]]:
    """As `Dataset.readable_captions`."""
    for start, dataset in zip(self._starts, self._datasets):
      for number, captions in dataset.readable_captions():
        yield int(start) + number, captions

  def captions(self) -> list[tuple[str, ...]]:
    """As `Dataset.captions`."""
    return list(itertools.chain.from_iterable(dataset.captions() for dataset in self._datasets))

  def first_captions(self, count: int) -> list[str]:
    """As `Dataset.first_captions`, from each data set in turn."""
    found = dict.fromkeys(caption for dataset in self._datasets for caption in dataset.first_captions(count))
    return list(found)[:count]

  def _locate(self, number):
    which = int(np.searchsorted(self._starts, number, side="right")) - 1
    return self._datasets[which], number - int(self._starts[which])
