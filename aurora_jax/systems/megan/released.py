"""Exchange of weights with the released PyTorch code of MEGAN (github tuanl12/MEGAN, `model.py` and `gumbel.py`).

One table per network lists every tensor of the released state dicts with its place in our variables; import and export
both follow it. Layouts differ by permutations only, so a round trip is exact to the bit: dense kernels are [in, out],
convolutions have channels last, and the rows of the shared projection are reordered from features with channels first
to features with channels last.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.interop import name_map
from aurora_jax.interop.name_map import CONV, DENSE, SAME, Layout
from aurora_jax.systems.megan import config as config_lib
from aurora_jax.systems.megan import discriminator, generator

_GENERATOR = {"image_size": "resolution", "z_dim": "z_dim", "g_conv_dim": "channels", "num_gen": "generators"}
_DISCRIMINATOR = {"image_size": "resolution", "d_conv_dim": "channels"}
_IGNORED = {"training", "source"}  # notes that may accompany the keywords
_COUNTER = "num_batches_tracked"
_MISFIT = "the checkpoint does not fit the configuration"


# ----------------------------------------------------------------------------------------------------------------------
# Configurations


def config_from_released(kwargs: Mapping[str, Any]) -> config_lib.Generator:
  """The generator's configuration.

  Args:
    kwargs: `image_size`, `z_dim`, `g_conv_dim`, `num_gen`, as on the released command line, with its defaults;
      `d_conv_dim` is ignored.

  Raises:
    UserError: a keyword that does not exist, or a value that does not fit.
  """
  return config_lib.Generator(**_fields(kwargs, _GENERATOR))


def discriminator_config_from_released(kwargs: Mapping[str, Any]) -> config_lib.Discriminator:
  """The discriminator's configuration, from the same keywords: `image_size`, `d_conv_dim`. Raises as the
  generator's.
  """
  return config_lib.Discriminator(**_fields(kwargs, _DISCRIMINATOR))


def config_to_released(cfg: config_lib.Generator, d_cfg: config_lib.Discriminator | None = None) -> dict[str, int]:
  """The inverse of both: the released keywords of a generator and, with `d_cfg`, of its discriminator."""
  values = {name: getattr(cfg, field) for name, field in _GENERATOR.items()}
  if d_cfg is not None:
    if d_cfg.resolution != cfg.resolution:
      raise UserError(f"the generator has {cfg.resolution} pixels and the discriminator {d_cfg.resolution}")
    values["d_conv_dim"] = d_cfg.channels
  return values


def _fields(kwargs: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
  fields = {}
  for name, value in kwargs.items():
    if name not in _GENERATOR | _DISCRIMINATOR and name not in _IGNORED:
      raise UserError(f"released configuration: no keyword {name!r}")
    if name in names:
      if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"released configuration: {name} must be an integer, got {value!r}")
      fields[names[name]] = value
  return fields


# ----------------------------------------------------------------------------------------------------------------------
# The tables


_SIDE = config_lib.FEATURE_RESOLUTION
_TRANSPOSED = Layout(
  lambda t: t.transpose(0, 2, 3, 1), lambda a: a.transpose(0, 3, 1, 2)
)  # [I, O, h, w] <-> [I, h, w, O]
_FLATTENED = Layout(  # [Z, channel * row * column] <-> [row * column * channel, Z]
  lambda t: t.reshape(len(t), -1, _SIDE, _SIDE).transpose(2, 3, 1, 0).reshape(-1, len(t)),
  lambda a: a.reshape(_SIDE, _SIDE, -1, a.shape[1]).transpose(3, 2, 0, 1).reshape(a.shape[1], -1),
)


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a released state dict and its place in our variables.

  Attributes:
    file: the state dict: "G", "Gum" or "D".
    name: its name there.
    path: the keys of our leaf, the collection first.
    layout: the change of layout.
    index: the generator's index in a stacked leaf; None: the tensor is the whole leaf.
    alias: a second name of the same tensor in the same file, or "".
  """

  file: str
  name: str
  path: tuple[str, ...]
  layout: Layout = SAME
  index: int | None = None
  alias: str = ""

  @property
  def optional(self) -> bool:
    """Whether a file may lack it: PyTorch 0.3.1 did not count batches."""
    return self.name.endswith(_COUNTER)

  def leaf(self, variables: Mapping[str, Any]) -> Any:
    """Our whole leaf, or None."""
    for key in self.path:
      if not isinstance(variables, Mapping) or key not in variables:
        return None
      variables = variables[key]
    return variables


