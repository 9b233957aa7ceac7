"""Trains a generator, or continues a run that was stopped.

The experiment is a file in configs/; any of its values can be set on the command line as --config.GROUP.NAME=VALUE.
Everything that the run makes lies in the folder --workdir:

  checkpoints/     the full state every train.checkpoint_every steps: the newest few, and what train.keep_every and
                   train.keep_best say
  samples/         images for the same prompts and latents, every train.sample_every steps
  metrics.jsonl    losses and other numbers, one JSON object per line; tensorboard/ has them for TensorBoard
  report.html      everything on one page, for a browser
  profile/         traces of --profile-steps
  config.json      the experiment
  references.json  identities of the data set and the CLIP that it names

Ctrl-C, SIGTERM, SIGHUP (the terminal has gone) and train.max_seconds stop cleanly: the step is finished and the state
is saved. Before the first step is done there is nothing to save, and the process ends at once. A second Ctrl-C ends it
at once in any case. The same command again continues from there, or from the newest checkpoint after a crash or kill
-9. The result is the same as without the stop. Without a reader of its output (nohup, a log driver that ended) training
goes on.

An experiment that differs from the stored one is refused, field by field, unless --allow-config-change lets it. So is a
data set or a CLIP that is no longer the one at that path with which the run began.
--config.train.init_from=RUN begins a new run with the networks of another one, or of a checkpoint of `convert`.

--workdir and data.path may be gs:// and s3:// URLs (docs/pods.md).

On several hosts, start the same command on each, with a --workdir that all of them share. On Cloud TPU, in a SLURM step
(srun) and in an indexed Job of Kubernetes they find each other; anywhere else --coordinator, --processes and --process
say which process is which. See README and launch/.

Example (after build-data and train-clip):
  python -m aurora_jax train --config configs/openmoji_32.py --config.data.path=datasets/openmoji \\
      --config.text.clip=clips/conditioner --workdir runs/openmoji

A record that cannot be read (a wrong checksum, a missing or truncated shard, no image, no caption) is skipped. The run
reports it, lists it in skipped_records.jsonl and uses another in its place, up to data.max_skipped. Corruption that
shows at the start is refused, unless data.tolerate_corruption=true.

An update whose loss or gradient is NaN or infinite is skipped; one line says where it came from. Warnings say when the
discriminator wins, images collapse or experts starve (config.health). `inspect DIR` shows all of it.

Exit status: 0 done or stopped cleanly (but see --stopped-status), 2 wrong input (one line says what), also when it
  comes
up while training (more records cannot be read than data.max_skipped allows: saved first), or a checkpoint that cannot
be saved (training stops, earlier checkpoints stand), 3 too many steps in a row were skipped
(train.max_skipped_in_a_row), or the state itself is no longer finite.
"""

import argparse
import contextlib
import hashlib
import os
import sys
import time
from typing import TYPE_CHECKING

from aurora_jax import config_files, local_copies, storage, text, xla_flags
from aurora_jax.cli import flag_types, host_flags
from aurora_jax.parallel import environment
from aurora_jax.runs import checkpoint_folder, config_check, profiler, references, remote_run, workdir
from aurora_jax.runs.signals import Signals

