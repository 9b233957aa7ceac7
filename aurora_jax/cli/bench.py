"""Measures this project on this machine: ratios, side by side in one run, medians after warm-up.

Examples:
  python -m aurora_jax bench sample --config configs/aurora_64.py --batch 1 --batch 4
  python -m aurora_jax bench guard --config configs/openmoji_32.py --config.data.path=DATA --config.text.clip=CLIP

`sample` times the generator with random weights. The floor is the time that its products and convolutions would take at
the speed of a plain matrix product, measured in the same run.

`guard` times training steps with the numerical guard (train.guard: skipped steps, norms per module) and without it,
in turn, on the same batches.
"""

import argparse
import sys

from aurora_jax import config_files, xla_flags
from aurora_jax.cli import standard_streams
from aurora_jax.errors import UserError

_REPEATS = {"sample": 5, "guard": 100}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("what", choices=tuple(_REPEATS), help="what to measure")
  parser.add_argument("--config", metavar="FILE[:VARIANT]", help="the experiment, e.g. configs/aurora_64.py")
  parser.add_argument(
    "--batch",
    type=int,
    action="append",
    metavar="N",
    help="sample: images per call; may be given several times (default 1 and 4)",
  )
  parser.add_argument(
    "--repeats",
    type=int,
    metavar="N",
    help="calls, or pairs of steps, whose median counts (default: sample 5, guard 100)",
  )


def run(args: argparse.Namespace) -> None:
  """Measures and prints."""
  if args.batch and args.what != "sample":
    raise UserError(f"--batch is for `bench sample`; {args.what} takes --config.train.batch_size=N")
  batches, repeats = args.batch or (1, 4), _REPEATS[args.what] if args.repeats is None else args.repeats
  for name, value in (("--batch", min(batches)), ("--repeats", repeats)):
    if value < 1:
      raise UserError(f"{name} must be at least 1, got {value}")
  experiment = config_files.load(args.config_argv)
  (_sample if args.what == "sample" else _guard)(experiment, batches, repeats)
  error = standard_streams.lost(sys.stdout)
  if error and not standard_streams.is_reader_gone(error):
    raise UserError(f"standard output cannot be written: {error.strerror or error}")


def _sample(experiment, batches, repeats):
  xla_flags.run_in_order()  # as `sample` does
  from aurora_jax.performance import benchmarks

  weights = benchmarks.parameter_bytes(experiment)
  print(f"{experiment.name}: generator of {weights / 4e6:,.1f} M parameters, random weights", flush=True)
  print("images  first call        call   per image   useful        floor   call / floor   peak memory / weights")
  for row in benchmarks.sample_speed(experiment, batches, repeats):
    print(
      f"{row.batch:6d} {row.first_seconds:9.1f} s {row.seconds:9.4g} s {row.seconds / row.batch:9.4g} s "
      f"{row.flops / 1e9:6.4g} GF {row.floor_seconds:10.4g} s {row.seconds / row.floor_seconds:14.4g} "
      f"{row.peak_bytes / weights:23.2f}",
      flush=True,
    )


def _guard(experiment, _, repeats):
  from aurora_jax.performance import benchmarks

  print(f"{experiment.name}: {repeats} pairs of training steps of {experiment.train.batch_size} images", flush=True)
  cost = benchmarks.guard_cost(experiment, repeats)
  print(
    f"a step with the guard {cost.on:.4g} s, without {cost.off:.4g} s; processor time {cost.work_on:.4g} s "
    f"and {cost.work_off:.4g} s"
  )
  print(
    f"steps per second with it, relative to without: {100 * cost.share:.1f} % (middle half of the pairs "
    f"{100 * cost.low:.1f} to {100 * cost.high:.1f} %), by processor time {100 * cost.work_share:.1f} %"
  )
