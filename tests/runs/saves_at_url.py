"""One of two processes that save checkpoints at a gs:// URL, by Orbax, and go on from the newest one.

python tests/runs/saves_at_url.py URL PORT PROCESS
"""

import sys

import jax
import numpy as np

from aurora_jax.runs import checkpoint_manager, retention

STEPS, SHAPE = 4, (64, 1000)


def values(step):
  """The array of a step; each process has half of its rows."""
  return np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) * step


def main(url, port, process):
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
  rows = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec("data"))
  make = lambda step: jax.make_array_from_callback(SHAPE, rows, lambda index: values(step)[index])
  state = lambda step: {"step": np.int32(step), "networks": {"g": {"params": {"a": make(step)}}}}
  with checkpoint_manager.Checkpoints(url, retention.Policy(newest=2)) as checkpoints:
    begin = checkpoints.newest() or 0
    if begin:
      abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)), state(0)
      )
      restored, progress = checkpoints.restore(abstract)
      assert progress == {"clock": begin}
      for piece in restored["networks"]["g"]["params"]["a"].addressable_shards:
        np.testing.assert_array_equal(piece.data, values(begin)[piece.index])
    for step in range(begin + 1, STEPS + 1):
      checkpoints.save(step, state(step), {"name": "x"}, {"clock": step})
  print(f"went on from {begin}")


if __name__ == "__main__":
  main(*sys.argv[1:])
