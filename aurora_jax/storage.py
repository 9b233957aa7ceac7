"""Object storage: files at `gs://` and `s3://` URLs, read by ranges and written whole.

The packages gcsfs and s3fs (fsspec) make the requests. They are optional: `pip install aurora_jax[gcs]` or
`aurora_jax[s3]`. Their usual settings apply: GOOGLE_APPLICATION_CREDENTIALS or gcloud's login and STORAGE_EMULATOR_HOST
for gs://, AWS_PROFILE, AWS_ACCESS_KEY_ID and so on and AWS_ENDPOINT_URL for s3://.

A request that fails for a passing reason (a server error, a lost connection, no answer) is repeated, with delays that
grow and are drawn at random, until AURORA_JAX_STORAGE_DEADLINE seconds have passed (default 120). Then a
`StorageError` of one line says what was asked of which server, and for how long.

Nothing here relies on renames: an object appears whole, or not at all.
"""

import contextlib
import errno
import functools
import itertools
import os
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aurora_jax import storage_client
from aurora_jax.errors import UserError
from aurora_jax.storage_client import MissingError as MissingError
from aurora_jax.storage_client import StorageError as StorageError
from aurora_jax.storage_client import attempt_seconds as attempt_seconds
from aurora_jax.storage_client import deadline as deadline
from aurora_jax.storage_client import prepare_orbax as prepare_orbax
from aurora_jax.storage_client import server as server

_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0  # seconds
_SLOWEST = 1e6  # bytes per second: a transfer may take this much longer than a short request
_AT_ONCE = 16  # transfers


def is_url(path: Any) -> bool:
  """Whether a path is the URL of an object or folder that this module reads: `gs://` or `s3://`."""
  return str(path).startswith(tuple(f"{scheme}://" for scheme in storage_client.SCHEMES))


def check_url(url: str) -> None:
  """Raises UserError unless `url` names a bucket and a folder in it, and its package is installed."""
  scheme, bucket, key = storage_client.split(url)
  if not bucket or not key:
    raise UserError(f"{url}: {scheme}://BUCKET/FOLDER is needed")
  storage_client.file_system(scheme, os.getpid())


def join(url: Any, *names: str) -> str:
  """A URL with further parts."""
  return "/".join((str(url).rstrip("/"), *names))


def read(url: str) -> bytes:
  """Reads an object. Raises MissingError if there is none, StorageError if it cannot be read."""
  return _request("read", url, lambda fs, path: fs._cat_file(path), size=0)


def read_range(url: str, offset: int, count: int) -> bytes:
  """Reads `count` bytes of an object from `offset`; fewer if it ends before. Raises as `read`."""
  if count <= 0:
    return b""
  return _request("read", url, lambda fs, path: fs._cat_file(path, start=offset, end=offset + count), size=count)


def size(url: str) -> int | None:
  """Size of an object in bytes; None if there is none."""
  try:
    found = _request("looked at", url, lambda fs, path: fs._info(path))
  except MissingError:
    return None
  return int(found["size"]) if found["type"] == "file" else None


def exists(url: str) -> bool:
  """Whether there is an object of this name."""
  return size(url) is not None


def write(url: str, content: bytes) -> None:
  """Writes an object; readers see the old one or the new one. Raises StorageError."""
  _request("written", url, lambda fs, path: fs._pipe_file(path, content), size=len(content))


def list_folder(url: str) -> tuple[list[str], list[str]]:
  """Names of the objects and of the folders that are in a folder, each sorted; empty if there is no such folder."""
  try:
    found = _request("listed", url, lambda fs, path: fs._ls(path.rstrip("/") + "/", detail=True))
  except MissingError:
    return [], []
  names = lambda kind: sorted(
    {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == kind}
  )
  return [name for name in names("file") if name], names("directory")


def find(url: str) -> dict[str, int]:
  """All objects below a folder: {name relative to the folder: size in bytes}; {} if there is no such folder."""
  prefix = str(url).rstrip("/").split("://", 1)[1] + "/"
  try:
    found = _request("listed", url, lambda fs, path: fs._find(path.rstrip("/") + "/", detail=True))
  except MissingError:
    return {}
  inside = {name.removeprefix(prefix): entry for name, entry in found.items() if name.startswith(prefix)}
  return {name: int(entry["size"]) for name, entry in sorted(inside.items()) if name and not name.endswith("/")}


def delete(urls: Iterable[str]) -> None:
  """Deletes objects; those that do not exist are passed over."""

  def one(url):
    with contextlib.suppress(MissingError):
      _request("deleted", url, lambda fs, path: fs._rm_file(path))

  _in_parallel(one, list(urls))


def delete_folder(url: str, first: Iterable[str] = ()) -> None:
  """Deletes all objects below a folder.

  Args:
    url: of the folder.
    first: names of objects that go before all others, such as the one that says that the folder is complete.
  """
  first = list(first)
  delete(join(url, name) for name in first)
  delete(join(url, name) for name in find(url) if name not in first)


