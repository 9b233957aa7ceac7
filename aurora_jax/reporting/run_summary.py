"""A summary of a run on one screen of 100 columns: events, progress, time, warnings, checkpoints, losses, next steps.

It is read from the files in the run's folder (config.json, metrics.jsonl, checkpoints, samples). No weights are read.
"""

import datetime
import json
import os
import pathlib
from collections.abc import Iterator

from aurora_jax import text
from aurora_jax.reporting import metrics_table
from aurora_jax.runs import checkpoint_reader, metrics, progress, retention, skipped_records, workdir

_WIDTH = 100
_LABEL = 11  # columns of a line's label
_EVENTS_SHOWN = 8
_WARNINGS_SHOWN = 4
_CHECKPOINTS_SHOWN = 4
_PHASES = {
  "step": "compute",
  "input": "waiting for input",
  "samples": "samples",
  "evaluation": "evaluation",
  "checkpoint": "checkpoints",
}
_ENDINGS = {
  "done": "all steps are done",
  "time": "train.max_seconds were over; saved",
  "interrupt": "Ctrl-C; saved",
  "terminated": "SIGTERM; saved",
  "save failed": "a checkpoint could not be saved",
  "damaged data": "too many records could not be read (data.max_skipped); saved",
}


def lines(path: str | os.PathLike) -> Iterator[str]:
  """Yields the lines of the summary.

  Args:
    path: the run's folder.

  Raises:
    UserError: there is no such run, or its config.json cannot be read.
  """
  folder = workdir.RunFolder(pathlib.Path(path))
  experiment = folder.experiment()
  everything, rows = metrics.read(folder.metrics), metrics.history(folder.metrics)
  steps = checkpoint_reader.steps(folder.checkpoints)
  running = workdir.is_locked(folder.path)
  yield from _opening(folder, experiment)
  parts = checkpoint_reader.only_parts(folder.checkpoints) if steps else None
  if parts is not None:
    yield _line(
      "converted",
      f"{', '.join(parts)}: to sample from, or to begin a run with "
      f"(--config.train.init_from={text.shell_quoted(path)})",
    )
    yield _line("saved", format_bytes(checkpoint_reader.size_bytes(folder.checkpoints, steps[-1])))
    return
  yield from _progress(experiment, rows)
  yield from _events(everything, running)
  yield from _stages(experiment, rows)
  yield from _time(rows)
  yield from _warnings(rows)
  yield from _skipped(folder, rows)
  yield from _saved(folder, experiment, steps)
  yield from _numbers(rows)
  yield from _figures(rows)
  yield from _next(folder, experiment, rows, steps, running)


def _line(label, content):
  return f"{label:{_LABEL}s}{content}"


def _count(number, noun):
  """ "1 step", "3 steps"."""
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_bytes(size: float) -> str:
  """Formats a number of bytes: "19.9 MB"."""
  for unit in ("B", "kB", "MB", "GB"):
    if size < 1000:
      return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
    size /= 1000
  return f"{size:.0f} TB" if size >= 100 else f"{size:.1f} TB"


def _opening(folder, experiment):
  yield _line("run", f"{folder.path} ({experiment.name})")
  yield _line("trains", experiment.summary)
  yield _line(
    "on",
    f"{experiment.data.path} [{experiment.data.split}]"
    + (f", text by {experiment.text.clip}" if experiment.text.clip else ""),
  )


def _of_kind(rows, *kinds):
  return [row for row in rows if row["kind"] in kinds]


