"""The training loop: from whatever stands in the run's folder to the last step, and nothing lost on the way.

It knows no model: a `Prepared` (training/setup.py) gives it the first state, the batches and the step.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from aurora_jax import config_files, files
from aurora_jax.data import loader
from aurora_jax.errors import UserError
from aurora_jax.parallel import hosts
from aurora_jax.runs import (
  checkpoint_manager,
  checkpoint_reader,
  config_check,
  progress,
  retention,
  skipped_records,
  workdir,
)
from aurora_jax.runs import metrics as metrics_lib
from aurora_jax.runs import profiler as profiler_lib
from aurora_jax.runs.signals import Interrupts
from aurora_jax.runs.timer import Clock
from aurora_jax.training import guard, health, schedule

_SHOWN_METRICS = 4

# How `run` can end, and the exit status that tells a script.
DONE = "done"  # total_steps are done
ALREADY_DONE = "already done"  # they were before this start
TIME = "time"  # train.max_seconds are over
INTERRUPT = "interrupt"  # Ctrl-C
TERMINATED = "terminated"  # SIGTERM
NON_FINITE = "non-finite"
DAMAGED_DATA = "damaged data"  # more records than data.max_skipped could not be read; saved
# Of several wishes to stop, by several processes, the last one here counts.
_WISHES = (None, TIME, INTERRUPT, TERMINATED)
_STATUS = {DONE: 0, ALREADY_DONE: 0, TIME: 0, INTERRUPT: 0, TERMINATED: 0, NON_FINITE: 3, DAMAGED_DATA: 2}


@dataclasses.dataclass(frozen=True)
class Hooks:
  """What other floors do when something happens.

  Attributes:
    on_samples: called with (step, SampleSet, RunFolder) on the first process; writes the pictures and returns one PIL
      picture for TensorBoard, or None.
    on_start: called with (step, state) before the first step.
  """

  on_samples: Callable[..., Any] = lambda step, samples, folder: None
  on_start: Callable[..., None] = lambda step, state: None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How training ended.

  Attributes:
    step: steps done.
    reason: one of the words above.
    state: the state at `step`; None if it was not loaded or is not finite.
  """

  step: int
  reason: str
  state: Any = None

  @property
  def status(self):
    """The process's exit status."""
    return _STATUS[self.reason]


