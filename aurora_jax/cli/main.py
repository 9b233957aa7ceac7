"""The command line: finds the command's file, reads its flags, turns bad input into one line and status 2."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from aurora_jax import local_copies, text
from aurora_jax.cli import environment, flag_types, foreign_errors
from aurora_jax.errors import UserError

# The command's name and the line that `--help` shows. The file is cli/NAME.py with "-" as "_"; it is imported only
# when the command runs, and imports JAX and its like only in `run`, so that `--help` and a wrong flag are answered at
# once.
COMMANDS = {
  "build-data": "image-text sources to sharded tfrecords with index and manifest",
  "train-clip": "train a small CLIP on such a data set",
  "train": "train a generator; resumes by itself from --workdir",
  "sample": "prompts to a PNG sheet",
  "interpolate": "prompt to prompt, a GIF and a strip",
  "evaluate": "metrics of a run by a named protocol",
  "compile": "compile the training step for a named TPU or GPU machine, without it: does it fit?",
  "bench": "measurements of this project on this machine",
  "export": "a run to a folder that PyTorch users sample from",
  "convert": "a released PyTorch checkpoint to ours, and back",
  "inspect": "describe a run, a checkpoint, a data set or a config",
}


# Set to anything, it shows the traceback of what would be one line.
TRACEBACK_VARIABLE = "AURORA_JAX_TRACEBACK"


def split_config_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Takes ml_collections' config flags out of an argument list.

  Returns:
    (config_argv, rest): `--config F`, `--config=F` and `--config.a.b=V` (or `--config.a.b V`), and all else.

  Raises:
    UserError: a flag without a value.
  """
  config_argv, rest = [], []
  arguments = iter(argv)
  for argument in arguments:
    if argument == "--config" or argument.startswith(("--config=", "--config.")):
      if "=" not in argument:
        value = next(arguments, None)
        if value is None or value.startswith("--"):
          raise UserError(f"{argument} needs a value")
        argument = f"{argument}={value}"
      config_argv.append(argument)
    else:
      rest.append(argument)
  return config_argv, rest


def build_parser() -> argparse.ArgumentParser:
  """The parser of the command's name."""
  parser = flag_types.Parser(
    prog="aurora_jax",
    description="Text-to-image GANs in JAX: Aurora, the sparse mixture of experts, and its siblings.",
    epilog="`python -m aurora_jax COMMAND --help` explains a command.",
  )
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  for name, description in COMMANDS.items():
    commands.add_parser(name, help=description, add_help=False)
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: without the program's name; None takes the process's.

  Returns:
    The exit status: 0, or 2 for bad input (one line on stderr says what), or what the command returns.
  """
  text.tolerate_locale()
  argv = list(sys.argv[1:] if argv is None else argv)
  name = ""
  try:
    name = build_parser().parse_known_args(argv[:1])[0].command
    return _run(name, argv[1:])
  except UserError as error:
    return _report(name, error, error)
  except KeyboardInterrupt:
    print(f"aurora_jax {name}: interrupted", file=sys.stderr)
    return 130
  except Exception as error:
    known = foreign_errors.explain(error)
    if known is None:
      raise
    return _report(name, known, error)


def _run(name: str, argv: Sequence[str]) -> int:
  module = importlib.import_module(f"aurora_jax.cli.{name.replace('-', '_')}")
  parser = flag_types.Parser(
    prog=f"python -m aurora_jax {name}",
    description=module.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  module.add_arguments(parser)
  config_argv, rest = split_config_flags(argv)
  args = parser.parse_args(rest)
  args.config_argv = config_argv
  environment.prepare()
  return module.run(args) or 0


def _report(name: str, known: UserError, error: Exception) -> int:
  if os.environ.get(TRACEBACK_VARIABLE):
    raise error
  program = f"aurora_jax {name}".rstrip()
  print(f"{program}: {text.printable(' '.join(local_copies.shown(known).split()))}", file=sys.stderr)
  return 2
