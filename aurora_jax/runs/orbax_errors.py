"""What Orbax says, made fit for a person: its log kept off the terminal, its exceptions in one line."""

import logging
import os
import re
import sys

from aurora_jax.errors import UserError


def unreadable(path, error):
  return UserError(
    f"checkpoint {path} cannot be read: {reason(error)} (remove that folder to fall back to the one before it)"
  )


def reason(error, longest=300):
  """One line of an exception's words. Of an error of the file system, which comes in a long wrapping, the core."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  words = " ".join(str(error).split()) or type(error).__name__
  return words if len(words) <= longest else words[:longest] + " ..."


def quieten():
  """Keeps Orbax's log off the terminal: a failed save is raised to us, its tracebacks from four threads add nothing."""
  logger = logging.getLogger("absl")
  if not any(isinstance(entry, _NotFromOrbax) for entry in logger.filters):
    logger.addFilter(_NotFromOrbax())
    # Of several writes that fail together Orbax collects one; asyncio would print the others when they are swept up.
    logging.getLogger("asyncio").addFilter(_NotFromOrbax())
    previous = sys.unraisablehook
    sys.unraisablehook = lambda event: None if _is_from_a_closed_loop(event) else previous(event)


def _is_from_a_closed_loop(event):
  """After a failed write or read, what TensorStore still has under way reports to an event loop that is gone."""
  return isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"


class _NotFromOrbax(logging.Filter):
  """Drops what Orbax logs, and what is logged about its tasks."""

  def filter(self, record):
    where = f"{os.sep}orbax{os.sep}"
    return where not in record.pathname and where not in record.getMessage()
