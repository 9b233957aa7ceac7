"""Finds the pairs of image and caption file in a folder, and accounts for every other file in it.

The caption file of NAME.png is NAME.txt or NAME.png.txt. If there is neither, a caption file counts whose name differs
only in letter case or in the encoding of accents (composed or decomposed, which differs between file systems), if it is
unambiguous.

NAME.json next to NAME.png, as img2dataset writes it, gives scores. If its field `caption` equals the text of the
caption file, that file holds one caption, even if it has several lines.

Names are compared as UTF-8 in every locale. Bytes that are not UTF-8 are escaped in keys.
"""

import collections
import dataclasses
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from aurora_jax import text
from aurora_jax.data import filters, images

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif", ".jp2")
CAPTION_SUFFIX = ".txt"
METADATA_SUFFIX = ".json"
_DATA_SUFFIXES = (".json", ".csv", ".tsv", ".xml", ".yaml", ".npy", ".npz", ".parquet")  # often next to each image
_MOST_CAPTION_BYTES = 2**24
_SHOWN = 60  # characters of a caption in a reason

# Kinds of files that did not become examples.
CAPTIONS = "caption files read"
METADATA = "metadata files read"
NO_CAPTION = "images without a caption file"
BAD_CAPTION = "images whose captions cannot be used"
UNKNOWN_FORMAT = "files of an unknown format next to a caption"
STRAY_CAPTION = "caption files without an image"
OTHER = "files of other kinds"
HIDDEN = "hidden files and folders"
UNREADABLE_FOLDER = "folders that cannot be read"
KNOWN_FOLDER = "linked folders that are searched elsewhere"
CYCLE = "linked folders that hold themselves"
DEAD_LINK = "links that lead nowhere"
SPECIAL = "pipes, sockets and devices"


@dataclasses.dataclass(frozen=True)
class Pair:
  """An image file and its captions.

  Attributes:
    key: the image's path within the folder, escaped; unique.
    path: the image's path.
    captions: at least one, the primary caption first.
    scores: numbers in its metadata file, by the names of `filters.SCORES`.
  """

  key: str
  path: str
  captions: tuple[str, ...]
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Scan:
  """Content of a folder.

  Attributes:
    pairs: in a fixed order.
    rejected: (key, reason) of images that cannot be used and of folders that cannot be searched.
    passed_over: (key, reason) of all other files, except caption and metadata files of pairs.
    captions_left_out: (key of the caption file, reason) of lines that are not captions.
    counts: {kind: number} of all that is not a pair. Together with the pairs, every file counts once.
  """

  pairs: list[Pair] = dataclasses.field(default_factory=list)
  rejected: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  passed_over: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  captions_left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def reject(self, what: str, key: str, reason: str) -> None:
    """Adds an image or folder that cannot be used, and counts it under `what`."""
    self.counts[what] += 1
    self.rejected.append((key, reason))

  def pass_over(self, what: str, key: str, reason: str) -> None:
    """Adds a file that is ignored, and counts it under `what`."""
    self.counts[what] += 1
    self.passed_over.append((key, reason))


def scan(root: str | os.PathLike) -> Scan:
  """Searches a folder and its subfolders, including linked ones. Each is searched once; hidden ones are skipped.

  Images are not decoded.
  """
  found = Scan()
  for folder, names in _walk(os.fspath(root), found):
    _sort_folder(folder, names, found)
  keys = collections.Counter()
  for number, pair in enumerate(found.pairs):
    keys[pair.key] += 1
    if keys[pair.key] > 1:  # two names are equal after escaping
      found.pairs[number] = dataclasses.replace(pair, key=f"{pair.key}~{keys[pair.key]}")
  return found


# ----------------------------------------------------------------------------------------------------------------------
# Folders


@dataclasses.dataclass(frozen=True)
class _Folder:
  """A folder to search.

  `path` opens it, `real` is the path without links, `name` is its path within the root as text.
  """

  path: str
  real: str
  name: str

  def key(self, name: str = "") -> str:
    """The key of a file in the folder, or of the folder itself."""
    return text.printable("/".join(filter(None, (self.name, name))))

  def child(self, path: str, real: str, name: str) -> "_Folder":
    return _Folder(path, real, f"{self.name}/{name}" if self.name else name)


