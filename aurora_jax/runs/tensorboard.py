"""TensorBoard event files of a run, written with the `tensorboard` package and without TensorFlow.

The package's `RecordWriter` frames and checksums the records. Its `EventFileWriter` is not used: it opens files through
TensorFlow where that is installed (seconds at every start), and its thread prints a traceback when a disk is full.
"""

import contextlib
import io
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image

from aurora_jax.errors import UserError


class EventWriter:
  """Writes one event file. Every event is in the file when the call that adds it returns."""

  def __init__(self, folder: str | os.PathLike):
    """Makes the folder and a new event file in it.

    Raises:
      UserError: they cannot be made.
    """
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer import record_writer

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    self._session_log = event_pb2.SessionLog
    name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    self._path = pathlib.Path(folder) / name
    try:
      os.makedirs(folder, exist_ok=True)
      self._writer = record_writer.RecordWriter(open(self._path, "ab"))
    except OSError as error:
      raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    self._write(file_version="brain.Event:2")

  def resume(self, step: int) -> None:
    """Makes TensorBoard drop what an interrupted process wrote after `step`."""
    self._write(step=step + 1, session_log=self._session_log(status=self._session_log.START))

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Adds the numbers among `values`; strings, booleans and other values are left out."""
    entries = [
      self._summary.Value(tag=name, simple_value=value)
      for name, value in values.items()
      if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    self._write(step=step, summary=self._summary(value=entries))

  def image(self, step: int, name: str, image: Image.Image) -> None:
    """Adds an RGB image."""
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    value = self._summary.Image(
      width=image.width, height=image.height, colorspace=3, encoded_image_string=encoded.getvalue()
    )
    self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=value)]))

  def close(self) -> None:
    """Closes the file."""
    with contextlib.suppress(OSError):  # `_write` has reported the event that could not be written
      self._writer.close()

  def _write(self, **fields: Any) -> None:
    event = self._event(wall_time=time.time(), **fields)
    try:
      self._writer.write(event.SerializeToString())
      self._writer.flush()
    except OSError as error:
      raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error