def run(prepared, run_dir, *, hooks=Hooks(), allow_config_change=(), started=None, interrupts=None, profile_steps=None):
  """Trains until `train.total_steps`, `train.max_seconds`, Ctrl-C or SIGTERM; goes on from the newest checkpoint.

  Args:
    prepared: `Prepared`: `experiment`, `abstract_state`, `init()`, `batches(step)`, `step(step, state, batch)`,
      `sample(state)` (or None: no pictures are drawn); and, optionally, `batch_sharding` (a Sharding for every entry
      of a batch), `begin()` (called first: begins to compile), `headline` (names of the metrics to show while training) and
      `dataset` (whose unreadable records the batches name in `skipped`, see runs/skipped_records.py). With stages
      (`schedule.resolutions`) also `at_stage(resolution)`, the `Prepared` whose `begin`, `step` and `sample` are that
      stage's, and `distances`.
    run_dir: the run's folder.
    hooks: `Hooks`.
    allow_config_change: names of config fields that may differ from the stored ones.
    started: `time.monotonic()` from which `train.max_seconds` counts; None takes now.
    profile_steps: (first, end) of the steps to take a profiler trace of, or None.
    interrupts: `Interrupts`, entered; None makes them here.

  Returns:
    An `Outcome`.

  Raises:
    UserError: the folder cannot be used, its config differs, a checkpoint cannot be read or saved.
  """
  experiment, train = prepared.experiment, prepared.experiment.train
  folder = workdir.RunFolder(run_dir)
  primary = hosts.is_first()
  with hosts.together("looking at the run's folder"):
    newest = checkpoint_reader.newest(folder.checkpoints)
    changes = config_check.refuse_changes(folder, experiment, allow_config_change)
  _check_same_folder(folder, newest)
  if newest is not None and newest >= train.total_steps:
    _tell(
      primary,
      f"{folder.path}: all {train.total_steps:,} steps are done (newest checkpoint: step {newest:,}); "
      "--config.train.total_steps=N goes further",
    )
    return Outcome(newest, ALREADY_DONE)

  with contextlib.ExitStack() as stack:
    with hosts.together("taking the run's folder"):
      workdir.check_writable(run_dir)
      stack.enter_context(workdir.held(folder.path) if primary else contextlib.nullcontext())
      if primary:
        files.write_text(folder.config, config_files.to_json(experiment))
      log = stack.enter_context(contextlib.closing(metrics_lib.Log(folder) if primary else metrics_lib.NoLog()))
      unread = skipped_records.follow(
        folder.skipped_records,
        getattr(prepared, "dataset", None),
        experiment.data.max_skipped,
        resumed=newest is not None,
      )
    with hosts.together("looking for what process 0 wrote"):
      if not folder.config.is_file():
        raise UserError(
          f"workdir {folder.path} is not the folder that process 0 writes to: all processes need the same "
          "one, on a file system that they share"
        )
    unread.begin()
    if interrupts is None:
      interrupts = stack.enter_context(Interrupts())
    checkpoints = stack.enter_context(
      checkpoint_manager.Checkpoints(folder.checkpoints, retention.of_run(train, folder.metrics))
    )
    display = stack.enter_context(progress.make(train.total_steps, primary=primary))
    profiler = profiler_lib.Profiler(folder.profile, *profile_steps) if profile_steps else profiler_lib.NoProfiler()
    trainer = _Trainer(prepared, folder, hooks, log, checkpoints, display, interrupts, unread, profiler)

    if hasattr(prepared, "begin") and not experiment.schedule.resolutions:  # a stage's programs are known later
      prepared.begin()
    # From the newest checkpoint if there is one, else from the beginning.
    if newest is None:
      display.doing("initialising")
      state, step, stored = checkpoint_manager.place(prepared.init(), prepared.abstract_state), 0, {}
      log.note("start", 0, 0.0, {"devices": _devices()})
      _tell(primary, f"{folder.path}: a new run of {train.total_steps:,} steps")
    else:
      display.doing(f"restoring step {newest:,}")
      state, stored = checkpoints.restore(prepared.abstract_state, newest)
      step = newest
      log.note(
        "resume",
        step,
        stored.get("clock", {}).get("seconds", 0.0),
        {
          "changed": {name: list(pair) for name, pair in changes.items()},
          "devices": _devices(),
          "phases": stored.get("clock", {}).get("phases", {}),
        },
      )
      _tell(primary, f"{folder.path}: going on from the checkpoint of step {step:,}, to {train.total_steps:,}")
    trainer.begin(stored, started)
    hooks.on_start(step, state)
    try:
      return trainer.train(state, step)
    except guard.NonFinite as error:
      checkpoints.wait()
      last = checkpoints.newest()
      log.note(
        "stop",
        error.step,
        trainer.clock.seconds,
        {
          "reason": NON_FINITE,
          "metric": error.name,
          "value": error.value,
          "message": str(error),
          "phases": trainer.clock.phases,
        },
      )
      stands = (
        "no checkpoint was saved yet"
        if last is None
        else (f"the last checkpoint, step {last:,}, stands in {folder.checkpoints}")
      )
      if primary:
        print(f"aurora_jax train: {error}; training stopped; {stands}", file=sys.stderr, flush=True)
      return Outcome(error.step, NON_FINITE)
    except checkpoint_manager.SaveError:
      with contextlib.suppress(UserError):  # the disk may be full
        log.note("stop", trainer.step, trainer.clock.seconds, {"reason": "save failed", "phases": trainer.clock.phases})
      raise


