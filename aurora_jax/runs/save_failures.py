"""Failures of Orbax's writing in the background, known to this process as soon as they happen."""


def watched(handler, failures):
  """An Orbax handler that adds to `failures` what goes wrong while it writes in the background.

  Of several processes Orbax has the one that fails wait for the others, who wait for it, until its ten minutes are over;
  until then it keeps the error to itself.
  """
  start = handler.async_save

  async def async_save(*args, **kwargs):
    return [_Watched(future, failures) for future in await start(*args, **kwargs) or ()]

  handler.async_save = async_save
  return handler


class _Watched:
  """A future of Orbax that notes its failure."""

  def __init__(self, future, failures):
    self._future, self._failures = future, failures

  def result(self, timeout=None):
    try:
      return self._future.result(timeout=timeout)
    except BaseException as error:
      self._failures.append(error)
      raise
