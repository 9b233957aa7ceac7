"""Errors of Orbax: as one line for a person, as soon as they happen, and without Orbax's own log on the terminal."""

import logging
import os
import re
import sys
from typing import Any

from aurora_jax.errors import UserError


def unreadable(path: str | os.PathLike, error: Exception) -> UserError:
  """The error to raise for a checkpoint folder that could not be read."""
  return UserError(
    f"checkpoint {path} cannot be read: {reason(error)} (remove that folder to fall back to the one before it)"
  )


def reason(error: Exception, longest: int = 300) -> str:
  """One line that says what went wrong: an error of the file system by its name, others by their shortened message."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  message = " ".join(str(error).split()) or type(error).__name__
  return message if len(message) <= longest else message[:longest] + " ..."


def note_failures(handler: Any, failures: list[BaseException]) -> Any:
  """Makes an Orbax checkpoint handler append errors of its background writes to `failures` at once.

  Orbax raises such an error only after all processes have met at a barrier. A process that failed never arrives there,
  so the others would wait until Orbax's timeout of ten minutes.

  Returns:
    The handler.
  """
  start = handler.async_save

  async def async_save(*args, **kwargs):
    return [_NotingFuture(future, failures) for future in await start(*args, **kwargs) or ()]

  handler.async_save = async_save
  return handler


class _NotingFuture:
  """A future of Orbax that appends its error to a list."""

  def __init__(self, future, failures):
    self._future, self._failures = future, failures

  def result(self, timeout=None):
    try:
      return self._future.result(timeout=timeout)
    except BaseException as error:
      self._failures.append(error)
      raise


def silence_log() -> None:
  """Keeps Orbax's log off the terminal. A failed save is raised to us; tracebacks from four threads add nothing."""
  logger = logging.getLogger("absl")
  if not any(isinstance(entry, _NotFromOrbax) for entry in logger.filters):
    logger.addFilter(_NotFromOrbax())
    # Orbax collects one error of several writes that fail together; asyncio would print the others when they are freed.
    logging.getLogger("asyncio").addFilter(_NotFromOrbax())
    previous = sys.unraisablehook
    sys.unraisablehook = lambda event: None if _is_from_a_closed_loop(event) else previous(event)


def _is_from_a_closed_loop(event):
  """After a failed write or read, TensorStore's remaining operations report to an event loop that is closed."""
  return isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"


class _NotFromOrbax(logging.Filter):
  """Drops what Orbax logs, and what is logged about its tasks."""

  def filter(self, record):
    where = f"{os.sep}orbax{os.sep}"
    return where not in record.pathname and where not in record.getMessage()