def _norm(file, name, path, **where):
  yield Entry(file, f"{name}.weight", ("params", *path, "scale"), **where)
  yield Entry(file, f"{name}.bias", ("params", *path, "bias"), **where)
  for theirs, ours in (("running_mean", "mean"), ("running_var", "var"), (_COUNTER, "count")):
    yield Entry(file, f"{name}.{theirs}", ("batch_stats", *path, ours), **where)


def _linear(file, name, path, layout, **where):
  yield Entry(file, f"{name}.weight", ("params", *path, "kernel"), layout, **where)
  yield Entry(file, f"{name}.bias", ("params", *path, "bias"), **where)


def _one_generator(cfg, index):
  last = index == cfg.generators - 1
  for position, resolution in enumerate(cfg.resolutions):
    # Both halves are sequences of (convolution, norm, activation); the first one has two of them.
    half, number = ("all_layers", position) if position < 2 else ("all_layers2", position - 2)
    path = ("generators", f"r{resolution}")
    entries = list(_linear("G", f"{half}.{index}.{3 * number}", path, _TRANSPOSED, index=index))
    if resolution != cfg.resolution:
      entries += _norm("G", f"{half}.{index}.{3 * number + 1}", (*path, "norm"), index=index)
    for entry in entries:
      # The released constructor leaves the last generator's halves in two attributes, which are saved again.
      alias = entry.name.replace(f"{half}.{index}.", "main1." if position < 2 else "main2.")
      yield dataclasses.replace(entry, alias=alias) if last else entry


def generator_entries(cfg: config_lib.Generator) -> Iterator[Entry]:
  """Every tensor of the generator's and the gate's state dicts, "G" and "Gum"."""
  for index in range(cfg.generators):
    yield from _one_generator(cfg, index)
  yield from _linear("G", "sum_linear", ("projection",), _FLATTENED)
  for i in range(2):
    yield from _linear("Gum", f"mlp.{3 * i}", ("gate", f"dense_{i}"), DENSE)
    yield from _norm("Gum", f"mlp.{3 * i + 1}", ("gate", f"norm_{i}"))
  yield from _linear("Gum", "mlp.6", ("gate", "logits"), DENSE)


def discriminator_entries(cfg: config_lib.Discriminator) -> Iterator[Entry]:
  """Every tensor of the discriminator's state dict."""
  for i in range(len(cfg.widths)):
    yield from _linear("D", f"main.{2 * i}", (f"conv_{i}",), CONV)
  yield from _linear("D", "last", ("logit",), CONV)


# ----------------------------------------------------------------------------------------------------------------------
# Exchange


def import_generator(state_dict: Mapping[str, Mapping[str, Any]], cfg: config_lib.Generator) -> dict[str, Any]:
  """The released generator and gate as our variables.

  Args:
    state_dict: {"G": ..., "Gum": ...}, each name -> array (anything with a shape that `np.asarray` takes). The second
      names of the last generator, `main1.*` and `main2.*`, must agree with its first ones. `num_batches_tracked` may be
      missing, as in files of PyTorch 0.3.1, and is 0 then.
    cfg: `config.Generator` that fits it.

  Returns:
    {"params": ..., "batch_stats": ...}, new numpy arrays: float32, and int32 for the counters of batches.

  Raises:
    UserError: lists what is missing, left over, misshapen or contradictory in either file.
  """
  return _import(state_dict, list(generator_entries(cfg)), generator.abstract_variables(cfg))


