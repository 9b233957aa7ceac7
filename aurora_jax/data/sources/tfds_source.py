"""Any data set of TensorFlow Datasets with an image and a text feature."""

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

from aurora_jax import text
from aurora_jax.data import filters
from aurora_jax.data.sources import base
from aurora_jax.data.sources.base import CaptionFields, FilePart, Item, PartedSource, Rejected
from aurora_jax.errors import UserError


def tfds(
  name: str,
  data_dir: str | os.PathLike | None = None,
  split: str = "train",
  fields: CaptionFields = CaptionFields(),
  image_column: str | None = None,
) -> PartedSource:
  """A data set that TensorFlow Datasets has prepared on this machine.

  Args:
    name: such as "coco_captions" or "laion400m/images"; or the folder of a prepared version.
    data_dir: tfds's folder of data sets, or the folder of a prepared version; None takes tfds's own.
    split: of the data set; "train[:10%]" works too.
    fields: which features are captions: "caption", or "captions/text" for a feature within another one.
    image_column: the image's feature; None takes the first image.

  Returns:
    A source. A part is a slice of the split.

  Raises:
    UserError: tfds has no such data set, or it is not prepared or lacks the features.
  """
  builder = _builder(name, data_dir)
  try:
    count = builder.info.splits[split].num_examples
  except (KeyError, ValueError, TypeError) as error:
    reason = text.printable(" ".join(str(error).split()), 150)
    raise UserError(f"tfds:{name} has no split {text.printable(split, 40)}, or it is not prepared: {reason}") from None
  flat = _flat(builder.info.features)
  image = image_column or next((path for path, kind in flat.items() if kind == "Image"), None)
  captions = list(fields.weights) or [path for path, kind in flat.items() if kind == "Text"]
  captions = captions if fields.weights else _best(captions, fields)
  missing = [path for path in (image, *captions) if path not in flat]
  if image is None or not captions or missing:
    listed = text.printable(", ".join(f"{path} ({kind})" for path, kind in flat.items()), 300)
    raise UserError(f"tfds:{name} has no {missing[0] if missing else 'image and text'} among its features: {listed}")
  fields = dataclasses.replace(fields, defaults=tuple(captions))
  folder = None if data_dir is None else os.fspath(data_dir)
  return PartedSource(
    name=base.name_of(name.replace("/", "_")),
    description=f"TensorFlow Datasets {builder.info.full_name}, split {split}",
    licence=text.printable(" ".join((builder.info.redistribution_info.license or "unknown").split()), 200),
    list_parts=lambda: (
      SlicePart(name, folder, split, first, min(count, first + base.PART_ITEMS), image, fields)
      for first in range(0, count, base.PART_ITEMS)
    ),
    count=count,
  )


def _builder(name, data_dir) -> Any:
  try:
    import tensorflow_datasets
  except ImportError as error:
    raise UserError(f"source tfds needs TensorFlow Datasets ({error}): pip install tensorflow-datasets") from None
  try:
    for folder in (data_dir, name):
      if folder is not None and os.path.isfile(os.path.join(folder, "features.json")):
        return tensorflow_datasets.builder_from_directory(os.fspath(folder))
    return tensorflow_datasets.builder(name, data_dir=data_dir)
  except Exception as error:  # of many kinds
    reason = text.printable(" ".join(str(error).split()), 150)
    raise UserError(f"tfds:{text.printable(name, 60)} cannot be opened: {reason}") from None


def _flat(features, prefix="") -> dict[str, str]:
  """{path of a feature: name of its class}, such as {"captions/text": "Text"}. A sequence has its element's class."""
  inner = getattr(features, "feature", None)
  if inner is not None:
    return _flat(inner, prefix)
  if hasattr(features, "items"):
    found = {}
    for name, feature in features.items():
      found |= _flat(feature, f"{prefix}/{name}" if prefix else name)
    return found
  return {prefix: type(features).__name__}


def _best(captions, fields):
  """The text feature to take if none is named: one of the usual names, else the only one."""
  named = [path for name in fields.defaults for path in captions if name in path.split("/")]
  return named[:1] or (captions if len(captions) == 1 else [])


@dataclasses.dataclass(frozen=True)
class SlicePart(FilePart):
  """The examples of a split from `first` to `end`."""

  name: str
  data_dir: str | None
  split: str
  first: int
  end: int
  image: str
  fields: CaptionFields

  def files(self) -> Iterable[str]:
    """See `base.Part`; TensorFlow Datasets does not name them."""
    return ()

  def items(self) -> Iterator[Item | Rejected]:
    """See `base.Part`."""
    import tensorflow_datasets

    builder = _builder(self.name, self.data_dir)
    decoders: Any = tensorflow_datasets.decode.SkipDecoding()
    for step in reversed(self.image.split("/")):
      decoders = {step: decoders}
    number = self.first
    # A slice of a slice has no name; then the examples before it are read and passed over.
    named = self.split in builder.info.splits.keys()
    try:
      examples = builder.as_dataset(
        split=f"{self.split}[{number}:{self.end}]" if named else self.split,
        shuffle_files=False,
        decoders=decoders,
        read_config=tensorflow_datasets.ReadConfig(interleave_cycle_length=1, try_autocache=False),
      )
      examples = examples if named else examples.skip(number).take(self.end - number)
      for example in examples.as_numpy_iterator():
        yield self._item(number, example)
        number += 1
    except Exception as error:  # TensorFlow's errors are of many kinds
      reason = f"the split is damaged after example {number:,}: {text.printable(' '.join(str(error).split()), 120)}"
      yield Rejected(f"{self.split}/{number}", reason, base.DAMAGED)

  def _item(self, number, example):
    captions = {name: _values(example, name) for name in (*self.fields.weights, *self.fields.defaults)}
    images = _values(example, self.image)
    scores = filters.scores_of(
      {name: value.item() for name, value in example.items() if getattr(value, "ndim", 1) == 0}
    )
    return base.item_or_rejected(
      f"{self.split}/{number:09d}", captions, self.fields, image=images[0] if images else None, scores=scores
    )


def _values(example, path):
  """The values of a feature, also within sequences, as a list."""
  for step in path.split("/"):
    example = example[step]
  return example.reshape(-1).tolist() if hasattr(example, "reshape") else [example]
