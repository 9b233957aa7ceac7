"""The record of a data set: one encoded image with its captions, as a `tf.train.Example`.

| feature   | kind  | values      | meaning                                          |
| --------- | ----- | ----------- | ------------------------------------------------ |
| `image`   | bytes | 1           | an encoded image: PNG, JPEG or WebP            |
| `caption` | bytes | 1 or more   | UTF-8; the first one is the primary caption      |
| `width`   | int64 | 1           | of the encoded image, in pixels                |
| `height`  | int64 | 1           | of the encoded image, in pixels                |
| `key`     | bytes | 1           | UTF-8; names the image within its data set     |
| any other | float | any         | named features, e.g. text features made upfront  |

TensorFlow reads these records (`tf.io.parse_single_example`), but is not needed for it: its message is small, so its
definition is repeated here and handed to the protobuf runtime in a pool of its own (the runtime refuses to define a
message twice in one pool, and TensorFlow may be loaded as well).
"""

import dataclasses
import zlib

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from aurora_jax import text

SCHEMA_VERSION = 1
# A feature with one number per caption: the probability with which training takes it. `build-data` stores it for mixed
# captions.
CAPTION_WEIGHT = "caption_weight"
_RESERVED = ("image", "caption", "width", "height", "key")
_NAMES_SHOWN = 200  # characters


class ExampleError(ValueError):
  """Bytes that are not a complete example. `key` is the key of the example, "" if it cannot be read."""

  def __init__(self, message: str, key: str = ""):
    super().__init__(message)
    self.key = key


@dataclasses.dataclass(frozen=True)
class Example:
  """One image with its captions.

  Attributes:
    image: the encoded image (PNG, JPEG, WebP).
    captions: at least one; the first is the primary caption.
    width: of the encoded image, in pixels.
    height: of the encoded image, in pixels.
    key: names the image within its data set.
    features: additional named features, float32 [n] each.
  """

  image: bytes
  captions: tuple[str, ...]
  width: int
  height: int
  key: str
  features: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def caption_id(caption: str) -> int:
  """An int32 that identifies a caption in an array. Two captions share it with probability 2**-32."""
  return zlib.crc32(caption.encode()) - 2**31


def _example_class():
  """The class of TensorFlow's message: tensorflow/core/example/{example,feature}.proto, field for field."""
  field = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(name="aurora_jax/example.proto", package="tensorflow", syntax="proto3")

  def add_message(parent, name, *fields):
    added = parent.add(name=name)
    for number, (field_name, label, kind, type_name) in enumerate(fields, start=1):
      added.field.add(name=field_name, number=number, label=label, type=kind, type_name=type_name)
    return added

  one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
  add_message(file.message_type, "BytesList", ("value", many, field.TYPE_BYTES, None))
  add_message(file.message_type, "FloatList", ("value", many, field.TYPE_FLOAT, None))
  add_message(file.message_type, "Int64List", ("value", many, field.TYPE_INT64, None))
  feature = add_message(
    file.message_type,
    "Feature",
    ("bytes_list", one, field.TYPE_MESSAGE, ".tensorflow.BytesList"),
    ("float_list", one, field.TYPE_MESSAGE, ".tensorflow.FloatList"),
    ("int64_list", one, field.TYPE_MESSAGE, ".tensorflow.Int64List"),
  )
  feature.oneof_decl.add(name="kind")
  for member in feature.field:
    member.oneof_index = 0
  features = add_message(
    file.message_type, "Features", ("feature", many, field.TYPE_MESSAGE, ".tensorflow.Features.FeatureEntry")
  )
  entry = add_message(
    features.nested_type,
    "FeatureEntry",
    ("key", one, field.TYPE_STRING, None),
    ("value", one, field.TYPE_MESSAGE, ".tensorflow.Feature"),
  )
  entry.options.map_entry = True
  add_message(file.message_type, "Example", ("features", one, field.TYPE_MESSAGE, ".tensorflow.Features"))
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


_ExampleProto = _example_class()


