"""The record of a data set, against TensorFlow's own reader and writer."""

import subprocess
import sys

import numpy as np
import pytest

from aurora_jax.data import schema
from aurora_jax.data.schema import Example

FULL = Example(
  image=b"\x89PNG\x00\xff picture",
  captions=("ein Äpfelchen 🍎", "apple"),
  width=5,
  height=2**33,
  key="fruit/apple",
  features={"score": np.array([0.25, -1.5], np.float32), "none": np.zeros(0, np.float32)},
)


def assert_same(left, right):
  for name in ("image", "captions", "width", "height", "key"):
    assert getattr(left, name) == getattr(right, name)
  assert left.features.keys() == right.features.keys()
  for name, values in left.features.items():
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, right.features[name])


def test_round_trip():
  assert_same(schema.decode(schema.encode(FULL)), FULL)


def test_equal_examples_give_equal_bytes():
  reordered = Example(
    FULL.image, FULL.captions, FULL.width, FULL.height, FULL.key, dict(reversed(FULL.features.items()))
  )
  assert schema.encode(reordered) == schema.encode(FULL)


def test_tensorflow_reads_ours(tf):
  parsed = tf.io.parse_single_example(
    schema.encode(FULL),
    {
      "image": tf.io.FixedLenFeature([], tf.string),
      "caption": tf.io.VarLenFeature(tf.string),
      "width": tf.io.FixedLenFeature([], tf.int64),
      "height": tf.io.FixedLenFeature([], tf.int64),
      "key": tf.io.FixedLenFeature([], tf.string),
      "score": tf.io.FixedLenFeature([2], tf.float32),
    },
  )
  assert parsed["image"].numpy() == FULL.image
  assert [caption.decode() for caption in parsed["caption"].values.numpy()] == list(FULL.captions)
  assert (parsed["width"].numpy(), parsed["height"].numpy()) == (5, 2**33)
  assert parsed["key"].numpy() == b"fruit/apple"
  np.testing.assert_array_equal(parsed["score"].numpy(), FULL.features["score"])


def test_tensorflow_message_equals_ours(tf):
  theirs = tf.train.Example.FromString(schema.encode(FULL))
  assert theirs.SerializeToString(deterministic=True) == schema.encode(FULL)


def test_reads_what_tensorflow_writes(tf):
  def bytes_feature(*values):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

  def integer_feature(value):
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

  message = tf.train.Example(
    features=tf.train.Features(
      feature={
        "image": bytes_feature(FULL.image),
        "caption": bytes_feature(*(caption.encode() for caption in FULL.captions)),
        "width": integer_feature(FULL.width),
        "height": integer_feature(FULL.height),
        "key": bytes_feature(FULL.key.encode()),
        "score": tf.train.Feature(float_list=tf.train.FloatList(value=FULL.features["score"])),
        "none": tf.train.Feature(float_list=tf.train.FloatList()),
        "other": integer_feature(3),
      }
    )
  )
  assert_same(schema.decode(message.SerializeToString()), FULL)


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"image": b""}, "'k' has no image"),
    ({"captions": ()}, "'k' has no caption"),
    ({"features": {"key": np.zeros(1)}}, "'key' is taken"),
  ],
)
def test_encode_refuses(changes, words):
  example = {"image": b"x", "captions": ("c",), "width": 1, "height": 1, "key": "k"} | changes
  with pytest.raises(ValueError, match=words):
    schema.encode(Example(**example))


def record(**features):
  import tensorflow as tf

  return tf.train.Example(
    features=tf.train.Features(
      feature={name: tf.train.Feature(bytes_list=tf.train.BytesList(value=values)) for name, values in features.items()}
    )
  ).SerializeToString()


@pytest.mark.parametrize(
  "data, words",
  [
    (b"\xff\xff not a message", r"not a tf.train.Example \(16 bytes\)"),
    (b"", r"no feature 'image'.*features: none"),
    (dict(caption=[b"c"]), r"no feature 'image'.*features: caption"),
    (dict(image=[b""], caption=[b"c"]), "no feature 'image'"),
    (dict(image=[b"x"]), "no feature 'caption'"),
    (dict(image=[b"x"], caption=[b"\xff"]), "not UTF-8"),
  ],
  ids=["no message", "empty", "no image", "empty image", "no caption", "no text"],
)
def test_decode_refuses(data, words):
  """`data`: a record, or the features of one."""
  with pytest.raises(ValueError, match=words):
    schema.decode(record(**data) if isinstance(data, dict) else data)


def test_records_of_another_program_are_named():
  with pytest.raises(ValueError) as caught:
    schema.decode(record(**{"image/encoded": [b"x"], "text\x1b": [b"c"]}))
  assert str(caught.value) == (
    r"no feature 'image' with one value (features: image/encoded, text\x1b; wanted: image, caption)"
  )
  with pytest.raises(ValueError) as caught:
    schema.decode(record(**{f"feature{number}": [b"x"] for number in range(1000)}))
  assert len(str(caught.value)) < 300


def test_size_and_key_may_be_missing():
  example = schema.decode(record(image=[b"x"], caption=[b"c"]))
  assert (example.width, example.height, example.key) == (0, 0, "")


@pytest.mark.slow
@pytest.mark.parametrize("module", ["schema", "dataset", "build", "loader"])
def test_tensorflow_stays_out(module):
  code = f"import sys, aurora_jax.data.{module}; sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_beside_tensorflow_in_either_order():
  code = "import aurora_jax.data.schema; import tensorflow as tf; tf.train.Example()"
  subprocess.run([sys.executable, "-c", code], check=True)
