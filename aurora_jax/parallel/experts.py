"""Expert parallelism: tokens are sent to their experts, or the experts' weights to the tokens.

Every device holds the tokens of some images. Of each layer it holds the experts of its position along the layer's run
of mesh axes (see mesh.py). The devices along that run are a group: together they have all experts. There are two modes.
Both are exact, and both use `jax.shard_map` with the backends of ops/moe.py for the local work:

  tokens   all-to-all: each token goes to the device of its expert, and its result comes back. A device sends at most C
           tokens to each other device. If any pair of devices in the mesh needs more, all devices use `weights` for
           that layer in that step. The decision is a maximum over the whole mesh, so all devices make the same one.
  weights  each device gathers the experts of its group and processes its own tokens. This moves fewer bytes if a device
           has many tokens.

No token is ever dropped.

  T tokens of a device, D width, F hidden width, E experts, P devices of a group, C capacity: slots per pair of devices
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from aurora_jax.ops import moe
from aurora_jax.parallel import mesh as mesh_lib


class Plan(NamedTuple):
  """The exchange of one layer, and the bytes that decided it.

  Attributes:
    mode: "local" (every device has all experts), "tokens" or "weights".
    axes: mesh axes of the group.
    group: P.
    capacity: C.
    token_bytes: bytes that a device receives in a step, forward and backward, with mode "tokens".
    weight_bytes: the same with mode "weights".
  """

  mode: str
  axes: tuple[str, ...]
  group: int
  capacity: int
  token_bytes: int
  weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Exchange:
  """The sharded version of `moe.expert_ffn`: same arguments, same result.

  Attributes:
    layout: the mesh.
    mode: "tokens", "weights", or "auto": in each layer the one that moves fewer bytes.
    rematerialized: whether the backward pass runs the forward pass, and its exchange, again.
    capacity_factor: C as a multiple of the mean, T / P.
  """

  layout: mesh_lib.Layout
  mode: str = "auto"
  rematerialized: bool = False
  capacity_factor: float = 2.0

  def plan(self, tokens: int, width: int, hidden: int, experts: int, itemsize: int) -> Plan:
    """The plan of a layer.

    Args:
      tokens: T.
      width: D.
      hidden: F.
      experts: E.
      itemsize: bytes per number of the compute type.

    Returns:
      `Plan`.
    """
    axes = self.layout.expert_axes(experts)
    group = self.layout.size(axes)
    capacity = min(math.ceil(self.capacity_factor * tokens / group), tokens)
    passes = 3 if self.rematerialized else 2  # forward, backward, and forward again
    there_and_back = 2 * (group - 1) * capacity * width * itemsize
    expert_bytes = (3 * width * hidden + 2 * hidden + width) * itemsize
    token_bytes = passes * there_and_back
    weight_bytes = passes * (experts - experts // group) * expert_bytes
    mode = self.mode
    if mode == "auto":
      mode = "tokens" if token_bytes < weight_bytes else "weights"
    return Plan(mode if group > 1 else "local", axes, group, capacity, token_bytes, weight_bytes)

  def __call__(self, x: jax.Array, expert: jax.Array, params: moe.ExpertParams, backend: str = "bucket") -> jax.Array:
    """The output of the chosen expert for every token of the whole mesh.

    Args:
      x: [devices * T, D], sharded along the batch axes.
      expert: [devices * T] int32.
      params: sharded along the layer's expert axes.
      backend: one of `moe.BACKENDS`, for the local work.

    Returns:
      [devices * T, D].

    Raises:
      ValueError: the devices do not divide the tokens.
    """
    tokens, devices = x.shape[0], self.layout.devices
    if tokens % devices:
      raise ValueError(f"{tokens} tokens cannot be spread over {devices} devices")
    experts, hidden, width = params.out_weight.shape
    plan = self.plan(tokens // devices, width, hidden, experts, x.dtype.itemsize)
    modes = {
      "local": lambda x, expert, params: moe.expert_ffn(x, expert, params, backend),
      "tokens": lambda x, expert, params: self._by_tokens(plan, backend, x, expert, params),
      "weights": lambda x, expert, params: _by_weights(plan, backend, x, expert, params),
    }
    # `pcast` sums the gradients of replicated weights over devices. It must be here and not within a backend: devices
    # may take different branches there, and some would wait forever for the others to join the sum.
    repeated = tuple(axis for axis in self.layout.rules.batch if axis not in plan.axes)

    def run_locally(x, expert, params):
      if repeated:
        params = jax.tree.map(lambda p: jax.lax.pcast(p, repeated, to="varying"), params)
      return modes[plan.mode](x, expert, params)

    batch = PartitionSpec(self.layout.rules.batch)
    stacked = PartitionSpec(plan.axes) if plan.axes else PartitionSpec()
    run = jax.shard_map(
      run_locally,
      mesh=self.layout.mesh,
      in_specs=(batch, batch, stacked),
      out_specs=batch,
      check_vma=backend != "kernel",  # tokamax does not say along which axes its results vary
    )
    return run(x, expert, params)

  def _by_tokens(self, plan, backend, x, expert, params):
    peer = expert // params.in_weight.shape[0]  # [T], the device of the group that has the token's expert
    position, load = moe.position_in_expert(peer, plan.group)

    def bounded(x, expert, params):
      return _through_peers(plan, backend, x, expert, peer, position, params)

    def unbounded(x, expert, params):
      # Recomputed in the backward pass: otherwise `cond` reserves memory for the gathered experts in either branch.
      # "dense", not "bucket": when this branch runs, the fullest expert of some device exceeds every bucket, and all
      # others wait for that device. The ladder of buckets would only double what there is to compile.
      return jax.checkpoint(lambda *args: _by_weights(plan, "dense", *args))(x, expert, params)

    if plan.capacity >= x.shape[0]:
      return bounded(x, expert, params)
    fullest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(load)), self.layout.rules.batch)
    return jax.lax.cond(fullest <= plan.capacity, bounded, unbounded, x, expert, params)


def _by_weights(plan, backend, x, expert, params):
  """Gathers the group's experts in the compute type. x: [T, D], params: the device's own experts -> [T, D]."""
  gather = lambda p: jax.lax.all_gather(p.astype(x.dtype), plan.axes, axis=0, tiled=True)
  return moe.expert_ffn(x, expert, jax.tree.map(gather, params), backend)


def _through_peers(plan, backend, x, expert, peer, position, params):
  """Sends each token to the device of its expert, applies the expert and sends the result back.

  Args:
    plan: of the layer.
    backend: one of `moe.BACKENDS`.
    x: [T, D].
    expert: [T], the token's expert.
    peer: [T], the device of the group that has it.
    position: [T], the token's position among those sent to that device, less than C.
    params: the device's own experts.

  Returns:
    [T, D].
  """
  group, capacity, own = plan.group, plan.capacity, params.in_weight.shape[0]
  slots = group * capacity
  slot = peer * capacity + position
  # Empty slots are assigned to the experts in turn, so that they do not unbalance the load.
  wanted = (jnp.arange(slots, dtype=jnp.int32) % own).at[slot].set(expert % own, mode="drop")
  exchange = lambda t: jax.lax.all_to_all(t, plan.axes, 0, 0, tiled=True)

  def feed_forward(sent):  # [P * C, D], by destination
    received = exchange(sent)  # [P * C, D], by source
    if own == 1:
      out = moe.geglu_ffn(received, jax.tree.map(lambda p: p[0], params))
    else:
      out = moe.expert_ffn(received, exchange(wanted), params, backend)
    return exchange(out)

  return moe.through_slots(x, slot, slots, feed_forward)
