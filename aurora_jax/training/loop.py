"""The training loop: from the newest checkpoint in the run's folder, or from the first state, to the last step.

It knows no system. A `Prepared` (training/setup.py) provides the first state, the batches and the step.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection
from typing import Any

import jax
from PIL import Image

from aurora_jax import config_files, files, local_copies, memory, storage
from aurora_jax.errors import UserError
from aurora_jax.parallel import hosts
from aurora_jax.runs import (
  checkpoint_manager,
  checkpoint_reader,
  config_check,
  progress,
  remote_run,
  retention,
  skipped_records,
  workdir,
)
from aurora_jax.runs import metrics as metrics_lib
from aurora_jax.runs import profiler as profiler_lib
from aurora_jax.runs.signals import Signals
from aurora_jax.runs.timer import Timer
from aurora_jax.systems import base
from aurora_jax.training import guard, schedule, stopping
from aurora_jax.training.batch_feed import BatchFeed
from aurora_jax.training.monitor import Monitor
from aurora_jax.training.prepared import Prepared, SampleSet
from aurora_jax.training.stopping import ALREADY_DONE, CORRUPT_RECORDS, DONE, NON_FINITE, TIME, Outcome, StopRule


@dataclasses.dataclass(frozen=True)
class Hooks:
  """Callbacks of the caller.

  Attributes:
    on_samples: called with (step, samples, folder) in the primary process. It may write the images, and returns an RGB
      image for TensorBoard, or None.
    on_start: called with (step, state) before the first step.
  """

  on_samples: Callable[[int, SampleSet, workdir.RunFolder], Image.Image | None] = lambda step, samples, folder: None
  on_start: Callable[[int, base.TrainState], None] = lambda step, state: None


def run(
  prepared: Prepared,
  run_dir: str | os.PathLike | remote_run.LocalRun,
  *,
  hooks: Hooks = Hooks(),
  allow_config_change: Collection[str] = (),
  started: float | None = None,
  signals: Signals | None = None,
  profile_steps: tuple[int, int] | None = None,
) -> Outcome:
  """Trains until `train.total_steps`, `train.max_seconds`, Ctrl-C or SIGTERM. Resumes from the newest checkpoint.

  Args:
    prepared: the experiment with its data and programs.
    run_dir: the run's folder, a gs:// or s3:// URL, or what `remote_run.trained` yielded.
    hooks: callbacks.
    allow_config_change: names of config fields that may differ from the stored ones.
    started: `time.monotonic()` from which `train.max_seconds` counts; None takes now.
    signals: a `Signals` that was entered; None makes one.
    profile_steps: (first, end) of the steps to trace with the profiler, or None.

  Raises:
    UserError: the folder cannot be used, its config differs, or a checkpoint cannot be read or saved.
  """
  with remote_run.trained(run_dir, hosts.is_primary()) as place:
    return _run(prepared, place, hooks, allow_config_change, started, signals, profile_steps)


def _run(prepared, place, hooks, allow_config_change, started, signals, profile_steps):
  experiment, train, folder = prepared.experiment, prepared.experiment.train, place.folder
  with hosts.together("looking at the run's folder"):
    newest = checkpoint_reader.newest(folder.checkpoints)
    changes = config_check.refuse_changes(folder, experiment, allow_config_change)
  _check_same_folder(folder, newest)
  if newest is not None and newest >= train.total_steps:
    _tell(
      f"{folder.path}: all {train.total_steps:,} steps are done (newest checkpoint: step {newest:,}); "
      "--config.train.total_steps=N goes further"
    )
    return Outcome(newest, ALREADY_DONE)

  with contextlib.ExitStack() as stack:
    log, skipped = _open_folder(stack, folder, prepared, resumed=newest is not None)
    signals = signals or stack.enter_context(Signals())
    checkpoints = stack.enter_context(checkpoint_manager.of_run(folder, retention.of_run(train, folder.metrics)))
    display = stack.enter_context(progress.training(primary=hosts.is_primary()))
    profiler = profiler_lib.Profiler(folder.profile, *profile_steps) if profile_steps else profiler_lib.NoProfiler()
    if not experiment.schedule.resolutions:  # with stages, the first programs are not known yet
      prepared.begin()

    # The state of the newest checkpoint, or the first state.
    if newest is None:
      display.status("initializing")
      state, step, stored = checkpoint_manager.place(prepared.init(), prepared.abstract_state), 0, {}
      log.note("start", 0, 0.0, {"devices": _devices()})
      _tell(f"{folder.path}: a new run of {train.total_steps:,} steps")
    else:
      display.status(f"restoring step {newest:,}")
      state, stored = checkpoints.restore(prepared.abstract_state, newest)
      step, spent = newest, stored.get("clock", {})
      event = {"changed": {name: list(pair) for name, pair in changes.items()}, "devices": _devices()}
      log.note("resume", step, spent.get("seconds", 0.0), event | {"phases": spent.get("phases", {})})
      _tell(f"{folder.path}: going on from the checkpoint of step {step:,}, to {train.total_steps:,}")

    timer = Timer(stored.get("clock"), started)
    feed = BatchFeed(prepared, skipped, timer)
    vote = hosts.vote(prepared.batch_sharding)
    stop = StopRule(train, signals, timer, vote, feed.no_data)
    monitor = Monitor(prepared, log, display, feed, stop, stored)
    growing = schedule.of_run(prepared, stored.get("schedule"))
    session = _Session(prepared, place, folder, hooks, log, display, checkpoints, timer, feed, stop, monitor, growing)
    hooks.on_start(step, state)

    first_step = step
    try:
      session.grow(step, state)  # measures the first stage's reference, or what a stop cut short
      display.status("compiling (the first steps take longer)")
      if not isinstance(vote, hosts.Alone):
        signals.idle = False  # the other processes must learn of a signal before this one ends
      feed.start(step)
      try:
        batches = feed.next()
        while (reason := stop.reason(step)) is None:
          if step % train.sample_every == 0:  # after the state is saved and it is known that there is time
            session.draw_samples(step, state)
          profiler.before(step)
          with timer.phase("step"), profiler.step(step):
            # An implicit transfer in the loop is a mistake that would cost time at every step.
            with jax.transfer_guard("disallow"):
              state, metrics = session.stage.step(step, state, batches)
          step += 1
          signals.idle = False
          batches = feed.next()  # their transfer overlaps with the step
          monitor.add(step, metrics)  # waits for the previous step
          _tell(profiler.after(step, metrics))
          checkpoints.check()
          place.check()
          session.grow(step, state)
          if step % train.checkpoint_every == 0:
            monitor.flush()
            if not monitor.skips_in_a_row:  # else the newest checkpoint stays the one before the skipped steps
              session.save(step, state)
      finally:
        _tell(profiler.close(step))
        feed.close()

      # The end: samples, checkpoint, message.
      monitor.flush()
      if reason in (DONE, TIME) and session.sampled_at != step:
        session.draw_samples(step, state)
      if step > first_step:
        session.save(step, state)  # which saves nothing twice
      with timer.phase("checkpoint"):
        checkpoints.wait()
      if reason == DONE and step % train.log_every:
        monitor.write_window(step)
      log.note("stop", step, timer.seconds, {"reason": reason, "phases": timer.phases})
      signals.idle = True
      session.report_end(step, reason)
      return Outcome(step, reason, state)

    except guard.NonFinite as error:
      checkpoints.wait()
      event = {"reason": NON_FINITE, "metric": error.name, "value": error.value, "message": str(error)}
      log.note("stop", error.step, timer.seconds, event | {"phases": timer.phases})
      if hosts.is_primary():
        stopping.report_non_finite(str(error), folder.checkpoints, checkpoints.newest())
      return Outcome(error.step, NON_FINITE)
    except storage.StorageError as error:
      last = checkpoints.last_seen
      saved = "no checkpoint is complete" if last is None else f"the last complete checkpoint is of step {last}"
      raise storage.StorageError(f"{error}; {saved} ({folder.checkpoints})") from error
    except checkpoint_manager.SaveError:
      with contextlib.suppress(UserError):  # the disk may be full
        log.note("stop", step, timer.seconds, {"reason": "save failed", "phases": timer.phases})
      raise


@dataclasses.dataclass
class _Session:
  """What the loop does between steps: stages, samples, checkpoints."""

  whole: Prepared
  place: remote_run.LocalRun
  folder: workdir.RunFolder
  hooks: Hooks
  log: metrics_lib.NoLog
  display: progress.Silent
  checkpoints: checkpoint_manager.Checkpoints
  timer: Timer
  feed: BatchFeed
  stop: StopRule
  monitor: Monitor
  growing: schedule.NotGrowing

  def __post_init__(self):
    self.stage = self.whole  # at the present stage of progressive growing
    self.sampled_at: int | None = None  # the step of the newest samples
    self._take_stage()

  def grow(self, step: int, state: base.TrainState) -> None:
    """Takes the distances that are due, and enters the next stage where the schedule says so."""
    while self.growing.is_due(step):
      self.monitor.flush()
      with self.timer.phase("evaluation"):
        self.display.status("measuring the Frechet distance", brief=True)
        event = self.growing.advance(step, state, keep_on=lambda: self.stop.request() is None)
      if event is None:
        break
      self.log.measured(event.kind, step, self.timer.seconds, event.values)
      _tell(event.message)
    self._take_stage()

  def _take_stage(self):
    """Takes the programs of the present stage."""
    resolution = self.growing.resolution
    if resolution is not None and resolution != self.monitor.resolution:
      self.monitor.resolution = resolution
      self.stage = self.whole.at_stage(resolution)
      self.display.status(f"compiling for {resolution}x{resolution} pixels")

  def draw_samples(self, step: int, state: base.TrainState) -> None:
    """Draws the fixed prompts and latents and calls the hook."""
    if self.stage.sample is None:
      return
    self.monitor.flush()
    self.sampled_at = step
    with self.timer.phase("samples"):
      self.display.status("drawing samples", brief=True)
      samples = self.stage.sample(state)
      memory.return_freed()  # the first call compiled
      if hosts.is_primary():
        image = self.hooks.on_samples(step, samples, self.folder)
        if image is not None:
          self.log.image(step, "samples", image)
      self.monitor.look_at_samples(step, samples)

  def save(self, step: int, state: base.TrainState) -> None:
    """Starts to save. All steps up to the checkpoint are looked at and logged first."""
    self.monitor.flush()
    with self.timer.phase("checkpoint"):
      self.display.status("saving", brief=True)
      self.feed.skipped.share()
      guard.check_state(step, state)
      progress_so_far = {"clock": self.timer.to_json(), "schedule": self.growing.to_json()} | self.monitor.to_json()
      self.place.push()  # first: a checkpoint's log is never older than the checkpoint
      self.checkpoints.save(step, state, config_files.to_mapping(self.whole.experiment), progress_so_far)

  def report_end(self, step: int, reason: str) -> None:
    """Prints how the run ended."""
    if not hosts.is_primary():
      return
    newest = self.checkpoints.newest()
    saved = None if newest is None else self.checkpoints.folder / str(newest)
    if reason == CORRUPT_RECORDS:
      stopping.report_corrupt_records(self.feed.describe_problem(), step, saved)
    else:
      stopping.report_end(self.folder.path, self.whole.experiment.train, step, reason, saved)


def _open_folder(stack, folder, prepared, resumed):
  """Locks the run's folder, writes its config and opens its files: (log, skipped records)."""
  primary = hosts.is_primary()
  with hosts.together("taking the run's folder"):
    workdir.check_writable(folder.path)
    stack.enter_context(workdir.locked(folder.path) if primary else contextlib.nullcontext())
    if primary:
      files.write_text(folder.config, config_files.to_json(prepared.experiment))
    log = stack.enter_context(contextlib.closing(metrics_lib.Log(folder) if primary else metrics_lib.NoLog()))
    skipped = skipped_records.follow(
      folder.skipped_records, prepared.dataset, prepared.experiment.data.max_skipped, resumed=resumed
    )
  with hosts.together("looking for what process 0 wrote"):
    if not folder.url and not folder.config.is_file():
      raise UserError(
        f"workdir {folder.path} is not the folder that process 0 writes to: all processes need the same "
        "one, on a file system that they share"
      )
  skipped.begin()
  return log, skipped


def _check_same_folder(folder, newest):
  """All processes must resume from the same step. A file system may show a checkpoint to some of them later."""
  primary = hosts.from_primary(-1 if newest is None else newest)
  with hosts.together("looking for the newest checkpoint"):
    if primary != (-1 if newest is None else newest):
      raise UserError(
        f"newest checkpoint in {folder.checkpoints}: {'none' if newest is None else f'step {newest}'} here, "
        f"{'none' if primary < 0 else f'step {primary}'} in process 0; all processes need the same workdir, on a "
        "file system that they share"
      )


def _devices() -> str:
  """Such as "16 tpu"."""
  return f"{jax.device_count()} {jax.default_backend()}"


def _tell(message: Any) -> None:
  if message is not None and hosts.is_primary():
    print(local_copies.shown(message), flush=True)
