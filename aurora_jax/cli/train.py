"""Trains a text-to-image generator, or goes on with a run that was stopped.

The experiment is a file in configs/; any of its values can be set on the command line as --config.GROUP.NAME=VALUE.
Everything that the run makes lies in the folder --workdir:

  checkpoints/   the full state every train.checkpoint_every steps: the newest few, and what train.keep_every and
                 train.keep_best say
  samples/       pictures for the same prompts and latents, every train.sample_every steps
  metrics.jsonl  losses and other numbers, one JSON object per line; tensorboard/ has them for TensorBoard
  report.html    everything on one page, for a browser
  profile/       traces of --profile-steps
  config.json    the experiment

Ctrl-C (or SIGTERM, or train.max_seconds) stops cleanly: the step is finished and the state saved; before the first step
of a start is done there is nothing to save, and the process ends at once. A second Ctrl-C ends it at once in any case, a
second SIGTERM changes nothing. The same command again goes on from there, and from the newest checkpoint after a crash
or kill -9; the result is the same as without the stop.
An experiment that differs from the stored one is refused, field by field, unless --allow-config-change lets it.
--config.train.init_from=RUN begins a new run with the networks of another one, or of a checkpoint of `convert`.

On several hosts the same command is started on each, with a --workdir that all of them share. On Cloud TPU, in a SLURM
step (srun) and in an indexed Job of Kubernetes they find each other; anywhere else --coordinator, --processes and
--process say who is who. See README and launch/.

Example (after build-data and train-clip):
  python -m aurora_jax train --config configs/openmoji_32.py --config.data.path=datasets/openmoji \\
      --config.text.clip=clips/conditioner --workdir runs/openmoji

A record that cannot be read (a wrong checksum, a shard that is cut off or gone, no picture, no caption) is skipped: the
run tells of it, lists it in skipped_records.jsonl and goes on with another in its place, up to data.max_skipped. Damage
that shows at the start already is refused, unless data.tolerate_damage=true.

An update whose loss or gradient is NaN or infinite is left out; one line says where it came from.
Warnings say when the discriminator wins, pictures collapse or experts starve (config.watch). `inspect DIR` tells it all.

Exit status: 0 done or stopped cleanly (but see --stopped-status), 2 wrong input (one line says what), also when it comes
up while training (more records cannot be read than data.max_skipped allows: saved first), or a checkpoint that cannot be
saved (training stops, earlier checkpoints stand), 3 too many steps in a row were skipped (train.max_skipped_in_a_row), or
the state itself is no longer finite.
"""

import hashlib
import time

from aurora_jax import config_files, xla_flags
from aurora_jax.parallel import hosts
from aurora_jax.runs import checkpoint_reader, config_check, profiler, workdir
from aurora_jax.runs.signals import Interrupts
from aurora_jax.training import initialize


def add_arguments(parser):
  parser.add_argument(
    "--config",
    metavar="FILE[:VARIANT]",
    help="the experiment, e.g. configs/openmoji_32.py; --config.train.total_steps=N and the like set single values",
  )
  parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder, made if missing")
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
  hosts.add_arguments(parser)


def run(args):
  started = time.monotonic()
  xla_flags.compile_quickly()
  profile_steps = profiler.parse(args.profile_steps) if args.profile_steps else None
  experiment = config_files.load(args.config_argv)
  job = hosts.join(args, hashlib.sha256(config_files.to_json(experiment).encode()).hexdigest())
  with hosts.leaving_at_once("train"), Interrupts(args.stopped_status) as interrupts:
    return _train(args, experiment, job, started, profile_steps, interrupts)


def _train(args, experiment, job, started, profile_steps, interrupts):
  # Wrong input is best said before the seconds that JAX, data and CLIP take.
  with hosts.together("looking at the run's folder"):
    workdir.check_writable(args.workdir)
    folder = workdir.RunFolder(args.workdir)
    config_check.refuse_changes(folder, experiment, args.allow_config_change)
    if experiment.train.init_from and checkpoint_reader.newest(folder.checkpoints) is None:
      initialize.check(experiment, args.allow_config_change)

  from aurora_jax.reporting import report
  from aurora_jax.training import loop, setup

  line, warning = hosts.banner(job, args.require)
  prepared = setup.prepare(experiment)
  hosts.announce(job, line, warning)
  if hosts.is_first():
    for words in (_sizes(prepared.abstract_state), *getattr(prepared, "notes", ())):
      print(words, flush=True)
  outcome = loop.run(
    prepared,
    args.workdir,
    hooks=loop.Hooks(on_samples=write_samples),
    allow_config_change=args.allow_config_change,
    started=started,
    interrupts=interrupts,
    profile_steps=profile_steps,
  )
  # After SIGTERM time is short, and what counts is saved.
  if hosts.is_first() and outcome.reason not in (loop.ALREADY_DONE, loop.TERMINATED):
    print(f"report: {report.write_report(args.workdir)}")
  if outcome.reason in (loop.TIME, loop.INTERRUPT, loop.TERMINATED):
    return args.stopped_status
  return outcome.status


def write_samples(step, samples, folder):
  """Writes the sample grid of a step: a row of latents per prompt, or a square grid for an unconditional system.

  Args:
    step: int.
    samples: `setup.SampleSet`.
    folder: `RunFolder`.

  Returns:
    The PIL image.
  """
  from aurora_jax.reporting import image_sheets

  sheet = image_sheets.sample_sheet(
    samples.images, samples.prompts, samples.makers, samples.maker_count, title=samples.stage
  )
  image_sheets.save_png(sheet, folder.sample_image(step))
  return sheet


def _sizes(state):
  from clu import parameter_overview

  counts = {name: parameter_overview.count_parameters(network.params) for name, network in state.networks.items()}
  return ", ".join(f"{name} {count / 1e6:,.2f} M parameters" for name, count in counts.items())