if TYPE_CHECKING:
  from PIL import Image

  from aurora_jax.training.setup import SampleSet


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument(
    "--config",
    metavar="FILE[:VARIANT]",
    help="the experiment, e.g. configs/openmoji_32.py; --config.train.total_steps=N and the like set single values",
  )
  parser.add_argument(
    "--workdir", type=flag_types.path, required=True, metavar="DIR", help="the run's folder or URL, made if missing"
  )
  parser.add_argument(
    "--allow-config-change",
    action="append",
    default=[],
    metavar="FIELD",
    help="go on although this field (loss.clip_weight) or group (loss) differs from the stored "
    "experiment; may be given several times",
  )
  parser.add_argument(
    "--stopped-status",
    type=int,
    default=0,
    metavar="N",
    help="exit status when stopped cleanly before the last step (default: 0); another one tells a "
    "scheduler to start the same command again",
  )
  parser.add_argument(
    "--profile-steps",
    metavar="FIRST:END",
    help="take a profiler trace of these steps (20:25 is 20 to 24) into DIR/profile, for TensorBoard; "
    "the run's result is the same",
  )
  host_flags.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Trains. Returns the exit status."""
  started = time.monotonic()
  xla_flags.compile_quickly()
  profile_steps = profiler.parse(args.profile_steps) if args.profile_steps else None
  experiment = config_files.load(args.config_argv)
  if environment.find(args.coordinator, args.processes, args.process).processes == 1:
    # Before the seconds that JAX, data and CLIP take.
    workdir.check_writable(args.workdir)
    if not storage.is_url(args.workdir):
      workdir.refuse_locked(args.workdir)
      _check_folder(args, experiment, workdir.RunFolder(args.workdir))

  from aurora_jax.parallel import hosts

  job = hosts.join(args, hashlib.sha256(config_files.to_json(experiment).encode()).hexdigest())
  with hosts.exiting_on_local_errors("train"), Signals(args.stopped_status) as signals:
    with _exiting_without_storage(), remote_run.trained(args.workdir, hosts.is_primary()) as place:
      return _train(args, experiment, place, job, started, profile_steps, signals)


@contextlib.contextmanager
def _exiting_without_storage():
  """Ends the process at once if a server of object storage is away: a normal exit would wait for writes to it."""
  try:
    yield
  except storage.StorageError as error:
    print(f"aurora_jax train: {text.printable(local_copies.shown(error))}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(2)


def _check_folder(args, experiment, folder):
  """Refuses a run's folder that cannot be used.

  Returns:
    (identities of what the experiment refers to, lines about those that differ and are allowed to).
  """
  config_check.refuse_changes(folder, experiment, args.allow_config_change)
  found = references.of_experiment(experiment)
  begun = checkpoint_folder.newest(folder.checkpoints) is not None
  return found, references.refuse_changes(folder, found, args.allow_config_change) if begun else []


def _train(args, experiment, place, job, started, profile_steps, signals):
  from aurora_jax.parallel import hosts
  from aurora_jax.training import initialize

  folder = place.folder
  with hosts.together("looking at the run's folder"):
    if not folder.url:
      workdir.check_writable(args.workdir)
      workdir.refuse_locked(args.workdir)
    found, differences = _check_folder(args, experiment, folder)
    if experiment.train.init_from and checkpoint_folder.newest(folder.checkpoints) is None:
      initialize.check(experiment, args.allow_config_change)

  from aurora_jax.reporting import report
  from aurora_jax.training import loop, setup, stopping

  line, warning = hosts.banner(job, args.require)
  prepared = setup.prepare(experiment)
  hosts.announce(job, line, warning)
  if hosts.is_primary():
    for line in (_sizes(prepared.abstract_state), *getattr(prepared, "notes", ())):
      print(line, flush=True)
    for line in differences:
      print(f"aurora_jax train: {line}", file=sys.stderr, flush=True)
  outcome = loop.run(
    prepared,
    place,
    hooks=loop.Hooks(
      on_samples=write_samples,
      on_start=lambda step, state: references.record(folder, found) if hosts.is_primary() else None,
    ),
    allow_config_change=args.allow_config_change,
    started=started,
    signals=signals,
    profile_steps=profile_steps,
  )
  # After SIGTERM time is short, and what counts is saved.
  if hosts.is_primary() and outcome.reason not in (stopping.ALREADY_DONE, stopping.TERMINATED):
    print(local_copies.shown(f"report: {report.write_report(folder.path)}"))
  if outcome.reason in (stopping.TIME, stopping.INTERRUPT, stopping.TERMINATED):
    return args.stopped_status
  return outcome.status


def write_samples(step: int, samples: "SampleSet", folder: workdir.RunFolder) -> "Image.Image":
  """Writes the sample sheet of a step: a row of latents per prompt, or a square grid for an unconditional system.

  Args:
    step: steps done.
    samples: the images.
    folder: the run's.

  Returns:
    The sheet.
  """
  from aurora_jax.reporting import image_sheets

  sheet = image_sheets.sample_sheet(
    samples.images, samples.prompts, samples.makers, samples.maker_count, title=samples.stage
  )
  image_sheets.save_png(sheet, folder.sample_image(step))
  return sheet


def _sizes(state):
  """Parameter counts of the networks, in one line."""
  import jax

  counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part.params)) for name, part in state.networks.items()}
  return ", ".join(f"{name} {count / 1e6:,.2f} M parameters" for name, count in counts.items())