class _Trainer:
  """The loop and what it carries from step to step on the host."""

  def __init__(self, prepared, folder, hooks, log, checkpoints, display, interrupts, unread, profiler):
    self._whole = self._prepared = prepared  # `_prepared`: at the present stage
    self._settings = prepared.experiment.train
    self._folder, self._hooks, self._log = folder, hooks, log
    self._checkpoints, self._display, self._interrupts = checkpoints, display, interrupts
    self._profiler = profiler
    self._headline = tuple(getattr(prepared, "headline", ()))
    self._vote = hosts.vote(getattr(prepared, "batch_sharding", None))
    self._unread = unread
    self._batches_per_step = getattr(prepared, "batches_per_step", 1)
    self._no_batch = None  # why there is no next batch

  def begin(self, stored, started):
    """Takes up the clock, the stage and the unfinished window of a checkpoint's progress, {} for a new run."""
    self.clock = Clock(stored.get("clock"), started)
    self._growing = schedule.of_run(self._whole, stored.get("schedule"))
    self._resolution = None  # of the stage that `_prepared` is at
    self._take_stage()
    self._window = metrics_lib.Window(stored.get("window"))
    names = getattr(self._prepared, "log_names", {"g": "generator", "d": "discriminator"})
    self._skips = guard.Skips(self._settings.max_skipped_in_a_row, names, stored.get("skips"))
    self._health = health.Health(self._prepared.experiment.health, stored.get("health", stored.get("watch")))
    self._pending = None  # (steps done, device metrics): dispatched, not yet looked at
    self._sampled = None
    self.step = None  # steps dispatched so far

  def train(self, state, step):
    """Steps until there is a reason to stop. Returns an `Outcome`."""
    settings, clock = self._settings, self.clock
    first = step
    self._grow(step, state)  # the first stage's reference, or what a stop cut short
    self._display.doing("compiling (the first steps take longer)")
    if not isinstance(self._vote, hosts.Alone):
      self._interrupts.idle = False  # the others are to hear of it
    batches = iter(self._prepared.batches(step))
    try:
      with clock.phase("input"):
        step_batches = self._next(batches)
      while (reason := self._reason_to_stop(step)) is None:
        if step % settings.sample_every == 0:  # after the state is saved and it is known that there is time
          self._sample(step, state)
        self._profiler.before(step)
        with clock.phase("step"), self._profiler.step(step):
          # Whatever reaches the device unasked is a mistake that would cost time at every step.
          with jax.transfer_guard("disallow"):
            state, metrics = self._prepared.step(step, state, step_batches)
        self.step = step = step + 1
        self._interrupts.idle = False
        with clock.phase("input"):  # the next batch travels while this step runs
          step_batches = self._next(batches)
        with clock.phase("step"):
          self._observe(self._pending)  # waits for the step before this one
        self._pending = (step, metrics)
        self._tell_profile(self._profiler.after(step, metrics))
        self._checkpoints.check()
        self._grow(step, state)
        if step % settings.checkpoint_every == 0:
          self._flush()
          if not self._skips.in_a_row:  # else the newest checkpoint stays the one before the trouble
            self._save(step, state)
    finally:
      self._tell_profile(self._profiler.close(self.step))
      if hasattr(batches, "close"):
        batches.close()
    return self._finish(state, step, reason, first)

  def _reason_to_stop(self, step):
    """The same in all processes, whichever of them got a signal or whose clock is ahead."""
    return DONE if step >= self._settings.total_steps else self._wish()

  def _wish(self):
    """Why to stop before the last step, None to go on; every process must ask as often as the others."""
    wish = self._interrupts.reason
    if wish is None and self._settings.max_seconds and self.clock.seconds_here >= self._settings.max_seconds:
      wish = TIME
    wish = _WISHES[self._vote(_WISHES.index(wish))]
    return DAMAGED_DATA if self._no_batch or self._unread.too_many else wish

  def _next(self, batches):
    """The next step's batches, on their way to the devices; None where nothing can be read: training ends before it."""
    try:
      found = [next(batches) for _ in range(self._batches_per_step)]
    except loader.NothingReadable as error:
      if not hosts.is_alone():  # The others have a batch and will wait in it for this process.
        raise
      self._no_batch, found = str(error), None
    self._unread.met(getattr(batches, "skipped", {}))
    return found and [self._put(batch) for batch in found]

  def _grow(self, step, state):
    """Measures what is due, and goes on to the next stage where the schedule says so."""
    while self._growing.is_due(step):
      self._flush()
      with self.clock.phase("evaluation"):
        self._display.doing("measuring the Frechet distance", brief=True)
        found = self._growing.advance(step, state, keep_on=lambda: self._wish() is None)
      if found is None:
        break
      kind, values, words = found
      self._log.measured(kind, step, self.clock.seconds, values)
      _tell(hosts.is_first(), words)
    self._take_stage()

  def _take_stage(self):
    """The programs of the stage at hand."""
    if self._growing.resolution != self._resolution:
      self._resolution = self._growing.resolution
      self._prepared = self._whole.at_stage(self._resolution)
      self._display.doing(f"compiling for {self._resolution}x{self._resolution} pixels")

  def _put(self, batch):
    """Starts the transfer of a batch; what is no array of numbers (captions) stays behind."""
    arrays = {
      name: value for name, value in batch.items() if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    }
    sharding = getattr(self._prepared, "batch_sharding", None)
    if sharding is None:
      return jax.device_put(arrays)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in arrays.items()}

  def _observe(self, pending):
    """Looks at the metrics of a step that was dispatched earlier: guard, average, log, display."""
    if pending is None:
      return
    done, phases = pending
    metrics, skip = self._skips.look(done - 1, phases, detail=done % self._settings.log_every == 0)
    self.clock.step_done()
    self._window.add(metrics)
    if skip is not None:
      self._report_skip(skip)
    if done % self._settings.log_every == 0:
      self._unread.share()
      self._write_window(done)
    names = [name for name in self._headline if name in metrics] or [
      name for name in metrics if name.startswith("loss/") and not np.ndim(metrics[name])
    ][:_SHOWN_METRICS]
    seconds = self.clock.step_seconds
    stage = {"pixels": self._resolution} if self._resolution else {}
    self._display.step(
      done,
      stage | {name: float(metrics[name]) for name in names},
      self._settings.batch_size / seconds if seconds else None,
      self._seconds_left(done),
    )

  def _write_window(self, done):
    values = self._window.take()
    values |= self.clock.take_window(self._settings.batch_size)
    values["images"] = done * self._settings.batch_size
    if self._resolution:
      values["resolution"] = self._resolution
    values["data/skipped"] = self._unread.count(done * self._batches_per_step)
    figures, warnings = self._health.window(values)
    self._log.train(done, self.clock.seconds, values | figures)
    self._warn(done, warnings)

  def _report_skip(self, skip):
    """Says why a step was left out; raises `NonFinite` if it was one too many."""
    self._log.note("skipped", skip.step + 1, self.clock.seconds, {"message": skip.message, **skip.to_json()})
    if hosts.is_first():
      in_a_row = f" ({self._skips.in_a_row} in a row)" if self._skips.in_a_row > 1 else ""
      print(f"aurora_jax train: step {skip.step} was skipped{in_a_row}: {skip.message}", file=sys.stderr, flush=True)
    self._skips.refuse(skip)

  def _warn(self, step, warnings):
    for warning in warnings:
      self._log.note("warning", step, self.clock.seconds, warning.to_json())
      if hosts.is_first():
        print(f"aurora_jax train: warning at step {step:,}: {warning.message}", file=sys.stderr, flush=True)

  def _tell_profile(self, line):
    if line is not None:
      _tell(hosts.is_first(), line)

  def _seconds_left(self, done):
    seconds = self.clock.step_seconds
    left = None if seconds is None else seconds * (self._settings.total_steps - done)
    if self._settings.max_seconds:
      until = max(0.0, self._settings.max_seconds - self.clock.seconds_here)
      left = until if left is None else min(left, until)
    return left

  def _flush(self):
    """Looks at the newest step too, which means to wait for it."""
    with self.clock.phase("step"):
      pending, self._pending = self._pending, None
      self._observe(pending)

  def _sample(self, step, state):
    """Draws the fixed prompts and latents and hands them to the hook."""
    if self._prepared.sample is None:
      return
    self._flush()
    self._sampled = step
    with self.clock.phase("samples"):
      self._display.doing("drawing samples", brief=True)
      samples = self._prepared.sample(state)
      figures, warnings = self._health.samples(step, samples.images)
      if hosts.is_first():
        picture = self._hooks.on_samples(step, samples, self._folder)
        if picture is not None:
          self._log.picture(step, "samples", picture)
    self._log.measured("samples", step, self.clock.seconds, figures)
    self._warn(step, warnings)

  def _save(self, step, state):
    """Starts to save. Everything that the checkpoint stands for is looked at and logged first."""
    self._flush()
    with self.clock.phase("checkpoint"):
      self._display.doing("saving", brief=True)
      self._unread.share()
      guard.check_state(step, state)
      self._checkpoints.save(
        step,
        state,
        config_files.to_mapping(self._prepared.experiment),
        {
          "clock": self.clock.to_json(),
          "window": self._window.to_json(),
          "skips": self._skips.to_json(),
          "health": self._health.to_json(),
          "schedule": self._growing.to_json(),
        },
      )

  def _finish(self, state, step, reason, first):
    """Saves, waits for it, says how to go on."""
    self._flush()
    if reason in (DONE, TIME) and self._sampled != step:
      self._sample(step, state)
    if step > first:
      self._save(step, state)  # nothing is written twice
    with self.clock.phase("checkpoint"):
      self._checkpoints.wait()
    if reason == DONE and step % self._settings.log_every:
      self._write_window(step)
    self._log.note("stop", step, self.clock.seconds, {"reason": reason, "phases": self.clock.phases})
    self._interrupts.idle = True
    if reason == DAMAGED_DATA and hosts.is_first():
      self._tell_damage(step)
    elif hosts.is_first():
      self._tell_end(step, reason)
    return Outcome(step, reason, state)

  def _tell_damage(self, step):
    saved = self._checkpoints.newest()
    stands = "no checkpoint was saved yet" if saved is None else f"saved in {self._checkpoints.folder / str(saved)}"
    why = self._unread.in_words() if self._unread.too_many else self._no_batch
    print(
      f"aurora_jax train: {why}; training stopped at step {step:,}; {stands}; "
      "mend the data set, or let more go with --config.data.max_skipped, and the same command goes on",
      file=sys.stderr,
      flush=True,
    )

  def _tell_end(self, step, reason):
    total = self._settings.total_steps
    saved = self._checkpoints.newest()
    where = "nothing to save yet" if saved is None else f"saved in {self._checkpoints.folder / str(saved)}"
    words = {
      DONE: f"all {total:,} steps are done",
      TIME: f"stopped at step {step:,} of {total:,}: train.max_seconds = {self._settings.max_seconds:g} are over",
      INTERRUPT: f"stopped at step {step:,} of {total:,}",
      TERMINATED: f"stopped at step {step:,} of {total:,} (SIGTERM)",
    }[reason]
    again = "goes on" if saved is not None else "begins again"
    _tell(True, f"{self._folder.path}: {words}; {where}" + ("" if reason == DONE else f"; the same command {again}"))


def _check_same_folder(folder, newest):
  """All processes must go on from the same step. A file system may show a checkpoint to some of them later."""
  first = hosts.from_first(-1 if newest is None else newest)
  with hosts.together("looking for the newest checkpoint"):
    if first != (-1 if newest is None else newest):
      raise UserError(
        f"newest checkpoint in {folder.checkpoints}: {'none' if newest is None else f'step {newest}'} here, "
        f"{'none' if first < 0 else f'step {first}'} in process 0; all processes need the same workdir, on a "
        "file system that they share"
      )


def _devices():
  """Such as "16 tpu"."""
  return f"{jax.device_count()} {jax.default_backend()}"


def _tell(primary, words):
  if primary:
    print(words, flush=True)
