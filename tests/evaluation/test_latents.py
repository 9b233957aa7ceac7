"""Latents drawn from a seed, and files of them."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents

Z = 3


def one(width):
  """`System.draw_latents` of a system with latents of this width."""
  return functools.cache(lambda: lambda key: {"z": jax.random.normal(key, (width,))})()


DRAW = one(Z)


def test_a_latent_depends_on_its_place_and_the_seed_only():
  whole = latents.draw(DRAW, 5, range(4), 3, 16)
  assert whole.values["z"].shape == (4, 3, Z) and whole.means["z"].shape == (4, 16, Z)
  part = latents.draw(DRAW, 5, [2], 2, 16)
  np.testing.assert_array_equal(part.values["z"], whole.values["z"][2:3, :2])
  np.testing.assert_array_equal(part.means["z"], whole.means["z"][2:3])
  other = latents.draw(DRAW, 6, range(4), 3, 16)
  rows = np.concatenate(
    [a.reshape(-1, Z) for part in (whole, other) for a in (part.values["z"], part.means["z"])]
  )  # and those of the mean are others
  assert (np.abs(rows[:, None] - rows[None]).max(-1) + np.eye(len(rows))).min() > 1e-3
  assert latents.draw(DRAW, 5, range(2), 1, 0).mean_latents == 0


def test_they_are_standard_normal():
  z = latents.draw(one(20), 0, range(50), 20, 0).values["z"]
  assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("mean_latents", [0, 4])
def test_saved_and_read_again(tmp_path, suffix, mean_latents):
  path = tmp_path / f"l{suffix}"
  drawn = latents.draw(DRAW, 1, range(2), 3, mean_latents)
  latents.save(drawn, path)
  again = latents.fit(latents.load(path), path, 2, DRAW)
  np.testing.assert_array_equal(again.values["z"], drawn.values["z"])
  np.testing.assert_array_equal(again.means["z"], drawn.means["z"])  # no mean latents stay none: the file says so
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_without_an_axis_of_prompts_they_are_for_every_prompt(tmp_path):
  z, mean_z = np.arange(6.0).reshape(2, Z), np.ones((2, 5, Z), np.float16)
  save_file({"z": z, "mean_z": mean_z}, tmp_path / "l.safetensors")
  fitted = latents.fit(latents.load(tmp_path / "l.safetensors"), "l", 2, DRAW)
  np.testing.assert_array_equal(fitted.values["z"], [z, z])
  assert fitted.means["z"].shape == (2, 5, Z) and fitted.values["z"].dtype == fitted.means["z"].dtype == np.float32


def test_mean_latents_that_the_file_lacks_are_drawn():
  arrays = {"z": np.zeros((2, Z), np.float32)}
  for asked, otherwise, count in ((None, 16, 16), (None, 0, 0), (3, 16, 3), (0, 16, 0)):
    fitted = latents.fit(arrays, "l", 2, DRAW, mean_latents=asked, otherwise=otherwise, seed=4)
    assert fitted.mean_latents == count
    if count:
      np.testing.assert_array_equal(fitted.means["z"], latents.draw(DRAW, 4, range(2), 1, count).means["z"])
  arrays["mean_z"] = np.zeros((7, Z), np.float32)
  assert latents.fit(arrays, "l", 2, DRAW, mean_latents=0).mean_latents == 0
  assert latents.fit(arrays, "l", 2, DRAW, otherwise=0).means["z"].shape == (2, 7, Z)
  with pytest.raises(UserError, match="7 latents, not the 3"):
    latents.fit(arrays, "l", 2, DRAW, mean_latents=3)


@pytest.mark.parametrize(
  "arrays, words",
  [
    ({"w": np.zeros(2)}, "holds w"),
    ({"z": np.zeros(Z)}, "float64 [3]"),
    ({"z": np.zeros((1, 1, 1, Z))}, "[1, 1, 1, 3]"),
    ({"z": np.zeros((2, Z), int)}, "int64"),
    ({"z": np.full((2, Z), np.nan)}, "finite"),
    ({"z": np.zeros((2, Z)), "mean_z": np.full((2, Z), np.inf)}, "'mean_z'"),
    ({"z": np.array([{}, {}], object)}, "allow_pickle"),
  ],
)
def test_files_that_are_refused(tmp_path, arrays, words):
  np.savez(tmp_path / "l.npz", **arrays)
  with pytest.raises(UserError) as error:
    latents.load(tmp_path / "l.npz")
  assert "l.npz" in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
  "arrays, words",
  [
    ({"z": np.zeros((2, Z + 1))}, "4 wide, the generator's latents are 3"),
    ({"z": np.zeros((2, Z)), "mean_z": np.zeros((2, 2))}, "'mean_z' is 2 wide"),
    ({"z": np.zeros((3, 1, Z))}, "for 3 prompts, there are 2"),
    ({"z": np.zeros((0, Z))}, "empty"),
    ({"z": np.zeros((2, Z)), "w": np.zeros((2, 2))}, "must hold z and perhaps mean_z, it holds w, z"),
  ],
)
def test_latents_that_do_not_fit(arrays, words):
  with pytest.raises(UserError, match=words):
    latents.fit(arrays, "l.npz", 2, DRAW)
