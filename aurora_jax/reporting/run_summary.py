"""The story of a run on one screen of 100 columns: what happened, where it stands, where the time went, what to do next.

Everything is read from the run's folder (config.json, metrics.jsonl, checkpoints, samples); nothing is loaded.
"""

import datetime
import json
import math

from aurora_jax.runs import checkpoint_reader, metrics, progress, retention, skipped_records, workdir
from aurora_jax.training import health

_WIDTH = 100
_HEAD = 11  # columns of a line's name
_EVENTS_SHOWN = 8
_WARNINGS_SHOWN = 4
_CHECKPOINTS_SHOWN = 4
_BARS = "▁▂▃▄▅▆▇█"
_BAR_COLUMNS = 8
_PHASES = {
  "step": "compute",
  "input": "waiting for input",
  "samples": "sample pictures",
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
# Shown in this order, where the run has them, and what they are called: what a person looks at first.
_NUMBERS = {
  "loss/d_adversarial": "D adversarial",
  "loss/g_adversarial": "G adversarial",
  "loss/d_matching": "D matching",
  "loss/g_matching": "G matching",
  "loss/g_clip": "G CLIP",
  "loss/r1": "R1",
  "loss/moe": "MoE losses",
  "d/logit_real": "logit real",
  "d/logit_fake": "logit fake",
  "d/logit_mismatched": "logit mismatched",
  "clip/accuracy": "CLIP accuracy",
  "grad_norm/d": "gradient of D",
  "grad_norm/g": "gradient of G",
  "g/w_std": "w std",
  "samples/diversity_within": "diversity, prompt",
  "samples/diversity_between": "diversity, all",
}
_ENTROPY = "entropy of experts"


def tell(path):
  """The story, line by line.

  Args:
    path: the run's folder.

  Yields:
    str.

  Raises:
    UserError: no such run, or a config.json that cannot be read.
  """
  folder = workdir.RunFolder(path)
  experiment = folder.experiment()
  everything, rows = metrics.read(folder.metrics), metrics.history(folder.metrics)
  steps = checkpoint_reader.steps(folder.checkpoints)
  held = workdir.is_held(folder.path)
  yield from _opening(folder, experiment)
  parts = checkpoint_reader.only_parts(folder.checkpoints) if steps else None
  if parts is not None:
    yield _line(
      "converted", f"{', '.join(parts)}: to sample from, or to begin a run with (--config.train.init_from={path})"
    )
    yield _line("saved", size_words(checkpoint_reader.size_bytes(folder.checkpoints, steps[-1])))
    return
  yield from _progress(experiment, rows)
  yield from _events(everything, held)
  yield from _stages(experiment, rows)
  yield from _time(rows)
  yield from _warnings(rows)
  yield from _skipped(folder, rows)
  yield from _saved(folder, experiment, steps)
  yield from _numbers(rows)
  yield from _figures(rows)
  yield from _next(folder, experiment, rows, steps, held)


def _line(name, words):
  return f"{name:{_HEAD}s}{words}"


def _count(number, noun):
  """ "1 step", "3 steps"."""
  return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_words(size):
  """Bytes in words: "19.9 MB"."""
  for unit in ("B", "kB", "MB", "GB", "TB"):
    if size < 1000 or unit == "TB":
      return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
    size /= 1000


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
  yield _line(
    "progress",
    f"{bar} {100 * share:.0f} %: step {last['step']:,} of {train.total_steps:,}, "
    f"{last['step'] * train.batch_size:,} images in batches of {train.batch_size}",
  )
  rates = sorted(row["images_per_second"] for row in _of_kind(rows, "train") if row.get("images_per_second"))
  spent = f"{progress.duration(last.get('seconds', 0.0))} of training"
  if not rates:
    yield _line("speed", f"not measured yet, {spent}")
    return
  newest = next(row["images_per_second"] for row in reversed(rows) if row.get("images_per_second"))
  left = (train.total_steps - last["step"]) * train.batch_size / newest
  rest = f", {progress.duration(left)} to go" if left > 0 else ""
  yield _line(
    "speed",
    f"{newest:,.1f} images/s in the last window, {rates[len(rates) // 2]:,.1f} in the middle one; {spent}{rest}",
  )


def _clock(row):
  """The time of day of an event, as it was where the run was; blanks for lines that were written without one."""
  try:
    return datetime.datetime.strptime(row["at"], "%Y-%m-%dT%H:%M:%S%z").strftime("%Y-%m-%d %H:%M")
  except (KeyError, TypeError, ValueError):
    return ""


def _events(everything, held):
  """Starts, resumes and stops; a process that ended without a word was killed."""
  events = []  # (time, step, words)
  open_step = None  # last step of a process that has said nothing of its end
  for row in everything:
    kind = row.get("kind")
    if kind in ("start", "resume"):
      if open_step is not None:
        events.append(("", open_step, f"killed{_lost(open_step, row)}"))
      changed = [
        f"{name} {json.dumps(old)} -> {json.dumps(new)}" for name, (old, new) in (row.get("changed") or {}).items()
      ]
      devices = f" on {row['devices']}" if row.get("devices") else ""
      events.append((_clock(row), row["step"], ("started" if kind == "start" else "went on") + devices))
      events += [("", None, f"with {words}") for words in changed]
      open_step = row["step"]
    elif kind == "stop":
      events.append((_clock(row), row["step"], _ending(row)))
      open_step = None
    elif kind == "train" and open_step is not None:
      open_step = row["step"]
  if held:
    events.append(("", everything[-1]["step"] if everything else 0, "a process is training in it now"))
  elif open_step is not None:
    events.append(("", open_step, "its process was killed; `train` goes on from the newest checkpoint"))
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
    when, step, words = event
    when = f"{when:18s}" if dated else ""
    yield _line(
      name, f"{when}{'step ' + format(step, f'{width},') if step is not None else ' ' * (5 + width)}  {words}"
    )


def _lost(step, resume):
  """What a killed process had done beyond the checkpoint that the next one went on from."""
  lost = step - resume["step"] if resume["kind"] == "resume" else step
  return f"; {_count(lost, 'step')} done again" if lost > 0 else ""


def _ending(row):
  if row.get("reason") == "non-finite":
    return (
      f"stopped: {row['message']}" if row.get("message") else (f"stopped: {row.get('metric')} is {row.get('value')}")
    )
  reason = str(row.get("reason"))
  return _ENDINGS[reason] if reason == "done" else f"stopped: {_ENDINGS.get(reason, reason)}"


def _stages(experiment, rows):
  """Where progressive growing stands; nothing for a run without stages."""
  for number, row in enumerate(_of_kind(rows, "stage")):
    side = f"{row['resolution']}x{row['resolution']} pixels " if "resolution" in row else ""
    yield _line("stages" if not number else "", f"{side}from step {row['step']:,} ({row.get('reason', '?')})")
  measured = [row for row in _of_kind(rows, "stage", "evaluation") if "resolution" in row]
  if measured:
    row = measured[-1]
    values = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("frechet")}
    side = str(row["resolution"])
    own = f"{values[side]:.4g} at step {row['step']:,}" if side in values else "not measured yet"
    real = values.get(f"reference_{side}")
    goal = "" if real is None else f", of real pictures {real:.4g}"
    yield _line("frechet", f"{own}{goal} ({side}x{side} pixels, features by {row.get('features', '?')})")


