"""Runs at gs:// and s3:// URLs.

Objects cannot be appended to. So all of a run but its checkpoints lives in a local folder, the spool. It is fetched
when a command begins, and what has changed is written back before every checkpoint, every minute, and at the end. What
a resumed run finds there is at least as new as the checkpoint; `metrics.history` leaves out the lines beyond it.

Against two runs in one folder there is the object `lease.json`, which a run renews while it lives. A lease that was not
renewed for LEASE_SECONDS, or whose process has ended on this machine, is taken over. Two runs that begin in the same
second may both get it; the one that loses it ends at its next check.

The spool has a file `.url` with the run's URL, by which `workdir.RunFolder` finds the checkpoints.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from typing import Any

from aurora_jax import files, local_copies, storage
from aurora_jax.errors import UserError
from aurora_jax.runs import workdir

LEASE = "lease.json"
LEASE_SECONDS = 60.0
_RENEW_SECONDS = 10.0
_PUSH_SECONDS = 60.0
_SETTLE_SECONDS = 0.2
_SMALL = 1 << 23  # bytes; smaller files are read at once, in case somebody appends to them meanwhile
_NOT_COPIED = (LEASE, workdir.URL_FILE)


class LocalRun:
  """A run in a local folder: nothing is to be copied. `RemoteRun` has the same methods.

  Attributes:
    folder: the run's.
  """

  def __init__(self, folder: workdir.RunFolder):
    self.folder = folder

  def push(self) -> None:
    """Writes back what has changed. Raises StorageError if that fails."""

  def check(self) -> None:
    """Raises UserError if the folder cannot be written any more, or belongs to another process."""


class RemoteRun(LocalRun):
  """The spool of a run at a URL."""

  def __init__(self, url: str, spool: pathlib.Path, whole: bool = True):
    """Takes the URL, the local folder, and whether it gets the files in folders, such as samples."""
    super().__init__(workdir.RunFolder(spool))
    self.url, self.whole = url, whole
    self._pushed: dict[str, tuple[int, int]] = {}  # name -> (size, time of change) of what is at the URL
    self._pushing = threading.Lock()
    self._error: Exception | None = None
    self._ended = threading.Event()
    self._token = ""

  def pull(self) -> bool:
    """Empties the spool and copies the run into it, without its checkpoints. Returns whether there is a run."""
    spool = self.folder.path
    try:
      shutil.rmtree(spool, ignore_errors=True)
      spool.mkdir(parents=True, exist_ok=True)
      (spool / workdir.URL_FILE).write_text(self.url, encoding="utf-8")
    except OSError as error:
      raise UserError(f"{spool} (for copies of {self.url}) cannot be written: {error.strerror or error}") from error
    names, folders = storage.list_folder(self.url)
    objects = {name: 0 for name in names if name not in _NOT_COPIED and not name.startswith(".")}
    for inner in folders if self.whole else ():
      if inner != "checkpoints":
        objects |= {f"{inner}/{name}": size for name, size in storage.find(storage.join(self.url, inner)).items()}
    storage.download_all(self.url, spool, objects)
    local_copies.show_as(spool, self.url)
    self._pushed = self._found()
    return bool(objects or folders)

  def _found(self):
    """{name: (size, time of change)} of the spool's files."""
    below = files.files_below(self.folder.path, skip=("checkpoints", *_NOT_COPIED))
    return {
      name: (status.st_size, status.st_mtime_ns)
      for name, status in below
      if not name.rsplit("/", 1)[-1].startswith(".")
    }

  def push(self) -> None:
    with self._pushing:
      for name, status in self._found().items():
        if self._pushed.get(name) != status:
          path, url = self.folder.path / name, storage.join(self.url, name)
          if status[0] < _SMALL:
            storage.write(url, path.read_bytes())
          else:
            storage.upload(path, url)
          self._pushed[name] = status

  def check(self) -> None:
    if self._error is not None:
      error, self._error = self._error, None
      raise error

  @contextlib.contextmanager
  def leased(self) -> Generator[None, None, None]:
    """A context in which this process alone trains, and the spool is written back in the background and at the end."""
    self._take_lease()
    thread = threading.Thread(target=self._keep, name="storage of the run", daemon=True)
    thread.start()
    failed = False
    try:
      yield
    except storage.StorageError:
      failed = True  # the server is away: another deadline would pass for nothing
      raise
    finally:
      self._ended.set()
      thread.join()
      with contextlib.suppress(*((UserError,) if sys.exc_info()[0] else ())):
        if not failed:
          self.push()
          self._release()

  def _keep(self):
    pushed = time.monotonic()
    while not self._ended.wait(_RENEW_SECONDS):
      try:
        if read_lease(self.url).get("token") != self._token:
          raise UserError(f"workdir {self.url}: another process has taken over the run")
        self._write_lease()
        if time.monotonic() - pushed > _PUSH_SECONDS:
          self.push()
          pushed = time.monotonic()
      except Exception as error:
        self._error = error
        return

  def _take_lease(self):
    found = read_lease(self.url)
    if found and not _has_ended(found):
      owner = f"{found.get('host')}, process {found.get('pid')}"
      if time.time() - found.get("renewed", 0) < LEASE_SECONDS:
        print(f"{self.url}: waiting whether the run on {owner} is still alive", file=sys.stderr, flush=True)
        end = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < end:
          time.sleep(min(5.0, max(0.0, end - time.monotonic())))
          now = read_lease(self.url)
          if not now:
            break
          if now != found:
            raise UserError(f"workdir {self.url}: another process is training in it ({owner})")
    self._token = secrets.token_hex(8)
    _own_tokens.add(self._token)
    self._write_lease()
    time.sleep(_SETTLE_SECONDS)
    if read_lease(self.url).get("token") != self._token:
      raise UserError(f"workdir {self.url}: another process is training in it")

  def _write_lease(self):
    content = {"token": self._token, "host": socket.gethostname(), "boot": _boot_id(), "pid": os.getpid()}
    storage.write(storage.join(self.url, LEASE), json.dumps(content | {"renewed": time.time()}).encode())

  def _release(self):
    if read_lease(self.url).get("token") == self._token:
      storage.delete([storage.join(self.url, LEASE)])


