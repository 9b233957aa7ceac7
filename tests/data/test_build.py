"""Building a data set: the held-out choice, what is written, and that it is written whole or not at all."""

import ast
import collections
import hashlib
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from aurora_jax.data import build_part, build_settings, heldout, images, sources, tfrecords
from aurora_jax.data.build import build, choose_heldout
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.sources import Item, words
from aurora_jax.errors import UserError


def items_of(*captions):
  return [Item(str(number), (caption,), str(number), "") for number, caption in enumerate(captions)]


def grid(rows=6, columns=7):
  """Every combination of two words: much to hold out."""
  return items_of(*(f"row{row} column{column}" for row in range(rows) for column in range(columns)))


def source_of(items, render=None, rejected=()):
  render = render or (lambda item, resolution: Image.new("RGB", (resolution, resolution), (int(item.key), 0, 0)))
  return sources.ListedSource("made_up", "made up for a test", "none", tuple(items), rejected, render)


def assert_compositional(items, held):
  trained = [set(words(item.captions[0])) for position, item in enumerate(items) if position not in held]
  known = set().union(*trained)
  for position in held:
    bag = set(words(items[position].captions[0]))
    assert len(bag) > 1
    assert bag <= known
    assert bag not in trained


# ------------------------------------------------------------------------------------------- the held-out choice


@pytest.mark.parametrize("skin_tones", [None, sources.UNNAMED, sources.NAMED])
@pytest.mark.parametrize("seed", [0, 1])
def test_heldout_of_openmoji(skin_tones, seed):
  items = sources.openmoji(skin_tones).items
  held = choose_heldout(items, 0.08, seed)
  assert 0.079 * len(items) < len(held) < 0.081 * len(items)
  assert_compositional(items, held)
  held_groups = {items[position].group for position in held}
  assert not held_groups & {item.group for position, item in enumerate(items) if position not in held}
  assert not {items[position].captions[0] for position in held} & set(build_settings.KEEP_FOR_TRAINING)


def test_heldout_depends_on_the_seed_alone():
  items = grid()
  assert choose_heldout(items, 0.2, 3) == choose_heldout(items, 0.2, 3)
  assert len({frozenset(choose_heldout(items, 0.2, seed)) for seed in range(10)}) > 5


@pytest.mark.parametrize("fraction, expected", [(0, 0), (0.1, 4), (0.5, 21)])
def test_heldout_fraction(fraction, expected):
  held = choose_heldout(grid(), fraction, 0)
  assert len(held) == expected
  assert_compositional(grid(), held)


def test_heldout_stops_where_words_would_be_lost():
  held = choose_heldout(grid(), 0.99, 0)
  assert_compositional(grid(), held)
  # Six rows and seven columns can all be named by seven captions, at best.
  assert 15 < len(held) <= 42 - 7


def test_nothing_shared_nothing_held_out():
  assert choose_heldout(items_of("a dog", "two cats", "red", "red", "", "!"), 0.5, 0) == set()


def test_keep():
  kept = {item.captions[0].upper() for item in grid() if "row0" in item.captions[0]}
  for seed in range(20):
    held = choose_heldout(grid(), 0.3, seed, keep=kept)
    assert held and not any("row0" in grid()[position].captions[0] for position in held)


def test_one_group_one_side():
  items = [
    Item(str(n), (f"{shape} {tone}",), shape, "")
    for n, (shape, tone) in enumerate(
      (f"shape{shape} of{shape % 3}", f"tone{tone}") for shape in range(12) for tone in range(3)
    )
  ]
  items += items_of(*(f"shape{shape}" for shape in range(12)))
  for seed in range(10):
    held = choose_heldout(items, 0.3, seed)
    counts = collections.Counter(items[position].group for position in held)
    assert counts and set(counts.values()) == {3}


def test_same_words_one_side():
  items = items_of("red cat", "Cat, red!", "cat red", "red dog", "blue cat", "blue dog", "dog")
  seen = set()
  for seed in range(30):
    held = choose_heldout(items, 0.45, seed)
    seen.add(frozenset(held & {0, 1, 2}))
    assert_compositional(items, held)
  assert seen == {frozenset(), frozenset({0, 1, 2})}