def _time(rows):
  """Where the time went, over all restarts."""
  spent, since = {}, 0
  for number, row in enumerate(rows):
    if row.get("phases"):  # a resume or a stop says what came before it
      spent, since = dict(row["phases"]), number + 1
  for row in rows[since:]:
    for name in _PHASES:
      spent[name] = spent.get(name, 0.0) + row.get(f"time/{name}", 0.0)
  total = max((row.get("seconds", 0.0) for row in rows), default=0.0)
  if total <= 0 or not sum(spent.values()):
    return
  spent = {words: spent.get(name, 0.0) for name, words in _PHASES.items()}
  spent["the rest"] = max(0.0, total - sum(spent.values()))
  parts = [
    f"{words} {100 * seconds / total:.{0 if seconds > 0.0995 * total else 1}f} %"
    for words, seconds in spent.items()
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
  for line in (line for words in newest for line in _wrapped(words)):
    yield _line("", line)


def _wrapped(words, most=2):
  """A long sentence on at most `most` lines."""
  room, lines = _WIDTH - _HEAD, []
  for word in words.split():
    if lines and len(lines[-1]) + 1 + len(word) <= room:
      lines[-1] += f" {word}"
    else:
      lines.append(word)
  if len(lines) > most:
    lines = lines[:most]
    lines[-1] = lines[-1][: room - 4] + " ..."
  return lines


def _saved(folder, experiment, steps):
  policy = retention.of_run(experiment.train, folder.metrics)
  reasons = policy.reasons(steps)
  shown = [step for step in steps if step in steps[-_CHECKPOINTS_SHOWN:] or any("best" in why for why in reasons[step])]
  for number, step in enumerate(shown):
    size, why = size_words(checkpoint_reader.size_bytes(folder.checkpoints, step)), "; ".join(reasons[step])
    yield _line("" if number else "saved", f"step {step:,} ({size}), {why or 'goes with the next save'}")
  if len(steps) > len(shown):
    yield _line("", f"and {len(steps) - len(shown):,} others, from step {steps[0]:,} on")
  if not steps:
    yield _line("saved", "nothing yet")
  if steps and policy.best and not policy.values():
    yield _line("", f"WARNING: no line of metrics.jsonl has train.keep_best's metric {policy.metric}")
  pictures = sorted(folder.samples.glob("step-*.png")) if folder.samples.is_dir() else []
  yield _line("samples", f"{len(pictures)}, newest {pictures[-1].relative_to(folder.path)}" if pictures else "none yet")


def _bars(values):
  """A curve in a few characters, from its smallest to its largest value."""
  edges = [round(i * len(values) / _BAR_COLUMNS) for i in range(_BAR_COLUMNS + 1)]
  means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:]) if b > a]
  low, high = min(means), max(means)
  return "".join(_BARS[round((len(_BARS) - 1) * (mean - low) / (high - low)) if high > low else 0] for mean in means)