def _walk(root: str, found: Scan) -> Iterator[tuple[_Folder, dict[str, str]]]:
  """Yields each folder with {name as text: path} of its files: first real folders, then linked ones."""
  waiting, links, searched = [_Folder(root, os.path.realpath(root), "")], collections.deque(), set()
  while waiting or links:
    folder = waiting.pop() if waiting else links.popleft()
    if folder.real in searched:
      found.pass_over(KNOWN_FOLDER, folder.key(), "linked folder, which is searched under another name")
      continue
    searched.add(folder.real)
    try:
      with os.scandir(folder.path) as listing:
        entries = sorted((text.path_text(entry.name), entry) for entry in listing)
    except OSError as error:
      found.reject(UNREADABLE_FOLDER, folder.key() or ".", f"folder cannot be read: {error.strerror}")
      continue
    files, folders = {}, []
    for name, entry in entries:
      kind = _kind(entry, name)
      if kind == "file":
        files[name] = entry.path
      elif kind == "folder" and not entry.is_symlink():
        folders.append(folder.child(entry.path, os.path.join(folder.real, entry.name), name))
      elif kind == "folder":
        target = os.path.realpath(entry.path)
        if _holds(target, folder.real):
          found.pass_over(CYCLE, folder.key(name), "linked folder that holds itself")
        else:
          links.append(folder.child(entry.path, target, name))
      else:
        found.pass_over(kind, folder.key(name), _REASONS[kind])
    yield folder, files
    waiting.extend(reversed(folders))


_REASONS = {HIDDEN: "hidden", DEAD_LINK: "a link that leads nowhere", SPECIAL: "no regular file"}


def _kind(entry: os.DirEntry, name: str) -> str:
  """ "file", "folder", or the kind under which another entry is counted."""
  if name.startswith("."):
    return HIDDEN
  try:
    if entry.is_dir():
      return "folder"
    if entry.is_file():
      return "file"
    return DEAD_LINK if entry.is_symlink() and not os.path.exists(entry.path) else SPECIAL
  except OSError:  # a link to itself
    return DEAD_LINK


def _holds(folder: str, other: str) -> bool:
  """Whether a folder is equal to another one or holds it; both are paths without links."""
  return other == folder or other.startswith(folder.rstrip(os.sep) + os.sep)


# ----------------------------------------------------------------------------------------------------------------------
# Files of one folder


def _sort_folder(folder: _Folder, files: dict[str, str], found: Scan) -> None:
  """Sorts the files of one folder into pairs, rejected and ignored files."""
  suffix = {name: os.path.splitext(name)[1].lower() for name in files}
  captions = [name for name in files if suffix[name] == CAPTION_SUFFIX]
  others = [name for name in files if suffix[name] not in (*IMAGE_SUFFIXES, CAPTION_SUFFIX, *_DATA_SUFFIXES)]
  certain = {name for name in files if suffix[name] in IMAGE_SUFFIXES}
  certain.update(name for name in others if _looks_like_image(files[name]))
  matches = _match(sorted(certain), captions)
  # A file that is an image only by its name counts as one if a caption file is left for it.
  taken = set(matches.values())
  more = _match(
    [name for name in others if name not in certain], [caption for caption in captions if caption not in taken]
  )
  readable = {name for name in more if suffix[name] in images.readable_suffixes()}
  matches |= {name: more[name] for name in readable}
  records = {
    name: record
    for image in matches
    if (name := _metadata_name(image, files)) and (record := _read_metadata(files[name])) is not None
  }
  used = set()
  for name, path in files.items():
    key, caption = folder.key(name), matches.get(name)
    if name not in certain and name not in readable:
      if name in records:
        found.counts[METADATA] += 1
      elif name in more:
        what = text.printable(suffix[name]) or "a name without suffix"
        found.reject(UNKNOWN_FORMAT, key, f"not a readable image: the format is none that is read ({what})")
      elif suffix[name] != CAPTION_SUFFIX:
        found.pass_over(OTHER, key, "not an image")
      continue
    if caption is None:
      wanted = os.path.splitext(name)[0] + CAPTION_SUFFIX
      record, lines, reason = {}, (), f"no caption file {text.printable(wanted)}"
      if os.path.isdir(os.path.splitext(path)[0] + CAPTION_SUFFIX):
        reason = f"caption file {text.printable(wanted)}: Is a directory"
    else:
      record = records.get(_metadata_name(name, files) or "", {})
      lines, reason = _read_captions(
        files[caption], caption, folder, found if caption not in used else None, record.get("caption")
      )
      used.add(caption)
    if lines:
      found.pairs.append(Pair(key, path, lines, filters.scores_of(record)))
    else:
      found.reject(BAD_CAPTION if caption else NO_CAPTION, key, reason)
  for name in captions:
    if name in used:
      found.counts[CAPTIONS] += 1
    else:
      found.pass_over(STRAY_CAPTION, folder.key(name), "no image of this name")


