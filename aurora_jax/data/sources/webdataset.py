"""Webdataset tars, as img2dataset and webdataset's TarWriter write them.

Members that follow each other and share a name up to the first dot are one record: an image, a caption (`.txt`), and
what is known about it (`.json`). Nothing is unpacked: members are read in memory.
"""

import dataclasses
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator

from aurora_jax import text
from aurora_jax.data import filters
from aurora_jax.data.image_folder import IMAGE_SUFFIXES
from aurora_jax.data.sources import base
from aurora_jax.data.sources.base import CaptionFields, FilePart, Item, PartedSource, Rejected
from aurora_jax.data.sources.listing import find_files

_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
_IMAGES = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
_MAXIMAL_TEXT = 2**24  # bytes of a caption or of JSON
_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
_BLOCK = 512


def webdataset(path: str | os.PathLike, fields: CaptionFields = CaptionFields()) -> PartedSource:
  """Tars of images with captions.

  Args:
    path: a tar, or a folder that is searched for `*.tar`.
    fields: which fields are captions: "txt" is the `.txt` member, all others are keys of the `.json` member.

  Returns:
    A source with one part per tar.
  """
  fields = dataclasses.replace(fields, defaults=("txt", "caption", "text"))
  tars = find_files(path, (".tar", ".tar.gz", ".tgz"), "tar")
  return PartedSource(
    name=base.name_of(path, "webdataset"),
    description=f"webdataset {base.shown(os.path.basename(os.path.abspath(path)))}",
    licence="unknown (the user's images)",
    list_parts=lambda: (TarPart(tar, os.path.getsize(tar), fields) for tar in tars),
  )


@dataclasses.dataclass(frozen=True)
class TarPart(FilePart):
  """One tar."""

  path: str
  size: int
  fields: CaptionFields

  def files(self) -> Iterable[str]:
    """See `base.Part`."""
    return (self.path,)

  def items(self) -> Iterator[Item | Rejected]:
    """See `base.Part`."""
    stem = os.path.basename(self.path).split(".")[0]
    members, found = 0, {}
    try:
      with tarfile.open(self.path, errors="surrogateescape") as tar:
        for member in tar:
          tar.members = []  # pyrefly: ignore [missing-attribute]  # otherwise all headers stay in memory
          members += 1
          match = _MEMBER.fullmatch(member.name)
          if member.isdir():
            continue
          if not member.isreg():
            yield _rejected(stem, member.name, "a link or device in a tar, which is not followed")
          elif not base.is_inside(member.name):
            yield _rejected(stem, member.name, "a name in a tar that leads out of it")
          elif match is not None:
            if found and found["__key__"] != match[1]:
              yield self._item(stem, found)
              found = {}
            found["__key__"] = match[1]
            _add(found, match[2].lower(), member, tar)
      if found:
        yield self._item(stem, found)
      problem = self._problem_at(tar.offset)
    except _ERRORS as error:
      if found:
        yield self._item(stem, found)
      problem = " ".join(str(error).split()) or type(error).__name__
    if problem:
      reason = f"tar is damaged after {members:,} members: {text.printable(problem, 100)}"
      yield Rejected(text.printable(os.path.basename(self.path)), reason, base.DAMAGED)

  def _problem_at(self, offset):
    """Why a tar ends at an offset, if not by its end mark; Python's reader takes a broken header for the end."""
    with open(self.path, "rb") as file:
      if file.read(2) == b"\x1f\x8b":  # gzip has its own checksum
        return None
      file.seek(offset)
      block = file.read(_BLOCK)
    if any(block):
      return "a header is broken"
    return None if len(block) == _BLOCK else "it has no end mark and may be cut off"

  def _item(self, stem, found):
    key = f"{stem}/{found.pop('__key__')}"
    problem = found.pop("__problem__", None)
    if problem:
      return Rejected(text.printable(key), *problem)
    record = found.pop("json", {})
    return base.item_or_rejected(
      key, {**record, **found}, self.fields, image=found.pop("__image__", None), scores=filters.scores_of(record)
    )


def _rejected(stem, name, reason):
  return Rejected(text.printable(f"{stem}/{name}", 200), reason, base.BAD_NAME)


def _add(found, suffix, member, tar):
  """Reads a member of a record into `found`; what is no image, caption or JSON is passed over."""
  is_image = suffix in _IMAGES
  name = "__image__" if is_image else suffix
  if not is_image and suffix not in ("txt", "json"):
    return
  if name in found:
    found["__problem__"] = f"two members of this name: .{text.printable(suffix)}", base.SAME_KEY
    return
  if member.size > (base.MAXIMAL_IMAGE_BYTES if is_image else _MAXIMAL_TEXT):
    error = base.too_long(member.size)
    found["__problem__"] = str(error), error.kind
    return
  file = tar.extractfile(member)
  data = file.read() if file else b""
  if suffix == "json":
    try:
      record = json.loads(text.decode(data))
      found["json"] = record if isinstance(record, dict) else {}
    except (ValueError, RecursionError):
      found["__problem__"] = "its JSON cannot be read", base.DAMAGED
  else:
    found[name] = data