def _progress(experiment, rows):
  train = experiment.train
  last = rows[-1] if rows else {"step": 0, "seconds": 0.0}
  share = min(1.0, last["step"] / train.total_steps)
  bar = "█" * round(20 * share) + "░" * (20 - round(20 * share))
  windows = _of_kind(rows, "train")
  counts = [row["images"] // row["step"] for row in windows if row.get("images")]
  images_per_step = counts[-1] if counts else train.batch_size
  batches = images_per_step // train.batch_size
  per_step = f", {batches} per step" if batches > 1 else ""
  yield _line(
    "progress",
    f"{bar} {100 * share:.0f} %: step {last['step']:,} of {train.total_steps:,}, "
    f"{last['step'] * images_per_step:,} images in batches of {train.batch_size}{per_step}",
  )
  speeds = [row["images_per_second"] for row in windows if row.get("images_per_second")]
  spent = f"{progress.duration(last.get('seconds', 0.0))} of training"
  if not speeds:
    yield _line("speed", f"not measured yet, {spent}")
    return
  left = (train.total_steps - last["step"]) * images_per_step / speeds[-1]
  rest = f", {progress.duration(left)} to go" if left > 0 else ""
  median = sorted(speeds)[len(speeds) // 2]
  yield _line("speed", f"{speeds[-1]:,.1f} images/s in the last window, {median:,.1f} in the median; {spent}{rest}")


def _local_time(row):
  """Date and time of an event in the time zone of the run; "" for lines without."""
  try:
    return datetime.datetime.strptime(row["at"], "%Y-%m-%dT%H:%M:%S%z").strftime("%Y-%m-%d %H:%M")
  except (KeyError, TypeError, ValueError):
    return ""


def _events(everything, running):
  """Starts, resumes and stops. A process without a "stop" line was killed."""
  events = []  # (time, step, message)
  open_step = None  # last step of a process without a "stop" line
  for row in everything:
    kind = row.get("kind")
    if kind in ("start", "resume"):
      if open_step is not None:
        events.append(("", open_step, f"killed{_lost(open_step, row)}"))
      changed = [
        f"{name} {json.dumps(old)} -> {json.dumps(new)}" for name, (old, new) in (row.get("changed") or {}).items()
      ]
      devices = f" on {row['devices']}" if row.get("devices") else ""
      events.append((_local_time(row), row["step"], ("started" if kind == "start" else "resumed") + devices))
      events += [("", None, f"with {change}") for change in changed]
      open_step = row["step"]
    elif kind == "stop":
      events.append((_local_time(row), row["step"], _ending(row)))
      open_step = None
    elif kind == "train" and open_step is not None:
      open_step = row["step"]
  if running:
    events.append(("", everything[-1]["step"] if everything else 0, "a process is training in it now"))
  elif open_step is not None:
    events.append(("", open_step, "its process was killed; `train` resumes from the newest checkpoint"))
  if not events:
    yield _line("history", "not started")
  restarts = sum(row.get("kind") == "resume" for row in everything)
  if restarts:
    yield _line("restarts", f"{restarts:,}")
  shown = events if len(events) <= _EVENTS_SHOWN else events[:1] + [None] + events[2 - _EVENTS_SHOWN :]
  dated = any(event and event[0] for event in shown)
  width = max((len(f"{event[1]:,}") for event in shown if event and event[1] is not None), default=1)
  for number, event in enumerate(shown):
    name = "history" if number == 0 else ""
    if event is None:
      yield _line(name, f"... {len(events) - len(shown) + 1} more, see metrics.jsonl ...")
      continue
    when, step, message = event
    when = f"{when:18s}" if dated else ""
    yield _line(
      name, f"{when}{'step ' + format(step, f'{width},') if step is not None else ' ' * (5 + width)}  {message}"
    )


def _lost(step, resume):
  """How many steps of a killed process the next one repeats."""
  lost = step - resume["step"] if resume["kind"] == "resume" else step
  return f"; {_count(lost, 'step')} repeated" if lost > 0 else ""


def _ending(row):
  if row.get("reason") == "non-finite":
    return (
      f"stopped: {row['message']}" if row.get("message") else (f"stopped: {row.get('metric')} is {row.get('value')}")
    )
  reason = str(row.get("reason"))
  return _ENDINGS[reason] if reason == "done" else f"stopped: {_ENDINGS.get(reason, reason)}"


def _stages(experiment, rows):
  """The stages of progressive growing; nothing for a run without stages."""
  for number, row in enumerate(_of_kind(rows, "stage")):
    side = f"{row['resolution']}x{row['resolution']} pixels " if "resolution" in row else ""
    yield _line("stages" if not number else "", f"{side}from step {row['step']:,} ({row.get('reason', '?')})")
  measured = [row for row in _of_kind(rows, "stage", "evaluation") if "resolution" in row]
  if measured:
    row = measured[-1]
    values = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("frechet")}
    side = str(row["resolution"])
    generated = f"{values[side]:.4g} at step {row['step']:,}" if side in values else "not measured yet"
    real = values.get(f"reference_{side}")
    goal = "" if real is None else f", of real images {real:.4g}"
    yield _line("frechet", f"{generated}{goal} ({side}x{side} pixels, features by {row.get('features', '?')})")


def _time(rows):
  """Time by phase over all restarts."""
  spent, since = {}, 0
  for number, row in enumerate(rows):
    if row.get("phases"):  # "resume" and "stop" lines have the sums up to them
      spent, since = dict(row["phases"]), number + 1
  for row in rows[since:]:
    for name in _PHASES:
      spent[name] = spent.get(name, 0.0) + row.get(f"time/{name}", 0.0)
  total = max((row.get("seconds", 0.0) for row in rows), default=0.0)
  if total <= 0 or not sum(spent.values()):
    return
  spent = {label: spent.get(name, 0.0) for name, label in _PHASES.items()}
  spent["the rest"] = max(0.0, total - sum(spent.values()))
  parts = [
    f"{label} {100 * seconds / total:.{0 if seconds > 0.0995 * total else 1}f} %"
    for label, seconds in spent.items()
    if seconds >= 0.0005 * total
  ]
  yield _line("time", f"{progress.duration(total)}: {', '.join(parts)}")


def _warnings(rows):
  warnings = _of_kind(rows, "warning")
  yield _line("warnings", f"{len(warnings):,}" if warnings else "none")
  if len(warnings) > _WARNINGS_SHOWN:
    yield _line("", f"... the newest {_WARNINGS_SHOWN}:")
  for row in warnings[-_WARNINGS_SHOWN:]:
    for line in _wrapped(f"step {row['step']:,}: {row.get('message', row.get('warning'))}"):
      yield _line("", line)


def _skipped(folder, rows):
  skips, listed = _of_kind(rows, "skipped"), skipped_records.read(folder.skipped_records)
  yield _line(
    "skipped",
    f"{_count(len(skips), 'step') if skips else 'no step'}, "
    f"{_count(len(listed), 'record') if listed else 'no record'}"
    + (f" (listed in {folder.skipped_records})" if listed else ""),
  )
  newest = [f"the newest, step {skips[-1]['step'] - 1:,}: {skips[-1].get('message')}"] if skips else []
  newest += [f"the newest record, at step {listed[-1].step:,}: {listed[-1]}"] if listed else []
  for line in (line for message in newest for line in _wrapped(message)):
    yield _line("", line)


def _wrapped(message, most=2):
  """Breaks a message into at most `most` lines."""
  room, wrapped = _WIDTH - _LABEL, []
  for word in message.split():
    if wrapped and len(wrapped[-1]) + 1 + len(word) <= room:
      wrapped[-1] += f" {word}"
    else:
      wrapped.append(word)
  if len(wrapped) > most:
    wrapped = wrapped[:most]
    wrapped[-1] = wrapped[-1][: room - 4] + " ..."
  return wrapped


def _saved(folder, experiment, steps):
  policy = retention.of_run(experiment.train, folder.metrics)
  reasons = policy.reasons(steps)
  shown = [step for step in steps if step in steps[-_CHECKPOINTS_SHOWN:] or any("best" in why for why in reasons[step])]
  for number, step in enumerate(shown):
    size, why = format_bytes(checkpoint_reader.size_bytes(folder.checkpoints, step)), "; ".join(reasons[step])
    yield _line("" if number else "saved", f"step {step:,} ({size}), {why or 'removed at the next save'}")
  if len(steps) > len(shown):
    yield _line("", f"and {len(steps) - len(shown):,} others, from step {steps[0]:,} on")
  if not steps:
    yield _line("saved", "nothing yet")
  if steps and policy.best and not policy.values():
    yield _line("", f"WARNING: no line of metrics.jsonl has train.keep_best's metric {policy.metric}")
  sheets = sorted(folder.samples.glob("step-*.png")) if folder.samples.is_dir() else []
  yield _line("samples", f"{len(sheets)}, newest {sheets[-1].relative_to(folder.path)}" if sheets else "none yet")


def _numbers(rows):
  """The metrics in two columns."""
  cells = metrics_table.cells(rows)
  half = -(-len(cells) // 2)
  for number, (left, right) in enumerate(zip(cells[:half], cells[half:] + [""])):
    yield _line("numbers" if not number else "", f"{left:{(_WIDTH - _LABEL) // 2}s} {right}".rstrip())


def _figures(rows):
  judged = _of_kind(rows, "judge")
  if judged:
    row = judged[-1]
    shares = [
      f"{label} {100 * row[name]:.0f} %"
      for name, label in (
        ("judge/top1_of_32", "training captions"),
        ("judge/heldout_top1_of_32", "held out"),
        ("judge/real_top1_of_32", "real images"),
      )
      if name in row
    ]
    yield _line("judge", f"at step {row['step']:,}" + (f", right among 32: {', '.join(shares)}" if shares else ""))


def _next(folder, experiment, rows, steps, running):
  """What to look at or to do next."""
  stops = _of_kind(rows, "stop")
  done = bool(steps) and steps[-1] >= experiment.train.total_steps
  path = text.shell_quoted(folder.path)
  board = f"tensorboard --logdir {text.shell_quoted(folder.tensorboard)}"
  if running:
    yield _line("next", f"look at the newest samples in {folder.samples}, at the curves with {board}")
    return
  ideas = []
  if stops and stops[-1].get("reason") == "non-finite":
    ideas.append(
      "read the skipped steps above: if images of the batch were not finite, check the data; else restart from the "
      "last checkpoint with a lower learning rate or a larger loss.r1_gamma (--allow-config-change)"
    )
  elif _of_kind(rows, "warning"):
    ideas.append(f"see the warnings above, the samples in {folder.samples}, the curves ({board})")
  if not done and steps:
    left = experiment.train.total_steps - steps[-1]
    ideas.append(f"the same `train` command continues ({_count(left, 'step')} left)")
  elif not steps:
    ideas.append("the same `train` command starts the run")
  if steps:
    more = "--prompt WORDS" if experiment.conditional else "--latents 64"
    ideas.append(f"images: python -m aurora_jax sample --workdir {path} {more} --out FILE.png")
    if experiment.conditional and not _of_kind(rows, "judge"):
      ideas.append(f"figures: python -m aurora_jax evaluate --workdir {path} --judge CLIP")
  if folder.report.is_file():
    ideas.append(f"the report with images: {folder.report}")
  for number, idea in enumerate(ideas):
    for part, line in enumerate([idea] if path in idea else _wrapped(idea, most=3)):  # commands stay on one line
      yield _line("next" if not number and not part else "", line)