CHINESE = [f"{colour}色的{shape}" for colour in "红蓝绿黄" for shape in ("心", "星", "圆", "月亮", "太阳")]
JAPANESE = [f"{colour}い{shape}" for colour in ("赤", "青", "黒", "白") for shape in ("ハート", "ほし", "つき", "丸")]
THAI = [f"{shape}สี{colour}" for colour in ("แดง", "ดำ", "ขาว", "เขียว") for shape in ("หัวใจ", "ดาว", "วงกลม", "แมว")]


@pytest.mark.parametrize("captions", [CHINESE, JAPANESE, THAI], ids=["Chinese", "Japanese", "Thai"])
def test_scripts_without_spaces_are_held_out_by_characters(captions):
  items = items_of(*captions)
  held = choose_heldout(items, 0.2, 0)
  assert len(held) == round(0.2 * len(items))
  trained = set().union(*(captions[position] for position in range(len(items)) if position not in held))
  assert all(set(captions[position]) <= trained for position in held)
  combinations = {frozenset(captions[position]) for position in range(len(items)) if position not in held}
  assert not any(frozenset(captions[position]) in combinations for position in held)


def test_words_and_characters_in_one_caption():
  items = items_of(*(f"{name} {colour}色" for name in ("iPhone", "Laptop", "Tablet") for colour in "红蓝绿"))
  held = choose_heldout(items, 0.3, 0)
  assert len(held) == 3
  names = {items[position].captions[0].split()[0] for position in range(9) if position not in held}
  assert names == {"iPhone", "Laptop", "Tablet"}  # a Latin word is not taken apart


def test_scripts_with_spaces_are_held_out_by_words():
  for captions in (
    ("빨간 하트", "빨간 별", "파란 하트", "파란 별"),
    ("красное сердце", "красная звезда", "синее сердце"),
  ):
    assert [sorted(heldout._bag(caption)) for caption in captions] == [sorted(caption.split()) for caption in captions]


# ------------------------------------------------------------------------------------------- what is written


def test_manifest_tells_the_truth(tmp_path):
  items = [Item(str(n), item.captions * (1 + n % 2), item.group, "") for n, item in enumerate(grid())]
  returned = build(source_of(items), tmp_path / "out", resolution=4, shards=5, heldout_fraction=0.25, seed=3)
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert manifest == returned
  assert {name: manifest[name] for name in ("schema_version", "name", "source", "licence", "resolution", "seed")} == {
    "schema_version": 1,
    "name": "made_up",
    "source": "made up for a test",
    "licence": "none",
    "resolution": 4,
    "seed": 3,
  }
  assert manifest["rejected"] == {"count": 0, "listed": []}
  captions = {}
  for split, entry in manifest["splits"].items():
    dataset = Dataset.open(tmp_path / "out", split)
    captions[split] = {dataset[number].captions[0] for number in range(len(dataset))}
    assert entry["examples"] == len(dataset) == len(captions[split])
    assert entry["captions"] == sum(map(len, dataset.captions()))
    for shard in entry["shards"]:
      data = (tmp_path / "out" / shard["file"]).read_bytes()
      assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
  held = choose_heldout(items, 0.25, 3)
  assert captions["heldout"] == {items[position].captions[0] for position in held}
  assert len(captions["train"] | captions["heldout"]) == 42
  files = [f"made_up-train-0000{n}-of-00005" for n in range(5)]
  files += [f"made_up-heldout-0000{n}-of-00002" for n in range(2)]
  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    "manifest.json",
    "dataset_info.json",
    "features.json",
  } | {file + suffix for file in files for suffix in (".tfrecord", ".index", ".captions")}


def test_pictures_keep_their_captions(tmp_path):
  build(source_of(grid()), tmp_path / "out", resolution=4, shards=2)
  dataset = Dataset.open(tmp_path / "out")
  for number in range(len(dataset)):
    example = dataset[number]
    assert (images.decode_image(example.image) == [int(example.key), 0, 0]).all()
    assert example.captions == grid()[int(example.key)].captions


