"""Compiles the training step of an experiment for a machine that need not be there, and says whether it fits.

It compiles the programs that `train` runs, one per phase of a step, with the experiment's mesh on the named machine's
devices. A table, and JSON with --report, show: what they take per device (parameters, optimizer, average, temporaries),
their arithmetic (of each program, and the sum per step), their collectives, which expert lives on which device, and how
fast a step can be at best.

Machines: TPU slices v4-N, v5e-N, v5p-N, v6e-N, tpu7x-N, or by shape (v5e:16x16, v5p:2x2x4, tpu7x:2x2x1, two devices
per chip); nodes of eight GPUs a100-N, a100-40g-N, h100-N, h100-94g-N (H100 NVL), h200-N, b200-N, or by nodes
(h100-8x8); cpu-N, this machine's CPU as N devices. TPU compiles need libtpu, GPU compiles jax-cuda12-plugin,
jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12; no TPU, GPU or driver.

Neither data nor CLIP's weights are read: of --config.text.clip only config.json, and if there is none, the CLIP's sizes
are guessed from generator.text_feature_dim.

--cache DIR keeps the programs in the form of JAX's compilation cache. On that machine, with the same versions of JAX
and its plug-ins and the same experiment (text.clip and train.total_steps are part of it), train takes them from there:
  JAX_COMPILATION_CACHE_DIR=DIR python -m aurora_jax train ...

Example:
  python -m aurora_jax compile --config configs/aurora_64.py:test --topology v5e:2x2 --report r.json

Exit status: 0 it fits, 1 it does not, 2 wrong input (one line says what).
"""

import argparse
import contextlib
import json
import os
import pathlib
import tempfile

from aurora_jax import config_files, files
from aurora_jax.cli import flag_types
from aurora_jax.errors import UserError
from aurora_jax.performance import compiler_log, topology


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument(
    "--config", metavar="FILE[:VARIANT]", help="the experiment; --config.mesh.expert=N and the like set single values"
  )
  parser.add_argument(
    "--topology", required=True, metavar="NAME", help="the machine, e.g. v5e:4x4, v5p-32, a100-8, h100-8x8, cpu-8"
  )
  parser.add_argument("--report", type=flag_types.path, metavar="FILE", help="write all numbers there, as JSON")
  parser.add_argument(
    "--cache", type=flag_types.path, metavar="DIR", help="keep the compiled programs there, for train to load"
  )
  parser.add_argument(
    "--explain", action="store_true", help="say what to change if it does not fit, and what that saves"
  )


def run(args: argparse.Namespace) -> int:
  """Compiles and reports. Returns the exit status: whether it fits."""
  experiment = config_files.load(args.config_argv)
  name = topology.parse(args.topology)
  if args.report:
    folder = os.path.dirname(args.report) or "."
    if not os.path.isdir(folder):
      raise UserError(f"--report {args.report}: no folder {folder}")
    files.check_folder(folder, f"--report {args.report}")
  topology.prepare_environment(name)
  with _kept_in(args.cache) as keep, compiler_log.captured():  # the compilers talk, when they are imported already
    from aurora_jax.performance import advice
    from aurora_jax.performance import compile_report as training_compile
    from aurora_jax.performance import estimate as compile_lib

    machine = topology.load(name)

    def progress(line):  # is called between programs, so that finished ones are saved
      keep()
      print(line, flush=True)

    report = training_compile.report(experiment, machine, progress)
  if args.report:
    files.write_text(args.report, json.dumps(report, indent=1) + "\n")
  print()
  for line in compile_lib.lines(report):
    print(line)
  if args.explain:
    print()
    for line in advice.lines(experiment, machine, report):
      print(line)
  return 0 if report["fits"] else 1


@contextlib.contextmanager
def _kept_in(folder):
  """Makes JAX store compiled programs in a folder, or nowhere (None).

  No program is read from there or from the user's cache: the report needs the compiler's own time and messages.

  Yields a function that moves finished programs there. They survive if the next program fails or the user interrupts.
  JAX does not write its entries atomically, so they are moved when they are complete.
  """
  if folder is None:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    yield lambda: None
    return
  files.check_folder(folder, f"--cache {folder}")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as new:
    os.environ |= {
      "JAX_ENABLE_COMPILATION_CACHE": "true",
      "JAX_COMPILATION_CACHE_DIR": new,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def keep():
      for entry in pathlib.Path(new).glob("*-cache"):
        entry.rename(folder / entry.name)

    yield keep
    keep()
