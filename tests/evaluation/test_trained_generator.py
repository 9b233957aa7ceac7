"""Reading a run for sampling: another CLIP, bfloat16, batches of a fitting size."""

import jax
import numpy as np
import pytest
import random_run

from aurora_jax import config_files
from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents, trained_generator
from aurora_jax.systems.aurora import system

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  home = random_run.make_home(tmp_path_factory.mktemp("home"))
  random_run.make_run(home / "nameless", "")
  return home


def variables(model):
  return model.weights.networks["generator"]


def test_weights_become_bfloat16_and_buffers_do_not(home):
  full, half = trained_generator.load(home / "run"), trained_generator.load(home / "run", dtype="bfloat16")
  assert {leaf.dtype.name for leaf in jax.tree.leaves(variables(full))} == {"float32"}
  assert {leaf.dtype.name for leaf in jax.tree.leaves(variables(half)["params"])} == {"bfloat16"}
  jax.tree.map(np.testing.assert_array_equal, variables(half)["buffers"], variables(full)["buffers"])
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
    variables(half)["params"],
    variables(full)["params"],
  )


def test_no_batch_is_larger_than_what_there_is(home):
  sizes = lambda **options: trained_generator.load(home / "run", **options).sampler.batch_size
  assert (sizes(), sizes(images=3), sizes(batch_size=2, images=3), sizes(batch_size=64)) == (32, 3, 2, 64)
  full = config_files.load(["--config=configs/aurora_64.py"])
  assert 1 < system.System(full).sampling_batch_size < 32


def test_a_run_whose_config_names_no_clip(home):
  with pytest.raises(UserError, match="names no CLIP: --clip DIR"):
    trained_generator.load(home / "nameless")
  assert trained_generator.load(home / "nameless", clip=str(home / "clip")).system.clip.config.text.width == 32
  with pytest.raises(UserError, match="wide: text features are 48 wide, generator.text_feature_dim is 32"):
    trained_generator.load(home / "run", clip=str(home / "wide"))


def test_a_walk_between_latents_passes_through_their_images(home):
  model = trained_generator.load(home / "run", prompts_at_once=2, images=8)
  drawn = latents.draw(model.system.draw_latents, 0, [0], 3, 2)
  prompts = ["red circle", "green bar"]
  walk = model.between_latents(prompts, drawn, steps=3, psi=0.5)
  assert walk.shape == (2, 5, 16, 16, 3)
  twice = lambda part: {name: np.repeat(array, 2, axis=0) for name, array in part.items()}
  both = latents.Latents(twice(drawn.values), twice(drawn.means))
  stops = model.sample(prompts, latents=both, psi=0.5).images
  np.testing.assert_allclose(walk[:, ::2], stops, rtol=1e-3, atol=1e-3 * np.abs(stops).max())
  assert np.abs(walk[:, 1] - walk[:, 2]).max() > 1e-2 * np.abs(stops).max()


def test_a_walk_ends_where_sampling_goes(home):
  model, seen = trained_generator.load(home / "run", prompts_at_once=4, images=8), []
  drawn = latents.draw(model.system.draw_latents, 0, [0], 2, 3)
  walk = model.interpolate(
    ["red circle", "green bar"],
    drawn,
    steps=4,
    move_all=True,
    psi=0.5,
    on_batch=lambda done, total: seen.append((done, total)),
  )
  assert walk.shape == (2, 4, 16, 16, 3) and seen == [(8, 8)]
  twice = lambda part: {name: np.repeat(array, 2, axis=0) for name, array in part.items()}
  both = latents.Latents(twice(drawn.values), twice(drawn.means))
  ends = model.sample(["red circle", "green bar"], latents=both, psi=0.5).images
  np.testing.assert_allclose(walk[:, [0, -1]], ends.swapaxes(0, 1), rtol=1e-3, atol=1e-3 * np.abs(ends).max())
  assert np.abs(walk[:, 1] - walk[:, 2]).max() > 1e-2 * np.abs(ends).max()
