"""The exchange of tokens or experts on eight devices, against the dense backend on one; see `test_eight_devices.py`.

python -m pytest tests/parallel/exchange_eight_devices.py        (in an environment with eight devices, see there)
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.ops import moe
from aurora_jax.parallel import experts as experts_lib
from aurora_jax.parallel import mesh as mesh_lib

TOKENS, WIDTH, HIDDEN = 256, 8, 12


def routings(devices):
  """Experts of TOKENS tokens: spread, all to one, and so that some devices' tokens are less balanced than others'."""
  token = np.arange(TOKENS, dtype=np.int32)
  return {
    "balanced": token % 8,
    "all to one": np.full(TOKENS, 2, np.int32),
    "one device uneven": np.where(token < TOKENS // devices, 2, token % 8),
    "to one half": 4 + token % 4,
  }


# Mesh and experts per layer, which decide the sub-axes of its expert axis. The layer that is tested has 8.
CUTS = [
  ((8, 1), (8,)),
  ((4, 2), (8,)),
  ((2, 4), (8,)),
  ((2, 4), (2, 8)),
  ((1, 8), (8,)),
  ((1, 8), (4, 8)),
  ((1, 8), (2, 4, 8)),
]
# "large": the grouped backend as for large experts.
BACKENDS = [(*cut, "bucket") for cut in CUTS] + [
  (*cut, kind) for cut in CUTS[3::3] for kind in ("grouped", "large", "kernel")
]
# Without an expert axis nothing is exchanged: both modes are the same program.
EVERY = [(*case, mode) for case in BACKENDS for mode in ("tokens", "weights")[: 2 if case[0][1] > 1 else 1]]
# Every cut, and both modes with both backends, on every mesh and with one, two and three sub-axes.
CHOSEN = [
  *((*cut, "bucket", "tokens") for cut in CUTS),
  *((*CUTS[i], "bucket", "weights") for i in (1, 3, 6)),
  (*CUTS[3], "grouped", "weights"),
  (*CUTS[3], "kernel", "tokens"),
  (*CUTS[6], "large", "tokens"),
]
EXCHANGES = EVERY if os.environ.get("ALL_MESHES") else CHOSEN


@functools.cache
def exchange_inputs():
  """(tokens, parameters of eight experts, weights of the outputs in the loss)."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  params = moe.ExpertParams(draw(8, WIDTH, 2 * HIDDEN), draw(8, 2 * HIDDEN), draw(8, HIDDEN, WIDTH), draw(8, WIDTH))
  return draw(TOKENS, WIDTH), params, draw(TOKENS, WIDTH)


def loss_and_gradients(expert_ffn, backend):
  """Jitted: (tokens, parameters, experts) -> ((loss, outputs), gradients)."""
  target = exchange_inputs()[2]

  def loss(x, params, expert):
    out = expert_ffn(x, expert, params, backend)
    return jnp.sum(out * target), out

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@functools.cache
def dense_oracle():
  """{routing: (outputs, gradients)} of the dense backend on one device."""
  run, (x, params, _) = loss_and_gradients(moe.expert_ffn, "dense"), exchange_inputs()
  found = {name: run(x, params, expert) for name, expert in routings(8).items()}
  return {name: jax.tree.map(np.asarray, (out, gradients)) for name, ((_, out), gradients) in found.items()}


@pytest.mark.parametrize("mesh,counts,backend,mode", EXCHANGES, ids=str)
def test_exchange_equals_dense_forward_and_backward(mesh, counts, backend, mode, monkeypatch):
  if backend == "large":
    backend = "grouped"
    monkeypatch.setattr(moe, "_REPEATED_BYTES", 0)
  sizes = mesh_lib.sub_axes(mesh[1], counts)
  names = ("data", *(f"expert{i}" for i in range(len(sizes))))
  types = (jax.sharding.AxisType.Auto,) * len(names)
  layout = mesh_lib.Layout(
    jax.make_mesh((mesh[0], *sizes), names, axis_types=types), mesh_lib.Rules(batch=names, experts=names[1:])
  )
  run, (x, params, _) = loss_and_gradients(experts_lib.Exchange(layout, mode), backend), exchange_inputs()
  for name, expert in routings(8).items():
    (_, out), gradients = run(x, params, expert)
    for expected, got in zip(jax.tree.leaves(dense_oracle()[name]), jax.tree.leaves((out, gradients)), strict=True):
      assert relative(expected, got) < 1e-5, name


def relative(expected, got):
  """Largest difference relative to the largest entry."""
  expected, got = np.asarray(expected), np.asarray(got)
  return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))
