"""Text from outside: decoded whatever wrote it, and shown so that a terminal takes it for text."""

import os
import re
import subprocess
import sys

import pytest

from aurora_jax import text
from aurora_jax.errors import UserError


@pytest.mark.parametrize(
  "value, shown",
  [
    ("red heart", "red heart"),
    ("a\x1b[31mred\x07 \u202e green", r"a\x1b[31mred\x07 \u202e green"),
    ("two\nlines\r\tand \x7f\x85\x9b", r"two\nlines\r\tand \x7f\x85\x9b"),
    ("\u2028\u2029\u2066\ufeff\u200b", r"\u2028\u2029\u2066\ufeff\u200b"),
    ("caf\udce9 \ud800", r"caf\xe9 \ud800"),
    # What people write stays: accents, scripts with joiners, emoji of several parts and flags with tags, no-break
    # space.
    ("é e\u0301 क्\u200dष می\u200cخواهم", "é e\u0301 क्\u200dष می\u200cخواهم"),
    ("👩‍👩‍👧 🏴\U000e0067\U000e007f ❤️ a\xa0b\u3000c", "👩‍👩‍👧 🏴\U000e0067\U000e007f ❤️ a\xa0b\u3000c"),
    (r"back\slash", r"back\slash"),
    (7, "7"),
  ],
)
def test_printable(value, shown):
  assert text.printable(value) == shown
  assert text.printable(shown) == shown


def test_nothing_that_moves_the_cursor_is_left():
  everything = "".join(map(chr, range(sys.maxunicode + 1)))
  shown = text.printable(everything)
  assert not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", shown)
  shown.encode()


@pytest.mark.parametrize("value", ["x" * 40, "\x1b" * 40, "ä\n" * 20, "x" * 9 + "\x1b" * 5, "x" * 10_000_000])
@pytest.mark.parametrize("length", [4, 10, 11, 12, 13])
def test_shortened(value, length):
  short = text.printable(value, length)
  assert length - 3 - 3 <= len(short) <= length and short.endswith("...")
  assert text.printable(value).startswith(short[:-3]) if len(value) < 1000 else True
  assert re.fullmatch(r"(x|ä|\\x1b|\\n)*\.\.\.", short)


def test_what_fits_is_not_shortened():
  assert text.printable("12345", 5) == "12345" and text.printable("123\n", 5) == r"123\n"
  assert text.printable("1234\n", 5) == "12..."


@pytest.mark.parametrize(
  "data, decoded",
  [
    ("red äpfel\n".encode(), "red äpfel\n"),
    ("\ufeffred\r\ncat".encode(), "red\r\ncat"),
    ("red 🍎".encode("utf-16"), "red 🍎"),
    ("\ufeffred 🍎".encode("utf-16-be"), "red 🍎"),
    ("red 🍎".encode("utf-32"), "red 🍎"),
    ("\ufeffred 🍎".encode("utf-32-be"), "red 🍎"),
    (b"", ""),
    (b"\xef\xbb\xbf", ""),
  ],
)
def test_decode(data, decoded, tmp_path):
  assert text.decode(data) == decoded
  (tmp_path / "x").write_bytes(data)
  assert text.read_text(tmp_path / "x") == decoded


@pytest.mark.parametrize(
  "data, words",
  [
    (b"caf\xe9", "is not UTF-8"),
    ("red heart\ncat face\n".encode("utf-16-le"), "looks like UTF-16 without a byte-order mark (save it as UTF-8)"),
    ("red heart\ncat face\n".encode("utf-16-be"), "looks like UTF-16 without a byte-order mark (save it as UTF-8)"),
    (b"\xff\xfea", "is not UTF-16"),
    (b"\xff\xfe\0\xd8a\0", "is not UTF-16"),
    (b"\xff\xfe\0\0\1", "is not UTF-32"),
    (b"a\0\0\0b\0\0c", "is not text (it has null bytes)"),
    (b"\x89PNG\r\n\x1a\n\0\0", "is not text (it has null bytes)"),
    (b"\xed\xa0\x80", "is not UTF-8"),
  ],
)
def test_no_text(data, words, tmp_path):
  with pytest.raises(text.TextError) as caught:
    text.decode(data)
  assert str(caught.value) == words
  path = tmp_path / "my\x1bfile"
  path.write_bytes(data)
  with pytest.raises(UserError) as caught:
    text.read_text(path)
  assert str(caught.value) == rf"{tmp_path}/my\x1bfile {words}"


def test_files_that_cannot_be_read(tmp_path):
  for path, words in ((tmp_path / "none", "No such file or directory"), (tmp_path, "Is a directory")):
    with pytest.raises(UserError, match=f"^{path} cannot be read: {words}$"):
      text.read_text(path)


def test_lines():
  written = "\ufeff  a   red\tsquare \r\n\n b\u2028c\r \u200b \n\ufeffd\x0be\x0cf\x85g"
  assert text.lines(written) == ["a red square", "b", "c", "\u200b", "d", "e", "f", "g"]
  assert text.lines(" \n\t\r\n") == []


@pytest.mark.parametrize("line", ["a", "ä", "赤", "❤️", "🏴\U000e0067\U000e007f", "!", "e\u0301", "\u200fשלום"])
def test_usable(line):
  assert text.unusable(line) is None


@pytest.mark.parametrize(
  "line, words",
  [
    ("a\x1b[31mred", r"has the control character \x1b"),
    ("a\x00", r"has the control character \x00"),
    ("\x9b31m", r"has the control character \x9b"),
    ("\u200b\u200d", "has no visible character"),
    ("\ufe0f", "has no visible character"),
    ("\u3164 \u2800\xad", "has no visible character"),
    ("", "has no visible character"),
  ],
)
def test_unusable(line, words):
  assert text.unusable(line) == words


@pytest.mark.parametrize(
  "locale", [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_names_are_the_same_in_every_locale(tmp_path, locale):
  for name in ("äpfel".encode(), b"caf\xe9", "🍎".encode()):
    (tmp_path / os.fsdecode(name)).touch()
  code = (
    "import os, sys; from aurora_jax import text; print(ascii(sorted(map(text.path_text, os.listdir(sys.argv[1])))))"
  )
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))} | locale
  done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
  assert done.stdout == ascii(["caf\udce9", "äpfel", "🍎"]) + "\n", done.stderr
