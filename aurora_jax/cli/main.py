"""The command line: finds the command's file, reads its flags, turns bad input into one line and status 2."""

import argparse
import importlib
import os
import sys

from aurora_jax import text
from aurora_jax.errors import UserError

# The command's name and the line that `--help` shows. The file is cli/NAME.py with "-" as "_"; it is imported only
# when the command runs, so that `--help` answers at once.
COMMANDS = {
  "build-data": "image-text sources to sharded tfrecords with index and manifest",
  "train-clip": "train a small CLIP on such a data set",
  "train": "train a generator; resumes by itself from --workdir",
  "sample": "prompts to a PNG sheet",
  "interpolate": "prompt to prompt, a GIF and a strip",
  "evaluate": "metrics of a run by a named protocol",
  "compile": "compile the training step for a named TPU or GPU machine, without it: does it fit?",
  "bench": "measurements of this project on this machine",
  "convert": "a released PyTorch checkpoint to ours, and back",
  "inspect": "a run, a data set or a config, in words",
}


def split_config_flags(argv):
  """Takes ml_collections' config flags out of an argument list.

  Args:
    argv: list of str.

  Returns:
    (config_argv, rest): `--config F`, `--config=F` and `--config.a.b=V` (or `--config.a.b V`), and all else.
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


def build_parser():
  parser = argparse.ArgumentParser(
    prog="aurora_jax",
    description="Aurora, the sparse mixture-of-experts text-to-image GAN, in JAX.",
    epilog="`python -m aurora_jax COMMAND --help` explains a command.",
  )
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  for name, words in COMMANDS.items():
    commands.add_parser(name, help=words, add_help=False)
  return parser


def main(argv=None):
  """Runs one command.

  Args:
    argv: list of str, without the program's name; None takes the process's.

  Returns:
    The exit status: 0, or 2 for bad input (said in one line on stderr), or what the command returns.
  """
  text.tolerate_locale()
  argv = list(sys.argv[1:] if argv is None else argv)
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  # Compiled programs are kept in the user's cache folder: the same command starts faster the second time.
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "aurora_jax", "jax"))
  selected, _ = build_parser().parse_known_args(argv[:1])
  name = selected.command
  module = importlib.import_module(f"aurora_jax.cli.{name.replace('-', '_')}")
  parser = argparse.ArgumentParser(
    prog=f"python -m aurora_jax {name}",
    description=module.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  module.add_arguments(parser)
  try:
    config_argv, rest = split_config_flags(argv[1:])
    args = parser.parse_args(rest)
    args.config_argv = config_argv
    return module.run(args) or 0
  except UserError as error:
    print(f"aurora_jax {name}: {text.printable(' '.join(str(error).split()))}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"aurora_jax {name}: interrupted", file=sys.stderr)
    return 130
