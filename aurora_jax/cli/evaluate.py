"""Measures a run by a named protocol: a table on the terminal, a line in metrics.jsonl, and the run's report.html.

Protocol caption-retrieval (the only one so far): a second CLIP, the judge, ranks all captions of the data set for every
generated image. Train the judge with another seed than the generator's CLIP, on all images:

  python -m aurora_jax train-clip --data datasets/openmoji_32 --out clips/judge --split all --seed 1
  python -m aurora_jax evaluate --workdir runs/openmoji_32 --judge clips/judge

A folder of `export`, or hf:OWNER/NAME on the Hub, is measured in the same way and stays as it is: the numbers go to the
terminal, and to a file with --figures. --data says where the data set is:

  python -m aurora_jax evaluate --workdir exported/openmoji_32 --judge clips/judge --data datasets/openmoji_32
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import time

from aurora_jax import files, local_copies, storage, text
from aurora_jax.cli import flag_types, sampling_flags
from aurora_jax.errors import UserError
from aurora_jax.runs import references, remote_run
from aurora_jax.systems.model_folder import ModelFolder

PROTOCOLS = ("caption-retrieval",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument(
    "--workdir",
    type=flag_types.path,
    required=True,
    metavar="DIR",
    help="the run's folder, as of `train`; or a folder of `export`, or hf:OWNER/NAME on the Hub",
  )
  parser.add_argument("--protocol", default=PROTOCOLS[0], choices=PROTOCOLS, help="what to measure")
  parser.add_argument(
    "--judge", type=flag_types.path, required=True, metavar="DIR", help="a CLIP folder that the run did not train with"
  )
  parser.add_argument("--data", type=flag_types.path, metavar="DIR", help="the data set (default: the run's own)")
  parser.add_argument("--step", type=int, metavar="S", help="of the checkpoint (default: the newest)")
  parser.add_argument(
    "--clip",
    type=flag_types.path,
    metavar="DIR",
    help="the CLIP folder that reads the captions (default: the one in the run's config)",
  )
  parser.add_argument("--seed", type=flag_types.seed, default=0, help="of the latents (default 0)")
  parser.add_argument("--figures", type=flag_types.path, metavar="JSON", help="also write all numbers into this file")
  sampling_flags.add_change_flag(parser)


def run(args: argparse.Namespace) -> None:
  """Evaluates, prints the table, appends to metrics.jsonl and writes the report."""
  started = time.monotonic()
  if storage.is_url(args.workdir):
    remote_run.fetched(args.workdir, whole=True)  # the report has its samples
  place = ModelFolder.open(args.workdir)
  remote_run.refuse_trained(place.run)
  folder, experiment = place.run, place.experiment
  if not experiment.conditional:
    raise UserError(f"{args.workdir} is a run of '{experiment.system}', which reads no captions: nothing to retrieve")
  place.check_step(args.step)
  if place.exported and not args.data:
    raise UserError(f"{args.workdir} does not say where the data set is: --data DIR")
  if args.figures:
    files.check_folder(pathlib.Path(args.figures).parent, args.figures)
  groups = ("text",) if args.data else ("text", "data")
  if args.clip:  # the same one at another place, or one that is allowed
    experiment = dataclasses.replace(experiment, text=dataclasses.replace(experiment.text, clip=args.clip))
  sampling_flags.check_references(folder, experiment, args.allow_config_change, groups)
  judge_identity = references.identify(args.judge)
  if judge_identity is None:
    raise UserError(f"no CLIP folder at {args.judge}")
  references.refuse_changed_judge(folder, judge_identity, args.allow_config_change)

  from aurora_jax.evaluation import caption_retrieval, judge, trained_generator
  from aurora_jax.reporting import report
  from aurora_jax.runs import metrics
  from aurora_jax.runs.progress import progress

  model = trained_generator.load(args.workdir, args.step, batch_size=64, clip=args.clip)
  with progress(f"judging step {model.step:,}") as update:
    result = caption_retrieval.evaluate(
      model,
      judge.load_judge(args.judge),
      args.data or model.experiment.data.path,
      seed=args.seed,
      on_progress=lambda what, done, total: update(done, total),
    )
  if args.figures:
    files.write_text(args.figures, json.dumps({"step": model.step, **result.figures}, indent=2) + "\n")
  if place.exported:
    _print(result, model.step, time.monotonic() - started)
    return
  rows = metrics.history(folder.metrics)
  with contextlib.closing(metrics.MetricsFile(folder.metrics)) as file:
    file.write("judge", model.step, rows[-1]["seconds"] if rows else 0.0, result.figures)
  references.record(folder, {}, judge_identity)
  panels = report.Panels(
    figures=result.figures,
    expert_examples=result.experts,
    heldout=result.heldout,
    colors=result.colors,
    notes=result.notes,
  )
  page = report.write_report(folder.path, panels)
  remote_run.write_back(folder)
  _print(result, model.step, time.monotonic() - started)
  print(f"report: {text.printable(local_copies.shown(text.path_text(page)))}")


def _print(result, step, seconds):
  """Prints the figures as a table, those of the real images next to them."""
  from rich import console as rich_console
  from rich import table as rich_table

  figures = result.figures
  console = rich_console.Console(width=100)
  table = rich_table.Table(
    title=f"caption retrieval by the judge, step {step:,} ({seconds:.0f} s)", title_justify="left"
  )
  for column in ("right caption first", "generated", "real images", "chance"):
    table.add_column(column, justify="left" if column.startswith("right") else "right")
  for split, prefix in (("training captions", ""), ("held-out captions", "heldout_")):
    for name in sorted(
      (n for n in figures if n.startswith(f"judge/{prefix}top1_of_")), key=lambda n: n.endswith("all")
    ):
      short = name.removeprefix(f"judge/{prefix}top1_")
      among = f"among all {figures[f'judge/{prefix}captions']:.0f}" if short == "of_all" else f"among {short[3:]}"
      real = figures.get(f"judge/{prefix}real_top1_{short}")
      table.add_row(
        f"{split}, {among}",
        f"{100 * figures[name]:.1f} %",
        "" if real is None else f"{100 * real:.1f} %",
        f"{100 * figures[f'judge/{prefix}chance_{short}']:.2f} %",
      )
  console.print(table)
  distances = [
    f"{what} {figures[name]:.4g}"
    for name, what in (
      ("judge/frechet", "generated to real"),
      ("judge/frechet_real_halves", "between halves of the real images"),
    )
    if name in figures
  ]
  if distances:
    console.print(f"Frechet distance of the judge's embeddings: {', '.join(distances)}")
  if result.color_checks:
    hues = "; ".join(
      f"{c.caption} {c.generated.hue:.0f}° (real {c.real.hue:.0f}°{'' if c.agrees else ', WRONG'})"
      for c in result.color_checks
    )
    console.print(f"mean hue: {hues}: {sum(c.agrees for c in result.color_checks)} of {len(result.color_checks)} right")
  if "judge/heldout_diversity_within" in figures:
    console.print(
      f"diversity: images of one caption differ by {figures['judge/heldout_diversity_within']:.2f} RMS, of "
      f"different captions by {figures['judge/heldout_diversity_between']:.2f} (range 2)"
    )
  if "judge/several_diversity_within" in figures:
    console.print(
      f"where a caption has several real images: {figures['judge/several_diversity_within']:.2f} RMS "
      f"(real {figures['judge/several_real_diversity_within']:.2f})"
    )