_own_tokens: set[str] = set()


def read_lease(url: str) -> dict[str, Any]:
  """The content of a run's lease; {} if there is none."""
  try:
    found = json.loads(storage.read(storage.join(url, LEASE)))
  except (storage.MissingError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def is_leased(url: str) -> bool:
  """Whether a process trains in the run at a URL now, by the time of its last renewal."""
  found = read_lease(url)
  return bool(found) and not _has_ended(found) and time.time() - found.get("renewed", 0) < LEASE_SECONDS


def _has_ended(lease):
  """Whether the process of a lease ran on this machine and has ended."""
  if (lease.get("host"), lease.get("boot")) != (socket.gethostname(), _boot_id()):
    return False
  try:
    os.kill(int(lease["pid"]), 0)
  except ProcessLookupError:
    return True
  except (OSError, ValueError, KeyError, TypeError):
    return False
  # A lease of this process's number that is not its own is from an earlier container of the same name.
  return lease["pid"] == os.getpid() and lease.get("token") not in _own_tokens


@functools.cache
def _boot_id():
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  except OSError:
    return ""


@contextlib.contextmanager
def trained(path: str | os.PathLike | LocalRun, primary: bool = True) -> Generator[LocalRun, None, None]:
  """A context for training in a run's folder, local or at a URL.

  Args:
    path: the folder; or what an outer `trained` yielded, which is returned.
    primary: whether this is the process that writes the run's files. Another one gets a copy of them.

  Yields:
    The run. Its folder is local; its checkpoints may be remote.

  Raises:
    UserError: another process trains in it, or the server cannot be reached.
  """
  if isinstance(path, LocalRun):
    yield path
    return
  if not storage.is_url(path):
    if "://" in str(path):
      workdir.check_writable(path)  # says which URLs are known; a `Path` no longer has the "//"
    yield LocalRun(workdir.RunFolder(pathlib.Path(path)))
    return
  url = str(path).rstrip("/")
  with contextlib.ExitStack() as stack:
    if not primary:
      run = RemoteRun(url, _temporary(stack))
      run.pull()
      yield run
      return
    spool = local_copies.cache_folder("runs", url)
    stack.enter_context(_locked_spool(spool, url))
    run = RemoteRun(url, spool / "run")
    stack.callback(shutil.rmtree, spool / "run", ignore_errors=True)
    stack.enter_context(run.leased())
    run.pull()
    yield run


@contextlib.contextmanager
def _locked_spool(spool, url):
  local_copies.show_as(spool, url)  # for the error of the lock
  with workdir.locked(spool):
    yield


def _temporary(stack):
  return pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora_jax-")), "run")


_copies = contextlib.ExitStack()
atexit.register(_copies.close)


def fetched(url: str, whole: bool = False) -> pathlib.Path:
  """A local copy of the run at a URL, for reading: without its checkpoints, which are read where they are.

  A process fetches it once. It is removed when the process ends.

  Args:
    url: of the run.
    whole: also the files in its folders, such as samples.

  Raises:
    UserError: there is nothing at the URL, or it cannot be read.
  """
  storage.check_url(url)
  url = url.rstrip("/")
  known = [run for run in _fetched.values() if run.url == url and (run.whole or not whole)]
  if known:
    return known[-1].folder.path
  run = RemoteRun(url, _temporary(_copies), whole)
  if not run.pull():
    raise UserError(f"run folder not found: {url}")
  _fetched[run.folder.path] = run
  return run.folder.path


_fetched: dict[pathlib.Path, RemoteRun] = {}


def write_back(folder: workdir.RunFolder) -> None:
  """Writes back what a command has changed in a copy that `fetched` made; does nothing for a local run."""
  if folder.path in _fetched:
    _fetched[folder.path].push()


def refuse_trained(folder: workdir.RunFolder) -> None:
  """Raises UserError for the copy of a run in which a process trains: it would overwrite what `write_back` writes."""
  if folder.path in _fetched and is_leased(_fetched[folder.path].url):
    raise UserError(
      f"{_fetched[folder.path].url}: a process trains in it; its files can be written when that has ended"
    )