def test_shards_are_even_and_mixed(tmp_path):
  manifest = build(source_of(grid()), tmp_path / "out", resolution=4, shards=5, heldout_fraction=0)
  assert [shard["examples"] for shard in manifest["splits"]["train"]["shards"]] == [8, 8, 9, 8, 9]
  dataset = Dataset.open(tmp_path / "out")
  keys = [int(dataset[number].key) for number in range(42)]
  assert sorted(keys) == list(range(42)) and keys != sorted(keys)


def test_no_more_shards_than_pictures(tmp_path):
  manifest = build(source_of(items_of("a", "b", "c")), tmp_path / "out", resolution=4, shards=8)
  assert [shard["examples"] for shard in manifest["splits"]["train"]["shards"]] == [1, 1, 1]
  assert list(manifest["splits"]) == ["train"]


def test_same_input_same_bytes(tmp_path):
  for name in ("one", "two"):
    build(source_of(grid()), tmp_path / name, resolution=4, shards=2)
  build(source_of(grid()), tmp_path / "other", resolution=4, shards=2, seed=1)
  for path in (tmp_path / "one").iterdir():
    assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
  assert (tmp_path / "one" / "manifest.json").read_bytes() != (tmp_path / "other" / "manifest.json").read_bytes()


def test_rejected_pictures_are_listed_and_do_not_count(tmp_path):
  def render(item, resolution):
    if int(item.key) % 3 == 0:
      raise images.ImageError(f"not readable today: {item.key}")
    return Image.new("RGB", (resolution, resolution))

  source = source_of(grid(), render, rejected=(("early", "no caption"),))
  manifest = build(source, tmp_path / "out", resolution=4, shards=2, heldout_fraction=0.2)
  assert manifest["rejected"]["count"] == 1 + 14
  assert manifest["rejected"]["listed"][:2] == [
    {"key": "early", "reason": "no caption"},
    {"key": "0", "reason": "not readable today: 0"},
  ]
  assert sum(entry["examples"] for entry in manifest["splits"].values()) == 28
  # The rule of the held-out choice holds for what was really written.
  written = {
    split: [items[0] for items in Dataset.open(tmp_path / "out", split).captions()] for split in ("train", "heldout")
  }
  assert len(written["heldout"]) == 6
  assert_compositional(items_of(*written["train"], *written["heldout"]), set(range(22, 28)))


def test_many_rejected_are_counted_and_some_listed(tmp_path, monkeypatch):
  monkeypatch.setattr(build_part, "LISTED", 3)
  rejected = tuple((str(number), "why") for number in range(10))
  manifest = build(source_of(items_of("a"), rejected=rejected), tmp_path / "out", resolution=4, shards=1)
  assert manifest["rejected"]["count"] == 10 and len(manifest["rejected"]["listed"]) == 3


