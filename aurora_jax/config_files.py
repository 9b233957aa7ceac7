"""An experiment as text: config files with the command line's overrides, and the `config.json` of a run.

An experiment is a file in `configs/` that returns an `ml_collections.ConfigDict` of plain values, begun by `defaults`;
`load` turns it into a `config.Experiment`.
"""

import dataclasses
import difflib
import json
import os
import typing
from collections.abc import Mapping

from aurora_jax.config import Experiment, PerResolution, require
from aurora_jax.errors import UserError


def _check_whole(experiment):
  """What holds for a whole experiment and not for one `at_stage`."""
  stages, cfg = experiment.schedule.resolutions, experiment.discriminator
  require(
    not stages or stages[-1] == experiment.generator.resolution,
    f"schedule.resolutions {stages} must end with generator.resolution {experiment.generator.resolution}",
  )
  missing = [r for r in stages if r not in cfg.input_resolutions]
  require(
    not missing,
    f"schedule.resolutions {stages}: the pictures of stage {missing} do not enter the discriminator, "
    f"discriminator.input_resolutions are {cfg.input_resolutions}",
  )
  return experiment


def _typed(cls, values, where):
  """Builds the dataclass `cls` from a mapping, naming what does not fit."""
  hints = typing.get_type_hints(cls)
  fields = {field.name for field in dataclasses.fields(cls)}
  for name in values:
    if name not in fields:
      close = difflib.get_close_matches(name, fields, n=1)
      hint = f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(sorted(fields))}"
      raise UserError(f"config: no field '{where}{name}'{hint}")
  return cls(**{name: _coerce(hints[name], value, f"{where}{name}") for name, value in values.items()})


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
  return value


def from_mapping(values):
  """A nested mapping of plain values (a ConfigDict, parsed JSON) as an `Experiment`.

  Raises:
    UserError: a field that does not exist, a value of the wrong type, values that do not fit together.
  """
  return _check_whole(_typed(Experiment, values, ""))


def to_mapping(experiment):
  """The inverse of `from_mapping`: nested dicts of plain values."""
  return dataclasses.asdict(experiment)


def to_json(experiment):
  """The text of a run's `config.json`."""
  return json.dumps(to_mapping(experiment), indent=2) + "\n"


def from_json(text):
  """Reads what `to_json` wrote."""
  return from_mapping(json.loads(text))


def defaults():
  """A ConfigDict with every field at its default, for the files in `configs/` to start from."""
  import ml_collections

  return ml_collections.ConfigDict(to_mapping(Experiment()))


def load(config_argv):
  """Reads a config file with the command line's overrides.

  Args:
    config_argv: list of str: `--config=configs/NAME.py[:VARIANT]` and any `--config.a.b=V`.

  Returns:
    An `Experiment`.

  Raises:
    UserError: no such file, no such field, a value of the wrong type.
  """
  from absl import flags
  from ml_collections import config_flags

  paths = [a.removeprefix("--config=").split(":")[0] for a in config_argv if a.startswith("--config=")]
  if not paths:
    raise UserError("which config? --config configs/NAME.py[:VARIANT]")
  if not os.path.isfile(paths[-1]):
    raise UserError(f"config file not found: {paths[-1]}")
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["aurora_jax", *config_argv])
  try:
    values(["aurora_jax", *config_argv])
    config = values.config.to_dict()
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
    raise UserError(_one_line(error)) from error
  return from_mapping(config)


def _one_line(error):
  """The line of ml_collections' many that says what is wrong."""
  text = str(error).replace("\\n", "\n").replace("\\'", "'")  # a KeyError's text is quoted, sometimes twice
  lines = [line.strip() for line in text.splitlines() if line.strip(" '\"")]
  if "Traceback" in text:  # the config file itself raised: its exception is the last line
    return f"config: {lines[-1].partition(': ')[2] or lines[-1]}"
  return "config: " + "; ".join(line.strip("'\"") for line in lines)
