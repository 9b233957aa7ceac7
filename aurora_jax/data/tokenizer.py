"""CLIP's byte-level BPE: trained on a data set's captions, or read from a Hugging Face CLIP folder.

Captions are lower-cased, split into words, digits and punctuation, encoded as bytes and merged. Any text can be
encoded. A row of ids has the begin token, the words, the end token and zeros. A longer caption is cut, with the end
token in the last position, as in the released models.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from aurora_jax import text
from aurora_jax.errors import UserError

BEGIN = "<|startoftext|>"
END = "<|endoftext|>"
PAD_ID = 0
WORD_END = "</w>"

# CLIP's splitting rule: special tokens, English contractions, runs of letters, single digits, the rest.
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

# Hugging Face writes a huge number for "no limit".
_LONGEST_CONTEXT = 1_000_000
_RELEASED_CONTEXT = 77


class Tokenizer:
  """Captions to rows of token ids.

  Attributes:
    context_length: length N of a row.
    begin_id, end_id: ids before and after a caption. In vocabularies trained here `end_id` is the highest id, so that
      the largest id of a row always marks the end of the text (OpenAI's rule).
    vocabulary_size: number of ids.
  """

  def __init__(self, backend: tokenizers.Tokenizer, context_length: int):
    """Wraps a backend; use `train` or `load`.

    Args:
      backend: from the `tokenizers` library; must know `<|startoftext|>` and `<|endoftext|>`.
      context_length: at least 2 (begin and end).
    """
    if context_length < 2:
      raise UserError(f"the context length must be at least 2 (begin and end of the text), it is {context_length}")
    self._backend = backend
    self._backend.no_padding()
    self._backend.no_truncation()
    self.context_length = context_length
    self.begin_id, self.end_id = backend.token_to_id(BEGIN), backend.token_to_id(END)
    if self.begin_id is None or self.end_id is None:
      raise UserError(f"not a CLIP tokenizer: no token {BEGIN if self.begin_id is None else END}")
    self.vocabulary_size = backend.get_vocab_size()

  def __call__(self, captions: Sequence[str]) -> np.ndarray:
    """Encodes captions: int32 [len(captions), context_length]."""
    rows = np.full((len(captions), self.context_length), PAD_ID, np.int32)
    for row, caption in zip(rows, captions, strict=True):
      # One at a time: the library's batch call starts threads, which do not survive a fork into worker processes.
      ids = self._backend.encode(caption, add_special_tokens=False).ids[: self.context_length - 2]
      row[: len(ids) + 2] = [self.begin_id, *ids, self.end_id]
    return rows

  def decode(self, tokens: Iterable[int]) -> str:
    """The text of one row, without begin, end and padding: lower-cased, a space after each word."""
    ids = []
    for token in list(tokens)[1:]:
      if token == self.end_id:
        break
      ids.append(int(token))
    return self._backend.decode(ids, skip_special_tokens=True).replace(WORD_END, " ").strip()

  @classmethod
  def train(cls, captions: Iterable[str], vocabulary_size: int, context_length: int) -> "Tokenizer":
    """Learns the merges from captions. The same captions give the same vocabulary.

    Args:
      captions: the texts.
      vocabulary_size: largest number of ids: 512 for the bytes (inside and at the end of a word), 2 for begin and end,
        the rest for merges. There are fewer if the captions offer fewer merges.
      context_length: N of the rows.

    Returns:
      The tokenizer.
    """
    # A byte may stand inside a word or end it.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters += [letter + WORD_END for letter in letters]
    specials = [BEGIN, END]
    if vocabulary_size < len(letters) + len(specials):
      raise UserError(
        f"a vocabulary of {vocabulary_size} is too small: the bytes alone need {len(letters) + len(specials)}"
      )
    # Letters go in as "special tokens": that fixes their ids. Left alone, the library numbers the letters that end a
    # word in the order of a hash table, and then breaks ties between merges by those numbers.
    trainer = trainers.BpeTrainer(
      vocab_size=vocabulary_size - len(specials),
      special_tokens=letters,
      end_of_word_suffix=WORD_END,
      show_progress=False,
    )
    learner = _backend({}, [])
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    entries = dict.fromkeys(letters + ["".join(pair) for pair in merges] + specials)
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    return cls(_backend(vocabulary, merges), context_length)

  def save(self, folder: str | os.PathLike) -> None:
    """Writes the files of a Hugging Face CLIP tokenizer into an existing folder.

    `tokenizer.json`, `vocab.json`, `merges.txt`, `tokenizer_config.json`.
    """
    folder = pathlib.Path(folder)
    # Written here, because the library takes no folder whose name is not UTF-8.
    whole = self._backend.to_str(pretty=True)
    model = json.loads(whole)["model"]
    in_order = dict(sorted(model["vocab"].items(), key=lambda entry: entry[1]))
    entries = json.dumps(in_order, ensure_ascii=False, separators=(",", ":"))
    _write(folder / "vocab.json", entries)
    _write(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    _write(folder / "tokenizer.json", whole)
    settings = {
      "tokenizer_class": "CLIPTokenizer",
      "bos_token": BEGIN,
      "eos_token": END,
      "unk_token": END,
      "pad_token": END,
      "model_max_length": self.context_length,
    }
    _write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")

  @classmethod
  def load(cls, folder: str | os.PathLike, context_length: int | None = None) -> "Tokenizer":
    """Reads the tokenizer of a CLIP folder, ours or Hugging Face's.

    Args:
      folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt`. For a part of Stable Diffusion (`text_encoder`),
        they are in the folder next to it (`tokenizer`).
      context_length: N of the rows; None takes `model_max_length` of `tokenizer_config.json`, else 77.

    Returns:
      The tokenizer.

    Raises:
      UserError: no such files, or they are corrupt.
    """
    folder = _folder_of(pathlib.Path(folder))
    try:
      if context_length is None:
        context_length = _context_length(folder)
      if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_str(text.read_text(folder / "tokenizer.json"))
      elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _backend(json.loads(text.read_text(folder / "vocab.json")), _read_merges(folder / "merges.txt"))
      else:
        raise UserError(f"no tokenizer in {folder}: neither tokenizer.json nor vocab.json with merges.txt")
    except UserError:
      raise
    except Exception as error:  # the library raises bare Exception for a damaged file
      raise UserError(f"cannot read the tokenizer in {folder}: {error}") from error
    return cls(backend, context_length)


def _folder_of(folder: pathlib.Path) -> pathlib.Path:
  """The folder of a model's tokenizer: the model's, or the one next to it (tokenizer_2 of text_encoder_2)."""
  if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")):
    return folder
  name = folder.resolve().name
  sibling = folder.resolve().with_name(name.replace("text_encoder", "tokenizer"))
  return sibling if sibling.name != name and sibling.is_dir() else folder


def _context_length(folder: pathlib.Path) -> int:
  path = folder / "tokenizer_config.json"
  if not path.is_file():
    return _RELEASED_CONTEXT
  length = json.loads(text.read_text(path)).get("model_max_length", _RELEASED_CONTEXT)
  return int(length) if length < _LONGEST_CONTEXT else _RELEASED_CONTEXT


def _read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
  """The pairs of a merges.txt, one per line after the version."""
  lines = text.read_text(path).split("\n")
  pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
  if any(len(pair) != 2 for pair in pairs):
    raise UserError(f"{path} is no list of pairs")
  return pairs


def _write(path: pathlib.Path, content: str) -> None:
  path.write_text(content, encoding="utf-8", newline="\n")


def _backend(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
  """CLIP's pipeline around a vocabulary and its merges."""
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocabulary, merges=merges, end_of_word_suffix=WORD_END, continuing_subword_prefix="", unk_token=END
    )
  )
  backend.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  if vocabulary:
    backend.add_special_tokens([BEGIN, END])
    backend.post_processor = processors.RobertaProcessing(
      (END, vocabulary[END]), (BEGIN, vocabulary[BEGIN]), trim_offsets=False, add_prefix_space=False
    )
  return backend