def download(url: str, path: str | os.PathLike, bytes_expected: int = 0) -> None:
  """Copies an object to a local file, which appears under its name when it is complete.

  Raises:
    StorageError: the object does not exist or cannot be read.
    UserError: the file cannot be written.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _request("read", url, lambda fs, key: fs._get_file(key, str(partial)), size=bytes_expected)
    os.replace(partial, path)
  except OSError as error:
    raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
  finally:
    partial.unlink(missing_ok=True)


def upload(path: str | os.PathLike, url: str) -> None:
  """Copies a local file to an object. Raises StorageError, or UserError if the file cannot be read."""
  try:
    bytes_here = os.stat(path).st_size
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from error
  _request("written", url, lambda fs, key: fs._put_file(str(path), key), size=bytes_here)


def download_all(url: str, folder: str | os.PathLike, files: Mapping[str, int]) -> None:
  """Copies objects below `url` into a local folder, several at once.

  Args:
    url: of the folder.
    folder: the local folder, made if missing.
    files: {name relative to the folder: size in bytes}, as of `find`.
  """
  os.makedirs(folder, exist_ok=True)
  for name in files:  # names come from a server
    if name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name:
      raise StorageError(f"{join(url, name)}: this name would lead out of the folder")
  _in_parallel(lambda name: download(join(url, name), pathlib.Path(folder, name), files[name]), list(files))


def upload_all(folder: str | os.PathLike, url: str, names: Iterable[str]) -> None:
  """Copies files of a local folder to objects of the same names below `url`, several at once."""
  _in_parallel(lambda name: upload(pathlib.Path(folder, name), join(url, name)), list(names))


def check_writable(url: str, name: str) -> None:
  """Checks that a folder can be written to. Leaves nothing behind.

  Args:
    url: of the folder.
    name: of it in an error, such as "workdir gs://bucket/run".

  Raises:
    UserError: there is no such bucket, no permission, no credentials, or no answer within the deadline.
  """
  check_url(url)
  probe = join(url, f".probe-{os.getpid()}-{random.getrandbits(32):08x}")
  try:
    write(probe, b"")
    delete([probe])
  except MissingError as error:
    bucket = "{}://{}".format(*storage_client.split(url)[:2])
    raise UserError(f"{name} cannot be written: there is no bucket {bucket} at {server(url)}") from error
  except StorageError as error:
    raise UserError(f"{name} cannot be written: {error}") from error


class RangeReader:
  """Reads parts of an object. It is safe to share between threads.

  Attributes:
    url: of the object.
  """

  def __init__(self, url: str):
    self.url = url

  def pread(self, count: int, offset: int) -> bytes:
    """As `os.pread`, of an object. Raises FileNotFoundError, or StorageError for anything else."""
    try:
      return read_range(self.url, offset, count)
    except MissingError as error:
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from error

  @functools.cached_property
  def size(self) -> int:
    """In bytes; 0 if there is no object."""
    return size(self.url) or 0


def _in_parallel(function, items):
  """Calls a function with each item, several at once. The first error is raised after the calls that had begun."""
  if len(items) < 2:
    for item in items:
      function(item)
    return
  from concurrent.futures import ThreadPoolExecutor  # late: it takes a tenth of what `--help` takes

  with ThreadPoolExecutor(min(_AT_ONCE, len(items)), "storage") as pool:
    try:
      for _ in pool.map(function, items):
        pass
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _request(what: str, url: str, operation: Callable[..., Any], *, size: int = 0) -> Any:
  """Makes a request until it succeeds or the deadline has passed.

  Args:
    what: is done, for a message ("read").
    url: of the object.
    operation: (file system of fsspec, path without scheme) -> coroutine. It may be called several times.
    size: bytes that it moves, if known; a long transfer gets more time.
  """
  from fsspec import asyn

  scheme, bucket, key = storage_client.split(url)
  path = f"{bucket}/{key}"
  fs = storage_client.file_system(scheme, os.getpid())
  begin, allowed, extra = time.monotonic(), deadline(), size / _SLOWEST
  for number in itertools.count():
    try:
      # fsspec runs the coroutine in its own thread, and cancels it when the time is over.
      return asyn.sync(fs.loop, operation, fs, path, timeout=attempt_seconds() + extra)
    except FileNotFoundError as error:
      raise MissingError(f"{url} does not exist ({server(url)})") from error
    except Exception as error:
      lasting = storage_client.lasting(error, scheme)
      if lasting is not None:
        raise StorageError(f"{url} cannot be {what}: {lasting}") from error
      delay = min(_FIRST_DELAY * 2 ** min(number, 16), _LONGEST_DELAY) * random.uniform(0.5, 1.0)
      spent = time.monotonic() - begin
      if spent + delay > allowed + extra:
        raise StorageError(
          f"{url} cannot be {what}: {server(url)} did not do it in {spent:.0f} s and {number + 1} attempts "
          f"({storage_client.one_line(error)}); {storage_client.DEADLINE_VARIABLE} sets the time"
        ) from error
    time.sleep(delay)


def path(name: str | os.PathLike) -> Any:
  """A path as `pathlib.Path`, or as `etils.epath.Path` if it is a URL: that one can be joined, and Orbax takes it."""
  if not is_url(name):
    return pathlib.Path(name)
  os.environ.setdefault("EPATH_USE_TF", "0")  # TensorFlow's own access to buckets knows neither S3 nor other servers
  from etils import epath

  return epath.Path(name)
