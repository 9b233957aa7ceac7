"""Numbers over time: windows of averages, metrics.jsonl, TensorBoard.

A step's metrics are a flat dict {name: scalar, or vector that becomes name/0, name/1, ...}. Names are paths such as
"loss/d_real"; a variant of the step may return metrics that others do not (R1 every k steps): a window averages each
over the steps that had it.

A line of metrics.jsonl is one JSON object with "step" (steps done), "seconds" (trained so far, over all restarts) and
"kind": "start", "resume", "train" (averages of a window), "samples" (measured on the fixed prompts), "stage" (of progressive
growing: one begins), "evaluation" (a Frechet distance of the generator's), "warning", "skipped" (a step that the guard left
out), "stop", or what other commands add ("judge"). After a resume the lines beyond the step that was resumed from stay in
the file; `history` leaves them out.
"""

import contextlib
import io
import json
import math
import os
import pathlib
import socket
import time
from typing import Any

import jax
import numpy as np

from aurora_jax.data import tfrecords
from aurora_jax.errors import UserError

# What is counted over a window, not averaged.
_COUNTED = frozenset({"guard/skipped"})


class Window:
  """Averages metrics over the steps between two log lines; a few are counted."""

  def __init__(self, stored=None):
    """Begins empty, or with what `stored` (as of `to_json`) holds: a resumed run finishes the window it was in."""
    self._sums = {name: np.asarray(values, np.float64) for name, (values, _) in (stored or {}).items()}
    self._counts = {name: count for name, (_, count) in (stored or {}).items()}

  def add(self, metrics):
    """Adds one step's metrics, already on the host: {name: scalar or vector}."""
    for name, value in metrics.items():
      value = np.asarray(value, np.float64)
      self._sums[name] = self._sums[name] + value if name in self._sums else value
      self._counts[name] = self._counts.get(name, 0) + 1

  def take(self):
    """Returns the averages, {name: float}, sorted by name, and begins anew."""
    means = {}
    for name in sorted(self._sums):
      mean = self._sums[name] / (1 if name in _COUNTED else self._counts[name])
      if mean.ndim:
        means.update({f"{name}/{i}": float(value) for i, value in enumerate(mean.ravel())})
      else:
        means[name] = float(mean)
    self._sums, self._counts = {}, {}
    return means

  def to_json(self):
    """The unfinished window as plain values; floats survive JSON exactly."""
    return {name: [values.tolist(), self._counts[name]] for name, values in self._sums.items()}


class MetricsFile:
  """Appends lines to metrics.jsonl; each is on disk before `write` returns, as far as the process is concerned."""

  def __init__(self, path):
    """Opens the file for appending.

    Raises:
      UserError: it cannot be written.
    """
    self.path = pathlib.Path(path)
    try:
      torn = self.path.is_file() and _ends_torn(self.path)
      self._file = open(self.path, "a", encoding="utf-8", buffering=1)
      if torn:  # the process was killed within a line
        self._file.write("\n")
    except OSError as error:
      raise UserError(f"{path} cannot be written: {error.strerror or error}") from error

  def write(self, kind, step, seconds, values=None):
    """Appends one line.

    Args:
      kind: str.
      step: int.
      seconds: float.
      values: {name: number, str or plain JSON value}.

    Raises:
      UserError: it cannot be written (a full disk).
    """
    row = {"step": int(step), "seconds": round(float(seconds), 3), "kind": kind}
    row |= {name: _plain(value) for name, value in (values or {}).items()}
    try:
      self._file.write(json.dumps(row, allow_nan=False) + "\n")
    except OSError as error:
      raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

  def close(self):
    with contextlib.suppress(OSError):  # `write` has said so of the line that it could not write
      self._file.close()


def _ends_torn(path):
  with open(path, "rb") as file:
    if not file.seek(0, os.SEEK_END):
      return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _plain(value):
  """Numbers with eight digits (float32 has seven); what is no finite number as a word, since JSON has none for it."""
  if isinstance(value, (float, np.floating)):
    return float(f"{value:.8g}") if math.isfinite(value) else str(float(value))
  return int(value) if isinstance(value, np.integer) else value


