"""Describes a data set to TensorFlow Datasets, which is not needed for it: `tfds.builder_from_directory(FOLDER)`.

The two files are in the format of tfds 4.9: `dataset_info.json` is its DatasetInfo message as JSON, `features.json` its
FeaturesDict.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

FILES = ("dataset_info.json", "features.json")
VERSION = "1.0.0"
_MODULE = "tensorflow_datasets.core.features"


def write(folder: pathlib.Path, manifest: Mapping[str, Any], features: Sequence[str]) -> None:
  """Writes the two files.

  Args:
    folder: of the data set.
    manifest: of the data set.
    features: names of the float features of its records.
  """
  name = manifest["name"]
  identifier = re.sub(r"\W+", "_", name)
  info = {
    "name": identifier if identifier[0].isalpha() else f"set_{identifier}",
    "version": VERSION,
    "fileFormat": "tfrecord",
    "description": f"Images with captions, from {manifest['source']}.",
    "redistributionInfo": {"license": manifest["licence"]},
    "splits": [
      {
        "name": split,
        "filepathTemplate": f"{name}-{{SPLIT}}-{{SHARD_X_OF_Y}}.{{FILEFORMAT}}",
        "shardLengths": [str(shard["examples"]) for shard in entry["shards"]],
        "numBytes": str(sum(shard["bytes"] for shard in entry["shards"])),
      }
      for split, entry in manifest["splits"].items()
    ],
  }
  side = manifest["resolution"]
  text_feature = _feature("text_feature.Text", "text", {})
  integer = _feature("scalar.Scalar", "tensor", {"shape": {}, "dtype": "int64", "encoding": "none"})
  tree = {
    "image": _feature(
      "image_feature.Image",
      "image",
      {"shape": {"dimensions": [str(side), str(side), "3"]}, "dtype": "uint8", "encodingFormat": "png"},
    ),
    "caption": _feature("sequence_feature.Sequence", "sequence", {"feature": text_feature, "length": "-1"}),
    "width": integer,
    "height": integer,
    "key": text_feature,
  }
  floats = _feature("tensor_feature.Tensor", "tensor", {"shape": {}, "dtype": "float32", "encoding": "none"})
  for feature in features:
    tree[feature] = _feature("sequence_feature.Sequence", "sequence", {"feature": floats, "length": "-1"})
  features_dict = _feature("features_dict.FeaturesDict", "featuresDict", {"features": tree})
  for file, content in zip(FILES, (info, features_dict)):
    (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _feature(name, kind, content):
  return {"pythonClassName": f"{_MODULE}.{name}", kind: content}
