"""Numbers over time: averages over a window of steps, metrics.jsonl, and the log of a run.

A step's metrics are a flat dict {name: scalar, or vector that becomes name/0, name/1, ...}. Names are paths such as
"loss/d_real". Some steps have metrics that others lack (R1 runs every k steps): a window averages each metric over the
steps that have it.

A line of metrics.jsonl is one JSON object with "step" (steps done), "seconds" (trained so far, over all restarts) and
"kind":

    start, resume, stop   a process began, continued or ended the run
    train                 averages of a window
    samples               measured on the fixed prompts
    stage                 a stage of progressive growing begins
    evaluation            a Frechet distance of the generator
    warning               training looks unhealthy
    skipped               the guard skipped a step
    judge                 added by the command `evaluate`

After a resume, the lines beyond the resumed step stay in the file; `history` leaves them out.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from aurora_jax.errors import UserError
from aurora_jax.runs import tensorboard
from aurora_jax.runs.workdir import RunFolder

# Metrics that are summed over a window, not averaged.
_COUNTED = frozenset({"guard/skipped"})


class Window:
  """Averages metrics over the steps between two log lines. Metrics in `_COUNTED` are summed."""

  def __init__(self, stored: Mapping[str, Any] | None = None):
    """Starts empty, or from `to_json` of an earlier window: a resumed run completes the window it was in."""
    self._sums = {name: np.asarray(values, np.float64) for name, (values, _) in (stored or {}).items()}
    self._counts = {name: count for name, (_, count) in (stored or {}).items()}

  def add(self, metrics: Mapping[str, Any]) -> None:
    """Adds one step's metrics, {name: scalar or vector}, already on the host."""
    for name, value in metrics.items():
      value = np.asarray(value, np.float64)
      self._sums[name] = self._sums[name] + value if name in self._sums else value
      self._counts[name] = self._counts.get(name, 0) + 1

  def take(self) -> dict[str, float]:
    """Returns the averages, sorted by name, and empties the window."""
    means = {}
    for name in sorted(self._sums):
      mean = self._sums[name] / (1 if name in _COUNTED else self._counts[name])
      if mean.ndim:
        means.update({f"{name}/{i}": float(value) for i, value in enumerate(mean.ravel())})
      else:
        means[name] = float(mean)
    self._sums, self._counts = {}, {}
    return means

  def to_json(self) -> dict[str, Any]:
    """The unfinished window as plain values. JSON keeps the floats exactly."""
    return {name: [values.tolist(), self._counts[name]] for name, values in self._sums.items()}


class MetricsFile:
  """Appends lines to metrics.jsonl. `write` returns after the operating system has the line."""

  def __init__(self, path: str | os.PathLike):
    """Opens the file for appending.

    Raises:
      UserError: it cannot be written.
    """
    self.path = pathlib.Path(path)
    try:
      torn = self.path.is_file() and _ends_torn(self.path)
      self._file = open(self.path, "a", encoding="utf-8", buffering=1)
      if torn:  # the process was killed while it wrote a line
        self._file.write("\n")
    except OSError as error:
      raise UserError(f"{path} cannot be written: {error.strerror or error}") from error

  def write(self, kind: str, step: int, seconds: float, values: Mapping[str, Any] | None = None) -> None:
    """Appends one line.

    Args:
      kind: see the module's docstring.
      step: steps done.
      seconds: seconds of training.
      values: {name: number, string or plain JSON value}.

    Raises:
      UserError: the line cannot be written (a full disk).
    """
    row = {"step": int(step), "seconds": round(float(seconds), 3), "kind": kind}
    row |= {name: _plain(value) for name, value in (values or {}).items()}
    try:
      self._file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
      raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

  def close(self) -> None:
    """Closes the file."""
    with contextlib.suppress(OSError):  # `write` has reported the line that could not be written
      self._file.close()


def _ends_torn(path):
  with open(path, "rb") as file:
    if not file.seek(0, os.SEEK_END):
      return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _plain(value):
  """Floats with eight digits (float32 has seven). NaN and infinity become strings: JSON has no numbers for them."""
  if isinstance(value, (float, np.floating)):
    return float(f"{value:.8g}") if math.isfinite(value) else str(float(value))
  return int(value) if isinstance(value, np.integer) else value


def read_lines(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
  """Reads a metrics.jsonl.

  Returns:
    (the readable lines in order, the number of unreadable lines, such as one cut off by a kill). Lines of earlier
    versions get today's names. ([], 0) if there is no file.
  """
  path = pathlib.Path(path)
  rows, unreadable = [], 0
  if path.is_file():
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except ValueError:
        row = None
      if isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool):
        if "words" in row:
          row["message"] = row.pop("words")
        rows.append(row)
      else:
        unreadable += 1
  return rows, unreadable


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The readable lines of a metrics.jsonl."""
  return read_lines(path)[0]


def history(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines that led to the present state.

  Lines beyond the step from which a run was resumed are left out, and so are those before its last "start".

  Returns:
    Rows with ascending steps, "start" and "resume" lines among them.
  """
  rows = []
  for row in read(path):
    if row.get("kind") == "start":
      rows = []
    elif row.get("kind") == "resume":
      rows = [earlier for earlier in rows if earlier["step"] <= row["step"]]
    rows.append(row)
  return rows


class NoLog:
  """Writes nothing: the log of all processes but the primary one. `Log` has the same methods."""

  def note(self, kind: str, step: int, seconds: float, values: Mapping[str, Any] | None = None) -> None:
    """Writes an event with the time of day: a start, a resume, a warning, a skipped step, a stop."""

  def train(self, step: int, seconds: float, values: Mapping[str, Any]) -> None:
    """Writes a window's averages."""

  def measured(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
    """Writes another line of numbers: "samples", "stage", "evaluation"."""

  def image(self, step: int, name: str, image: Image.Image) -> None:
    """Writes an RGB image."""

  def close(self) -> None:
    """Closes the files."""


class Log(NoLog):
  """metrics.jsonl and the TensorBoard events of a run. All methods raise UserError if they cannot write."""

  def __init__(self, folder: RunFolder):
    """Opens both files in an existing folder."""
    self._lines = MetricsFile(folder.metrics)
    self._events = tensorboard.EventWriter(folder.tensorboard)

  def note(self, kind: str, step: int, seconds: float, values: Mapping[str, Any] | None = None) -> None:
    self._lines.write(kind, step, seconds, {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **(values or {})})
    if kind == "resume":
      self._events.resume(step)

  def train(self, step: int, seconds: float, values: Mapping[str, Any]) -> None:
    self.measured("train", step, seconds, values)

  def measured(self, kind: str, step: int, seconds: float, values: Mapping[str, Any]) -> None:
    self._lines.write(kind, step, seconds, values)
    self._events.scalars(step, values)

  def image(self, step: int, name: str, image: Image.Image) -> None:
    self._events.image(step, name, image)

  def close(self) -> None:
    self._lines.close()
    self._events.close()


def to_host(metrics: Any) -> Any:
  """Fetches metrics: a tree of device scalars and vectors to a tree of numpy arrays. Waits until the step is done."""
  return jax.device_get(metrics)
