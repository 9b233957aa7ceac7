"""Clients of object storage: packages, settings, credentials and errors. storage.py makes the requests."""

import functools
import os
from typing import Any

from aurora_jax.errors import UserError

DEADLINE_VARIABLE = "AURORA_JAX_STORAGE_DEADLINE"
_DEADLINE_SECONDS = 120.0
SCHEMES = {"gs": ("gcsfs", "gcs", "STORAGE_EMULATOR_HOST"), "s3": ("s3fs", "s3", "AWS_ENDPOINT_URL")}
_SERVERS = {"gs": "storage.googleapis.com", "s3": "Amazon S3"}
_HELP = {
  "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS=FILE",
  "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_DENIED = ("Anonymous caller", "Invalid Credentials", "InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden")


class StorageError(UserError):
  """A server did not do what it was asked, within the deadline. The message is one line."""


class MissingError(StorageError):
  """There is no such object or bucket."""


def deadline() -> float:
  """Seconds for which a request is repeated: AURORA_JAX_STORAGE_DEADLINE, or 120.

  Raises:
    UserError: the variable holds no positive number.
  """
  value = os.environ.get(DEADLINE_VARIABLE, "")
  try:
    seconds = float(value) if value else _DEADLINE_SECONDS
  except ValueError:
    seconds = 0.0
  if not 0 < seconds < float("inf"):
    raise UserError(f"{DEADLINE_VARIABLE}={value}: a positive number of seconds is needed")
  return seconds


def attempt_seconds() -> float:
  """Seconds after which one short request counts as unanswered."""
  return min(30.0, max(1.0, deadline() / 6))


def server(url: Any) -> str:
  """The server that a URL is read from, for messages."""
  scheme = split(url)[0]
  return os.environ.get(SCHEMES[scheme][2]) or _SERVERS[scheme]


def split(url: Any) -> tuple[str, str, str]:
  """(scheme, bucket, key) of a URL."""
  scheme, _, rest = str(url).partition("://")
  if scheme not in SCHEMES:
    raise UserError(f"{url}: only gs:// and s3:// can be read")
  bucket, _, key = rest.partition("/")
  return scheme, bucket, key.strip("/")


def lasting(error: Exception, scheme: str) -> str | None:
  """Why it is useless to try again; None if it may help."""
  name, message = type(error).__name__, str(error)
  status = getattr(error, "code", None) or getattr(error, "status", None)
  if name in (
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "RefreshError",
    "ProfileNotFound",
  ):
    return f"there are no credentials ({_HELP[scheme]})"
  if isinstance(error, PermissionError) or status in (401, 403, "401", "403") or any(w in message for w in _DENIED):
    return f"no permission, or no credentials ({_HELP[scheme]}): {one_line(error)}"
  if isinstance(error, (TypeError, AttributeError, NameError, AssertionError)):
    raise error  # a mistake in a program
  if (
    isinstance(error, OSError)
    and error.filename
    and "://" not in str(error.filename)
    and os.path.isabs(str(error.filename))
  ):
    return f"{error.filename}: {error.strerror}"  # of the local file
  if name == "ParamValidationError" or (name == "HttpError" and status in (400, "400")):
    return one_line(error)
  return None


def one_line(error: Exception, longest: int = 160) -> str:
  """An error's message as one line of at most about `longest` characters."""
  message = " ".join(str(error).split()) or {"FSTimeoutError": "no answer"}.get(
    type(error).__name__, type(error).__name__
  )
  return message if len(message) <= longest else f"{message[:longest]} ..."


@functools.cache
def file_system(scheme: str, process: int) -> Any:
  """fsspec's file system of a scheme: without caches of listings, and with its own retries cut short.

  `process` is the process's id: what a child inherits from its parent does not work.
  """
  del process
  package, extra, _ = SCHEMES[scheme]
  seconds = attempt_seconds()
  try:
    if scheme == "s3":
      from fsspec import asyn
      from s3fs import S3FileSystem

      config = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"total_max_attempts": 1}}
      fs = S3FileSystem(
        config_kwargs=config | {"max_pool_connections": 64}, use_listings_cache=False, skip_instance_cache=True
      )
      fs.retries = 1
      asyn.sync(fs.loop, fs.set_session)  # reads much of botocore: not a part of the first request's time
    else:
      import logging

      import aiohttp
      from gcsfs.core import GCSFileSystem

      for name in ("gcsfs", "gcsfs.retry"):  # what it logs of an error is raised too
        logging.getLogger(name).setLevel(logging.CRITICAL)
      timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds)  # `_request` limits the whole
      fs = GCSFileSystem(requests_timeout=timeout, use_listings_cache=False, skip_instance_cache=True)
  except ImportError as error:
    raise UserError(
      f"{scheme}:// needs the package {package}: pip install 'aurora_jax[{extra}]' (or pip install {package})"
    ) from error
  except Exception as error:  # credentials that cannot be read
    raise StorageError(f"{scheme}:// cannot be used: {lasting(error, scheme) or one_line(error)}") from error
  return fs


def prepare_orbax() -> None:
  """Settles what Orbax reads and writes gs:// with: etils (over gcsfs) for small files, TensorStore for arrays.

  Both repeat requests by themselves. Here they get limits for requests without an answer, and the emulator's address.
  """
  seconds = attempt_seconds()
  emulator = os.environ.get("STORAGE_EMULATOR_HOST")
  settings = {
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": str(round(seconds)),
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": str(round(seconds)),
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
  }
  if emulator:
    settings |= {"TENSORSTORE_GCS_HTTP_URL": emulator, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "emulator"}
  for name, value in settings.items():
    os.environ.setdefault(name, value)
  file_system("gs", os.getpid())  # says what is missing
  import aiohttp
  from fsspec import config

  timeout = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
  for name in ("gs", "gcs"):
    config.conf[name] = {"requests_timeout": timeout, "use_listings_cache": False}
