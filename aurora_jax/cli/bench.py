"""Measures this project on this machine: ratios, side by side in one run, medians after warm-up.

Examples:
  python -m aurora_jax bench sample --config configs/aurora_64.py --batch 1 --batch 4
  python -m aurora_jax bench torch --config configs/aurora_64.py --batch 1 --batch 4
  python -m aurora_jax bench guard --config configs/openmoji_32.py --config.data.path=DATA --config.text.clip=CLIP
  python -m aurora_jax bench accelerator --out DIR
  python -m aurora_jax bench train --data DATA --clip CLIP --judge JUDGE --out DIR
  python -m aurora_jax bench data --latency-ms 50

`sample` times the generator with random weights. The floor is the time that its products and convolutions would take at
the speed of a plain matrix product, measured in the same run.

`torch` times the generator's PyTorch form (`export`) with random weights, on the CPU.

`guard` times training steps with the numerical guard (train.guard: skipped steps, norms per module) and without it,
in turn, on the same batches.

`data` compares the loader with tf.data, grain and webdataset, as far as they are installed, and with decoding alone:
shuffled batches of 64x64 from 256-pixel JPEGs, which it makes in a temporary folder. --data takes the images of a data
set instead. --latency-ms also measures the loader with a delay in each of its reads.

`accelerator` measures one GPU or TPU within --minutes: numbers of the released generator, sampling, the phases of a
training step, experts, attention, and where the time goes. It needs jax, flax, optax, orbax-checkpoint, numpy,
safetensors and pillow; torch for one part. Results are in DIR/accelerator.json and DIR/accelerator.md after every part.
Its exit status is 1 if a part failed. A second call with the same DIR finds compiled programs there. --toy runs the
same code at small sizes on a CPU.

`train` answers what experts are worth on one device: it trains configs/openmoji_64.py (or --config) and its dense twin,
one expert's feed-forward layer in place of the experts, on as many images, and lets a CLIP that neither trained with
judge both. The first run takes 38 % of --minutes, the second the same number of steps, the judge what remains. DIR gets
train.md, train.json and both runs. The data set and two CLIPs are made by `build-data` and `train-clip`; `evaluate
--help` says how the judge is trained.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

from aurora_jax import config_files, xla_flags
from aurora_jax.cli import flag_types, standard_streams
from aurora_jax.errors import UserError

_REPEATS = {"sample": 5, "torch": 5, "guard": 100}
_ACCELERATOR, _DATA, _TRAIN = "accelerator", "data", "train"
_CONFIG = "configs/aurora_64.py"
_TRAIN_CONFIG = "configs/openmoji_64.py"
_MINUTES, _TOY_MINUTES = 8.0, 30.0
# The measurements that take a flag; the others take it as a mistake.
_FLAGS = {
  "data": (_DATA, _TRAIN),
  "images": (_DATA,),
  "resolution": (_DATA,),
  "workers": (_DATA,),
  "latency_ms": (_DATA,),
  "clip": (_TRAIN,),
  "judge": (_TRAIN,),
  "out": (_ACCELERATOR, _TRAIN),
  "minutes": (_ACCELERATOR, _TRAIN),
  "toy": (_ACCELERATOR,),
  "part": (_ACCELERATOR,),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("what", choices=(*_REPEATS, _ACCELERATOR, _TRAIN, _DATA), help="what to measure")
  parser.add_argument("--config", metavar="FILE[:VARIANT]", help="the experiment, e.g. configs/aurora_64.py")
  parser.add_argument(
    "--batch",
    type=int,
    action="append",
    metavar="N",
    help="sample, torch: images per call; may be given several times (default 1 and 4)",
  )
  parser.add_argument(
    "--repeats",
    type=int,
    metavar="N",
    help="calls, pairs of steps or rounds, whose median counts (default: sample and torch 5, guard 100, data 5)",
  )
  parser.add_argument(
    "--data", type=flag_types.path, metavar="DIR", help="data: take the images of this data set; train: this data set"
  )
  parser.add_argument("--clip", type=flag_types.path, metavar="DIR", help="train: the CLIP that both runs train with")
  parser.add_argument("--judge", type=flag_types.path, metavar="DIR", help="train: a CLIP that neither trains with")
  parser.add_argument("--images", type=int, metavar="N", help="data: images of a round (default 4000)")
  parser.add_argument("--resolution", type=int, metavar="N", help="data: side of the images in batches (default 64)")
  parser.add_argument("--workers", type=int, metavar="N", help="data: threads of each pipeline (default 2)")
  parser.add_argument("--latency-ms", type=float, metavar="N", help="data: also with this delay in each read")
  parser.add_argument(
    "--out", type=flag_types.path, metavar="DIR", help="accelerator, train: the folder of the results"
  )
  parser.add_argument(
    "--minutes", type=float, metavar="N", help="accelerator, train: the time for all parts together (default 8)"
  )
  parser.add_argument("--toy", action="store_true", help="accelerator: small sizes, for a CPU")
  parser.add_argument(
    "--part", action="append", metavar="NAME", help="accelerator: only this part; may be given several times"
  )
  # A part in a process of its own: the time, in seconds since 1970, when it has to be done.
  parser.add_argument("--end", type=float, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int | None:
  """Measures and prints. Returns the exit status."""
  for name, takers in _FLAGS.items():
    if args.what not in takers and getattr(args, name):
      raise UserError(f"--{name.replace('_', '-')} is for {' and '.join(f'`bench {taker}`' for taker in takers)}")
  whole = {_ACCELERATOR: _accelerator, _DATA: _data, _TRAIN: _train}
  if args.what in whole:
    return whole[args.what](args)
  if args.batch and args.what == "guard":
    raise UserError(f"--batch is for `bench sample` and `bench torch`; {args.what} takes --config.train.batch_size=N")
  batches, repeats = args.batch or (1, 4), _REPEATS[args.what] if args.repeats is None else args.repeats
  for name, value in (("--batch", min(batches)), ("--repeats", repeats)):
    if value < 1:
      raise UserError(f"{name} must be at least 1, got {value}")
  experiment = config_files.load(args.config_argv)
  {"sample": _sample, "torch": _torch, "guard": _guard}[args.what](experiment, batches, repeats)
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


def _torch(experiment, batches, repeats):
  from aurora_jax.performance import torch_benchmark

  print(f"{experiment.name}: the generator in PyTorch, random weights", flush=True)
  print("images        call   per image   images/s   peak memory / weights")
  for row in torch_benchmark.measure(experiment, batches, repeats):
    print(
      f"{row.batch:6d} {row.seconds:9.4g} s {row.seconds / row.batch:9.4g} s {row.batch / row.seconds:10.3g} "
      f"{row.peak_bytes / row.weights_bytes:23.2f}",
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


def _data(args):
  from aurora_jax.performance import data_benchmark
  from aurora_jax.runs.progress import progress

  if args.config_argv:
    raise UserError(f"bench {_DATA} takes no config; see --data and --images")
  if args.batch and len(args.batch) > 1:
    raise UserError(f"bench {_DATA} takes one --batch")
  given = {
    "images": args.images,
    "resolution": args.resolution,
    "batch_size": args.batch and args.batch[0],
    "workers": args.workers,
    "repeats": args.repeats,
    "latency": None if args.latency_ms is None else args.latency_ms / 1000,
  }
  settings = data_benchmark.Settings(**{name: value for name, value in given.items() if value is not None})
  with progress("rounds") as on_progress:
    speeds = data_benchmark.measure(settings, args.data or "", on_progress)
  print(f"{settings.images:,} images per round, {settings.workers} threads each; ratio: aurora_jax / this")
  print(f"{'':48} images/s   ratio   per processor second   ratio")
  for row in speeds:
    print(
      f"{row.name:48} {row.images_per_second:8,.0f} {row.relative:7.2f} "
      f"{row.images_per_processor_second:22,.0f} {row.relative_work:7.2f}"
    )
  return None


def _out_and_minutes(args, default):
  """The flags of the measurements that have a time and a folder."""
  if args.batch or args.repeats:
    raise UserError(f"--batch and --repeats are not for `bench {args.what}`")
  if not args.out:
    raise UserError(f"bench {args.what}: where to? --out DIR")
  minutes = default if args.minutes is None else args.minutes
  if not minutes > 0:
    raise UserError(f"--minutes must be more than 0, got {minutes:g}")
  return pathlib.Path(args.out), minutes


def _train(args):
  out, minutes = _out_and_minutes(args, _MINUTES)
  for name in ("data", "clip", "judge"):
    if not getattr(args, name):
      raise UserError(f"bench {_TRAIN} needs --{name} DIR")
  given = any(argument.startswith("--config=") for argument in args.config_argv)
  experiment = config_files.load([f"--config={_TRAIN_CONFIG}"] * (not given) + args.config_argv)
  experiment = dataclasses.replace(
    experiment,
    data=dataclasses.replace(experiment.data, path=args.data),
    text=dataclasses.replace(experiment.text, clip=args.clip),
  )
  xla_flags.compile_quickly()  # as `train` does

  from aurora_jax.performance import train_benchmark

  say = lambda line: print(line, flush=True)
  settings = train_benchmark.Settings(experiment, args.judge, out, minutes)
  results = train_benchmark.run(settings, say)
  say("\n".join(["", *train_benchmark.lines(results), "", f"{out / 'train.md'}"]))


def _accelerator(args):
  from aurora_jax.performance import accelerator

  out, minutes = _out_and_minutes(args, _TOY_MINUTES if args.toy else _MINUTES)
  configs = [argument.removeprefix("--config=") for argument in args.config_argv]
  if any(config.startswith("--config.") for config in configs):
    raise UserError(f"bench {_ACCELERATOR} takes a config file as it is, without --config.NAME=VALUE")
  config, parts = configs[-1] if configs else _CONFIG + ":test" * args.toy, args.part or ()
  say = lambda line: print(line, flush=True)
  if args.end is not None:
    accelerator.run_here(out, config, parts[0], args.end, args.toy)
    sys.stdout.flush()
    os._exit(0)  # without waiting for a compiler whose time is over
  status = accelerator.run(out, config, minutes=minutes, toy=args.toy, parts=parts, progress=say)
  say(f"{out / 'accelerator.md'}")
  return status
