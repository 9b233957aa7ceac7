"""Expert parallelism: tokens travel to their experts, or experts to the tokens.

Every device holds some images' tokens and, of each layer, the experts of its place along the layer's run of mesh axes
(see mesh.py). Devices along that run, a group, have all experts between them. Two ways, both exact, both through
`jax.shard_map` with the local work done by the backends of ops/moe.py:

  tokens   all-to-all: each token goes to the device of its expert and its result comes back. A device sends at most C
           tokens to each other one. If any pair of devices anywhere needs more, all devices take the way of `weights`
           in that layer and step instead: the predicate is a maximum over the whole mesh, the same everywhere;
  weights  each device gathers the experts of its group and works on its own tokens. Cheaper with many tokens a device.

No token is ever dropped.

  T tokens of a device, D width, F hidden width, E experts, P devices of a group, C slots per pair of devices
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
  """How one layer's tokens meet its experts, and why.

  Attributes:
    mode: "local" (every device has all experts), "tokens" or "weights".
    axes: mesh axes of the group.
    group: P.
    capacity: C.
    token_bytes, weight_bytes: what a device receives from others in a step (both passes) in the one way and the other.
  """

  mode: str
  axes: tuple[str, ...]
  group: int
  capacity: int
  token_bytes: int
  weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Exchange:
  """The sharded stand-in for `moe.expert_ffn`; same arguments, same result.

  Attributes:
    layout: the mesh.
    mode: "tokens", "weights", or "auto" for the one that moves fewer bytes, layer by layer.
    rematerialised: whether the forward pass runs again for the backward pass, and its exchange with it.
    capacity_factor: C as a multiple of the mean, T / P.
  """

  layout: mesh_lib.Layout
  mode: str = "auto"
  rematerialised: bool = False
  capacity_factor: float = 2.0

  def plan(self, tokens, width, hidden, experts, itemsize):
    """The plan of a layer.

    Args:
      tokens: T.
      width, hidden, experts: D, F, E.
      itemsize: bytes of a number as computed with.

    Returns:
      `Plan`.
    """
    axes = self.layout.expert_axes(experts)
    group = self.layout.size(axes)
    capacity = min(math.ceil(self.capacity_factor * tokens / group), tokens)
    passes = 3 if self.rematerialised else 2  # forward, backward, and forward again
    there_and_back = 2 * (group - 1) * capacity * width * itemsize
    expert_bytes = (3 * width * hidden + 2 * hidden + width) * itemsize
    token_bytes = passes * there_and_back
    weight_bytes = passes * (experts - experts // group) * expert_bytes
    mode = self.mode
    if mode == "auto":
      mode = "tokens" if token_bytes < weight_bytes else "weights"
    return Plan(mode if group > 1 else "local", axes, group, capacity, token_bytes, weight_bytes)

  def __call__(self, x, expert, params, backend="bucket"):
    """The chosen expert's output for every token of the whole mesh.

    Args:
      x: [devices * T, D], along the batch axes.
      expert: [devices * T] int32.
      params: ExpertParams, along the layer's expert axes.
      backend: one of `moe.BACKENDS`, for the local work.

    Returns:
      [devices * T, D].
    """
    tokens, devices = x.shape[0], self.layout.devices
    if tokens % devices:
      raise ValueError(f"{tokens} tokens cannot be spread over {devices} devices")
    experts, hidden, width = params.out_weight.shape
    plan = self.plan(tokens // devices, width, hidden, experts, x.dtype.itemsize)
    ways = {
      "local": lambda *args: moe.expert_ffn(*args, backend),
      "tokens": lambda *args: self._by_tokens(plan, backend, *args),
      "weights": lambda *args: _by_weights(plan, backend, *args),
    }
    # The gradients of repeated weights are summed where these become each device's own. That must be here and not within
    # a backend, whose branches differ from device to device: some would wait for ever for the others to join the sum.
    repeated = tuple(axis for axis in self.layout.rules.batch if axis not in plan.axes)

    def run_locally(x, expert, params):
      if repeated:
        params = jax.tree.map(lambda p: jax.lax.pcast(p, repeated, to="varying"), params)
      return ways[plan.mode](x, expert, params)

    batch = PartitionSpec(self.layout.rules.batch)
    stacked = PartitionSpec(plan.axes) if plan.axes else PartitionSpec()
    run = jax.shard_map(run_locally, mesh=self.layout.mesh, in_specs=(batch, batch, stacked), out_specs=batch)
    return run(x, expert, params)

  def _by_tokens(self, plan, backend, x, expert, params):
    peer = expert // params.in_weight.shape[0]  # [T], which device of the group has the token's expert
    position, load = moe.position_in_expert(peer, plan.group)

    def bounded(x, expert, params):
      return _through_peers(plan, backend, x, expert, peer, position, params)

    def unbounded(x, expert, params):
      # Recomputed in the backward pass: `cond` would otherwise keep room for the gathered experts in either case. All
      # experts on all tokens: with an expert per device, some device's fullest one is beyond twice its mean and so beyond
      # every bucket, the others wait for it, and a ladder of buckets would be half of what there is to compile.
      return jax.checkpoint(lambda *args: _by_weights(plan, "dense", *args))(x, expert, params)

    if plan.capacity >= x.shape[0]:
      return bounded(x, expert, params)
    fullest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(load)), self.layout.rules.batch)
    return jax.lax.cond(fullest <= plan.capacity, bounded, unbounded, x, expert, params)


def _by_weights(plan, backend, x, expert, params):
  """Gathers the group's experts, in the type they are used in. x: [T, D], params: the device's own experts."""
  gather = lambda p: jax.lax.all_gather(p.astype(x.dtype), plan.axes, axis=0, tiled=True)
  return moe.expert_ffn(x, expert, jax.tree.map(gather, params), backend)


def _through_peers(plan, backend, x, expert, peer, position, params):
  """Sends each token to the device of its expert, works there and sends the results back.

  Args:
    x: [T, D].
    expert, peer, position: [T], the token's expert, its device in the group and its place among those sent there,
      which must be less than C.
    params: the device's own experts.

  Returns:
    [T, D].
  """
  group, capacity, own = plan.group, plan.capacity, params.in_weight.shape[0]
  slots = group * capacity
  slot = peer * capacity + position
  # Empty slots are dealt to the experts in turn, which leaves these as balanced as they were.
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