def export_generator(variables: Mapping[str, Any], cfg: config_lib.Generator) -> dict[str, dict[str, np.ndarray]]:
  """The inverse of `import_generator`; both files load with `strict=True` in the released code on today's torch.

  Args:
    variables: {"params", "batch_stats"} of `Generator(cfg)`.
    cfg: `config.Generator`.

  Returns:
    {"G": ..., "Gum": ...}: name -> contiguous float32 array, int64 for `num_batches_tracked`. Both names of one tensor
    have the same array.

  Raises:
    UserError: the variables do not fit the configuration.
  """
  return _export(variables, list(generator_entries(cfg)), generator.abstract_variables(cfg))


def import_discriminator(state_dict: Mapping[str, Any], cfg: config_lib.Discriminator) -> dict[str, Any]:
  """The released discriminator, name -> array, as our variables {"params": ...}. Raises as `import_generator` does."""
  return _import({"D": state_dict}, list(discriminator_entries(cfg)), discriminator.abstract_variables(cfg))


def export_discriminator(variables: Mapping[str, Any], cfg: config_lib.Discriminator) -> dict[str, np.ndarray]:
  """The inverse of `import_discriminator`. Raises as `export_generator` does."""
  return _export(variables, list(discriminator_entries(cfg)), discriminator.abstract_variables(cfg))["D"]


def _import(files, entries, abstract):
  _check_names_and_shapes(files, entries, abstract)
  variables, problems = {}, []
  for entry in entries:
    state_dict, leaf = files[entry.file], entry.leaf(abstract)
    node = variables
    for key in entry.path[:-1]:
      node = node.setdefault(key, {})
    ours = node.setdefault(entry.path[-1], np.zeros(leaf.shape, leaf.dtype))
    name = f"{entry.file} {entry.name}"
    if entry.name in state_dict:
      array = np.asarray(state_dict[entry.name])
      if entry.optional and not 0 <= int(array) <= np.iinfo(leaf.dtype).max:
        problems.append(f"{name} is {int(array)}")
        continue
      ours[... if entry.index is None else entry.index] = entry.layout.to_ours(array.astype(leaf.dtype))
      if entry.alias in state_dict and not np.array_equal(array, np.asarray(state_dict[entry.alias]), equal_nan=True):
        problems.append(f"{name} and {entry.alias} should be the same tensor and differ")
    elif entry.alias in state_dict:
      problems.append(f"{name} is missing and {entry.alias} is there")
  if problems:
    raise UserError(f"{_MISFIT}; {name_map.shortened(problems)}")
  return variables


def _check_names_and_shapes(files, entries, abstract):
  """Raises UserError for state dicts of another model; reads none of their arrays."""
  expected, optional = {}, set()
  for entry in entries:
    leaf = entry.leaf(abstract)
    # A strided view of one element costs nothing, whatever its shape.
    probe = np.broadcast_to(np.float32(0), leaf.shape if entry.index is None else leaf.shape[1:])
    for name in filter(None, (entry.name, entry.alias)):
      expected[f"{entry.file} {name}"] = entry.layout.to_theirs(probe).shape
      if entry.optional:
        optional.add(f"{entry.file} {name}")
  found = {
    f"{file} {name}": array_shape
    for file, state_dict in files.items()
    for name, array_shape in name_map.shapes(state_dict).items()
  }
  name_map.check(_MISFIT, found, expected, optional=optional)


def _export(variables, entries, abstract):
  problems = {}
  for entry in entries:
    leaf, expected = entry.leaf(variables), entry.leaf(abstract).shape
    if leaf is None or np.shape(leaf) != expected:
      found = "missing" if leaf is None else np.shape(leaf)
      problems["/".join(entry.path)] = f"{'/'.join(entry.path)} is {found}, expected {expected}"
  if problems:
    raise UserError(f"the variables do not fit the configuration; {name_map.shortened(list(problems.values()))}")
  files, leaves = {}, {}
  for entry in entries:
    if entry.path not in leaves:
      leaves[entry.path] = np.asarray(entry.leaf(variables))  # once: it may come from a device
    array = leaves[entry.path] if entry.index is None else leaves[entry.path][entry.index]
    dtype = np.int64 if entry.optional else np.float32
    array = np.array(entry.layout.to_theirs(array), dtype, order="C")
    files.setdefault(entry.file, {})[entry.name] = array
    if entry.alias:
      files[entry.file][entry.alias] = array
  return files
