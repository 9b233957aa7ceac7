"""Exchange of generator weights with the released PyTorch model (github zhujiapeng/Aurora, `models/text_generator.py`).

One table, `entries`, lists every tensor of the released state dict with its place in our variables; import and export
both follow it.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop import name_map
from aurora_jax.systems.aurora import generator
from aurora_jax.systems.aurora.config import Generator
from aurora_jax.systems.aurora.released_config import config_from_released, config_to_released  # noqa: F401

_MISFIT = "the checkpoint does not fit the configuration"

# Per layout: the released array as ours, and back. Both are permutations, hence exact.
_LAYOUTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
  "same": (lambda t: t, lambda a: a),
  "dense": (lambda t: t.T, lambda a: a.T),  # [O, I] and [I, O]
  "conv1x1": (lambda t: t[:, :, 0, 0].T, lambda a: a.T[:, :, None, None]),  # [O, I, 1, 1] and [I, O]
  "filters": (lambda t: t.transpose(0, 3, 4, 2, 1), lambda a: a.transpose(0, 4, 3, 1, 2)),  # [K, O, I, h, w]
  "mtm_filter": (lambda t: t.transpose(2, 3, 1, 0)[None], lambda a: a[0].transpose(3, 2, 0, 1)),  # [O, I, h, w]
  "constant": (lambda t: t[0].transpose(1, 2, 0), lambda a: a.transpose(2, 0, 1)[None]),  # [1, C, h, w]
  "mtm_vector": (lambda t: t.reshape(-1), lambda a: a.reshape(1, -1, 1, 1)),
}


class Entry(NamedTuple):
  """One array of ours and its place in the released state dict."""

  path: tuple[str, ...]  # in our variables, from the collection on
  names: tuple[str, ...]  # released names: one per expert if `stacked`, else all names of the same tensor
  layout: str
  stacked: bool = False


def _dense(path, name, bias=True):
  yield Entry(path + ("weight",), (name + ".weight",), "dense")
  if bias:
    yield Entry(path + ("bias",), (name + ".bias",), "same")


def _norm(path, name):
  yield Entry(path + ("norm", "scale"), (name + ".weight",), "same")
  yield Entry(path + ("norm", "bias"), (name + ".bias",), "same")


def _modulated(path, name, kernels=1, deformable=False):
  yield Entry(path + ("weight",), (name + ".weight",), "filters")
  yield Entry(path + ("bias",), (name + ".bias",), "same")
  yield from _dense(path + ("style",), name + ".style")
  if kernels > 1:
    yield from _dense(path + ("mix",), name + ".filter_weight")
  if deformable:
    yield from _dense(path + ("mtm_style",), name + ".mtm_style")
    yield Entry(path + ("mtm_weight",), (name + ".mtm_weight",), "mtm_filter")
    yield Entry(path + ("mtm_bias",), (name + ".mtm_bias",), "mtm_vector")
    yield Entry(path + ("mtm_scale",), (name + ".mtm_scales",), "mtm_vector")


def _text_head(cfg):
  path = ("params", "text_head")
  if cfg.text_feature_dim != cfg.text_dim:
    yield from _dense(path + ("align",), "text_head.align_dim")
  for i in range(cfg.text_layers):
    block, name = path + (f"block_{i}",), f"text_head.transformer.res_blocks.{i}"
    yield from _dense(block + ("qkv",), name + ".attn.to_qkv")
    yield from _dense(block + ("out",), name + ".attn.to_out.0")
    for ours, theirs in (("mlp_in", "c_fc"), ("mlp_out", "c_proj")):
      for entry in _dense(block + (ours,), f"{name}.{theirs}"):
        # The released module registers these two layers twice: the same tensor under two names.
        yield entry._replace(names=entry.names + (entry.names[0].replace(f".{theirs}.", f".mlp.{theirs}."),))
    yield from _norm(block + ("norm1",), name + ".ln_1")
    yield from _norm(block + ("norm2",), name + ".ln_2")


def _input(cfg, path, name):
  if not cfg.fourier_input:
    yield Entry(("params",) + path + ("constant",), (name + ".const",), "constant")
    return
  for buffer in ("freqs", "phases", "transform"):
    yield Entry(("buffers",) + path + (buffer,), (f"{name}.{buffer}",), "same")
  yield from _dense(("params",) + path + ("affine",), name + ".affine")
  yield Entry(("params",) + path + ("mix", "weight"), (name + ".weight",), "dense")


def _attention_block(cfg, r, path, name):
  yield from _norm(path + ("norm",), name + ".norm")
  yield Entry(path + ("in", "weight"), (name + ".proj_in.weight",), "conv1x1")
  yield Entry(path + ("out", "weight"), (name + ".proj_out.weight",), "conv1x1")
  for k in range(cfg.attention_depth[r]):
    layer, inner = path + (f"layer_{k}",), f"{name}.attn_blocks.{k}"
    for i in (1, 2, 3):
      yield from _norm(layer + (f"norm{i}",), f"{inner}.norm{i}")
    yield from _dense(layer + ("self_attention", "qk"), inner + ".self_attn.to_qk", bias=False)
    yield from _dense(layer + ("self_attention", "v"), inner + ".self_attn.to_v", bias=False)
    yield from _modulated(layer + ("self_attention", "out"), inner + ".self_attn.proj_out")
    if cfg.w_token:
      yield from _dense(layer + ("w_token",), inner + ".align_dim")
    yield from _dense(layer + ("cross_attention", "q"), inner + ".cross_attn.to_q", bias=False)
    yield from _dense(layer + ("cross_attention", "kv"), inner + ".cross_attn.to_kv", bias=False)
    yield from _dense(layer + ("cross_attention", "out"), inner + ".cross_attn.proj_out.0")
    feed_forward, experts = layer + ("feed_forward",), cfg.experts[r]
    nets = [f"{inner}.ff.net"] if experts == 1 else [f"{inner}.ff.net.{e}" for e in range(experts)]
    for ours, theirs, layout in (
      ("in_weight", "0.proj.weight", "dense"),
      ("in_bias", "0.proj.bias", "same"),
      ("out_weight", "2.weight", "dense"),
      ("out_bias", "2.bias", "same"),
    ):
      yield Entry(feed_forward + (ours,), tuple(f"{net}.{theirs}" for net in nets), layout, stacked=True)
    if experts > 1:
      yield from _modulated(feed_forward + ("router",), inner + ".ff.routing")


def entries(cfg: Generator) -> Iterator[Entry]:
  """Every array of the generator with its released names, in the released order of layers."""
  yield Entry(("buffers", "w_avg"), ("w_avg",), "same")
  yield from _text_head(cfg)
  for i in range(cfg.mapping_layers):
    yield from _dense(("params", f"mapping_{i}"), f"mapping.dense{i}")
  index = 0
  for r in cfg.resolutions:
    deformable, kernels = r <= cfg.deformable_max_resolution, cfg.adaptive_kernels[r]
    for i in range(cfg.blocks[r]):
      name, path = f"synthesis.net.{index}.0", ("params", "synthesis", f"r{r}_block{i}_conv")
      if r == 4 and i == 0:
        yield from _input(cfg, ("synthesis", "input"), name)
        yield from _modulated(path, f"synthesis.net.{index}.1", kernels, deformable)
      else:
        yield from _modulated(path + ("conv1",), name + ".conv1", kernels)
        yield from _modulated(path + ("conv2",), name + ".conv2", kernels, deformable)
        if r > 4 and i == 0:
          yield Entry(path + ("skip", "weight"), (name + ".skip_connection.weight",), "conv1x1")
      index += 1
      if r in cfg.attention_depth:
        block = ("params", "synthesis", f"r{r}_block{i}_attention")
        yield from _attention_block(cfg, r, block, f"synthesis.net.{index}.0")
        index += 1
    yield from _modulated(("params", "synthesis", f"r{r}_rgb"), f"synthesis.output_res_{r}x{r}", kernels)


def fir_buffers(cfg: Generator) -> tuple[list[str], np.ndarray]:
  """The constant FIR filters of the released state dict: their names, and the value of all of them [4, 4]."""
  names, index = ["synthesis.filter"], 0
  for r in cfg.resolutions:
    if r > 4:
      names += [f"synthesis.net.{index}.0.conv1.filter", f"synthesis.net.{index}.0.skip_connection.filter"]
    index += cfg.blocks[r] * (2 if r in cfg.attention_depth else 1)
  taps = np.array([1, 3, 3, 1], np.float32) / 8
  return names, np.outer(taps, taps)


def layer_names(cfg: Generator) -> dict[str, str]:
  """{our name of a routing: released name of its module}, such as {"r8_block0_layer0": "synthesis.net.3.0..."}."""
  names = {}
  for entry in entries(cfg):
    if entry.path[-2:] == ("router", "weight"):
      block, layer = entry.path[2].removesuffix("_attention"), entry.path[3].replace("_", "")
      names[f"{block}_{layer}"] = entry.names[0].removesuffix(".routing.weight")
  return names


def import_generator(
  state_dict: Mapping[str, Any], cfg: Generator, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
  """The released weights as our variables. Arrays are read one at a time, so memory holds one copy of the model.

  Args:
    state_dict: {name: array}, anything with a shape that `np.asarray` takes, such as entries of `interop.tensor_files`.
    cfg: the configuration of the generator.
    on_progress: called with (arrays done, arrays in total).

  Returns:
    {"params": ..., "buffers": ...}, numpy float32.

  Raises:
    UserError (a ValueError): lists what is missing, left over or misshapen.
  """
  _check_names_and_shapes(state_dict, cfg)
  variables: dict[str, Any] = {}
  problems = []
  table = list(entries(cfg))
  for done, entry in enumerate(table):
    if on_progress is not None:
      on_progress(done, len(table))
    to_ours = _LAYOUTS[entry.layout][0]
    array = np.asarray(state_dict[entry.names[0]], dtype=np.float32)
    if entry.stacked:
      value = np.empty((len(entry.names), *to_ours(array).shape), np.float32)
      for expert, name in enumerate(entry.names):
        value[expert] = to_ours(np.asarray(state_dict[name], dtype=np.float32))
    else:
      if any(not np.array_equal(array, np.asarray(state_dict[name], dtype=np.float32)) for name in entry.names[1:]):
        problems.append(f"{' and '.join(entry.names)} should be the same tensor and differ")
      value = np.array(to_ours(array), order="C")  # a copy: the caller's array may change
    node = variables
    for part in entry.path[:-1]:
      node = node.setdefault(part, {})
    node[entry.path[-1]] = value
  names, taps = fir_buffers(cfg)
  problems += [
    f"{name} is not the filter [1, 3, 3, 1]"
    for name in names
    if not np.allclose(np.asarray(state_dict[name], dtype=np.float32), taps, atol=1e-6)
  ]
  if problems:
    raise UserError(f"{_MISFIT}; {name_map.shortened(problems)}")
  return variables


def released_shapes(cfg: Generator) -> dict[str, tuple[int, ...]]:
  """Shape of every array of the released state dict, {name: shape}, without allocating it."""
  return expected_shapes(cfg) | {name: (4, 4) for name in fir_buffers(cfg)[0]}


def _check_names_and_shapes(state_dict, cfg):
  """Raises UserError for a state dict of another model; reads none of its arrays."""
  name_map.check(_MISFIT, name_map.shapes(state_dict), released_shapes(cfg))


def export_generator(variables: Mapping[str, Any], cfg: Generator) -> dict[str, np.ndarray]:
  """Our variables under the released names; loads with `strict=True` in the released code.

  Args:
    variables: {"params", "buffers"} of the generator.
    cfg: its configuration.

  Returns:
    {name: contiguous float32 array}; all names of one tensor have the same array.
  """
  return dict(exported(variables, cfg))


def exported(variables: Mapping[str, Any], cfg: Generator) -> Iterator[tuple[str, np.ndarray]]:
  """The arrays of `export_generator`, one at a time: yields (name, array)."""
  for entry in entries(cfg):
    value: Any = variables
    for part in entry.path:
      value = value[part]
    value, to_torch = np.asarray(value), _LAYOUTS[entry.layout][1]
    if entry.stacked:
      for name, expert in zip(entry.names, value):
        yield name, np.array(to_torch(expert), np.float32, order="C")
    else:
      array = np.array(to_torch(value), np.float32, order="C")
      yield from ((name, array) for name in entry.names)
  names, taps = fir_buffers(cfg)
  yield from ((name, taps.copy()) for name in names)


def expected_shapes(cfg: Generator) -> dict[str, tuple[int, ...]]:
  """Shape of every released tensor except the FIR filters, {name: shape}, from the model's abstract shapes."""
  abstract = generator.abstract_variables(cfg)
  shapes = {}
  for entry in entries(cfg):
    value: Any = abstract
    for part in entry.path:
      value = value[part]
    shape = value.shape[1:] if entry.stacked else value.shape
    # A strided view of one element costs nothing, whatever its shape.
    probe = np.broadcast_to(np.float32(0), shape)
    for name in entry.names:
      shapes[name] = _LAYOUTS[entry.layout][1](probe).shape
  return shapes