def picture_files(folder, captions, side=8):
  """A folder of images, one per caption."""
  folder.mkdir()
  for number, caption in enumerate(captions):
    Image.new("RGB", (side, side), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
  return folder


def test_every_file_is_accounted_for(tmp_path):
  folder = picture_files(tmp_path / "in", ["red", "green\n\x1b[0m", "\u200b"])
  (folder / "0.png").write_bytes(b"no image")
  (folder / "notes.md").write_text("notes")
  manifest = build(sources.folder(folder), tmp_path / "out", resolution=4, shards=1)
  assert manifest["files"] == {
    "seen": 7,
    "counts": {
      "images stored": 1,
      "caption files read": 3,
      "images whose captions cannot be used": 1,
      "images that cannot be read": 1,
      "files of other kinds": 1,
    },
    "passed_over": {"count": 1, "listed": [{"key": "notes.md", "reason": "not an image"}]},
    "captions_left_out": {
      "count": 1,
      "listed": [{"key": "1.txt", "reason": r"a caption has the control character \x1b: \x1b[0m"}],
    },
  }
  assert [entry["key"] for entry in manifest["rejected"]["listed"]] == ["2.png", "0.png"]
  assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")) == manifest


def test_sources_without_files_have_no_account_of_them(tmp_path):
  manifest = build(source_of(grid()), tmp_path / "out", resolution=4, shards=1)
  assert "files" not in manifest and "enlarged" not in manifest and manifest["distinct_captions"] == 42


def test_enlarged_images_are_counted(tmp_path):
  folder = picture_files(tmp_path / "in", ["a", "b", "c", "d"])
  Image.new("RGB", (1, 1)).save(folder / "1.png")
  Image.new("RGB", (20, 3)).save(folder / "2.png")
  manifest = build(sources.folder(folder), tmp_path / "out", resolution=8, shards=1)
  assert manifest["enlarged"] == {"count": 2, "smallest": [1, 1], "key": "1.png"}
  assert manifest["splits"]["train"]["examples"] == 4


POSIX = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_the_locale_does_not_matter(tmp_path):
  folder = picture_files(tmp_path / "in", ["roter Äpfel", "赤い心"])
  for name in ("äpfel", os.fsdecode(b"caf\xe9")):
    (folder / f"{name}.png").write_bytes((folder / "0.png").read_bytes())
    (folder / f"{name}.txt").write_text("grüner Äpfel", encoding="utf-16")
  code = """
import json, sys
from aurora_jax.data import build, dataset, sources
build.build(sources.folder(sys.argv[1]), sys.argv[2], resolution=4, shards=1)
opened = dataset.Dataset.open(sys.argv[2])
print(ascii([(opened[n].key, opened[n].captions) for n in range(len(opened))]))
"""
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
  written = {}
  for name, locale in (("posix", POSIX), ("utf8", {"LC_ALL": "C.UTF-8"})):
    done = subprocess.run(
      [sys.executable, "-c", code, folder, tmp_path / name], env=environment | locale, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    written[name] = done.stdout, {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
  assert written["posix"] == written["utf8"]
  keys = {key: captions for key, captions in ast.literal_eval(written["posix"][0])}
  assert keys == {
    "0.png": ("roter Äpfel",),
    "1.png": ("赤い心",),
    "äpfel.png": ("grüner Äpfel",),
    r"caf\xe9.png": ("grüner Äpfel",),
  }


def test_progress_is_reported(tmp_path):
  calls = []
  build(source_of(grid()), tmp_path / "out", resolution=4, shards=1, on_progress=lambda *call: calls.append(call))
  assert calls[-1] == (42, 42) and calls == sorted(calls) and {total for _, total in calls} == {42}


def test_folder_is_as_open_as_others(tmp_path):
  build(source_of(grid()), tmp_path / "out", resolution=4, shards=1)
  (tmp_path / "other").mkdir()
  assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode
  (tmp_path / "file").touch()
  assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {(tmp_path / "file").stat().st_mode}


# ------------------------------------------------------------------------------------------- whole or not at all


def contents(folder):
  return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing_source(error, at=20):
  def render(item, resolution):
    if int(item.key) == at:
      raise error
    return Image.new("RGB", (resolution, resolution))

  return source_of(grid(), render)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a fault in the program"), SystemExit(1)])
def test_nothing_is_left_of_a_build_that_fails(tmp_path, error):
  with pytest.raises(type(error)):
    build(failing_source(error), tmp_path / "out", resolution=4, shards=2)
  assert not list(tmp_path.iterdir())


def test_old_data_set_survives_a_failing_overwrite(tmp_path):
  build(source_of(grid()), tmp_path / "out", resolution=4, shards=2)
  before = contents(tmp_path)
  with pytest.raises(KeyboardInterrupt):
    build(failing_source(KeyboardInterrupt()), tmp_path / "out", resolution=8, shards=2, overwrite=True)
  assert contents(tmp_path) == before


def test_old_data_set_survives_a_failing_rename(tmp_path, monkeypatch):
  build(source_of(grid()), tmp_path / "out", resolution=4, shards=2)
  before = contents(tmp_path)
  rename = os.rename

  def refuse(old, new):
    if os.fspath(old).endswith(".partial"):
      raise OSError(28, "No space left on device")
    rename(old, new)

  monkeypatch.setattr(os, "rename", refuse)
  with pytest.raises(UserError, match="out .*out cannot be written: No space left on device"):
    build(source_of(grid()), tmp_path / "out", resolution=8, shards=2, overwrite=True)
  assert contents(tmp_path) == before


def test_full_disk(tmp_path, monkeypatch):
  def refuse(self, payload):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tfrecords.ShardWriter, "write", refuse)
  with pytest.raises(UserError, match="out .*out cannot be written: No space left on device"):
    build(source_of(grid()), tmp_path / "out", resolution=8, shards=2)
  assert not list(tmp_path.iterdir())


def test_overwrite(tmp_path):
  build(source_of(grid()), tmp_path / "out", resolution=4, shards=9)
  build(source_of(grid()), tmp_path / "out", resolution=8, shards=1, overwrite=True)
  assert Dataset.open(tmp_path / "out").resolution == 8
  assert len(list((tmp_path / "out").glob("*-train-*.tfrecord"))) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_through_a_link(tmp_path):
  build(source_of(grid()), tmp_path / "real" / "out", resolution=4, shards=1)
  (tmp_path / "link").symlink_to(tmp_path / "real" / "out")
  build(source_of(grid()), tmp_path / "link", resolution=8, shards=1, overwrite=True)
  assert (tmp_path / "link").is_symlink()
  assert Dataset.open(tmp_path / "link").resolution == 8
  assert [path.name for path in (tmp_path / "real").iterdir()] == ["out"]


def test_empty_folder_may_be_filled(tmp_path):
  (tmp_path / "out").mkdir()
  build(source_of(grid()), tmp_path / "out", resolution=4, shards=1)
  assert len(Dataset.open(tmp_path / "out")) > 30


def test_parents_are_made(tmp_path):
  build(source_of(grid()), tmp_path / "a" / "b" / "out", resolution=4, shards=1)
  assert len(Dataset.open(tmp_path / "a" / "b" / "out")) > 30


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_folders_are_never_replaced(tmp_path, overwrite):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "thesis.tex").write_text("years of work")
  with pytest.raises(UserError, match="out .*out exists and is not a data set"):
    build(source_of(grid()), tmp_path / "out", resolution=4, shards=1, overwrite=overwrite)
  assert contents(tmp_path).keys() == {(tmp_path / "out" / "thesis.tex").relative_to(tmp_path)}


def test_data_sets_are_not_replaced_unasked(tmp_path):
  build(source_of(grid()), tmp_path / "out", resolution=4, shards=1)
  with pytest.raises(UserError, match="out .*out exists: choose another folder or give --overwrite"):
    build(source_of(grid()), tmp_path / "out", resolution=4, shards=1)


def test_out_is_a_file(tmp_path):
  (tmp_path / "out").write_text("x")
  for out in (tmp_path / "out", tmp_path / "out" / "below"):
    with pytest.raises(UserError, match="out .*out"):
      build(source_of(grid()), out, resolution=4, shards=1, overwrite=True)
  assert (tmp_path / "out").read_text() == "x"


@pytest.mark.parametrize(
  "values, words_of_error",
  [
    ({"resolution": 0}, "resolution must be between 1 and 4096, not 0"),
    ({"resolution": 5000}, "not 5000"),
    ({"shards": 0}, "shards must be between 1 and 99999, not 0"),
    ({"heldout_fraction": 1.0}, "held-out fraction must be at least 0 and below 1, not 1.0"),
    ({"heldout_fraction": -0.1}, "not -0.1"),
    ({"heldout_fraction": float("nan")}, "not nan"),
    ({"seed": -1}, "seed must be 0 or more, not -1"),
    ({"name": "a/b"}, "data set name 'a/b'"),
    ({"name": ""}, "data set name ''"),
  ],
)
def test_bad_values(tmp_path, values, words_of_error):
  with pytest.raises(UserError, match=words_of_error):
    build(source_of(grid()), tmp_path / "out", **({"resolution": 4, "shards": 1} | values))
  assert not list(tmp_path.iterdir())


def test_addresses_are_no_folders(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="gs://bucket/set is an address"):
    build(source_of(grid()), "gs://bucket/set", resolution=4, shards=1)
  assert not list(tmp_path.iterdir())


def test_no_readable_picture(tmp_path):
  def render(item, resolution):
    raise images.ImageError("no")

  with pytest.raises(UserError, match="made up for a test has no readable image: 42 rejected, the first is 0: no"):
    build(source_of(grid(), render), tmp_path / "out", resolution=4, shards=1)
  assert not list(tmp_path.iterdir())
