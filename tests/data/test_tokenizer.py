"""The tokenizer against its own files, against transformers, and on text nobody expects."""

import json
import pickle

import numpy as np
import pytest

from aurora_jax.data import tokenizer as tokenizer_lib
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError

CAPTIONS = [
  "red heart",
  "blue heart",
  "red circle",
  "grinning face",
  "grinning cat with smiling eyes",
  "keycap: 10",
] * 3
BYTES = 512  # a byte inside a word, and at its end
ODD_TEXTS = [
  "",
  " ",
  "\t two\n spaces ",
  "I'M HERE, they'll see",
  "naïve café Ünï",
  "猫と犬",
  "👩‍🚀🚀",
  "1234567890",
  "a_b-c!?",
  "x" * 500,
  "\x00\x7f",
  "ﬁ ½ Ⅷ",
]


@pytest.fixture(scope="module")
def tokenizer():
  return Tokenizer.train(CAPTIONS, BYTES + 2 + 30, 10)


def test_rows(tokenizer):
  rows = tokenizer(["red heart", "", "Red  HEART"])
  assert rows.shape == (3, 10) and rows.dtype == np.int32
  first = rows[0].tolist()
  end = first.index(tokenizer.end_id)
  assert first[0] == tokenizer.begin_id and first[end + 1 :] == [0] * (9 - end)
  assert tokenizer.begin_id not in first[1:]
  assert rows[1].tolist() == [tokenizer.begin_id, tokenizer.end_id] + [0] * 8
  assert (rows[2] == rows[0]).all()
  assert tokenizer([]).shape == (0, 10)


def test_frequent_words_become_one_token(tokenizer):
  assert np.count_nonzero(tokenizer(["red heart"])) == 4  # begin, two words, end
  assert np.count_nonzero(tokenizer(["xyz"])) == 5


def test_end_is_the_largest_id(tokenizer):
  assert tokenizer.end_id == tokenizer.vocabulary_size - 1
  assert tokenizer.vocabulary_size == BYTES + 2 + 30
  rows = tokenizer(ODD_TEXTS)
  assert (rows.argmax(axis=1) == (rows == tokenizer.end_id).argmax(axis=1)).all()
  assert (rows.max(axis=1) == tokenizer.end_id).all()


def test_long_text_is_cut_with_the_end_in_the_last_slot(tokenizer):
  rows = tokenizer(["red heart " * 4, "red heart " * 5000])
  assert (rows[0] == rows[1]).all()
  assert rows[0, -1] == tokenizer.end_id and (rows[0, :-1] != tokenizer.end_id).all() and (rows[0] != 0).all()
  assert rows[0, 1:9].tolist() == tokenizer(["red heart " * 3])[0, 1:7].tolist() + rows[0, 1:3].tolist()


def test_no_text_is_unknown(tokenizer):
  longer = Tokenizer(tokenizer._backend, 2000)
  for text in ODD_TEXTS[4:9]:
    assert longer.decode(longer([text])[0]).replace(" ", "") == text.lower().replace(" ", "")
  assert tokenizer.decode(tokenizer(["Red  heart"])[0]) == "red heart"


def test_same_captions_same_vocabulary():
  # Hash tables differ from one training to the next; the vocabulary must not.
  captions = [f"{a}{b} {b}{a}" for a in "abcdefgh" for b in "stuvwxyz"]
  files = {Tokenizer.train(captions, BYTES + 60, 8)._backend.to_str() for _ in range(4)}
  assert len(files) == 1


def test_fewer_merges_than_asked_for():
  assert BYTES + 2 < Tokenizer.train(["ab"], 5000, 8).vocabulary_size < BYTES + 10


@pytest.mark.parametrize("kept", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_save_and_load(tokenizer, tmp_path, kept):
  tokenizer.save(tmp_path)
  for path in tmp_path.iterdir():
    if path.name not in (*kept, "tokenizer_config.json"):
      path.unlink()
  loaded = Tokenizer.load(tmp_path)
  assert loaded.context_length == 10 and loaded.vocabulary_size == tokenizer.vocabulary_size
  assert (loaded(ODD_TEXTS + CAPTIONS) == tokenizer(ODD_TEXTS + CAPTIONS)).all()
  assert Tokenizer.load(tmp_path, 6).context_length == 6


def test_context_length_of_downloaded_folders(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": int(1e30)}))
  assert Tokenizer.load(tmp_path).context_length == 77
  (tmp_path / "tokenizer_config.json").unlink()
  assert Tokenizer.load(tmp_path).context_length == 77


def test_padding_and_truncation_of_the_file_do_not_count(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  path = tmp_path / "tokenizer.json"
  values = json.loads(path.read_text())
  values["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
  values["padding"] = {
    "strategy": {"Fixed": 9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
  }
  path.write_text(json.dumps(values))
  assert (Tokenizer.load(tmp_path)(CAPTIONS) == tokenizer(CAPTIONS)).all()


def test_transformers_reads_it_and_agrees(tokenizer, tmp_path):
  transformers = pytest.importorskip("transformers")
  tokenizer.save(tmp_path)
  theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
  longer = Tokenizer(tokenizer._backend, 2000)
  for text in ODD_TEXTS + CAPTIONS:
    ids = theirs(text).input_ids
    assert longer([text])[0, : len(ids) + 1].tolist() == ids + [0]


def test_travels_to_worker_processes(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert (copy(CAPTIONS) == tokenizer(CAPTIONS)).all()


def test_bad_input(tokenizer, tmp_path):
  with pytest.raises(UserError, match="513 is too small.*514"):
    Tokenizer.train(CAPTIONS, 513, 8)
  with pytest.raises(UserError, match="at least 2.*it is 1"):
    Tokenizer.train(CAPTIONS, 600, 1)
  with pytest.raises(UserError, match="no tokenizer in .*nowhere"):
    Tokenizer.load(tmp_path / "nowhere")
  tokenizer.save(tmp_path)
  text = (tmp_path / "tokenizer.json").read_text()
  (tmp_path / "tokenizer.json").write_text(text[:1000])
  with pytest.raises(UserError, match=f"cannot read the tokenizer in {tmp_path}"):
    Tokenizer.load(tmp_path)
  (tmp_path / "tokenizer.json").write_text(text.replace(tokenizer_lib.END, "<|stop|>"))
  with pytest.raises(UserError, match="no token <.endoftext.>"):
    Tokenizer.load(tmp_path)
