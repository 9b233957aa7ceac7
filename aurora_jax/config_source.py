"""Runs a config file, `configs/NAME.py`; whatever it raises becomes one line with its name and the number of the
line.
"""

import contextlib
import os
import sys
import types
from typing import Any

from aurora_jax import config_search, plain_config, text
from aurora_jax.errors import UserError

_MODULE = "config_file"  # its name in sys.modules, where dataclasses of a config file look for their module


def run(argument: str) -> Any:
  """What the `get_config` of a config file returns.

  Args:
    argument: a config file as `config_search.find` takes it, or FILE:VARIANT, whose variant `get_config` is called
      with.

  Returns:
    An `ml_collections.ConfigDict`; a `PlainConfig` where ml_collections is not installed.

  Raises:
    UserError: no such file, it is no Python, it raises something, or it returns something else.
  """
  path, variant = _split(argument)
  shown = text.printable(text.path_text(path))
  with _explained(path, shown), config_search.importable(path):
    with open(path, "rb") as file:
      code = compile(file.read(), path, "exec", dont_inherit=True)
    module = types.ModuleType(_MODULE)
    module.__file__ = path
    sys.modules[_MODULE] = module
    exec(code, module.__dict__)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
      raise UserError(f"config: {shown} has no function get_config(variant)")
    config = get_config(*variant)
  if not isinstance(config, plain_config.config_class()):
    raise UserError(f"config: get_config of {shown} returns no ConfigDict, but {text.printable(repr(config), 40)}")
  return config


def _split(argument: str) -> tuple[str, list[str]]:
  """The path and the variant, [] for none. Either may hold a colon."""
  parts = argument.split(":")
  for count in range(len(parts), 0, -1):
    path = config_search.find(":".join(parts[:count]))
    if path is not None:
      return path, [":".join(parts[count:])] if count < len(parts) else []
  shown = text.printable(text.path_text(parts[0]))
  if os.path.isdir(parts[0]):
    raise UserError(f"config file {shown} is a folder")
  raise UserError(f"config file not found: {shown}{config_search.hint(parts[0])}")


@contextlib.contextmanager
def _explained(path: str, shown: str):
  """Turns what the file raises into one line."""
  try:
    yield
  except SyntaxError as error:  # of the file, or of a module that it imports
    where = shown if error.filename in (path, None) else text.printable(error.filename)
    line = f", line {error.lineno}" if error.lineno else ""
    raise UserError(f"config: {where}{line}: {error.msg}") from error
  except (Exception, SystemExit) as error:
    line = _line_of(path, error)
    if line is None and isinstance(error, UserError):
      raise
    if line is None and isinstance(error, OSError):
      raise UserError(f"config: {shown} cannot be read: {error.strerror or error}") from error
    name = "" if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: "
    message = " ".join(text.printable(error).split())
    raise UserError(f"config: {shown}{f', line {line}' if line else ''}: {name}{message}") from error


def _line_of(path: str, error: BaseException) -> int | None:
  """The number of the innermost line of the file that an exception went through."""
  line, trace = None, error.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == path:
      line = trace.tb_lineno
    trace = trace.tb_next
  return line
