"""Local copies of what is at gs:// and s3:// URLs."""

import functools
import hashlib
import os
import pathlib
from typing import Any

from aurora_jax import storage, user_cache
from aurora_jax.errors import UserError

_shown: dict[str, str] = {}


def show_as(folder: str | os.PathLike, url: str) -> None:
  """Makes `shown` write `url` for a local copy of it."""
  _shown[str(folder)] = url


def shown(message: Any) -> str:
  """A message in which local copies of what is at a URL are named by that URL."""
  message = str(message)
  for folder, url in sorted(_shown.items(), key=lambda entry: -len(entry[0])):
    message = message.replace(folder, url)
  return message


def cache_folder(kind: str, url: str) -> pathlib.Path:
  """The folder of the user's cache for local copies of what is at a URL. It may not exist yet.

  Args:
    kind: of copies, such as "runs".
    url: of what is copied.

  Raises:
    UserError: there is no place for caches.
  """
  place = user_cache.folder(kind)
  if place is None:
    raise UserError(f"{url}: there is no folder for local copies; XDG_CACHE_HOME=FOLDER sets one")
  return place / hashlib.sha256(str(url).rstrip("/").encode()).hexdigest()[:20]


@functools.cache
def of_folder(folder: str) -> str:
  """A local copy of a folder of weights at a URL, with all that is in it; another path is returned as it is.

  The copy is in the user's cache folder. What has another size than at the URL is fetched again. A process looks once.

  Raises:
    StorageError: it cannot be read.
    UserError: there is nothing at the URL, or the copy cannot be written.
  """
  if not storage.is_url(folder):
    return folder
  storage.check_url(folder)
  found = storage.find(folder)
  if not found:
    raise UserError(f"{folder} does not exist ({storage.server(folder)})")
  place = cache_folder("weights", folder)
  show_as(place, folder)
  same = lambda name: (place / name).is_file() and (place / name).stat().st_size == found[name]
  small = 1 << 20  # bytes; such files may change and keep their size
  storage.download_all(folder, place, {name: count for name, count in found.items() if count < small or not same(name)})
  return str(place)
