"""Images travel as uint8 and become the host's float32 on the device, to the bit."""

import jax
import numpy as np
import pytest

from aurora_jax.data import loader
from aurora_jax.training import batch_feed

ALL = np.arange(256, dtype=np.uint8).reshape(2, 4, 32, 1)


@pytest.mark.parametrize("exact", [True, False])
def test_every_value_is_that_of_the_host(exact, monkeypatch):
  monkeypatch.setattr(batch_feed, "_computes_exactly", lambda: exact)
  placed = batch_feed.put({"image": ALL, "index": np.arange(2), "caption": ["a", "b"]}, None)
  assert placed.keys() == {"image", "index"}
  assert placed["image"].dtype == np.float32
  np.testing.assert_array_equal(np.asarray(placed["image"]).view(np.int32), loader.to_float(ALL).view(np.int32))


def test_a_cpu_computes_exactly():
  assert batch_feed._computes_exactly()


def test_sharding_is_kept():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  placed = batch_feed.put({"image": ALL}, sharding)
  assert placed["image"].sharding.is_equivalent_to(sharding, 4)


def test_floats_travel_as_they_are():
  image = loader.to_float(ALL)
  np.testing.assert_array_equal(batch_feed.put({"image": image}, None)["image"], image)
