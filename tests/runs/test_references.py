"""What a run refers to: identities, and that a changed one is refused."""

import json

import pytest

from aurora_jax.errors import UserError
from aurora_jax.runs import references, workdir
from aurora_jax.systems.aurora.config import Experiment
from aurora_jax.systems.stylegan_t.config import Experiment as StyleGanT


def data_set(folder, checksum="a", images=3, **more):
  folder.mkdir(exist_ok=True)
  shard = {"file": "x-0.tfrecord", "examples": images, "bytes": 10, "sha256": checksum}
  manifest = {"resolution": 8, "splits": {"train": {"examples": images, "shards": [shard]}}} | more
  (folder / "manifest.json").write_text(json.dumps(manifest))
  return folder


def weights(folder, content=b"weights"):
  folder.mkdir(exist_ok=True)
  (folder / "model.safetensors").write_bytes(content)
  (folder / "config.json").write_text("{}")
  return folder


def experiment(data="", clip=""):
  default = Experiment()
  return Experiment(data=type(default.data)(path=str(data)), text=type(default.text)(clip=str(clip)))


def test_an_identity_is_that_of_the_content(tmp_path):
  one = references.identify(data_set(tmp_path / "a"))
  assert one.summary == "3 images" and one.path == str(tmp_path / "a")
  assert references.identify(data_set(tmp_path / "b", source="elsewhere")).sha256 == one.sha256
  assert references.identify(data_set(tmp_path / "b", "b")).sha256 != one.sha256
  clip = references.identify(weights(tmp_path / "c"))
  (tmp_path / "c" / "training.json").write_text("seconds and other notes")
  assert references.identify(tmp_path / "c").sha256 == clip.sha256
  assert references.identify(weights(tmp_path / "c", b"WEIGHTS")).sha256 != clip.sha256
  assert references.identify(tmp_path / "c" / "model.safetensors") is not None


@pytest.mark.parametrize("place", [0, 5 * 2**20 + 3, 40 * 2**20 - 1])
def test_a_large_file_by_its_parts(tmp_path, place):
  """Other weights of the same shapes differ nearly everywhere: at least at one of the places that are read."""
  content = bytearray(40 * 2**20)
  before = references.identify(weights(tmp_path / "c", content)).sha256
  content[max(0, place - 2**18) : place + 2**18] = b"\1" * (min(place, 2**18) + min(len(content) - place, 2**18))
  assert references.identify(weights(tmp_path / "c", content)).sha256 != before


def test_what_has_no_identity(tmp_path):
  assert references.identify(tmp_path / "nowhere") is None
  assert references.identify(tmp_path) is None
  (tmp_path / "manifest.json").write_text("{")
  assert references.identify(tmp_path) is None


def test_fields_are_those_of_the_config(tmp_path):
  data, clip = data_set(tmp_path / "data"), weights(tmp_path / "clip")
  assert list(references.of_experiment(experiment(data, clip))) == ["data.path", "text.clip"]
  assert list(references.of_experiment(experiment(data, clip), ("text",))) == ["text.clip"]
  dino = StyleGanT(dino=type(StyleGanT().dino)(path=str(clip)))
  assert list(references.of_experiment(dino)) == ["dino.path"]


def test_a_changed_data_set_is_refused_unless_it_is_allowed(tmp_path):
  folder, values = workdir.RunFolder(tmp_path / "run"), experiment(data_set(tmp_path / "data"))
  folder.path.mkdir()
  now = lambda: references.of_experiment(values)
  assert references.refuse_changes(folder, now()) == []  # of an earlier version
  references.record(folder, now())
  assert references.refuse_changes(folder, now()) == []
  data_set(tmp_path / "data", "b", 24)
  with pytest.raises(UserError) as error:
    references.refuse_changes(folder, now(), ["text"])
  for part in (f"data.path: what is at {tmp_path / 'data'}", "3 images then, 24 images now", "change data.path"):
    assert part in str(error.value)
  assert len(references.refuse_changes(folder, now(), ["data.path"])) == 1
  assert len(references.refuse_changes(folder, now(), ["data"])) == 1
  references.record(folder, now())
  assert references.refuse_changes(folder, now()) == []


def test_judges(tmp_path):
  folder = workdir.RunFolder(tmp_path)
  one, other = (references.identify(weights(tmp_path / name, name.encode())) for name in ("one", "other"))
  references.record(folder, {}, one)
  references.refuse_changed_judge(folder, one)
  references.refuse_changed_judge(folder, other)  # at another place: another judge
  changed = references.identify(weights(tmp_path / "one", b"two"))
  with pytest.raises(UserError, match="--allow-config-change judge"):
    references.refuse_changed_judge(folder, changed)
  references.refuse_changed_judge(folder, changed, ["judge"])


def test_a_damaged_record_is_named(tmp_path):
  (tmp_path / "references.json").write_text("{")
  with pytest.raises(UserError, match="references.json"):
    references.refuse_changes(workdir.RunFolder(tmp_path), {})
