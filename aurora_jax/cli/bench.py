"""Measures this project on this machine: medians after warm-up, with the floor beside them.

Example:
  python -m aurora_jax bench sample --config configs/aurora_64.py --batch 1 --batch 4

`sample` times the generator with random weights. The floor is the time that its products and convolutions would take at
the speed of a plain matrix product, measured in the same run.
"""

from aurora_jax import config
from aurora_jax.errors import UserError


def add_arguments(parser):
  parser.add_argument("what", choices=("sample",), help="what to measure")
  parser.add_argument("--config", metavar="FILE[:VARIANT]", help="the experiment, e.g. configs/aurora_64.py")
  parser.add_argument("--batch", type=int, action="append", metavar="N",
                      help="images per call; may be given several times (default 1 and 4)")
  parser.add_argument("--repeats", type=int, default=5, metavar="N", help="calls whose median counts (default 5)")


def run(args):
  batches = args.batch or (1, 4)
  for name, value in (("--batch", min(batches)), ("--repeats", args.repeats)):
    if value < 1:
      raise UserError(f"{name} must be at least 1, got {value}")
  experiment = config.load(args.config_argv)

  from aurora_jax.evaluation import benchmarks  # pylint: disable=g-import-not-at-top

  cfg = experiment.generator
  weights = benchmarks.parameter_bytes(cfg)
  print(f"{experiment.name}: generator of {weights / 4e6:,.1f} M parameters, random weights", flush=True)
  print("images  first call        call   per image   useful        floor   call / floor   peak memory / weights")
  for row in benchmarks.sample_speed(cfg, batches, args.repeats):
    print(f"{row.batch:6d} {row.first_seconds:9.1f} s {row.seconds:9.4g} s {row.seconds / row.batch:9.4g} s "
          f"{row.flops / 1e9:6.4g} GF {row.floor_seconds:10.4g} s {row.seconds / row.floor_seconds:14.4g} "
          f"{row.peak_bytes / weights:23.2f}", flush=True)
