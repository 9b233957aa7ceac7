"""Small image-text sets in the formats of other programs, each written by the program itself or its usual library."""

import io
import json
import tarfile
import zipfile

import numpy as np
from PIL import Image

COLORS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 40, 200), "gray": (120, 120, 120)}
SHAPES = ("square", "circle", "star", "moon", "heart", "cross")


def pixels(number, side=16):
  """A smooth image, uint8 [side, side, 3], another one for each number."""
  rows, columns = np.mgrid[:side, :side]
  base = np.array(list(COLORS.values())[number % 4])
  ramp = (rows * (1 + number % 3) + columns * (1 + number % 5))[..., None] * np.array([1, -1, 1])
  return np.clip(base + ramp, 0, 255).astype(np.uint8)


def caption(number):
  """Two words, another pair for each number below 24."""
  return f"{list(COLORS)[number % 4]} {SHAPES[number // 4 % 6]}"


def encoded(number, kind="PNG", side=16, **options):
  """An image file as bytes."""
  buffer = io.BytesIO()
  Image.fromarray(pixels(number, side)).save(buffer, kind, **options)
  return buffer.getvalue()


class PlainTarWriter:
  """Writes the same tars as webdataset's TarWriter, without its imports (PyTorch)."""

  def __init__(self, path):
    self._tar = tarfile.open(path, "w")

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._tar.close()

  def write(self, sample):
    """Adds a sample: {"__key__": name, suffix: bytes}."""
    for suffix in sorted(sample.keys() - {"__key__"}):
      info = tarfile.TarInfo(f"{sample['__key__']}.{suffix}")
      info.size = len(sample[suffix])
      self._tar.addfile(info, io.BytesIO(sample[suffix]))


def write_webdataset(folder, count=24, tars=2, side=16, writer_class=PlainTarWriter, **more):
  """Tars as img2dataset writes them. `more`: {field: values} for the JSON."""
  folder.mkdir(parents=True, exist_ok=True)
  for tar in range(tars):
    with writer_class(str(folder / f"{tar:05d}.tar")) as writer:
      for number in range(tar * count // tars, (tar + 1) * count // tars):
        info = {"key": f"{number:09d}", "width": side, "height": side, "url": f"http://localhost/{number}"}
        info |= {name: values[number] for name, values in more.items()}
        writer.write(
          {
            "__key__": f"{number:09d}",
            "jpg": encoded(number, "JPEG", side, quality=90),
            "txt": caption(number).encode(),
            "json": json.dumps(info).encode(),
          }
        )
  return folder


def write_huggingface_parquet(folder, count=24):
  """A table by `datasets`, with its Image feature and two columns of captions."""
  import datasets

  folder.mkdir(parents=True, exist_ok=True)
  features = datasets.Features(
    {"image": datasets.Image(), "text": datasets.Value("string"), "rewritten": datasets.Value("string")}
  )
  rows = {
    "image": [{"bytes": encoded(number), "path": None} for number in range(count)],
    "text": [caption(number) for number in range(count)],
    "rewritten": [f"a drawing of a {caption(number)}" for number in range(count)],
  }
  datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / "train-00000.parquet"))
  return folder


def write_parquet(folder, count=24):
  """The same table by pyarrow, which takes less time to import."""
  import pyarrow
  from pyarrow import parquet

  folder.mkdir(parents=True, exist_ok=True)
  rows = {
    "image": [{"bytes": encoded(number), "path": None} for number in range(count)],
    "text": [caption(number) for number in range(count)],
    "rewritten": [f"a drawing of a {caption(number)}" for number in range(count)],
  }
  parquet.write_table(pyarrow.table(rows), folder / "train-00000.parquet")
  return folder


def write_image_folder(folder, metadata="jsonl", count=24):
  """Hugging Face's imagefolder: metadata by pandas, images by Pillow."""
  import pandas

  folder.mkdir(parents=True, exist_ok=True)
  for number in range(count):
    (folder / f"{number}.png").write_bytes(encoded(number))
  table = pandas.DataFrame(
    {"file_name": [f"{number}.png" for number in range(count)], "text": [caption(number) for number in range(count)]}
  )
  if metadata == "jsonl":
    table.to_json(folder / "metadata.jsonl", orient="records", lines=True)
  elif metadata == "csv":
    table.to_csv(folder / "metadata.csv", index=False)
  else:
    table.to_parquet(folder / "metadata.parquet")
  return folder


def write_coco(folder, count=24):
  """COCO's annotations and images; every image has two captions."""
  (folder / "annotations").mkdir(parents=True)
  (folder / "val2017").mkdir()
  for number in range(count):
    (folder / "val2017" / f"{number:012d}.jpg").write_bytes(encoded(number, "JPEG", quality=90))
  content = {
    "info": {},
    "licenses": [],
    "images": [{"id": 7 * number, "file_name": f"{number:012d}.jpg"} for number in range(count)],
    "annotations": [
      {"id": 2 * number + i, "image_id": 7 * number, "caption": text}
      for number in range(count)
      for i, text in enumerate((caption(number), f"the {caption(number)}"))
    ],
  }
  (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
  return folder / "annotations" / "captions_val2017.json"


def write_stylegan_zip(path, count=24):
  """A zip as StyleGAN's dataset tool writes it: stored PNGs and labels."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    labels = []
    for number in range(count):
      name = f"{number // 10:05d}/img{number:08d}.png"
      archive.writestr(name, encoded(number))
      labels.append([name, number % 4])
    archive.writestr("dataset.json", json.dumps({"labels": labels}))
  return path
