"""The parts of `bench accelerator` that measure single operations: experts and attention at the shapes of training.

B images, N queries, M keys, T tokens, D width, F hidden width, E experts
"""

import concurrent.futures
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.ops import attention, moe
from aurora_jax.performance import accelerator_inputs as inputs

_TOKENS = {False: (4096, 32768, 131072), True: (256,)}
_EXPERTS = {False: (4, 8, 16), True: (4,)}
_WIDTHS = {False: (512, 2048), True: (32, 64)}
# Images, queries, keys, heads, width of a head, chunk: self-attention at 64 and 32 pixels, cross-attention at 64.
_ATTENTION = {
  False: {
    "self-attention at 64 pixels": (8, 4096, 4096, 8, 64),
    "self-attention at 32 pixels": (8, 1024, 1024, 8, 64),
    "cross-attention at 64 pixels": (8, 4096, 76, 8, 64),
  },
  True: {"self-attention": (1, 64, 64, 2, 8), "cross-attention": (1, 64, 7, 2, 8)},
}
_CHUNK = {False: 1024, True: 32}
_COMPILERS = 8


class _Case:
  """One program of a table: what its row says, how it is compiled, its arguments and its useful operations."""

  def __init__(self, row: Mapping[str, Any], function: Callable[..., Any], flops: Mapping[str, float], group: Any):
    self.row, self.function, self.flops, self.group = row, function, flops, group


def _measure(run, cases, arguments, results):
  """Compiles all cases side by side, then times one after the other. `arguments`: group -> {routing or "": arrays}."""
  run.doing("compiling", results)
  with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as pool:
    compiled = []
    for case in cases:
      shapes = next(iter(arguments(case.group).values()))
      compiled.append(pool.submit(lambda case=case, shapes=shapes: jax.jit(case.function).lower(*shapes).compile()))
    concurrent.futures.wait(compiled, timeout=max(1.0, 0.7 * run.time_left()))
    for future in compiled:
      future.cancel()
  sheet = inputs.chip()
  for case, future in zip(cases, compiled):
    for kind, arrays in arguments(case.group).items():
      with inputs.attempts(results["rows"], dict(case.row) | ({"routing": kind} if kind else {})) as row:
        run.require_time(1, "this row")
        if not future.done() or future.cancelled():
          raise UserError("there was no time to compile it")
        program = future.result()
        placed = jax.device_put(arrays)
        row["temporaries_bytes"] = program.memory_analysis().temp_size_in_bytes
        seconds = inputs.seconds_of(lambda: program(*placed))
        row["milliseconds"] = seconds * 1e3
        row |= inputs.shares(case.flops, seconds, sheet)
    run.save(results)
  inputs.raise_failures(results["rows"])
  return results


def measure_experts(run: inputs.Run) -> dict[str, Any]:
  """Times the backends of `ops.moe`, with balanced tokens and with all tokens on one expert.

  "kernel" is among them where tokamax is installed. A dense feed-forward over the same tokens is the floor.
  Parameters are float32, tokens bfloat16, as in training.
  """
  width, hidden = _WIDTHS[run.toy]
  made: dict[tuple[int, int], dict[str, Any]] = {}

  def arguments(group):
    tokens, experts = group
    if group not in made:
      x = inputs.normals(tokens * width, 1).reshape(tokens, width).astype(jnp.bfloat16)
      stacked = {
        "in_weight": (experts, width, 2 * hidden),
        "in_bias": (experts, 2 * hidden),
        "out_weight": (experts, hidden, width),
        "out_bias": (experts, width),
      }
      shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in stacked.items()}
      params = moe.ExpertParams(**inputs.filled(shapes, 2))
      balanced = np.random.default_rng(0).permutation(np.arange(tokens, dtype=np.int32) % experts)
      one = np.zeros(tokens, np.int32)
      made.clear()  # the largest take a gigabyte of the host
      made[group] = {"": (x, one, params)} if experts == 1 else {"balanced": (x, balanced, params)}
      if experts > 1:
        made[group]["one expert"] = (x, one, params)
    return made[group]

  installed = importlib.util.find_spec("tokamax") is not None
  backends = [backend for backend in moe.BACKENDS if backend != "kernel" or installed]
  cases = []
  for tokens in _TOKENS[run.toy]:
    for experts in (1, *_EXPERTS[run.toy]):
      # Three products of T x D x F per token: value, gate, output.
      flops = 6 * tokens * width * hidden
      for backend in ("dense feed-forward",) if experts == 1 else backends:
        forward = _dense if experts == 1 else _routed(backend)
        for name, function, factor in (("forward", forward, 1), ("forward and backward", _with_gradient(forward), 3)):
          row = {"tokens": tokens, "experts": experts, "backend": backend, "pass": name}
          cases.append(_Case(row, function, {"bfloat16": factor * flops}, (tokens, experts)))
  return _measure(run, cases, arguments, {"width": width, "hidden": hidden, "rows": []})


def _dense(x, expert, params):
  del expert
  return moe.geglu_ffn(x, jax.tree.map(lambda leaf: leaf[0], params))


def _routed(backend):
  return lambda x, expert, params: moe.expert_ffn(x, expert, params, backend)


def _with_gradient(forward):
  """The output and the gradients of tokens and weights."""

  def run(x, expert, params):
    out, pull_back = jax.vjp(lambda x, params: forward(x, expert, params), x, params)
    return out, pull_back(out)

  return run


def measure_attention(run: inputs.Run) -> dict[str, Any]:
  """Times L2 attention, forward and with gradients, by every implementation of `ops.attention`."""
  shapes = _ATTENTION[run.toy]

  def arguments(name):
    images, queries, keys, heads, width = shapes[name]
    draw = lambda count, seed: inputs.normals(images * count * heads * width, seed).reshape(images, count, heads, width)
    return {"": tuple(draw(count, seed).astype(jnp.bfloat16) for seed, count in enumerate((queries, keys, keys)))}

  cases = []
  for name, (images, queries, keys, heads, width) in shapes.items():
    product = 2 * images * heads * queries * keys * width
    for label, attend in _implementations(_CHUNK[run.toy], queries).items():
      for kind, function, factor in (("forward", attend, 1), ("forward and backward", _gradient_of(attend), 3)):
        # Distances in float32 at the highest precision, the product with the values in bfloat16.
        flops = {"float32, highest": factor * product, "bfloat16": factor * product}
        row = {"what": name, "images": images, "implementation": label, "pass": kind}
        cases.append(_Case(row, function, flops, name))
  return _measure(run, cases, arguments, {"rows": []})


def _implementations(chunk, queries):
  """{name: function of queries, keys, values}, of all that this version has."""
  found = {"unchunked": attention.l2_attention}
  if queries > chunk:
    found["chunked"] = lambda q, k, v: attention.l2_attention(q, k, v, chunk=chunk)
  if "implementation" in inspect.signature(attention.l2_attention).parameters:
    for name in getattr(attention, "IMPLEMENTATIONS", ()):
      if name != "xla" and jax.default_backend() != "cpu":  # there the fused kernels are the first implementation
        found[name] = lambda q, k, v, name=name: attention.l2_attention(q, k, v, implementation=name)
  return found


def _gradient_of(attend):
  def run(queries, keys, values):
    out, pull_back = jax.vjp(attend, queries, keys, values)
    return out, pull_back(out)

  return run