def read_lines(path: str | os.PathLike) -> tuple[list[dict[str, Any]], int]:
  """All lines of a metrics.jsonl that can be read, in order, and the number of those that cannot (cut off by a kill).

  Lines of earlier versions get today's names. ([], 0) where there is no file.
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
  """The lines of `read_lines` alone."""
  return read_lines(path)[0]


def history(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines that led to the present state: what came after the step from which a run was resumed is left out.

  Returns:
    list of dict, steps ascending, "start" and "resume" lines among them.
  """
  kept = []
  for row in read(path):
    if row.get("kind") == "start":
      kept = []
    elif row.get("kind") == "resume":
      kept = [earlier for earlier in kept if earlier["step"] <= row["step"]]
    kept.append(row)
  return kept


class TensorBoard:
  """Writes event files.

  `clu.metric_writers` would do, but it imports TensorFlow: 5 s on a laptop at every start. An event file is a TFRecord
  file of protocol buffers, tensorboard brings those without TensorFlow, and data/tfrecords.py has the framing.
  """

  def __init__(self, folder):
    """Makes the folder and an event file of this process in it.

    Raises:
      UserError: they cannot be made.
    """
    from tensorboard.compat.proto import event_pb2, summary_pb2

    self._event, self._summary = event_pb2, summary_pb2
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    try:
      os.makedirs(folder, exist_ok=True)
      self._file = open(pathlib.Path(folder) / name, "ab")
    except OSError as error:
      raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

  def resume(self, step):
    """Tells TensorBoard to forget what an interrupted process wrote beyond this step."""
    log = self._event.SessionLog(status=self._event.SessionLog.START)
    self._write(self._event.Event(wall_time=time.time(), step=step + 1, session_log=log))

  def scalars(self, step, values):
    """Adds numbers, {name: float}; other values are left out."""
    entries = [
      self._summary.Summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
      if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    self._write(self._event.Event(wall_time=time.time(), step=step, summary=self._summary.Summary(value=entries)))

  def picture(self, step, name, picture):
    """Adds a PIL picture."""
    encoded = io.BytesIO()
    picture.save(encoded, format="PNG")
    image = self._summary.Summary.Image(
      width=picture.width, height=picture.height, colorspace=3, encoded_image_string=encoded.getvalue()
    )
    entry = self._summary.Summary.Value(tag=name, image=image)
    self._write(self._event.Event(wall_time=time.time(), step=step, summary=self._summary.Summary(value=[entry])))

  def _write(self, event):
    try:
      self._file.write(tfrecords.frame(event.SerializeToString()))
      self._file.flush()
    except OSError as error:
      raise UserError(f"{self._file.name} cannot be written: {error.strerror or error}") from error

  def close(self):
    with contextlib.suppress(OSError):
      self._file.close()


class Log:
  """metrics.jsonl and TensorBoard of a run together. Made by the first process only; the others have a `NoLog`."""

  def __init__(self, folder):
    """Args: folder: `RunFolder`, existing."""
    self._lines = MetricsFile(folder.metrics)
    self._board = TensorBoard(folder.tensorboard)

  def note(self, kind, step, seconds, values=None):
    """A line that is no measurement, with the time of day: a start, a resume, a warning, a skipped step, a stop."""
    self._lines.write(kind, step, seconds, {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **(values or {})})
    if kind == "resume":
      self._board.resume(step)

  def train(self, step, seconds, values):
    """A window's averages."""
    self.measured("train", step, seconds, values)

  def measured(self, kind, step, seconds, values):
    """Any other line of numbers: "samples", "stage", "evaluation"."""
    self._lines.write(kind, step, seconds, values)
    self._board.scalars(step, values)

  def picture(self, step, name, picture):
    """A picture for TensorBoard."""
    self._board.picture(step, name, picture)

  def close(self):
    self._lines.close()
    self._board.close()


class NoLog:
  """The twin of `Log` for all processes but the first: it writes nothing."""

  def note(self, kind, step, seconds, values=None):
    pass

  def train(self, step, seconds, values):
    pass

  def measured(self, kind, step, seconds, values):
    pass

  def picture(self, step, name, picture):
    pass

  def close(self):
    pass


def to_host(metrics):
  """Fetches a step's metrics: {name: device scalar or vector} to {name: numpy}. Waits until the step is done."""
  return jax.device_get(metrics)
