"""What a run's own files say for its model card: data set, measured numbers, cost of training."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from aurora_jax.config import Experiment
from aurora_jax.data import dataset
from aurora_jax.errors import UserError
from aurora_jax.interop.hub.model_card import Metric
from aurora_jax.runs import metrics
from aurora_jax.runs.workdir import RunFolder

# Figures of `evaluate` in the order of the card: (name after "judge/", kind on the Hub, what a reader should see).
_JUDGE = (
  ("top1_of_", "accuracy", "caption ranked first among {}, training captions"),
  ("heldout_top1_of_", "accuracy", "caption ranked first among {}, held-out captions"),
)
_PROMPTS = 6


def fields(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
  """Fields of `model_card.Card` that a run knows at a checkpoint.

  Args:
    workdir: the run's folder.
    step: of the checkpoint. Numbers of `evaluate` count if they are of this step.

  Raises:
    UserError: no such run.
  """
  folder = RunFolder(pathlib.Path(workdir))
  experiment = folder.experiment()
  rows = [row for row in metrics.history(folder.metrics) if row["step"] <= step]
  return {
    "summary": f"A generator of the system `{experiment.system}`: {experiment.summary}.",
    **_dataset(experiment),
    "metrics": (*_judged(rows, step), *_frechet(rows)),
    "cost": tuple(_cost(experiment, rows, step)),
  }


def prompts(experiment: Experiment) -> list[str]:
  """Some prompts for a sheet of samples: those of the run, else captions of its data set; [""] without text."""
  if not experiment.conditional:
    return [""]
  found = list(experiment.train.sample_prompts)
  if not found:
    try:
      data = dataset.Dataset.open(experiment.data.path, experiment.data.split)
      found = [data[i].captions[0] for i in range(0, len(data), max(1, len(data) // _PROMPTS))]
    except (UserError, OSError):
      return []
  return found[:_PROMPTS]


def _dataset(experiment):
  """Name, source and license of the data set; its name alone where it is not there any more."""
  if not experiment.data.path:
    return {}
  name, lines, size = _described(experiment.data.path, experiment.data.split)
  further = []
  for weight, path in experiment.data.sources[1:]:
    other, others_lines, _ = _described(path, experiment.data.split)
    further.append(f"{other}, {100 * weight:.3g} % of the images" + "".join(f"; {line}" for line in others_lines))
  return {"dataset": name, "dataset_images": size, "dataset_notes": (*lines, *(f"also {line}" for line in further))}


def _described(path, split):
  """(name, lines on source and license, number of images or 0) of a data set."""
  try:
    manifest = dataset.read_manifest(path)
  except UserError:
    return pathlib.PurePath(path).name, [], 0
  text = lambda key: " ".join(str(manifest.get(key) or "").split())
  lines = [f"{label}: {text(key)}" for label, key in (("source", "source"), ("license", "licence")) if text(key)]
  size = manifest.get("splits", {}).get(split, {}).get("examples")
  return text("name") or pathlib.PurePath(path).name, lines, size if isinstance(size, int) else 0


def _judged(rows: Sequence[Mapping[str, Any]], step: int) -> list[Metric]:
  """Numbers of the newest evaluation of this step."""
  judged = [row for row in rows if row.get("kind") == "judge" and row["step"] == step]
  if not judged:
    return []
  found, row = [], judged[-1]
  number = lambda name: row.get(f"judge/{name}") if isinstance(row.get(f"judge/{name}"), int | float) else None
  for prefix, kind, label in _JUDGE:
    heldout = "heldout_" if prefix.startswith("heldout_") else ""
    names = [name.removeprefix(f"judge/{prefix}") for name in row if name.startswith(f"judge/{prefix}")]
    for among in sorted(names, key=lambda name: name == "all"):
      captions = number(f"{heldout}captions")
      chance, real = number(f"{heldout}chance_of_{among}"), number(f"{heldout}real_top1_of_{among}")
      value, images = number(prefix + among), number(f"{heldout}images")
      if value is None:
        continue
      protocol = ["caption-retrieval by a second CLIP", "psi 1"]
      protocol += [f"{images:,.0f} images"] if images is not None else []
      protocol += [f"real images {real:.4g}"] if real is not None else []
      protocol += [f"chance {chance:.2g}"] if chance is not None else []
      shown = label.format(f"all {captions:,.0f}" if among == "all" and captions else among)
      found.append(Metric(kind, shown, value, ", ".join(protocol)))
  value, halves = number("frechet"), number("frechet_real_halves")
  if value is not None:
    protocol = "embeddings of a second CLIP, psi 1"
    protocol += f", halves of the real images {halves:.4g}" if halves is not None else ""
    found.append(Metric("frechet_distance", "Frechet distance", value, protocol))
  return found


def _frechet(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
  """The newest measurement of a run that grows, at the resolution of its stage."""
  for row in reversed([row for row in rows if row.get("kind") == "evaluation"]):
    side = str(row.get("resolution"))
    values = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("frechet")}
    if isinstance(values.get(side), int | float):
      images = row.get("images", row.get("pictures"))
      features = str(row.get("features", "?")).split("/")[0].strip()
      protocol = f"{features} features, {side}x{side} pixels, step {row['step']:,}"
      protocol += f", {images:,} images" if isinstance(images, int) else ""
      reference = values.get(f"reference_{side}")
      protocol += f", of real images {reference:.4g}" if isinstance(reference, int | float) else ""
      return [Metric("frechet_distance", "Frechet distance during training", values[side], protocol)]
  return []


def _cost(experiment, rows, step):
  """Lines on what training took, up to the checkpoint."""
  if not rows:
    return
  counts = [row for row in rows if row.get("kind") == "train" and isinstance(row.get("images"), int) and row["step"]]
  per_step = counts[-1]["images"] // counts[-1]["step"] if counts else experiment.train.batch_size
  yield f"{step:,} steps, {step * per_step:,} images seen ({per_step:,} a step)"
  seconds = max(float(row.get("seconds", 0.0)) for row in rows)
  begun = [row for row in rows if row.get("kind") in ("start", "resume")]
  devices = list(dict.fromkeys(str(row["devices"]) for row in begun if row.get("devices")))
  restarts = sum(row["kind"] == "resume" for row in begun)
  on = f" on {', then '.join(devices)}" if devices else ""
  yield f"wall time {_span(seconds)}{on}" + (f", {restarts} restarts" if restarts else "")


def _span(seconds):
  """ "93 seconds", "42.5 minutes", "6.3 hours", "12.0 days"."""
  for unit, length, most in (("seconds", 1, 120), ("minutes", 60, 120), ("hours", 3600, 96)):
    if seconds < most * length:
      return f"{seconds / length:.{0 if length == 1 else 1}f} {unit}"
  return f"{seconds / 86400:.1f} days"