def _looks_like_image(path: str) -> bool:
  """Whether a file with an unknown suffix, or none, begins with the signature of an image."""
  try:
    with open(path, "rb") as file:
      return images.signature(file.read(16)) is not None
  except OSError:
    return False


def _match(image_names: Sequence[str], captions: Sequence[str]) -> dict[str, str]:
  """{image: caption file} by name, for the images that have one. Images of one stem may share a caption file."""
  matches, pending, free = {}, list(image_names), list(captions)
  for alike in (str, _composed, _folded):
    for whole in (False, True):
      by_name = collections.defaultdict(list)
      for caption in free:
        by_name[alike(os.path.splitext(caption)[0])].append(caption)
      wanting = collections.defaultdict(list)
      for image in pending:
        base = image if whole else os.path.splitext(image)[0]
        wanting[alike(base)].append((image, base))
      for name, pairs in wanting.items():
        candidates = by_name.get(name, ())
        exact = [caption for caption in candidates if caption == pairs[0][1] + CAPTION_SUFFIX]
        candidates = exact or candidates
        if len(candidates) == 1 and len({base for _, base in pairs}) == 1:
          matches |= {image: candidates[0] for image, _ in pairs}
      pending = [image for image in pending if image not in matches]
      taken = set(matches.values())
      free = [caption for caption in free if caption not in taken]
      if not pending or not free:
        return matches
  return matches


def _composed(name: str) -> str:
  return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
  return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _metadata_name(image: str, files: Mapping[str, str]) -> str | None:
  """The name of an image's metadata file among the files of its folder, or None."""
  return next((name for stem in (os.path.splitext(image)[0], image) if (name := stem + METADATA_SUFFIX) in files), None)


def _read_metadata(path: str) -> dict[str, object] | None:
  """The fields of a metadata file; None if it cannot be read or is no JSON object."""
  try:
    if os.path.getsize(path) > _MOST_CAPTION_BYTES:
      return None
    with open(path, "rb") as file:
      record = json.loads(text.decode(file.read()))
  except (OSError, ValueError, RecursionError):
    return None
  return record if isinstance(record, dict) else None


def _read_captions(
  path: str, name: str, folder: _Folder, found: Scan | None, whole: object = None
) -> tuple[tuple[str, ...], str]:
  """(captions, reason if there are none). If there are captions, the other lines are added to `found`.

  `whole` is the caption in the metadata file. If the caption file says the same, its lines are one caption.
  """
  shown = text.printable(name)
  try:
    if os.path.getsize(path) > _MOST_CAPTION_BYTES:
      return (), f"caption file {shown} has more than {_MOST_CAPTION_BYTES:,} bytes"
    with open(path, "rb") as file:
      lines = text.lines(text.decode(file.read()))
  except text.TextError as error:
    return (), f"caption file {shown} {error}"
  except OSError as error:
    return (), f"caption file {shown}: {error.strerror}"
  if isinstance(whole, str) and text.lines(whole) == lines:
    lines = [" ".join(lines)] if lines else []
  bad = [(line, reason) for line in lines if (reason := text.unusable(line))]
  captions = tuple(dict.fromkeys(line for line in lines if text.unusable(line) is None))
  if captions and found is not None:
    for line, reason in bad:
      found.captions_left_out.append((folder.key(name), f"a caption {reason}: {text.printable(line, _SHOWN)}"))
  if not captions and bad:
    return (), f"caption file {shown} {bad[0][1]}: {text.printable(bad[0][0], _SHOWN)}"
  return captions, f"caption file {shown} is empty"