def encode(example: Example) -> bytes:
  """Serializes an `Example`. Equal examples give equal bytes.

  Args:
    example: the example.

  Returns:
    The bytes of a `tf.train.Example`.

  Raises:
    ValueError: no image, no caption, or an additional feature with a reserved name.
  """
  if not example.image:
    raise ValueError(f"example {example.key!r} has no image")
  if not example.captions:
    raise ValueError(f"example {example.key!r} has no caption")
  proto = _ExampleProto()
  feature = proto.features.feature
  feature["image"].bytes_list.value.append(example.image)
  feature["caption"].bytes_list.value.extend(caption.encode() for caption in example.captions)
  feature["width"].int64_list.value.append(example.width)
  feature["height"].int64_list.value.append(example.height)
  feature["key"].bytes_list.value.append(example.key.encode())
  for name, values in example.features.items():
    if name in _RESERVED:
      raise ValueError(f"example {example.key!r}: the feature name {name!r} is taken (as are {', '.join(_RESERVED)})")
    feature[name].float_list.value.extend(np.asarray(values, np.float32).reshape(-1).tolist())
  return proto.SerializeToString(deterministic=True)


def decode(record: bytes) -> Example:
  """Reads an example written by `encode` or TensorFlow.

  Args:
    record: the bytes of a `tf.train.Example`.

  Returns:
    An `Example`. Additional features that are not floats are left out.

  Raises:
    ExampleError: not a `tf.train.Example`, or one without an image or a caption, or with an empty caption.
  """
  try:
    feature = _ExampleProto.FromString(record).features.feature
  except (message.DecodeError, UnicodeDecodeError):
    raise ExampleError(f"not a tf.train.Example ({len(record)} bytes)") from None
  # A lookup would add a missing name to the map, as in a defaultdict.
  key = feature["key"].bytes_list.value if "key" in feature else ()
  key = key[0].decode(errors="replace") if key else ""
  image = feature["image"].bytes_list.value if "image" in feature else ()
  captions = feature["caption"].bytes_list.value if "caption" in feature else ()
  if len(image) != 1 or not image[0]:
    raise ExampleError(f"no feature 'image' with one value (features: {_names(feature)})", key)
  if not captions:
    raise ExampleError(f"no feature 'caption' with a value (features: {_names(feature)})", key)
  try:
    captions = tuple(caption.decode() for caption in captions)
  except UnicodeDecodeError:
    raise ExampleError("feature 'caption' is not UTF-8", key) from None
  if not all(caption.strip() for caption in captions):
    raise ExampleError("feature 'caption' has an empty value", key)
  return Example(
    image=image[0],
    captions=captions,
    width=_first_integer(feature, "width"),
    height=_first_integer(feature, "height"),
    key=key,
    features={
      name: np.array(feature[name].float_list.value, np.float32)
      for name in feature
      if name not in _RESERVED and feature[name].WhichOneof("kind") == "float_list"
    },
  )


def decode_features(record: bytes) -> dict[str, list[bytes] | list[float] | list[int]]:
  """Reads all features of any `tf.train.Example`.

  Args:
    record: its bytes.

  Returns:
    {name: values}; empty features are left out.

  Raises:
    ExampleError: not a `tf.train.Example`.
  """
  try:
    feature = _ExampleProto.FromString(record).features.feature
  except (message.DecodeError, UnicodeDecodeError):
    raise ExampleError(f"not a tf.train.Example ({len(record)} bytes)") from None
  kinds = {name: value.WhichOneof("kind") for name, value in feature.items()}
  return {name: list(getattr(feature[name], kind).value) for name, kind in kinds.items() if kind}


def _names(feature):
  """The names of a record's features, for a message. If the record is another program's, the required names too."""
  names = text.printable(", ".join(sorted(feature)) or "none", _NAMES_SHOWN)
  return names if not feature or "image" in feature or "caption" in feature else f"{names}; wanted: image, caption"


def _first_integer(feature, name):
  values = feature[name].int64_list.value if name in feature else ()
  return int(values[0]) if values else 0
