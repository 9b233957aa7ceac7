"""L2 attention on a mesh: every device computes the attention of its own images."""

import dataclasses
import functools

import jax
from jax.sharding import PartitionSpec

from aurora_jax.ops.attention import l2_attention
from aurora_jax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class Sharded:
  """The sharded version of `l2_attention`: same arguments, same result.

  XLA splits its own operations over devices by itself. It cannot split a kernel.

  Attributes:
    layout: the mesh.
  """

  layout: mesh_lib.Layout

  def __call__(
    self,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    chunk: int | None = None,
    implementation: str = "xla",
  ) -> jax.Array:
    """See `l2_attention`. With "pallas" the devices must divide the batch; other batches are computed by "xla"."""
    devices = self.layout.size(self.layout.rules.batch)
    if implementation == "xla" or len(queries) % devices:
      return l2_attention(queries, keys, values, chunk=chunk)
    batch = PartitionSpec(self.layout.rules.batch)
    attend = functools.partial(l2_attention, chunk=chunk, implementation=implementation)
    # No array is replicated, so there is no sum over devices to insert (`check_vma`, which kernels do not support).
    run = jax.shard_map(attend, mesh=self.layout.mesh, in_specs=batch, out_specs=batch, check_vma=False)
    return run(queries, keys, values)
