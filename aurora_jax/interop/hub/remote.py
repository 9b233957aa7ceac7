"""The Hub itself: downloads exported folders, and uploads them where asked to. Nothing else here needs a network.

The environment variable HF_ENDPOINT names another server, HF_TOKEN the token (or `hf auth login` stores it).
"""

import contextlib
import functools
import os
import pathlib
import re
import types
from collections.abc import Iterator

from aurora_jax.errors import UserError

PREFIX = "hf:"
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
# What is read of a folder; its code stays there.
_READ = ("*.json", "*.safetensors", "*.txt")


def is_remote(name: str | os.PathLike) -> bool:
  """Whether a name is that of a folder on the Hub, "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION"."""
  return str(name).startswith(PREFIX)


@functools.cache
def download(name: str) -> pathlib.Path:
  """Downloads a folder, or takes the copy in the Hub's cache. A process asks once for each name.

  Args:
    name: "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION"; a revision is a branch, a tag or a commit.

  Returns:
    The local folder.

  Raises:
    UserError: a name of another form, no such repository, or no network.
  """
  match = _NAME.fullmatch(name.removeprefix(PREFIX))
  if match is None:
    raise UserError(f"{name}: a folder on the Hub is named {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION")
  hub = _library()
  unreachable = "the Hub cannot be reached, and the cache has no copy"
  with _explained(f"{name} cannot be downloaded", unreachable), _quiet(hub):
    path = hub.snapshot_download(match[1], revision=match[2], allow_patterns=list(_READ), endpoint=_endpoint(hub))
  return pathlib.Path(path)


def check_push(repository: str) -> None:
  """Raises a UserError if `push` would refuse the name, or if there is no token; to be asked before minutes of work."""
  match = _NAME.fullmatch(repository)
  if match is None or match[2]:
    raise UserError(f"a repository on the Hub is named OWNER/NAME, got {repository!r}")
  if not _library().get_token():
    raise UserError(
      f"nothing can be pushed to {repository} without a token of the Hub: set HF_TOKEN or `hf auth login`"
    )


def push(folder: str | os.PathLike, repository: str, *, private: bool = False) -> str:
  """Uploads a folder in one commit and makes the repository if there is none.

  Args:
    folder: as `folder.write` made it.
    repository: "OWNER/NAME".
    private: whether a new repository is private.

  Returns:
    Address of the repository.

  Raises:
    UserError: whatever the Hub or the network said, in one line.
  """
  folder, hub = pathlib.Path(folder), _library()
  names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
  names = [name for name in names if "__pycache__" not in name]
  with _explained(f"{folder} is written, but it could not be pushed to {repository}"), _quiet(hub):
    api = hub.HfApi(endpoint=_endpoint(hub))
    url = api.create_repo(repository, private=private or None, exist_ok=True)
    # One commit: the repository has all of the folder, or what it had before.
    operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    api.create_commit(repository, operations, commit_message="Upload by aurora_jax export")
  return str(url)


def _library() -> types.ModuleType:
  import huggingface_hub
  import huggingface_hub.constants
  import huggingface_hub.utils

  return huggingface_hub


def _endpoint(hub):
  """The server. huggingface_hub itself reads the variable when it is imported, which may have been earlier."""
  return os.environ.get("HF_ENDPOINT") or hub.constants.ENDPOINT


@contextlib.contextmanager
def _quiet(hub) -> Iterator[None]:
  """Without huggingface_hub's warnings, which repeat what the error says."""
  before = hub.utils.logging.get_verbosity()
  hub.utils.logging.set_verbosity_error()
  try:
    yield
  finally:
    hub.utils.logging.set_verbosity(before)


@contextlib.contextmanager
def _explained(what: str, unreachable: str = "the Hub cannot be reached") -> Iterator[None]:
  """Turns whatever the library raises into one line: its errors are of many classes, some of its HTTP client."""
  from huggingface_hub import errors

  try:
    yield
  except errors.RepositoryNotFoundError as error:
    raise UserError(f"{what}: no such repository, or none that the token may read") from error
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
    raise UserError(f"{what}: {unreachable}") from error
  except (AttributeError, NameError, TypeError, AssertionError):  # faults of a program
    raise
  except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise UserError(f"{what}: {lines[0] if lines else type(error).__name__}") from error
