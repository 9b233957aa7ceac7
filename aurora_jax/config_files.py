"""Reads and writes configurations: `configs/*.py` with overrides of the command line, and the JSON of a run.

The class of a configuration comes from the registry of systems, which imports a system's `config.py` by its name.
"""

import ast
import contextlib
import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aurora_jax import config_migration, config_source, plain_config, text
from aurora_jax.config import Experiment, PerResolution, require
from aurora_jax.errors import UserError
from aurora_jax.systems import registry

if TYPE_CHECKING:
  import ml_collections


def _typed(cls, values, where):
  """Builds the dataclass `cls` from a mapping, naming what does not fit."""
  hints = typing.get_type_hints(cls)
  fields = {field.name for field in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      raise UserError(f"config: no field '{where}{name}'{_hint(f'{where}{name}', fields)}")
  return cls(**{name: _coerce(hints[name], value, f"{where}{name}") for name, value in values.items()})


def _hint(name, fields):
  new = config_migration.new_name(name)
  if new:
    return f"; it is {new} now"
  close = difflib.get_close_matches(name.rpartition(".")[2], fields, n=1)
  return f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(sorted(fields))}"


def _coerce(hint, value, where):
  if dataclasses.is_dataclass(hint):
    require(isinstance(value, Mapping), f"{where} must be a group of fields, got {value!r}")
    return _typed(hint, value, f"{where}.")
  origin = typing.get_origin(hint)
  if origin is Mapping:
    key_type, value_type = typing.get_args(hint)
    require(isinstance(value, Mapping), f"{where} must be a mapping, got {value!r}")
    return PerResolution({_coerce(key_type, k, where): _coerce(value_type, v, where) for k, v in value.items()})
  if origin is tuple:
    require(isinstance(value, (tuple, list)), f"{where} must be a list, got {value!r}")
    return tuple(_coerce(typing.get_args(hint)[0], item, where) for item in value)
  if hint is int and isinstance(value, str) and value.isdigit():
    return int(value)  # JSON turns the keys of a mapping into strings
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  require(
    isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
    f"{where} must be {hint.__name__}, got {value!r}",
  )
  if hint is str and value.startswith("~"):  # a path, in which no shell has expanded it
    return text.expand_home(value)
  return value


def from_mapping(values: Mapping[str, Any]) -> Experiment:
  """A nested mapping of plain values (a ConfigDict, parsed JSON) as the `Experiment` of its system.

  Raises:
    UserError: no such system, a field that does not exist, a value of the wrong type, values that do not fit together.
  """
  experiment = _typed(registry.experiment_class(str(values.get("system", ""))), values, "")
  experiment.check_whole()
  return experiment


def from_stored(values: Mapping[str, Any]) -> Experiment:
  """`from_mapping` of a stored configuration, which may be of an earlier version."""
  return from_mapping(config_migration.migrate(values))


def to_mapping(experiment: Experiment) -> dict[str, Any]:
  """The inverse of `from_mapping`: nested dicts of plain values."""
  return dataclasses.asdict(experiment)


def to_json(experiment: Experiment) -> str:
  """The text of a run's `config.json`."""
  return json.dumps(to_mapping(experiment), indent=2) + "\n"


def from_json(content: str) -> Experiment:
  """Reads what `to_json` wrote, in this or an earlier version."""
  return from_stored(json.loads(content))


def defaults(system: str = "aurora") -> "ml_collections.ConfigDict":
  """All fields of a system with their defaults, for the files in `configs/` to start from."""
  return plain_config.config_class()(to_mapping(registry.experiment_class(system)()))


def load(config_argv: Sequence[str]) -> Experiment:
  """Reads a config file with the command line's overrides.

  Args:
    config_argv: `--config=configs/NAME.py[:VARIANT]` and any `--config.a.b=V`.

  Raises:
    UserError: no such file, no such field, a value of the wrong type.
  """
  paths = [argument.removeprefix("--config=") for argument in config_argv if argument.startswith("--config=")]
  if not paths:
    raise UserError("which config? --config configs/NAME.py[:VARIANT]")
  config = config_source.run(text.expand_home(paths[-1]))
  overrides = [argument for argument in config_argv if argument.startswith("--config.")]
  for argument in overrides:
    name = argument.removeprefix("--config.").split("=")[0]
    if name in config_migration.RENAMED:
      raise UserError(f"config: no field '{name}'; it is {config_migration.new_name(name)} now")
  return from_mapping(_overridden(config, overrides).to_dict())


def _overridden(config, overrides):
  """A ConfigDict with values of the command line in it."""
  if not overrides:
    return config
  try:
    from absl import flags
    from ml_collections import config_flags
  except ModuleNotFoundError as error:
    raise UserError(f"{overrides[0]}: needs a package that is not installed: pip install ml_collections") from error

  argv, values = ["aurora_jax", *overrides], flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(_one_line(error)) from error


def _one_line(error):
  """The message of an exception of ml_collections."""
  message = str(error)
  if isinstance(error, KeyError | AttributeError):  # the text is quoted, sometimes twice
    for _ in range(2):
      with contextlib.suppress(ValueError, SyntaxError):
        message = str(ast.literal_eval(message))
    message = f"no field {message}"
  return "config: " + "; ".join(line.strip() for line in message.splitlines() if line.strip())
