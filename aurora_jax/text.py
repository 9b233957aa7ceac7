"""Text from outside: read in whatever encoding it comes, and shown so that a terminal takes it for nothing but text.

Text files are UTF-8, whatever the locale. A byte-order mark is dropped, and UTF-16 or UTF-32 is read if it has one.
"""

import io
import os
import pathlib
import re
import shlex
import sys

from aurora_jax.errors import UserError

_BYTE_ORDER_MARKS = (
  (b"\xef\xbb\xbf", "utf-8"),
  (b"\xff\xfe\0\0", "utf-32-le"),  # before UTF-16, whose mark it begins with
  (b"\0\0\xfe\xff", "utf-32-be"),
  (b"\xff\xfe", "utf-16-le"),
  (b"\xfe\xff", "utf-16-be"),
)

# What a terminal acts on instead of showing it: control characters (C0, C1, delete), ends of lines and paragraphs, and
# marks that turn the direction of all that follows. Besides them what nobody can see in a message (zero-width space and
# its like, byte-order mark) and halves of surrogate pairs, which cannot be written. Joiners stay: emoji and many
# scripts need them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]")
_SHORT_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}
_SURROGATE_ESCAPES = range(0xDC80, 0xDD00)  # a byte that was not UTF-8, as Python carries it
_ELLIPSIS = "..."

_LINE_ENDS = re.compile("\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Unicode's Default_Ignorable_Code_Point, spaces and the blank letters: nothing that a reader sees.
_INVISIBLE = re.compile(
  "[\\s\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
  "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
_SURROGATES = re.compile("[\ud800-\udfff]")  # bytes that were not UTF-8, as Python carries them
_EDGES = " \u200b\u2060\ufeff"


class TextError(ValueError):
  """Bytes that are no text of a known encoding. The message says why, in the form "is not UTF-8"."""


def printable(value: object, length: int | None = None) -> str:
  """A value as one line that is safe for a terminal.

  Control characters, marks that change the direction of the text and bytes that are not UTF-8 are escaped as in Python
  (`\\x1b`, `\\u202e`); so nothing in the result moves the cursor, changes colors or ends the line.

  Args:
    value: text, or anything else that `str` takes.
    length: longest result in characters, at least 4; longer text ends in "...". None: as long as it is.

  Returns:
    The text.
  """
  text = str(value)
  if length is not None and len(text) > length:
    text = text[: length + 1]  # whatever is behind that is cut anyhow, and it may be megabytes
  pieces = [_escape(character) if _UNSAFE.match(character) else character for character in text]
  if length is None or sum(map(len, pieces)) <= length:
    return "".join(pieces)
  kept, left = [], length - len(_ELLIPSIS)
  for piece in pieces:
    left -= len(piece)
    if left < 0:
      break
    kept.append(piece)
  return "".join(kept) + _ELLIPSIS


def _escape(character: str) -> str:
  code = ord(character)
  if code in _SURROGATE_ESCAPES:
    code -= 0xDC00
  return _SHORT_ESCAPES.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def tolerate_locale() -> None:
  """Lets stdout and stderr escape what the locale's encoding lacks, instead of failing over it."""
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper) and not stream.closed:
      stream.reconfigure(errors="backslashreplace")


def path_text(path: str | bytes | os.PathLike) -> str:
  """A path as text, the same whatever the locale: its bytes as UTF-8, what is not UTF-8 as lone surrogates.

  It compares and sorts like text; `printable` makes it fit for showing and storing.
  """
  return os.fsencode(path).decode("utf-8", "surrogateescape")


def is_utf8(path: str | bytes | os.PathLike) -> bool:
  """Whether the bytes of a path, made absolute, are UTF-8."""
  return not _SURROGATES.search(path_text(os.path.abspath(path)))


def shell_quoted(path: str | bytes | os.PathLike) -> str:
  """A path as it stands in a command that can be pasted: quoted where a shell would take it apart.

  What a terminal cannot show is escaped in the manner of bash, $'caf\\xe9'.
  """
  plain = path_text(path)
  if printable(plain) == plain:
    return shlex.quote(plain)
  pieces = []
  for character in plain:
    if _UNSAFE.match(character):
      pieces += [f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape")]
    else:
      pieces.append(f"\\{character}" if character in "\\'" else character)
  return f"$'{''.join(pieces)}'"


def expand_home(path: str) -> str:
  """A path with the home folder in place of a leading `~` or `~user`; a shell leaves it after an "=".

  Raises:
    UserError: the path is empty or holds a null byte, or there is no home folder to put in place of `~`.
  """
  if not path or "\0" in path:
    raise UserError("a path is empty" if not path else f"a path has a null byte: {printable(path, 80)}")
  expanded = os.path.expanduser(path)
  if expanded == path and (path == "~" or path.startswith("~/")):
    raise UserError(f"{printable(path)}: there is no home folder to put in place of ~ (HOME is not set)")
  return expanded


def decode(data: bytes) -> str:
  """Bytes of a text file as text.

  Args:
    data: UTF-8 with or without a byte-order mark, or UTF-16 or UTF-32 with one.

  Returns:
    The text, without the mark.

  Raises:
    TextError: another encoding, or binary data.
  """
  mark, encoding = next((pair for pair in _BYTE_ORDER_MARKS if data.startswith(pair[0])), (b"", "utf-8"))
  body = data[len(mark) :]
  if not mark and b"\0" in data:
    raise TextError(_why_null_bytes(data))
  try:
    return body.decode(encoding)
  except UnicodeDecodeError:
    raise TextError(f"is not {encoding.upper()[:6].rstrip('-')}") from None


def _why_null_bytes(data: bytes) -> str:
  """Text in UTF-16 has its null bytes on one side: nearly all of the high bytes of Latin letters, none of the low
  ones.
  """
  even, odd = data[::2].count(0), data[1::2].count(0)
  if len(data) % 2 == 0 and min(even, odd) * 8 < max(even, odd):
    return "looks like UTF-16 without a byte-order mark (save it as UTF-8)"
  return "is not text (it has null bytes)"


def read_text(path: str | os.PathLike) -> str:
  """The text in a user's file; see `decode`.

  Raises:
    UserError: it cannot be read, or is no text of a known encoding: one line that names it.
  """
  try:
    return decode(pathlib.Path(path).read_bytes())
  except TextError as error:
    raise UserError(f"{printable(path_text(path))} {error}") from None
  except OSError as error:
    raise UserError(f"{printable(path_text(path))} cannot be read: {error.strerror or error}") from None


def lines(text: str) -> list[str]:
  """The lines of a text without their ends; runs of white space become one space, empty lines are left out.

  Zero-width spaces and byte-order marks (of files that were joined) go from the sides of a line that has more than
  them.
  """
  split = (" ".join(line.split()) for line in _LINE_ENDS.split(text))
  return [line.strip(_EDGES) or line for line in split if line]


def unusable(line: str) -> str | None:
  """Why a line is no prompt or caption, in the form "has ...", or None.

  Bytes that are not UTF-8, control characters, or nothing to be seen.
  """
  if _SURROGATES.search(line):
    return "has bytes that are not UTF-8"
  control = _CONTROLS.search(line)
  if control:
    return f"has the control character {_escape(control[0])}"
  if not _INVISIBLE.sub("", line):
    return "has no visible character"
  return None
