"""Builds all parts of a source, in this process, in several, or on Apache Beam. The files are the same."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from aurora_jax.data import build_part, build_settings
from aurora_jax.data.sources.base import Part
from aurora_jax.errors import UserError

_WAITING_PER_WORKER = 3  # parts that are listed ahead
_POLL_SECONDS = 0.5


def identity(part: Part) -> str:
  """A digest of a part's description and of the sizes and times of its files: another content has another one."""
  digest = hashlib.blake2b(repr(part).encode(errors="surrogatepass"), digest_size=16)
  for path in part.files():
    try:
      status = os.stat(path)
      digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
    except OSError:
      digest.update(b"missing\n")
  return digest.hexdigest()


def run(
  parts: Iterable[Part],
  folder: pathlib.Path,
  settings: build_settings.Settings,
  workers: int,
  on_items: Callable[[int], None] = lambda done: None,
) -> int:
  """Builds the parts that are not finished.

  Args:
    parts: of the source, in order. Only a few are held at a time.
    folder: where shards and reports are written.
    settings: of the data set.
    workers: number of processes; 1 works in this process. A single part is built in this process, too.
    on_items: called with the number of items done so far.

  Returns:
    The number of parts.
  """
  numbered = enumerate(parts)
  first = list(itertools.islice(numbered, 2))
  if workers > 1 and len(first) > 1:
    return _in_processes(itertools.chain(first, numbered), folder, settings, workers, on_items)
  done = count = 0
  for number, part in itertools.chain(first, numbered):

    def add(items):
      nonlocal done
      done += items
      on_items(done)

    build_part.build_part(part, number, folder, settings, identity(part), add)
    count = number + 1
  return count


def _in_processes(numbered: Iterator[tuple[int, Part]], folder, settings, workers, on_items) -> int:
  # Not a fork of this process: it has threads, and a library of the source may have its own.
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([__name__])
  done, stop = context.Value("q", 0), context.Event()
  count, waiting = 0, set()
  pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (done, stop))
  try:
    while True:
      for number, part in itertools.islice(numbered, max(0, _WAITING_PER_WORKER * workers - len(waiting))):
        waiting.add(pool.submit(_work, part, number, folder, settings))
        count = number + 1
      if not waiting:
        break
      finished, waiting = concurrent.futures.wait(waiting, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
      for future in finished:
        future.result()
      on_items(done.value)
  except concurrent.futures.process.BrokenProcessPool:
    raise UserError(
      "a worker process was killed (out of memory?): run the same command again to go on, with fewer --workers"
    ) from None
  finally:
    stop.set()
    pool.shutdown(cancel_futures=True)
  return count


_worker = None  # (items done by all workers, whether to stop), in a worker process


def _start_worker(done, stop):
  """Prepares a worker process."""
  global _worker
  _worker = done, stop
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process is told, and stops the workers

  def die_with_parent():
    parent = multiprocessing.parent_process()
    if parent is None:
      return
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=die_with_parent, daemon=True).start()


def _work(part, number, folder, settings):
  assert _worker is not None
  done, stop = _worker

  def on_items(count):
    with done.get_lock():
      done.value += count
    if stop.is_set():
      raise build_part.Stopped

  with contextlib.suppress(build_part.Stopped):
    build_part.build_part(part, number, folder, settings, identity(part), on_items)


def run_on_beam(
  parts: Iterable[Part],
  folder: pathlib.Path,
  settings: build_settings.Settings,
  runner: str,
  options: Sequence[str] = (),
) -> int:
  """Builds the parts that are not finished on Apache Beam.

  Args:
    parts: of the source. All are listed first.
    folder: where shards and reports are written; all workers must see it under this path.
    settings: of the data set.
    runner: such as "DirectRunner", "FlinkRunner", "SparkRunner" or "DataflowRunner".
    options: Beam's own flags, such as "--project=P".

  Returns:
    The number of parts.

  Raises:
    UserError: Apache Beam is not installed, or does not know the runner.
  """
  try:
    import apache_beam as beam  # pyrefly: ignore [missing-import]
    from apache_beam.options import pipeline_options  # pyrefly: ignore [missing-import]
  except ImportError as error:
    raise UserError(f"--runner {runner} needs Apache Beam ({error}): pip install 'aurora_jax[beam]'") from None
  listed = list(enumerate(parts))
  try:
    pipeline = beam.Pipeline(options=pipeline_options.PipelineOptions([f"--runner={runner}", *options]))
  except (ValueError, ImportError) as error:
    raise UserError(f"--runner {runner}: {' '.join(str(error).split())[:200]}") from None
  with pipeline:
    _ = (
      pipeline
      | "Parts" >> beam.Create(listed)
      | "Spread" >> beam.Reshuffle()
      | "Build" >> beam.Map(_on_beam, os.fspath(folder), settings)
    )
  return len(listed)


def _on_beam(numbered, folder, settings):
  number, part = numbered
  build_part.build_part(part, number, pathlib.Path(folder), settings, identity(part))
  return number
