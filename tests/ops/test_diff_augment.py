"""DiffAugment against the public StyleGAN-T code's numbers, and its draws."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from aurora_jax.ops import diff_augment

apply = jax.jit(diff_augment.apply)
GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "stylegan_t"


@pytest.fixture(scope="module")
def parts():
  return load_file(GOLDENS / "parts.safetensors")


def nhwc(array):
  return array.transpose(0, 2, 3, 1)


def draws_of(parts, prefix):
  """The golden's draws below a name, {name: {"u" or "rows", "columns"}}."""
  draws = {}
  for name, value in parts.items():
    if name.startswith(prefix):
      change, _, kind = name.removeprefix(prefix).rpartition(".")
      draws.setdefault(change, {})[kind] = value
  return draws


@pytest.mark.parametrize(
  "name", ["augment20.translation", "augment20.cutout"] + [f"augment24.{n}" for n in diff_augment.POLICY]
)
def test_each_change(parts, name):
  size, change = name.split(".")
  (draws,) = draws_of(parts, f"{name}.draw.").values()
  out = apply({change: draws}, nhwc(parts[f"{size}.in.image"]))
  np.testing.assert_allclose(out, nhwc(parts[f"{name}.out"]), rtol=1e-5, atol=1e-6)


def test_all_in_order_with_gradient(parts):
  draws, cotangent = draws_of(parts, "augment24.all.draw."), nhwc(parts["augment24.all.cotangent"])
  assert set(draws) == set(diff_augment.POLICY)
  out, vjp = jax.vjp(lambda image: apply(draws, image), nhwc(parts["augment24.in.image"]))
  np.testing.assert_allclose(out, nhwc(parts["augment24.all.out"]), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    vjp(jnp.asarray(cotangent))[0], nhwc(parts["augment24.all.grad.image"]), rtol=1e-4, atol=1e-5
  )


def test_ranges_of_the_draws():
  draws = jax.tree.map(np.asarray, jax.jit(lambda key: diff_augment.draw(key, 4000, 24, 20))(jax.random.key(0)))
  for name in ("brightness", "saturation", "contrast"):
    u = draws[name]["u"]
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1
  assert set(draws["translation"]["rows"]) == set(range(-3, 4))  # int(24 / 8 + 0.5)
  assert set(draws["translation"]["columns"]) == set(range(-3, 4))  # int(20 / 8 + 0.5)
  assert set(draws["cutout"]["rows"]) == set(range(24))  # an odd square of 5
  assert set(draws["cutout"]["columns"]) == set(range(21))  # an even square of 4
  flat = np.stack([value for group in draws.values() for value in group.values()])
  assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.06  # independent


def test_a_policy_leaves_other_draws_as_they_are():
  key = jax.random.key(1)
  draw = jax.jit(
    lambda key: (diff_augment.draw(key, 3, 16, 16), diff_augment.draw(key, 3, 16, 16, ("cutout", "contrast")))
  )
  everything, some = draw(key)
  assert set(some) == {"cutout", "contrast"}
  jax.tree.map(np.testing.assert_array_equal, some, {name: everything[name] for name in some})
  image = np.random.default_rng(0).normal(size=(3, 16, 16, 2)).astype(np.float32)
  augment = jax.jit(diff_augment.augment, static_argnums=2)
  np.testing.assert_array_equal(augment(key, image, ("cutout",)), apply({"cutout": everything["cutout"]}, image))
  np.testing.assert_array_equal(diff_augment.augment(key, image, ()), image)


def test_images_need_not_be_square():
  image = np.arange(2 * 4 * 8, dtype=np.float32).reshape(1, 8, 8, 1)[:, :4] + 1
  moved = apply({"translation": {"rows": np.array([1]), "columns": np.array([-2])}}, image)
  expected = np.zeros_like(image)
  expected[0, :3, 2:] = image[0, 1:, :6]
  np.testing.assert_array_equal(moved, expected)


def test_a_tiny_image_has_no_cutout():
  image = np.ones((1, 2, 2, 1), np.float32)
  draws = diff_augment.draw(jax.random.key(0), 1, 2, 2, ("cutout",))
  np.testing.assert_array_equal(apply(draws, image), image)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="'color' does not exist, there are brightness"):
    diff_augment.draw(jax.random.key(0), 1, 8, 8, ("color",))
  with pytest.raises(ValueError, match="'blur'"):
    diff_augment.apply({"blur": {}}, jnp.zeros((1, 8, 8, 3)))