def _numbers(rows):
  """Losses and other figures: at the beginning, now, and the way between; two columns."""
  series = {}
  for row in _of_kind(rows, "train", "samples"):
    if row["kind"] == "samples" and not row["step"]:
      continue  # what random weights draw
    entropies = health.expert_entropy(row)
    if entropies:  # of many layers, the most uneven one
      row = row | {_ENTROPY: min(entropies.values())}
    for name, value in row.items():
      if isinstance(value, (int, float)) and math.isfinite(value):
        series.setdefault(name, []).append(value)
  names = [name for name in (*_NUMBERS, _ENTROPY) if name in series]
  names += [name for name in series if name.startswith("loss/") and name not in names]
  cells = []
  for name in names:
    values = series[name]
    short = _NUMBERS.get(name, name.removeprefix("loss/"))
    cells.append(f"{short:18s}{_number(values[0]):>6s} → {_number(values[-1]):6s} {_bars(values)}")
  if not cells:
    return
  half = -(-len(cells) // 2)
  for number, (left, right) in enumerate(zip(cells[:half], cells[half:] + [""])):
    yield _line("numbers" if not number else "", f"{left:{(_WIDTH - _HEAD) // 2}s} {right}".rstrip())


def _number(value):
  """Three digits in at most six characters, where that is possible."""
  words = f"{value:.3g}"
  return words if len(words) <= 6 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def _figures(rows):
  judged = _of_kind(rows, "judge")
  if judged:
    row = judged[-1]
    shares = [
      f"{whose} {100 * row[name]:.0f} %"
      for name, whose in (
        ("judge/top1_of_32", "training captions"),
        ("judge/heldout_top1_of_32", "held out"),
        ("judge/real_top1_of_32", "real pictures"),
      )
      if name in row
    ]
    yield _line("judge", f"at step {row['step']:,}" + (f", right among 32: {', '.join(shares)}" if shares else ""))


def _next(folder, experiment, rows, steps, held):
  """What to look at, or to do, now."""
  stops = _of_kind(rows, "stop")
  done = bool(steps) and steps[-1] >= experiment.train.total_steps
  path = folder.path
  board = f"tensorboard --logdir {folder.tensorboard}"
  if held:
    yield _line("next", f"look at the newest pictures in {folder.samples}, at the curves with {board}")
    return
  ideas = []
  if stops and stops[-1].get("reason") == "non-finite":
    ideas.append(
      "read the skipped steps above: bad pictures are a matter of the data; else begin again from the last "
      "checkpoint with a lower rate or a larger loss.r1_gamma (--allow-config-change)"
    )
  elif _of_kind(rows, "warning"):
    ideas.append(f"see the warnings above, the pictures in {folder.samples}, the curves ({board})")
  if not done and steps:
    left = experiment.train.total_steps - steps[-1]
    ideas.append(f"the same `train` command goes on ({_count(left, 'step')} left)")
  elif not steps:
    ideas.append("the same `train` command begins")
  if steps:
    more = "--prompt WORDS" if experiment.conditional else "--latents 64"
    ideas.append(f"images: sample --workdir {path} {more} --out FILE.png")
    if experiment.conditional and not _of_kind(rows, "judge"):
      ideas.append(f"figures: evaluate --workdir {path} --judge CLIP")
  if folder.report.is_file():
    ideas.append(f"the whole story with pictures: {folder.report}")
  for number, idea in enumerate(ideas):
    for part, line in enumerate([idea] if str(path) in idea else _wrapped(idea, most=3)):  # a command stays whole
      yield _line("next" if not number and not part else "", line)
